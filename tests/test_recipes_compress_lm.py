"""Recipes of compressed language models run, and their parts do what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from espalier import recipes
from espalier.costs import Counts
from espalier.nets.llama import rotate
from espalier.recipes import apt_prune, compressor_3mb
from espalier.recipes._parts import byte_pairs, modules
from espalier.recipes._parts.compressor import GENES, Genetic, Students


def test_apt_prune_runs() -> None:
    found = recipes.run("apt-prune")
    assert json.loads(json.dumps(found)) == found
    (subject,) = found["subjects"].values()
    for row in subject["patterns"].values():
        assert row["zeros"] == pytest.approx(dict.fromkeys(row["zeros"], 0.5))
        assert min(row["layer_error"], key=row["layer_error"].__getitem__) == "apt"
        assert all(bits > 0 for bits in row["bits_per_byte"].values())
    (judged,) = (row for name, row in found["check"].items() if name != "holds")
    assert set(judged) == {"50%", "2:4"}


def test_the_verdict_of_apt_prune_counts_draws() -> None:
    bits = {
        "apt": [1.0, 1.0, 1.0, 1.0, 1.0],
        "magnitude": [2.0] * 5,
        "wanda": [2.0, 2.0, 2.0, 2.0, 0.5],
        "sparsegpt": [1.0, 1.0, 2.0, 2.0, 0.5],  # a draw is not worse
    }
    assert apt_prune.verdict(bits) == {
        "wins": {"magnitude": 5, "wanda": 4, "sparsegpt": 4}, "of": 5, "holds": True,
    }  # fmt: skip
    bits["wanda"][0] = 1.0
    assert not apt_prune.verdict(bits)["holds"]


def test_positions_turn_pairs_of_channels() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(5, 2)
    turned = rotate(x, torch.stack([angle.cos(), angle.sin()], -1))
    numbers = torch.view_as_complex(x.reshape(2, 3, 5, 2, 2))
    expected = numbers * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(turned, torch.view_as_real(expected).flatten(-2), atol=1e-6)


@pytest.mark.data
def test_the_llama_tells_its_published_story(real_data) -> None:
    from espalier.recipes._parts import stories

    model, tokens = stories.model(), stories.Tokens.read()
    assert sum(p.numel() for p in model.parameters()) == 260_032
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = [1]
    with torch.inference_mode():
        for _ in tokens.encode(story):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert ids[1:] == tokens.encode(story)
    assert b"".join(map(tokens.bytes_of, ids[1:])).decode() == " " + story
    mixed = "Café, 3\nlines\tand   spaces"
    assert b"".join(map(tokens.bytes_of, tokens.encode(mixed))).decode() == " " + mixed


def test_compressor_runs() -> None:
    found = recipes.run("compressor-3mb")
    assert json.loads(json.dumps(found)) == found
    setting = compressor_3mb._SCALES["smoke"]
    assert len(found["students"]) == 1 + setting.students
    assert found["students"][0]["macs"] == found["search"]["macs"]
    assert found["search"]["macs"] <= found["search"]["macs_of_the_best"]
    sizes = [row["bytes"] / setting.bytes for row in found["students"]]
    assert sizes == pytest.approx([1.0] * len(sizes), abs=compressor_3mb.TOLERANCE)
    assert found["check"]["size_off_by"] == pytest.approx(max(abs(s - 1) for s in sizes))
    distances = [row["distance"] for row in found["students"]]
    assert found["check"]["holds"] == (distances[0] < np.mean(distances[1:]))


def test_sizes_by_formula_are_the_counts() -> None:
    family = Students(16, 4)
    codes = family.space.sample(6, np.random.default_rng(0))
    counted = Counts(family).estimate_codes(codes)
    assert np.array_equal(counted["params"], family.params(codes))
    assert np.array_equal(counted["macs"], family.macs(codes))


def test_the_genetic_search_finds_what_enumeration_finds() -> None:
    sizes = np.array([6, 5, 4, 6])
    weights = np.random.default_rng(0).normal(size=(4, 6))

    def fitness(rows):
        return weights[np.arange(4), rows].sum(1)

    seen = Genetic(20, 20, times=1).run(sizes, fitness, 0)
    assert len(np.unique(seen, axis=0)) == len(seen)
    assert (seen < sizes).all()
    best = [int(row[:n].argmax()) for row, n in zip(weights, sizes, strict=True)]
    assert seen[fitness(seen).argmax()].tolist() == best
    assert np.array_equal(seen, Genetic(20, 20, times=1).run(sizes, fitness, 0))


def test_pairs_are_joined_most_frequent_first() -> None:
    assert byte_pairs.learn(b"abababcab", 258) == [(97, 98), (256, 256)]
    run = np.array([5, 7, 7, 7, 5, 7, 7])  # of three in a run, the first two
    assert byte_pairs.joined(run, (7, 7), 300).tolist() == [5, 300, 7, 5, 300]
    pairs = byte_pairs.learn(b"to be or not to be, that is the question; " * 20, 300)
    windows = np.frombuffer(b"to be or not to the question be ", np.uint8).reshape(2, 16)
    found = byte_pairs.encode(windows, pairs, [256, 280], 16)
    assert np.array_equal(found[256], windows)
    table = {i: bytes([i]) for i in range(256)}
    for i, (a, b) in enumerate(pairs[:24]):
        table[256 + i] = table[a] + table[b]
    for row, window in zip(found[280], windows, strict=True):
        assert b"".join(table[t] for t in row.tolist() if t) == window.tobytes()
        assert (row != 0).sum() < 16


def test_no_window_is_in_two_splits() -> None:
    setting = compressor_3mb._SCALES["smoke"]
    text = modules.read(setting.classes, setting.window, setting.windows, 0)
    assert len(text.names) == setting.classes
    sets = [{row.tobytes() for row in rows} for rows in text.windows.values()]
    assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
    assert all(len(np.unique(y)) == setting.classes for y in text.labels.values())
    assert len(GENES) == len(Students(4, 2).space.names)
