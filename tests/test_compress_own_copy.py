"""Models as users hold them: with weights made at every pass, kept values, compiled, scripted."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from espalier.compress import Bits, Pretrained, Sparsity, Widths
from espalier.costs import count
from espalier.errors import EspalierError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(first: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    tail = (nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(first, *tail)


def weighed(kind: str) -> nn.Module:
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 8, 3)
    with warnings.catch_warnings(action="ignore"):  # some are old, and still in use
        if kind == "weight norm":
            return nn.utils.weight_norm(conv)
        if kind == "spectral norm":
            return nn.utils.spectral_norm(conv)
    if kind == "mask":
        return prune.l1_unstructured(conv, "weight", 0.5)
    parametrised = {
        "weight": parametrizations.weight_norm,
        "spectral": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }
    return parametrised[kind](conv)


KINDS = ("weight norm", "spectral norm", "mask", "weight", "spectral", "orthogonal")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_made_at_every_pass_are_cut_as_weights(kind: str) -> None:
    model = network(weighed(kind))
    model(X)  # leaves weights with a history, as after a training
    model.eval()
    with torch.no_grad():
        wanted = model(X)
    cuts = (Widths(multiple=1), Sparsity(shares=(0.25,), patterns=()), Bits((2,)))
    family = Pretrained(model, X, cuts, calibration=X)
    with torch.no_grad():
        whole = family.build(family.original)
        assert torch.allclose(whole(X), wanted, atol=1e-5)
        assert type(whole[0]) is nn.Conv2d
        assert "weight" in whole[0]._parameters
        sparse = family.build({**family.original, "sparsity:0": 0.25})
        assert (sparse[0].weight == 0).float().mean() >= 0.75
        for change in ({"sparsity:0": 0.25}, {"bits:0": 2}, {"width:0": 4}):
            small = family.build({**family.original, **change})
            assert not torch.allclose(small(X), wanted, atol=1e-6)
    assert count(family.build({**family.original, "width:0": 4}), X[:1]).params < count(whole, X[:1]).params  # fmt: skip
    with torch.no_grad():  # the user's own is as it was
        assert torch.equal(model(X), wanted)


def test_kept_values_are_no_hindrance() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(nn.Conv2d(3, 8, 3))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.body[:2](x)
            self.seen = [self.features]
            return self.body[2:](self.features)

    model = Keeps()
    model(X)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    assert Pretrained(model, X, (Widths(multiple=1),)).space.names
    assert model.features.requires_grad


def test_a_layer_with_a_product_of_its_own_keeps_its_floats() -> None:
    class Causal(nn.Conv1d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(nn.functional.pad(x, (2, 0)), weight, bias)

    model = nn.Sequential(Causal(3, 8, 3), nn.Flatten(), nn.Linear(80, 5))
    family = Pretrained(model, torch.randn(2, 3, 10), (Bits(),))
    assert family.space.names == ("bits:2",)
    assert any(i.layer == "0" and "Causal" in i.reason for i in family.ignored)


def test_a_compiled_model_is_the_one_that_was_compiled() -> None:
    model = network(nn.Conv2d(3, 8, 3))
    model[0].compile()
    family = Pretrained(torch.compile(model), X, (Widths(multiple=1),))
    assert "width:0" in family.space.names
    assert all(m._compiled_call_impl is None for m in family.model.modules())
    assert model[0]._compiled_call_impl is not None


def test_what_is_no_model_or_no_example_is_refused_in_a_line() -> None:
    model = network(nn.Conv2d(3, 8, 3)).eval()
    for wrong, told in (
        (model.state_dict(), "torch module"),
        ("model.pt", "torch module"),
        (torch.jit.trace(model, X), "scripted"),
        (nn.Sequential(nn.Linear(2, 2, device="meta")), "can't be copied"),
    ):
        with pytest.raises(EspalierError, match=told):
            Pretrained(wrong, X)
    for wrong in ((X,), {"x": X}, X.numpy()):
        with pytest.raises(EspalierError, match="an example is a tensor"):
            Pretrained(model, wrong)
        with pytest.raises(EspalierError, match="calibration data is a tensor"):
            Pretrained(model, X, calibration=wrong)
    with pytest.raises(EspalierError, match="an example is a tensor"):
        Pretrained(model, torch.tensor(1.0))
    with pytest.raises(EspalierError, match="cuts are such as"):
        Pretrained(model, X, ("width",))
    assert Pretrained(model, X, Widths(multiple=1)).space.names == ("width:0", "width:2")
