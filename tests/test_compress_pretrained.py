"""A trained model as a family: what it builds, what its pieces add up to, what it refuses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from compress_toys import IMAGES, TOKENS, Language, Narrow, ViT, dense, resnet
from espalier.compress import Depth, Pretrained, Sparsity, Widths
from espalier.compress.attention import Attention as CutAttention
from espalier.compress.attention_graph import as_graph
from espalier.compress.calls import follow
from espalier.compress.sparsity import StoredBytes, mask, stored_bytes
from espalier.costs import Counts, count
from espalier.costs.pieces import pieces_of
from espalier.errors import EspalierError, SpaceError
from espalier.export import to_onnx
from espalier.testing import check_cost, check_family
from espalier.testing.family import check_plain, sampled

MODELS = {
    "resnet": (resnet, IMAGES, (Depth(), Narrow(), Sparsity())),
    "vit": (ViT, IMAGES, (Depth(),)),
    "language": (Language, TOKENS, (Depth(), Sparsity(shares=(0.25,)))),
    "dense": (dense, IMAGES, (Depth(),)),
}


def family_of(name: str) -> Pretrained:
    make, example, cuts = MODELS[name]
    torch.manual_seed(0)
    return Pretrained(make(), example, cuts)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_passes_the_conformance_of_families(name):
    family = family_of(name)
    check_family(family)
    # pieces are looked up, not whole networks built
    assert type(pieces_of(family)).__name__ == "_Units"


def test_any_mix_of_cuts_is_one_candidate():
    family = family_of("resnet")
    kinds = {name.partition(":")[0] for name in family.space.names}
    assert kinds == {"width", "depth", "sparsity"}
    assert all(family.original[d.name] == d.options[-1] for d in family.space.decisions)
    choice = {**family.original, "width:4.conv1": 2, "depth:6": 0, "sparsity:4.conv2": "2:4"}
    candidate = family.space.decode(family.space.encode([_active(family, choice)]))[0]
    network = family.build(candidate)
    assert network[4].conv1.out_channels == network[4].conv2.in_channels == 2
    assert type(network[6]) is nn.Identity
    # the mask was taken of what the widths left
    expected = family.model[4].conv2.weight[:, :2]
    assert torch.equal(network[4].conv2.weight, expected)  # 2 of every 2 inputs
    wide = family.build(_active(family, {**choice, "width:4.conv1": 4}))[4].conv2.weight
    assert int((wide != 0).sum()) == wide.numel() // 2


def _active(family: Pretrained, choice: dict) -> dict:
    """Only the options of decisions that are active."""
    parents = {d.name: d.when for d in family.space.decisions}
    return {
        n: o
        for n, o in choice.items()
        if all(choice[p] in allowed for p, allowed in parents[n].items())
    }


def test_decisions_inside_a_block_hang_on_the_block():
    space = family_of("resnet").space
    assert dict(space["width:4.conv1"].when) == {"depth:4": (1,)}
    assert dict(space["sparsity:5.conv2"].when) == {"depth:5": (1,)}
    assert not space["sparsity:5.down.0"].when


def test_pieces_know_tied_weights_and_weights_of_no_layer():
    language, vit = family_of("language"), family_of("vit")
    units = {u.name: language.unit(u.name, language.original) for u in language.units()}
    assert not list(units["head"][0].parameters())  # the embedding counts them
    held = vit.unit("network", vit.original)
    assert {n for n, _ in held[0].named_parameters()} == {"cls", "pos"}
    kinds = [u.name for u in vit.units()]
    assert "layers.0.attn" in kinds  # its products are of no layer: it is one piece
    assert "layers.0.attn.qkv" not in kinds


def test_a_model_is_built_once_a_width_to_tell_its_pieces(monkeypatch):
    torch.manual_seed(0)
    family = Pretrained(ViT(), IMAGES)
    built, cut = [], family._cut
    monkeypatch.setattr(family, "_cut", lambda *given: built.append(given[0]) or cut(*given))
    family.units()
    widths = [name for name in family.space.names if name.startswith("width:")]
    assert [list(choices) for choices in built] == [[name] for name in widths]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_peak_of_activations_knows_what_is_alive_beside_a_piece(name):
    family = family_of(name)
    rows = np.concatenate(
        [family.space.corner(True), family.space.sample(4, np.random.default_rng(0))]
    )
    got = Counts(family).estimate_codes(rows)["activation_bytes"]
    built = [family.build(c) for c in family.space.decode(rows)]
    assert got.tolist() == [count(n, family.example()).activation_bytes for n in built]


def test_widths_and_depth_of_a_network_whose_code_names_its_width():
    torch.manual_seed(0)
    family = Pretrained(ViT(), IMAGES)  # the cuts by default
    kinds = {name.partition(":")[0] for name in family.space.names}
    assert kinds == {"width", "depth"}
    check_family(family)


def test_pieces_run_alone_in_onnx_runtime():
    family = family_of("language")  # whole numbers in, keywords, a tuple out
    runtime = esp.costs.OnnxRuntime(seconds=0.001, precision=1)
    for unit in family.units():
        module, shape = family.unit(unit.name, family.original)
        x = TOKENS[:1] if shape == (5,) else torch.randn(1, *shape)
        assert runtime.quick(to_onnx(module, x, fast=True), x).median_ms > 0


class Encoder(nn.Module):
    """torch's own encoder layer, that looks into its attention; masks by name and by place."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.5, batch_first=True)
        self.again = nn.MultiheadAttention(16, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        x = self.layer(self.inputs(x), src_mask=mask).transpose(0, 1)
        out: Tensor = self.head(self.again(x, x, x, None, True, mask)[0].mean(0))
        return out


def test_torchs_attention_with_fewer_heads_or_none_is_plain():
    torch.manual_seed(0)
    family = Pretrained(Encoder(), torch.randn(2, 5, 6))
    x = torch.randn(3, 5, 6)
    for name in ("width:layer.self_attn", "width:again", "depth:layer.self_attn"):
        first = family.space[name].options[0]
        candidate = _active(family, {**family.original, name: first})
        network = copy.deepcopy(family.build(candidate))
        check_plain(network)
        with torch.no_grad():  # twice: dropout does nothing in evaluation
            assert torch.equal(network(x), network(x))
        assert len(to_onnx(network, x, fast=True)) > 0
    # all heads, as a graph: it computes what torch's attention does
    model = family.model
    call = next(c for c in follow(model, x).calls if c.path == "again")
    twin = copy.deepcopy(model)
    twin.again = as_graph(CutAttention(twin.again), call)
    assert torch.allclose(twin(x), model(x), atol=1e-6)


def test_it_leaves_the_users_model_alone():
    model = resnet().train()
    family = Pretrained(model, IMAGES, (Depth(),))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = family.build(family.original)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not family.model.training


def test_it_travels_between_processes():
    family = family_of("resnet")
    family.units()
    twin = pickle.loads(pickle.dumps(family))
    candidate = family.space.decode(family.space.sample(1, np.random.default_rng(0)))[0]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(twin.build(candidate)(x), family.build(candidate)(x))


def test_explain_lists_decisions_and_what_is_ignored():
    family = Pretrained(resnet(in_place=True), IMAGES, (Depth(), Sparsity(shares=())))
    rows = family.explain()
    first = rows[0]
    assert (first["decision"], first["kind"], first["original"]) == ("depth:4", "depth", 1)
    assert first["layers"] == ["4.conv1", "4.bn1", "4.conv2", "4.bn2", "4.relu"]
    sparse = next(r for r in rows if r["kind"] == "sparsity")
    assert "latency does not change" in sparse["note"]
    left = {(r["kind"], *r["layers"]): r["reason"] for r in rows if "reason" in r}
    assert "does not run" in left["depth", "5"]
    assert left["sparsity", "0"] == "1 inputs are too few for 2:4"


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "example", "says"),
    [
        (Pair(), IMAGES, "must give one tensor, Pair gives tuple"),
        (resnet(), torch.zeros(1, 3, 8, 8), "does not run on an example of shape"),
        (nn.Linear(3, 4), torch.zeros(1, 3), "nothing of 'model' can be decided"),
    ],
)
def test_what_cannot_be_read_is_one_line(model, example, says):
    with pytest.raises(EspalierError, match=says) as error:
        Pretrained(model, example, (Depth(),))
    assert "\n" not in str(error.value)


def test_other_scores_keep_other_channels_in_the_same_space():
    family = Pretrained(resnet(), IMAGES, (Widths(multiple=4), Depth()))
    scores = torch.arange(8.0)  # the last ones are the most important
    other = family.with_scores({"4.conv1": scores})
    assert other.space == family.space
    candidate = _active(family, {**family.original, "width:4.conv1": 4})
    got = other.build(candidate)[4].conv1.weight
    assert torch.equal(got, family.model[4].conv1.weight[4:])
    assert torch.equal(other.build(other.original)(IMAGES + 1), family.model(IMAGES + 1))


def test_refusals():
    family = family_of("dense")
    with pytest.raises(SpaceError):
        family.build({"depth:4": 2})
    with pytest.raises(SpaceError, match="unknown unit"):
        family.unit("nothing", family.original)
    with pytest.raises(EspalierError, match="add Widths"):
        family.with_scores({})


# --- sparsity ----------------------------------------------------------------------------------


def test_masks_keep_the_largest():
    weight = torch.tensor([[0.1, -3.0, 2.0, 0.2, 5.0, -6.0, 0.0, 7.0, 1.0, 2.5, 3.5]])
    # two of every four; of the last three, two
    assert weight[mask(weight, "2:4")].tolist() == [-3.0, 2.0, -6.0, 7.0, 2.5, 3.5]
    assert weight[mask(weight, 4 / 11)].tolist() == [5.0, -6.0, 7.0, 3.5]
    conv = torch.randn(6, 8, 3, 3)
    groups = mask(conv, "1:4").reshape(6, 2, 4, 3, 3).sum(2)
    assert torch.equal(groups, torch.ones_like(groups))  # along the inputs, at each position


def test_zeros_take_no_room_where_they_are_not_stored():
    dense_weight = torch.ones(4, 8)
    assert stored_bytes(dense_weight) == 4 * 32
    assert stored_bytes(dense_weight * mask(dense_weight, "2:4")) == 4 * 16 + 16 // 4
    one = torch.zeros(4, 8).index_fill(1, torch.tensor([0, 1, 2]), 1.0)
    assert stored_bytes(one) == 4 * 12 + 32 // 8
    family = family_of("resnet")
    table = StoredBytes(family)
    check_cost(table, sampled(family, 0))
    candidate = _active(family, {**family.original, "sparsity:6.conv1": "2:4"})
    whole = count(family.build(family.original), family.example())
    got = table.estimate([family.space.candidate(candidate)])["stored_bytes"][0]
    assert got == whole.bytes - 16 * 16 * 9 * (2 - 1 / 8)
    assert Counts(family).estimate([family.space.candidate(candidate)])["bytes"][0] == whole.bytes


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"patterns": ("4:2",)}, "0 < N < M"),
        ({"patterns": ("half",)}, "a pattern is N:M"),
        ({"shares": (1.5,)}, "between 0 and 1"),
        ({"patterns": (), "shares": ()}, "needs patterns"),
    ],
)
def test_wrong_settings_of_sparsity(settings, says):
    with pytest.raises(EspalierError, match=says):
        Sparsity(**settings)


def test_shared_weights_are_not_made_sparse_one_by_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    family = Pretrained(model, torch.randn(2, 8), (Sparsity(patterns=()),))
    assert family.space.names == ("sparsity:0", "sparsity:3")
    told = [(row.layer, row.reason) for row in Sparsity().bind(model, torch.randn(2, 8)).ignored]
    assert told == [("2", "its weight is that of 0")]
    half = family.space.candidate({"sparsity:0": 0.5, "sparsity:3": 1.0})
    dense, saved = 4 * (8 * 8 + 8 + 8 + 8 * 4 + 4), 4 * 64 - (4 * 32 + 64 // 8)
    assert StoredBytes(family).estimate([half])["stored_bytes"].tolist() == [dense - saved]
