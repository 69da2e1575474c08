"""Kinds of decision and their settings as text: read, told again, refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from espalier.compress import Bits, Cut, Depth, Sparsity, Widths
from espalier.errors import EspalierError
from espalier.flows.decisions import make_cuts, told

SAID: list[tuple[str, Cut]] = [
    ("width", Widths()),
    ("width:multiple=8/steps=6", Widths(multiple=8, steps=6)),
    ("width:least=0.25/importance=bn/heads=no", Widths(least=0.25, importance="bn", heads=False)),
    ("depth", Depth()),
    ("bits", Bits()),
    ("bits:8/4", Bits((8, 4))),
    ("bits:weights", Bits(weights_only=True)),
    ("bits:weights/4", Bits((4,), weights_only=True)),
    ("sparsity", Sparsity()),
    ("sparsity:2:4", Sparsity(("2:4",), ())),
    ("sparsity:2:4/1:4/0.3", Sparsity(("2:4", "1:4"), (0.3,))),
]


@pytest.mark.parametrize(("text", "cut"), SAID)
def test_what_text_says_is_the_cut_and_what_the_cut_tells_is_the_text(text: str, cut: Cut) -> None:
    assert make_cuts(text) == (cut,)
    assert told(cut) == text


def test_several_kinds_and_several_ways_to_write_them() -> None:
    cuts = (Widths(), Bits((8, 4)), Sparsity((), (0.5,)))
    assert make_cuts("width, bits: 4 / 8 ,sparsity:50%") == cuts
    assert make_cuts(["width", Bits((8, 4)), "sparsity:.5"]) == cuts
    assert make_cuts("width:least=25%") == (Widths(least=0.25),)
    twice = (Sparsity(layers=["a"]), Sparsity(layers=["b"]))
    assert make_cuts(twice) == twice


class Mine(Cut):
    kind = "mine"

    def bind(self, model: Any, example: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "cut",
    [
        Bits(layers=("fc",)),
        Bits(calibration=torch.zeros(1)),
        Widths(scores={"stem": torch.zeros(8)}),
        Depth(layers=["block*"]),
        Mine(),
    ],
)
def test_what_text_cannot_say_is_not_told(cut: Cut) -> None:
    assert told(cut) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits:wieghts", "bits takes bits to choose from .* like bits:8/4 .*got 'wieghts'"),
        ("bits:", "like bits:8/4 .*got ''"),
        ("bits:9", "from 2 to 8, or 32 for float; got 9"),
        ("bits:8,4", "unknown kind of decision '4'.*settings follow a colon: bits:8/4"),
        ("bits=8", "'bits'.*settings follow a colon: bits:8/4"),
        ("bits:8,bits:4", "bits is there twice: join its settings by slashes, bits:8/4"),
        ("sparsity:2-4", "sparsity takes patterns N:M .*got '2-4'"),
        ("sparsity:4:2", "0 < N < M, got '4:2'"),
        ("sparsity:150%", "between 0 and 1, got 1.5"),
        ("width:8", "width takes multiple=8, .*got '8'"),
        ("width:multiple=x", "got 'multiple=x'"),
        ("width:heads=maybe", "got 'heads=maybe'"),
        ("width:importance=tailor", "Did you mean 'taylor'"),
        ("depth:2", "depth takes no settings.*got '2'"),
        ("widths", "Did you mean 'width'"),
        ("", "unknown kind of decision ''"),
    ],
)
def test_bad_text_gets_one_line_with_what_there_is(text: str, words: str) -> None:
    with pytest.raises(EspalierError, match=words) as caught:
        make_cuts(text)
    assert "\n" not in str(caught.value)


def test_no_kind_at_all_is_refused() -> None:
    with pytest.raises(EspalierError, match="width, depth, bits, sparsity"):
        make_cuts([])
