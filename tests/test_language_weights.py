"""Bits and sparsity of a transformer's weights: rounding, places, bytes, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from espalier.errors import EspalierError

pytest.importorskip("transformers")

from espalier.compress import removal
from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.files.folder import read_folder
from espalier.compress.language.layer_by_layer.layerwise import Layerwise
from espalier.compress.language.layer_by_layer.weights import in_layers
from espalier.compress.language.weights import rounding
from espalier.compress.language.weights.bits import WeightBits
from espalier.compress.language.weights.places import expert_inputs, grams, places
from espalier.compress.language.weights.sparse import SparseWeights, sparse_bytes
from espalier.testing.language import tiny

KINDS = ("llama", "gpt2", "opt", "qwen2_moe", "bert", "vit")


def ids(n: int = 8, t: int = 24) -> torch.Tensor:
    return torch.randint(0, 64, (n, t), generator=torch.Generator().manual_seed(0))


def layer(o: int = 12, d: int = 80, rows: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs that hang together, of different sizes."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(d, d, generator=g)
    x = torch.randn(rows, d, generator=g) @ mix * torch.linspace(0.1, 3, d).exp()
    return torch.randn(o, d, generator=g), x.double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_method_is_on_levels_and_better_than_the_one_before(bits: int) -> None:
    weight, x = layer()
    errors = []
    for method in ("nearest", "aware", "error"):
        packed = rounding.METHODS[method](weight, x.T @ x, bits, 32)
        assert packed.codes.min() >= -(2 ** (bits - 1))
        assert packed.codes.max() <= 2 ** (bits - 1) - 1
        assert packed.scales.shape == (12, 3)
        values = packed.values()
        errors.append(float((x @ (values - weight).T.double()).square().sum()))
    assert errors[1] <= errors[0]
    assert errors[2] < 0.5 * errors[0]


def test_compensation_is_the_textbook_loop_largest_inputs_first() -> None:
    weight, x = layer(d=40)
    gram = x.T @ x
    order = gram.diagonal().argsort(descending=True)
    damped = (gram + 0.01 * gram.diagonal().mean() * torch.eye(40))[order][:, order]
    w = weight.double()[:, order]
    for j in range(40):  # each time the inverse for the columns that are left, from scratch
        value = (w[:, j] * 4).round() / 4
        inverse = torch.linalg.inv(damped[j:, j:])
        w[:, j + 1 :] -= ((w[:, j] - value) / inverse[0, 0])[:, None] * inverse[0, 1:]
        w[:, j] = value
    each = torch.full_like(w, 0.25)
    for chunk in (7, 128):
        found = rounding.column_by_column(
            weight.double(), gram, lambda now, s: (now / s).round() * s, each, chunk=chunk
        )
        assert torch.allclose(found[:, order], w)


def test_many_matrices_at_once_are_each_alone() -> None:
    weight, x = layer()
    stack = torch.stack([weight, weight.flip(0) * 2])
    both = torch.stack([x.T @ x, x[:100].T @ x[:100]])
    for method in rounding.METHODS.values():
        packed = method(stack, both, 3, 32)
        for n in range(2):
            assert torch.allclose(
                packed.values()[n], method(stack[n], both[n], 3, 32).values(), atol=1e-5
            )


def test_zeros_stay_and_packing_is_found_again() -> None:
    weight, x = layer()
    weight[:, ::2] = 0.0
    packed = rounding.compensating(weight, x.T @ x, 4, 32)
    assert (packed.values()[:, ::2] == 0).all()
    again = rounding.repack(packed.values(), 4, 32)
    assert torch.allclose(again.values(), packed.values(), rtol=1e-5)
    with pytest.raises(EspalierError, match="not on 4-bit levels"):
        rounding.repack(weight, 4, 32)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_multiplied_by_onnx_runtime_as_they_are_here(bits: int) -> None:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from espalier.export.nbits import packed_codes

    weight, x = layer(d=96)
    packed = rounding.compensating(weight, x.T @ x, bits, 32)
    constants = {
        "w": packed_codes(packed.codes.numpy(), bits, 32),
        "scales": packed.scales.numpy().reshape(-1),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft",
        K=96, N=12, bits=bits, block_size=32,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [value("x", TensorProto.FLOAT, [5, 96])],
        [value("y", TensorProto.FLOAT, [5, 12])],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    inputs = x[:5].float()
    (found,) = session.run(None, {"x": inputs.numpy()})
    expected = (inputs @ packed.values().T).numpy()
    assert np.allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    size = sum(array.nbytes for array in constants.values())
    assert size == packed.bytes == rounding.packed_bytes((12, 96), bits, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_change_the_places_that_are_asked_for_and_nothing_else(kind: str) -> None:
    model = tiny(kind)
    inputs = torch.rand(4, 3, 16, 16) if kind == "vit" else ids()
    bound = WeightBits(options=(4, 8)).bind(model, inputs)
    assert all(d.options == (4, 8, 32) for d in bound.decisions)
    names = [d.name for d in bound.decisions]
    assert len(names) == len(set(names))
    asked = {names[0]: 4, names[-1]: 8}
    twin = copy.deepcopy(model)
    bound.apply(twin, {n: asked.get(n, 32) for n in names})
    touched = {p for name in asked for p in bound.places[name.partition(":")[2]].modules}
    before, after = dict(model.named_parameters()), dict(twin.named_parameters())
    for path, weight in before.items():
        inside = any(path.startswith(f"{t}.") for t in touched) and not path.endswith("bias")
        assert torch.equal(weight, after[path]) != inside, path
    packed = bound.packed(twin, asked)
    for path, form in packed.items():
        now = after[path].t() if kind == "gpt2" else after[path]
        assert torch.allclose(form.values(), now, atol=1e-5)
    counted = sum(form.bytes for form in packed.values())
    assert counted == sum(bound.bytes_of(n, b) for n, b in asked.items())
    assert type(twin) is type(model)


def test_places_are_tied_as_kernels_need_them() -> None:
    found = places(anatomy(tiny("qwen2_moe")), tables=True)
    first = [n for n in found if "layers.0" in n]
    assert [n.rpartition(".")[2] for n in first] == ["qkv", "out", "experts", "up", "down"]
    assert len(found["model.layers.0.qkv"].weights) == 3
    assert len(found["model.layers.0.up"].weights) == 2  # of the shared expert
    assert {"model.embed_tokens", "lm_head"} < set(found)
    tied = places(anatomy(tiny("llama", tie_word_embeddings=True)), tables=True)
    assert "lm_head" not in tied
    assert tied["model.embed_tokens"].module == "lm_head"


def test_a_place_sees_what_the_places_before_it_give() -> None:
    model = tiny("llama")
    windows = ids()
    names = [d.name for d in WeightBits().bind(model, windows).decisions]
    all_low = dict.fromkeys(names, 3)
    changed, original = copy.deepcopy(model), copy.deepcopy(model)
    WeightBits().bind(model, windows).apply(changed, all_low)
    kept = WeightBits(inputs="original").bind(model, windows)
    kept.apply(original, all_low)
    # the last place, rounded by hand from the inputs it has in the changed model
    down = places(anatomy(model))["model.layers.1.down"]
    gram = grams(changed, windows, [down])["model.layers.1.down"][""]
    before = down.read(model)[""].detach()
    expected = rounding.compensating(before, gram, 3, 32).values()
    assert torch.allclose(down.read(changed)[""], expected, atol=1e-6)
    gram = grams(model, windows, [down])["model.layers.1.down"][""]
    expected = rounding.compensating(before, gram, 3, 32).values()
    assert torch.allclose(down.read(original)[""], expected, atol=1e-6)
    tables = WeightBits(inputs="original", tables=True).bind(model, windows)
    tables.apply(again := copy.deepcopy(model), all_low)  # embeddings are read by no product
    for a, b in itertools.zip_longest(again.parameters(), original.parameters()):
        assert torch.equal(a, b)


def test_experts_inputs_are_those_of_their_tokens_times_the_gate() -> None:
    model = tiny("mixtral")
    mixture = model.model.layers[0].mlp
    seen: list[torch.Tensor] = []
    mixture.experts.register_forward_pre_hook(lambda module, args: seen.extend(args))
    with torch.no_grad():
        model(ids())
        hidden, index, gates = seen
        total = torch.zeros_like(hidden)
        for n in range(4):
            x = expert_inputs(mixture.experts, n, hidden, index, gates, "down_proj")
            made = functional.linear(x.float(), mixture.experts.down_proj[n])
            total[(index == n).any(-1)] += made  # the gates are in the inputs already
        assert torch.allclose(total, mixture.experts(hidden, index, gates), atol=1e-4)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(EspalierError, match="from 2 to 8, 16"):
        WeightBits(options=(9,))
    with pytest.raises(EspalierError, match="nearest"):
        WeightBits(method="neerest")
    with pytest.raises(EspalierError, match="power of 2"):
        WeightBits(block=48)
    with pytest.raises(EspalierError, match=r"model\.layers\.0\.qkv"):
        WeightBits(layers=["model.layers.0.qkw"]).bind(tiny("llama"), ids())


@pytest.mark.parametrize("method", ["apt", "wanda"])
def test_sparse_weights_are_what_the_method_gives_from_the_inputs_of_the_moment(
    method: str,
) -> None:
    model = tiny("llama")
    windows = ids()
    bound = SparseWeights(method=method).bind(model, windows)
    assert bound.decisions[0].options == ("2:4", 0.5, 1.0)
    names = [d.name for d in bound.decisions]
    sparse = copy.deepcopy(model)
    bound.apply(sparse, dict.fromkeys(names, "2:4"))
    for place in bound.places.values():
        for weights in place.weights:
            groups = weights.read(sparse).reshape(-1, 4)
            assert ((groups != 0).sum(1) == 2).all()
    out = places(anatomy(model))["model.layers.1.out"]
    gram = grams(sparse, windows, [out])["model.layers.1.out"][""]
    expected = removal.METHODS[method](out.read(model)[""].detach(), gram, "2:4")
    assert torch.allclose(out.read(sparse)[""], expected, atol=1e-6)


def test_sparse_experts_then_bits_keep_their_zeros() -> None:
    model = tiny("mixtral")
    windows = ids()
    place = "model.layers.0.experts"
    SparseWeights(layers=[place], method="sparsegpt").bind(model, windows).apply(
        model, {f"sparsity:{place}": 0.5}
    )
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    gone = stack == 0
    assert float(gone.double().mean()) == pytest.approx(0.5)
    WeightBits().bind(model, windows).apply(model, {f"bits:{place}": 4})
    assert (stack[gone] == 0).all()
    assert float((stack == 0).double().mean()) < 0.7


def test_bytes_of_sparse_weights() -> None:
    assert sparse_bytes((8, 64), "2:4") == 8 * 32 * 4 + 8 * 64 // 8
    assert sparse_bytes((8, 64), 0.25, bits=4) == 8 * 16 // 2 + 8 * 64 // 8 + 8 * 2 * 4
    assert sparse_bytes((8, 64), 1.0) == sparse_bytes((8, 64), 0.999) == 8 * 64 * 4
    odd = SparseWeights(patterns=("2:5",), shares=()).bind(tiny("llama"), ids())
    assert not odd.decisions
    assert "whole groups of 2:5" in odd.ignored[0].reason


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_layer_by_layer_is_what_the_whole_model_gets(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / "in")
    windows = ids()
    last = "model.layers.1.out"
    cut = WeightBits(options=(3,))
    choices = {d.name: 3 for d in cut.bind(model, windows).decisions if not d.name.endswith(last)}
    through = Layerwise(read_folder(tmp_path / "in"), 1 << 40, batch=4)
    through.run(windows, in_layers(cut, choices), out=tmp_path / "out")
    made = read_folder(tmp_path / "out").model()
    cut.bind(model, windows).apply(model, choices)
    for (name, ours), theirs in zip(model.named_parameters(), made.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name
