"""Folders of Hugging Face: what is read, what is refused, what a configuration can say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier.errors import DataError, EspalierError, ExportError

pytest.importorskip("transformers")

import transformers

from espalier.compress.language.anatomy import KINDS
from espalier.compress.language.files.folder import (
    expressible,
    greedy,
    read_folder,
    save_folder,
    store_as,
)
from espalier.testing.language import tiny

LONG = ("llama", "gemma2", "mixtral")  # 64 tokens are compared; fewer for the others, for time
AUTO = {
    "bert": transformers.AutoModelForMaskedLM,
    "vit": transformers.AutoModelForImageClassification,
}


def _plain(path: Path, kind: str) -> Any:
    return AUTO.get(kind, transformers.AutoModelForCausalLM).from_pretrained(path).eval()


def _ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved folder, not to be written to."""
    place = tmp_path_factory.mktemp("folders") / "llama"
    save_folder(tiny("llama", context=16), place)
    return place


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_plain_transformers_loads_what_is_saved(kind: str, tmp_path: Path) -> None:
    model = tiny(kind, context=96 if kind in LONG else 32)
    saved = save_folder(model, tmp_path / kind)
    assert saved.difference < 1e-6
    assert saved.config == {}
    assert saved.bytes == sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    loaded, again = _plain(tmp_path / kind, kind), read_folder(tmp_path / kind)
    assert (again.kind, again.stored, again.bytes_on_disk) == (kind, torch.float32, saved.bytes)
    assert again.tokenizer() is None
    if kind == "vit":
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            wanted = model(images).logits
            assert torch.equal(loaded(images).logits, wanted)
            assert torch.equal(again.model()(images).logits, wanted)
        return
    ids = _ids()
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(loaded(ids).logits, wanted)
        assert torch.equal(again.model()(ids).logits, wanted)
    assert saved.tokens == (0 if kind == "bert" else 64 if kind in LONG else 24)
    if kind in LONG:  # transformers' own generation says what greedy() says
        own = loaded.generate(ids[:1], max_new_tokens=20, do_sample=False)
        assert torch.equal(own[:, 7:], greedy(model, ids[:1], 20))


def _narrow(kind: str, heads: int, groups: int, width: int) -> Any:
    """A tiny model whose modules are of another model's sizes, its configuration not told."""
    model = tiny(kind, context=32)
    sizes = {"heads": heads, "groups": groups, "width": width}
    scale = {"query_pre_attn_scalar": 8} if kind == "gemma2" else {}
    smaller = tiny(kind, **sizes, context=32, head_dim=8, **scale)
    other = smaller.config
    for name, part in smaller.named_children():
        setattr(model, name, part)
    for module in smaller.modules():  # as after surgery: one configuration, that of the original
        if hasattr(module, "config"):
            module.config = model.config
    model.config._attn_implementation = other._attn_implementation
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "qwen3_moe"])
def test_smaller_heads_and_widths_are_said_by_the_configuration(kind: str, tmp_path: Path) -> None:
    model = _narrow(kind, heads=2, groups=1, width=40)
    assert model.config.num_attention_heads == 4
    saved = save_folder(model, tmp_path / kind)
    assert saved.config["num_attention_heads"] == (4, 2)
    assert saved.config["num_key_value_heads"] == (2, 1)
    loaded = _plain(tmp_path / kind, kind)
    assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    with torch.no_grad():
        assert torch.equal(loaded(_ids()).logits, model(_ids()).logits)


def test_experts_are_said_by_the_configuration(tmp_path: Path) -> None:
    model = tiny("mixtral", context=32)
    for layer in model.model.layers:  # three of four experts, one active
        mlp = layer.mlp
        for stack, name in ((mlp.experts, "gate_up_proj"), (mlp.experts, "down_proj")):
            setattr(stack, name, nn.Parameter(getattr(stack, name)[:3]))
        mlp.gate.weight = nn.Parameter(mlp.gate.weight[:3])
        mlp.gate.top_k = mlp.top_k = 1
        mlp.gate.num_experts = mlp.experts.num_experts = 3
    saved = save_folder(model, tmp_path / "few")
    assert saved.config == {"num_local_experts": (4, 3), "num_experts_per_tok": (2, 1)}
    assert _plain(tmp_path / "few", "mixtral").model.layers[0].mlp.gate.top_k == 1


def test_a_layer_that_adds_nothing_is_left_out(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    model = tiny("gemma2", layers=3, context=32, layer_types=types)

    class Nothing(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
            return torch.zeros_like(hidden_states), None

    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    block = model.model.layers[1]
    block.self_attn, block.mlp = Nothing(), Zero()
    model.model.layers[2].self_attn.layer_idx = 1
    assert expressible(model) is None
    saved = save_folder(model, tmp_path / "two")
    assert saved.config["num_hidden_layers"] == (3, 2)
    assert saved.config["layer_types"] == (types, types[::2])
    assert len(model.model.layers) == 3
    assert model.config.num_hidden_layers == 3
    with torch.no_grad():
        wanted = model(_ids()).logits
        assert torch.allclose(_plain(tmp_path / "two", "gemma2")(_ids()).logits, wanted, atol=1e-5)


def test_what_a_configuration_cannot_say(tmp_path: Path) -> None:
    model = tiny("llama", layers=3)
    assert expressible(model) is None
    for i, width in ((1, 40), (2, 32)):
        mlp = model.model.layers[i].mlp
        mlp.up_proj, mlp.gate_proj = (nn.Linear(32, width, bias=False) for _ in range(2))
        mlp.down_proj = nn.Linear(width, 32, bias=False)
    reason = "layers differ in feed-forward width: 3 shapes (48, 40, 32)"
    assert expressible(model) == reason
    with pytest.raises(ExportError, match="grouped") as error:
        save_folder(model, tmp_path / "no")
    assert reason in str(error.value)
    assert not (tmp_path / "no").exists()
    model = tiny("llama")
    model.model.layers[1].mlp = nn.Identity()
    assert expressible(model) == "model.layers.1 has no feed-forward, the others have"
    model = tiny("qwen3")
    model.model.layers[0].self_attn.scaling = 0.5
    assert "model.layers.0.self_attn.scaling" in str(expressible(model))
    model = tiny("olmoe")  # whose norm of queries spans all heads
    model.model.layers[0].self_attn.q_norm.weight = nn.Parameter(torch.ones(30))
    assert "q_norm.weight (32,), the model has it (30,)" in str(expressible(model))
    model = tiny("gpt2")
    model.transformer.h[1].mlp.extra = nn.Linear(2, 2)
    assert "absent" in str(expressible(model))


def test_heads_of_gpt2_share_its_width() -> None:
    model = tiny("gpt2", layers=1)
    attention = model.transformer.h[0].attn
    attention.c_attn.weight = nn.Parameter(attention.c_attn.weight[:, :72])  # three heads of 8
    assert "splits its width of 32 among its heads" in str(expressible(model))


def test_a_folder_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    model = tiny("llama", layers=1)
    model.model.norm.register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(ExportError, match="logits differ by"):
        save_folder(model, tmp_path / "no")
    assert not list((tmp_path / "no").glob("*.json"))


def test_half_precision_and_the_type_asked_for(tmp_path: Path) -> None:
    model = tiny("llama", layers=1)
    turns = model.model.rotary_emb.inv_freq.clone()
    store_as(model, torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, turns)  # as transformers loads it
    save_folder(model, tmp_path / "half")
    assert read_folder(tmp_path / "half").stored == torch.bfloat16
    assert read_folder(tmp_path / "half").model().dtype == torch.float32
    assert read_folder(tmp_path / "half", dtype=None).model().dtype == torch.bfloat16


def test_a_tokenizer_goes_along(llama: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "a": 1, "b": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(source)
    (source / "own.py").write_text("raise SystemExit")
    model = read_folder(source).model()
    save_folder(model, tmp_path / "out", source)
    tokenizer = read_folder(tmp_path / "out").tokenizer()
    assert tokenizer is not None
    assert tokenizer("b a c")["input_ids"] == [2, 1, 0]
    assert not (tmp_path / "out" / "own.py").exists()
    with pytest.raises(ExportError, match="folder of the original"):
        save_folder(model, source, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 2}))
    with pytest.raises(DataError, match="tokenizer has 3 tokens, the model's table 2 rows"):
        read_folder(source).tokenizer()


def _config(**fields: Any) -> Callable[[Path], Any]:
    def spoil(place: Path) -> None:
        file = place / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return spoil


def _weights(spoil: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    from safetensors.torch import load_file, save_file

    def apply(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        spoil(tensors)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})

    return apply


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder": (shutil.rmtree, r"no folder '.*copy': give a local folder with config.json"),
    "config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "json": (lambda p: (p / "config.json").write_text("{"), "is no JSON"),
    "list": (lambda p: (p / "config.json").write_text("[]"), "must hold a JSON object"),
    "code": (_config(auto_map={"AutoModel": "own.Own"}), "never run"),
    "kernels": (_config(_attn_implementation="some/kernel"), "code from elsewhere"),
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), "already .gptq."),
    "adapter": (lambda p: (p / "adapter_config.json").write_text("{}"), "merge_and_unload"),
    "kind": (_config(model_type="lama"), "unknown architecture 'lama'. Did you mean 'llama'"),
    "head": (_config(architectures=["LlamaModel"]), "give a LlamaForCausalLM"),
    "class": (_config(architectures=["pipeline"]), "has no model 'pipeline'"),
    "none": (lambda p: (p / "model.safetensors").unlink(), "has no .*safetensors: save the model"),
    "bin": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        "only pytorch_model.bin, which can run code.*save_pretrained",
    ),
    "shard": (
        lambda p: (
            (p / "model.safetensors")
            .rename(p / "model.safetensors.index.json")
            .write_text('{"weight_map": {"a": "b.x"}}')
        ),
        "that model.safetensors.index.json names are missing: b.x",
    ),
    "half": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:99]
        ),
        "no whole safetensors file",
    ),
    "missing": (_weights(lambda t: t.pop("lm_head.weight")), "1 tensors are missing .lm_head.weig"),
    "shape": (_config(intermediate_size=40), "other shapes than config.json says.*mlp"),
    "nan": (_weights(lambda t: t["lm_head.weight"].fill_(torch.nan)), "lm_head.weight holds NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_in_one_line(case: str, broken: Path) -> None:
    spoil, text = BAD[case]
    spoil(broken)
    with pytest.raises(EspalierError, match=text) as error:
        read_folder(broken).model()
    assert "\n" not in str(error.value)


def test_an_empty_block_of_an_encoder_is_left_out(tmp_path: Path) -> None:
    from espalier.compress.language.shape.surgery import drop, empty_blocks

    model = tiny("bert", layers=3)
    drop(model, 1, "attention")
    drop(model, 1, "feed")  # the norms behind the sums stay and act
    assert "has no attention" in str(expressible(model))
    empty_blocks(model, [1])
    saved = save_folder(model, tmp_path / "two")
    assert saved.config["num_hidden_layers"] == (3, 2)
    with torch.no_grad():
        assert torch.equal(_plain(tmp_path / "two", "bert")(_ids()).logits, model(_ids()).logits)
