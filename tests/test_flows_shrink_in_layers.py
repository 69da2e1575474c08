"""Shrinking without ever having the model in memory: what is written, measured and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier.errors import BudgetError, DataError, EspalierError, StudyError

pytest.importorskip("transformers")

import transformers

from espalier.compress.language.anatomy import anatomy
from espalier.compress.language.files.folder import read_folder
from espalier.compress.language.layer_by_layer.layerwise import Layerwise
from espalier.compress.language.layer_by_layer.narrow import Harms
from espalier.flows.language.fit_in_layers import fits, group_shares, layer_bytes, outside
from espalier.flows.language.shrink_in_layers import RECORD, shrink_in_layers
from espalier.flows.progress import Silent
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


class Killed(BaseException):
    """As if the process had ended."""


class Killer(Silent):
    """Ends a run when so many layers were looked at; counts them."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def step(self, done: int, total: int, text: str = "") -> None:
        self.seen += 1
        if self.seen > self.after:
            raise Killed


def test_a_run_that_died_goes_on_behind_its_last_layer_to_the_same_files(
    folder: Path, tmp_path: Path
) -> None:
    def shrink(out: Path, show: Silent, resume: bool, batch: int = 4, bytes: str = "65%") -> Any:
        return shrink_in_layers(
            folder, TEXT, within={"bytes": bytes}, memory=PLENTY, out=out, windows=(8, 2, 8),
            tries=2, batch=batch, resume=resume, progress=show,
        )  # fmt: skip

    whole = Killer(10**6)
    wanted = shrink(tmp_path / "whole", whole, False)
    out, seen, died = tmp_path / "died", 0, 0
    while True:  # killed again and again, each time four layers further
        show = Killer(4)
        try:
            found = shrink(out, show, died > 0)
        except Killed:
            died, seen = died + 1, seen + show.after
            continue
        seen += show.seen
        break
    assert died == (whole.seen - 1) // 4 >= 2
    assert seen == whole.seen  # no layer that was finished was looked at again
    for name in ("fit", "tried", "bytes", "loss", "rivals"):
        assert getattr(found, name) == getattr(wanted, name)
    files = {p.name for p in (tmp_path / "whole").iterdir() if p.name.startswith("model")}
    assert len(files) > 2
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for name in (*files, "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert shrink(out, Killer(0), True).loss == found.loss  # all is known
    with pytest.raises(StudyError, match="limits"):
        shrink(out, Silent(), True, bytes="70%")
    with pytest.raises(StudyError, match="holds a study already"):
        shrink(out, Silent(), False)


def test_states_on_disk_and_shapes_of_written_layers_come_back(tmp_path: Path) -> None:
    from espalier.compress.language.files.configuration import expressed
    from espalier.compress.language.layer_by_layer.held import Held
    from espalier.compress.language.layer_by_layer.shapes import described, reshape
    from espalier.compress.language.shape.surgery import drop, keep_heads, keep_units

    for scratch in (None, tmp_path):
        held, again = Held(scratch), Held()
        for index in range(2):
            held[index] = torch.full((1, 2, 3), float(index))
            again[index] = torch.zeros(1)
        held.keep(tmp_path / f"kept {scratch is None}")
        held[0] = torch.full((1, 2, 3), 9.0)  # what is kept stays as it was
        again.take(tmp_path / f"kept {scratch is None}")
        assert [float(chunk.mean()) for chunk in again] == [0.0, 1.0]
    for kind in ("llama", "mixtral"):
        changed, twin = tiny(kind), tiny(kind)
        for layer in (0, 1):
            keep_heads(changed, layer, range(1))
            keep_units(changed, layer, range(24))
            reshape(twin.model.layers[layer], described(changed.model.layers[layer]))
        assert expressed(twin).to_dict() == expressed(changed).to_dict()
    drop(changed, 1, "feed")
    with pytest.raises(DataError, match="begin anew"):
        reshape(twin.model.layers[1], described(changed.model.layers[1]))


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
        (["--memory", "8GB", "--out", tmp_path / "x", "--resume"], "holds no study"),
        (["--memory", "8GB", "--out", tmp_path / "x", "--no-repair"], "leave out --no-repair"),
        (["--memory", "50%", "--out", tmp_path / "x"], "is a size, like 4GB"),
        (["--memory", "much", "--out", tmp_path / "x"], "can't read the limit 'much'"),
    ):
        code, output = told(*words)
        assert code == 2
        assert said in " ".join(output.split())
