"""Shrinking without ever having the model in memory: what is written, measured and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from espalier.errors import BudgetError, EspalierError

pytest.importorskip("transformers")

import transformers

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.files.folder import read_folder
from espalier.compress.language.layer_by_layer.layerwise import Layerwise
from espalier.compress.language.layer_by_layer.narrow import Harms
from espalier.flows.language.fit_in_layers import fits, group_shares, layer_bytes, outside
from espalier.flows.language.shrink_in_layers import RECORD, shrink_in_layers
from espalier.testing.language import tiny

PLENTY = 64 << 30
TEXT = bytes(range(48, 112)) * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("in_layers") / "qwen"
    tiny("qwen3", layers=3, vocabulary=256, context=32).save_pretrained(place)
    return place


def test_a_smaller_folder_keeps_the_limit(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = shrink_in_layers(
        folder, TEXT, within={"bytes": "65%"}, memory=PLENTY, out=out, windows=(8, 2, 8), tries=2
    )
    small = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    before = read_folder(folder)
    size = sum(4 * p.numel() for p in tiny("qwen3", layers=3, vocabulary=256).parameters())
    assert done.bytes == (size, done.fit.bytes)
    assert done.bytes[1] == sum(4 * p.numel() for p in small.parameters()) <= 0.65 * size
    assert len(small.model.layers) == 3 - len(done.fit.gone)
    assert done.fit in [fit for fit, _ in done.tried]
    assert min(loss for _, loss in done.tried) == dict(done.tried)[done.fit]
    assert set(done.rivals) == {"last blocks", "least influence"}
    assert 0 < done.peak <= done.limit
    # the losses are those of whole models on the same text
    from espalier.tasks.tokens import encoder, token_text

    windows = token_text(TEXT, 256, 31, encoder(None), (8, 2, 8), 0).windows("test")
    for model, loss in ((before.model(), done.loss[0]), (small, done.loss[1])):
        with torch.no_grad():
            logits = model(windows).logits[:, :-1].flatten(0, 1)
        own = float(nn.functional.cross_entropy(logits, windows[:, 1:].flatten()))
        assert loss == pytest.approx(own, abs=1e-4)
    assert json.loads((out / RECORD).read_text())["bytes"] == list(done.bytes)


def test_bytes_of_layers_are_those_of_narrow_ones(folder: Path) -> None:
    from espalier.compress.language.shape.surgery import keep_heads, keep_units

    for kind in ("qwen3", "qwen2_moe", "gpt2"):
        if kind != "qwen3":
            folder = folder.parent / kind
            tiny(kind).to(torch.bfloat16).save_pretrained(folder)
        pieces = Layerwise(read_folder(folder), PLENTY).pieces
        model = read_folder(folder).model()
        size = pieces.folder.stored.itemsize
        whole = size * sum(p.numel() for p in model.parameters())
        layers = [layer_bytes(pieces, i, 1.0, 1.0) for i in range(len(pieces.layers))]
        assert outside(pieces) + sum(layers) == whole
        keep_units(model, 1, range(24))
        keep_heads(model, 1, range(anatomy(model).layers[1].attention.groups // 2))
        left = size * sum(p.numel() for p in model.parameters())
        assert whole - left == layers[1] - layer_bytes(pieces, 1, 0.5, 0.5)
        # GPT-2's configuration can't say fewer heads at the same width
        assert group_shares(pieces, (0.5,)) == (() if kind == "gpt2" else (0.5,))


def test_harms_are_those_of_the_layers_outputs(folder: Path) -> None:
    windows = torch.randint(256, (6, 20), generator=torch.Generator().manual_seed(3))
    harms = Harms((0.5, 0.25), (0.5,))
    through = Layerwise(read_folder(folder), PLENTY, batch=2)
    through.run(windows, harms)
    with torch.no_grad():
        states = read_folder(folder).model()(windows, output_hidden_states=True).hidden_states
    first = (states[1] - states[0]).square().sum() / states[1].square().sum()
    assert harms.blocks[0] == pytest.approx(float(first), rel=1e-4)
    for layer in range(3):
        assert 0 < harms.units[layer, 0.5] < harms.units[layer, 0.25]
        assert harms.groups[layer, 0.5] > 0
    limit = outside(through.pieces) + 2 * layer_bytes(through.pieces, 0, 0.5, 1.0)
    found = fits(through.pieces, harms, limit)
    assert [fit.harm for fit in found] == sorted(fit.harm for fit in found)
    assert all(fit.bytes <= limit for fit in found)
    assert any(fit.gone for fit in found)
    assert {len(fit.gone) for fit in found} <= {0, 1, 2}
    for fit in found:  # by hand; between shares that were read, on the line between them
        kept = [i for i in range(3) if i not in fit.gone]
        low, high = harms.units[kept[0], 0.25], harms.units[kept[0], 0.5]
        told = sum(harms.blocks[i] for i in fit.gone)
        told += sum(harms.groups.get((i, fit.groups), 0.0) for i in kept)
        assert told <= fit.harm
        if len(kept) == 1 and 0.25 <= fit.units <= 0.5:
            own = low + (fit.units - 0.25) * 4 * (high - low)
            assert fit.harm == pytest.approx(told + own)
        if fit.units < 1:
            assert fit.harm > told


def test_what_can_not_be_kept_is_said(folder: Path, tmp_path: Path) -> None:
    def shrink(memory: int = PLENTY, **within: str) -> None:
        sizes = (4, 2, 2)
        shrink_in_layers(folder, TEXT, within=within, memory=memory, out=tmp_path, windows=sizes)

    with pytest.raises(BudgetError, match="one on bytes, got params <= 50%"):
        shrink(params="50%")
    with pytest.raises(EspalierError, match="memory limit of 1 MB can't be kept"):
        shrink(memory=1_000_000, bytes="50%")
    with pytest.raises(BudgetError, match="lie outside of layers") as error:
        shrink(bytes="20%")
    assert int(re.findall(r"ask for (\d+) or more", str(error.value))[0]) > 65536
    assert not list(tmp_path.iterdir())


def test_the_command_takes_a_limit_of_memory(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from espalier.cli import app

    text = tmp_path / "text.txt"
    text.write_bytes(TEXT)

    def told(*words: object) -> tuple[int, str]:
        own = ["shrink", folder, "--text", text, "--max", "bytes=80%", "--context", "8", *words]
        done = CliRunner().invoke(app, [str(word) for word in own])
        return done.exit_code, done.output

    code, output = told("--memory", "8GB", "--out", tmp_path / "small", "--json")
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    assert found["bytes"][1] <= 0.8 * found["bytes"][0]
    assert found["limit"] == 8e9
    assert len(read_folder(tmp_path / "small").weights) > 1
    for words, said in (
        (["--memory", "8GB"], "needs a folder to go to: --out DIR"),
        (["--memory", "8GB", "--out", tmp_path / "x", "--resume"], "leave out --resume"),
        (["--memory", "8GB", "--out", tmp_path / "x", "--no-repair"], "leave out --no-repair"),
        (["--memory", "50%", "--out", tmp_path / "x"], "is a size, like 4GB"),
        (["--memory", "much", "--out", tmp_path / "x"], "can't read the limit 'much'"),
    ):
        code, output = told(*words)
        assert code == 2
        assert said in " ".join(output.split())
