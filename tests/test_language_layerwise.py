"""Models that go through memory layer by layer: the same numbers, changed layers, kept limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from espalier.errors import DataError, EspalierError, ExportError

pytest.importorskip("transformers")

import transformers

from espalier.compress.language.anatomy import KINDS, anatomy
from espalier.compress.language.files.folder import read_folder
from espalier.compress.language.layer_by_layer.held import Held, Peak, release
from espalier.compress.language.layer_by_layer.layerwise import Inputs, Layerwise
from espalier.testing.language import tiny

PLENTY = 64 << 30


def _windows(kind: str, count: int = 3, length: int = 20) -> torch.Tensor:
    draw = torch.Generator().manual_seed(4)
    if kind == "vit":
        return torch.rand(count, 3, 16, 16, generator=draw)
    return torch.randint(64, (count, length), generator=draw)


def _loss(model: Any, windows: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(windows).logits
    wanted = windows[:, 1:].flatten()
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted))


def _shrunk(i: int, layer: nn.Module, inputs: Inputs) -> None:
    """A change that depends on what stands before the layer."""
    size = float(torch.stack([chunk.norm() for chunk in inputs]).mean())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5 + 0.3 / (1 + size))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_pass_and_a_changed_folder_equal_the_whole_model(kind: str, tmp_path: Path) -> None:
    model, windows = tiny(kind, layers=2), _windows(kind)
    model.save_pretrained(tmp_path / "in")
    own = anatomy(model)
    states: list[torch.Tensor] = []
    for layer in own.layers:
        model.get_submodule(layer.path).register_forward_pre_hook(
            lambda _m, args: states.append(args[0].clone())
        )
    model(windows)
    seen: list[torch.Tensor] = []

    def visit(i: int, layer: nn.Module, inputs: Inputs) -> None:
        seen.append(torch.cat(list(inputs)))
        _shrunk(i, layer, inputs)

    through = Layerwise(read_folder(tmp_path / "in"), PLENTY, batch=2)
    passed = through.run(windows, visit, out=tmp_path / "out")
    assert torch.allclose(seen[0], states[0], atol=1e-5)
    assert not torch.allclose(seen[1], states[1], atol=1e-2)  # the first layer was changed by then
    # by hand: the model with the same changes, each made when the ones before it are made
    for i, layer in enumerate(own.layers):
        states.clear()
        model(windows)
        chunks = Held()
        for j, chunk in enumerate(torch.split(states[i].detach(), 2)):
            chunks[j] = chunk
        _shrunk(i, model.get_submodule(layer.path), Inputs(chunks, [], None))
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(windows).logits, model(windows).logits, atol=1e-4)
    if own.decoder:
        assert passed.loss == pytest.approx(_loss(model, windows), abs=1e-4)
    else:
        assert passed.loss is None


def test_changed_shapes_are_said_by_the_configuration(tmp_path: Path) -> None:
    from espalier.compress.language.shape.surgery import keep_units

    tiny("mistral", layers=3).save_pretrained(tmp_path / "in")
    windows = _windows("mistral")
    through = Layerwise(read_folder(tmp_path / "in"), PLENTY)
    through.run(
        windows,
        lambda i, layer, inputs: keep_units(inputs.model, 0, range(0, 48, 2)),
        out=tmp_path / "out",
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.intermediate_size == 24
    whole = tiny("mistral", layers=3)
    for i in range(3):
        keep_units(whole, i, range(0, 48, 2))
    with torch.no_grad():
        assert torch.allclose(loaded(windows).logits, whole(windows).logits, atol=1e-5)

    def uneven(i: int, layer: nn.Module, inputs: Inputs) -> None:
        keep_units(inputs.model, 0, range(24 + i))

    with pytest.raises(ExportError, match="layers differ in feed-forward width: 3 shapes"):
        Layerwise(read_folder(tmp_path / "in"), PLENTY).run(windows, uneven, out=tmp_path / "no")
    assert not list((tmp_path / "no").glob("*.json"))
    with pytest.raises(ExportError, match="the folder that is read"):
        through.run(windows, out=tmp_path / "in")


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "olmoe"])
def test_narrower_layers_and_fewer(kind: str, tmp_path: Path) -> None:
    """One layer is left out, the others lose half; what stays takes over."""
    from espalier.compress.language.layer_by_layer.narrow import narrow_room, narrowed
    from espalier.compress.language.shape.surgery import drop_blocks, keep_units

    model, windows = tiny(kind, layers=3), _windows(kind, 8)
    model.save_pretrained(tmp_path / "in")
    through = Layerwise(read_folder(tmp_path / "in"), PLENTY, batch=4)
    room = max(narrow_room(layer) for layer in through.pieces.own.layers)
    passed = through.run(windows, narrowed(0.5), out=tmp_path / "out", skip=[1], room=room)
    loaded = read_folder(tmp_path / "out").model()
    assert passed.influence[1] == 0 < min(passed.influence[0], passed.influence[2])
    assert [layer.feed.width for layer in anatomy(loaded).layers] == [24, 24]
    # what is left is nearer to the original than units taken out as they come
    drop_blocks(model, [1])
    with torch.no_grad():
        wanted = model(windows).logits
        for layer in range(2):
            keep_units(model, layer, range(24))
        naive = (model(windows).logits - wanted).square().mean()
        assert (loaded(windows).logits - wanted).square().mean() < 0.7 * naive
    through.run(windows, out=tmp_path / "again")  # the first pass left nothing behind
    assert len(anatomy(read_folder(tmp_path / "again").model()).layers) == 3
    with pytest.raises(EspalierError, match="numbers from 0 to 2, got 3"):
        through.run(windows, skip=[3])
    with pytest.raises(EspalierError, match="share of units is above 0 and up to 1, got 0"):
        narrowed(0)


def test_fewer_heads_are_written(tmp_path: Path) -> None:
    from espalier.compress.language.layer_by_layer.narrow import narrowed

    model, windows = tiny("qwen3"), _windows("qwen3", 8)
    model.save_pretrained(tmp_path / "in")
    through = Layerwise(read_folder(tmp_path / "in"), PLENTY, batch=4)
    first = through.run(windows, keep=True)
    passed = through.run(windows, narrowed(groups=0.5), out=tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.num_key_value_heads == 1
    assert passed.loss == pytest.approx(_loss(loaded, windows), abs=1e-4)
    # block influence of the whole model, by hand
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    turn = 1 - nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert first.influence[0] == pytest.approx(float(turn), abs=1e-5)


def test_stored_type_is_kept_and_what_goes_on_is_what_is_written(tmp_path: Path) -> None:
    tiny("llama", layers=2).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    windows = _windows("llama")
    passed = Layerwise(read_folder(tmp_path / "in"), PLENTY).run(
        windows, _shrunk, out=tmp_path / "out"
    )
    again = read_folder(tmp_path / "out")
    assert again.stored == torch.bfloat16
    assert passed.loss == pytest.approx(_loss(again.model(), windows), abs=1e-5)


def _unprefixed(name: str) -> str:
    return name.removeprefix("transformer.")


def _gamma(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")


def _encoder(name: str) -> str:
    for new, old in (
        ("vit.layers", "vit.encoder.layer"),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize(
    ("kind", "old"), [("gpt2", _unprefixed), ("bert", _gamma), ("vit", _encoder)]
)
def test_names_that_older_folders_have(
    kind: str, old: Callable[[str], str], tmp_path: Path
) -> None:
    model, windows = tiny(kind), _windows(kind)
    model.save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    state = {old(name): tensor for name, tensor in load_file(file).items()}
    state["h.0.attn.bias" if kind == "gpt2" else "bert.pooler.dense.bias"] = torch.ones(32)
    assert state.keys() & load_file(file).keys() != state.keys()
    save_file(state, file, metadata={"format": "pt"})
    folder = read_folder(tmp_path / "in")
    Layerwise(folder, PLENTY).run(windows, out=tmp_path / "out")
    with torch.no_grad():
        wanted = model(windows).logits
        assert torch.equal(folder.model()(windows).logits, wanted)
        assert torch.equal(type(model).from_pretrained(tmp_path / "out")(windows).logits, wanted)


def _large(place: Path, layers: int, width: int) -> int:
    """Write a Llama of random weights, a file a layer, without ever holding it whole: its bytes."""
    place.mkdir()
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(place)
    draw, where, total = torch.Generator().manual_seed(0), {}, 0
    shapes = {f"self_attn.{n}_proj": (width, width) for n in "qo"}
    shapes |= {f"self_attn.{n}_proj": (width // 2, width) for n in "kv"}
    shapes |= {f"mlp.{n}_proj": (2 * width, width) for n in ("up", "gate")}
    shapes |= {"mlp.down_proj": (width, 2 * width)}
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    rest = {"model.embed_tokens": (64, width), "model.norm": (width,), "lm_head": (64, width)}
    drawn = {n: torch.empty(s).uniform_(-0.06, 0.06, generator=draw) for n, s in shapes.items()}
    for i in range(layers + 1):
        if i < layers:
            part = {f"model.layers.{i}.{n}.weight": t * (1 + i / 64) for n, t in drawn.items()}
        else:
            part = {
                f"{n}.weight": torch.empty(s).uniform_(-0.06, 0.06, generator=draw)
                for n, s in rest.items()
            }
        save_file(part, place / f"part-{i}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(part, f"part-{i}.safetensors")
        total += sum(tensor.nbytes for tensor in part.values())
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return total


def test_a_limit_of_memory_is_kept(tmp_path: Path) -> None:
    """A model of 101 MB goes through what is less than half of it, measured by the system."""
    size = _large(tmp_path / "in", layers=12, width=512)
    assert size > 100e6
    windows = _windows("llama", 4)
    folder = read_folder(tmp_path / "in")
    Layerwise(folder, PLENTY).pieces.layer(0)  # whatever is loaded once is loaded
    release(PLENTY)
    held = psutil.Process().memory_info().rss
    limit = held + int(0.45 * size)
    passed = Layerwise(folder, limit, batch=4).run(windows)
    assert held < passed.peak <= limit
    assert passed.peak <= passed.needed <= limit
    with Peak() as peak:  # the whole model does not go through it
        model = folder.model()
        loss = _loss(model, windows)
        assert peak.most() > limit
    assert passed.loss == pytest.approx(loss, abs=1e-4)
    del model
    release(PLENTY)
    held = psutil.Process().memory_info().rss
    with pytest.raises(EspalierError, match=r"limit of \d+ MB can't be kept: layer 0 takes \d+ MB"):
        Layerwise(folder, held + (4 << 20)).run(windows)
    hoard: list[torch.Tensor] = []

    def greedy(i: int, layer: nn.Module, inputs: Inputs) -> None:
        hoard.append(torch.ones(limit // 40))

    with pytest.raises(EspalierError, match=r"was passed at layer \d+.*say what the visit takes"):
        Layerwise(folder, held + int(0.45 * size)).run(windows, greedy)


def test_hidden_states_that_do_not_fit_go_to_disk(tmp_path: Path) -> None:
    tiny("llama", layers=2).save_pretrained(tmp_path / "in")
    windows = _windows("llama", 5)
    through = Layerwise(read_folder(tmp_path / "in"), PLENTY, scratch=tmp_path, batch=2)
    first = through.run(windows)
    needs = max(through.needs(windows).values())
    seen: list[list[str]] = []

    def visit(i: int, layer: nn.Module, inputs: Inputs) -> None:
        seen.append(sorted(file.name for file in tmp_path.rglob("hidden-*")))

    for states, spilled in ((5 * 20 * 32 * 4, False), (5 * 20 * 32 * 4 - 1, True)):
        seen.clear()
        through._plan = lambda *_, s=spilled: (0, s)  # type: ignore[method-assign]
        assert through.run(windows, visit).loss == first.loss
        names = [f"hidden-{i:06d}.safetensors" for i in range(3)] if spilled else []
        assert seen == [names, names]
        del through._plan
        through.memory = 10**9 + needs + states
        assert through._plan(windows, 0, 10**9)[1] is spilled
        through.memory = PLENTY
    assert not list(tmp_path.rglob("hidden-*"))


def test_what_can_not_go_through_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", layers=2)
    model.save_pretrained(tmp_path / "in")
    folder = read_folder(tmp_path / "in")
    with pytest.raises(EspalierError, match="memory and batch must be above 0, got 0 and 1"):
        Layerwise(folder, 0)
    through = Layerwise(folder, PLENTY)
    for windows, text in (
        (torch.full((1, 4), 64), r"ids must be within 0..63, got 64..64"),
        (torch.rand(1, 4), "windows must be ids"),
        (torch.zeros(1, 65, dtype=torch.long), "windows of 65 tokens: the model takes 64"),
    ):
        with pytest.raises(DataError, match=text):
            through.run(windows)
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"3 tensors are missing .model.layers.\d.mlp"):
        Layerwise(folder, PLENTY).run(_windows("llama"))
    state = {k: v for k, v in state.items() if "layers.1." not in k}
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="no tensors of layer 1 of 2"):
        Layerwise(folder, PLENTY)
