"""The page: valid, self-contained, harmless, complete, and whole when parts are missing."""

from __future__ import annotations

import copy
import json
import math
import re
from importlib.resources import files
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import pytest

from espalier.report.figures import figures
from espalier.report.page import inline_json, page
from espalier.report.reading import Result
from report_html import Read, read
from report_sample import sample_result

NASTY = (
    "</script><script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" 'and' & {{ 7*7 }}"
)


@pytest.fixture(scope="module")
def html() -> str:
    return page(Result(sample_result()))


@pytest.fixture(scope="module")
def parsed(html: str) -> Read:
    return read(html)


def _figures(parsed: Read) -> dict[str, Any]:
    (element,) = [e for e in parsed.all("script") if e.attributes.get("id") == "figures"]
    found: dict[str, Any] = json.loads(element.text)
    return found


def test_every_element_closes_and_nothing_is_loaded(parsed: Read) -> None:
    assert parsed.wrong == []
    assert parsed.loads == []
    assert parsed.handlers == []
    assert not parsed.all("link")
    assert not parsed.all("img")


def test_the_page_forbids_loading_and_holds_plotly_once(html: str, parsed: Read) -> None:
    (policy,) = [e for e in parsed.all("meta") if "http-equiv" in e.attributes]
    assert "default-src 'none'" in str(policy.attributes["content"])
    assert html.count("* plotly.js v") == 1
    style = parsed.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style


def test_it_is_accessible(parsed: Read) -> None:
    assert parsed.all("html")[0].attributes["lang"] == "en"
    assert len(parsed.all("h1")) == 1
    plots = [e for e in parsed.elements if e.attributes.get("class") == "plot"]
    assert len(plots) == 3
    for element in [*plots, *parsed.all("svg")]:
        assert element.attributes["role"] == "img"
        assert element.attributes.get("aria-label") or element.attributes.get("aria-labelledby")
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert all("scope" in e.attributes for e in parsed.all("th"))
    levels = [int(e.tag[1]) for e in parsed.elements if re.fullmatch(r"h[1-6]", e.tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_it_says_all_there_is_to_say(html: str) -> None:
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.S)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    for words in (
        "0.283 ms of 0.3 ms",
        "8,748,000 candidates",
        "Example CPU @ 2.50GHz, 2 cores",
        "98.1% ± 0.7",
        "± 0.004 ms",
        "measured: trained to the end, the 359 test examples",
        "estimated: shared weights, the 359 validation examples",
        "Spearman rank correlation 0.97",
        "75 by search, 75 by random search",
        "expansion3",
        "espalier search --task digits",
        "torch 2.13.0",
        "The machine was busy for 2 of 31 measurements",
    ):
        assert words in text, words


def test_the_front_shows_trials_front_chosen_baselines_and_limit(parsed: Read) -> None:
    views = _figures(parsed)["front"]
    assert [view["label"] for view in views] == ["latency", "parameters", "MACs"]
    figure = views[0]["figure"]
    names = [trace["name"] for trace in figure["data"]]
    assert names == [
        "tried by search (estimate)",
        "tried by random search (estimate)",
        "front, trained",
        "scaled by hand, trained",
        "random search, trained",
        "chosen, trained",
    ]
    done = [t for t in sample_result()["trials"] if t["accuracy"] is not None]
    assert sum(len(t["x"]) for t in figure["data"][:2]) == len(done)
    assert figure["data"][-1]["x"] == [0.283]
    assert figure["data"][-1]["y"] == [0.981]
    assert figure["layout"]["shapes"][0]["x0"] == 0.3
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 0.942 < 0.981 < high
    assert "kernel1=" in figure["data"][0]["hovertext"][0]


def test_the_latency_figure_has_every_held_out_network(parsed: Read) -> None:
    band, exact, points = _figures(parsed)["latency"][0]["figure"]["data"]
    rows = sample_result()["latency"]["held_out"]
    assert points["x"] == [r["measured"] for r in rows]
    assert points["y"] == [r["predicted"] for r in rows]
    assert exact["x"] == exact["y"]
    assert band["y"][1] == pytest.approx(band["x"][1] * 0.9)
    assert band["y"][2] == pytest.approx(band["x"][2] * 1.1)
    off = [abs(r["predicted"] / r["measured"] - 1) > 0.1 for r in rows]
    assert [c == "@warn" for c in points["marker"]["color"]] == off


def test_plotly_accepts_every_figure() -> None:
    def paint(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: paint(v) for k, v in value.items()}
        if isinstance(value, list):
            return [paint(v) for v in value]
        return "#123456" if isinstance(value, str) and value.startswith("@") else value

    for views in figures(Result(sample_result())).values():
        for view in views:
            go.Figure(paint(view["figure"]))  # raises for a property that plotly does not know


def test_every_colour_of_a_figure_is_in_the_style_sheet(parsed: Read) -> None:
    used = set(re.findall(r'"@([a-z0-9-]+)"', json.dumps(_figures(parsed))))
    light, dark = _schemes()
    assert used
    assert used <= set(light)
    assert set(light) == set(dark)


def _schemes() -> tuple[dict[str, str], dict[str, str]]:
    style = (files("espalier.report") / "templates" / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([a-z0-9-]+):\s*([^;]+);", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    return light, dark


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(scheme: int) -> None:
    """WCAG 2.1 AA: 4.5 for text, 3 for marks in figures."""
    colours = _schemes()[scheme]
    for ink in ("ink", "soft", "accent", "warn"):
        assert _contrast(colours[ink], colours["paper"]) >= 4.5, ink
        assert _contrast(colours[ink], colours["wash"]) >= 4.5, ink
    assert _contrast(colours["warn"], colours["warn-wash"]) >= 4.5
    assert _contrast(colours["paper"], colours["accent"]) >= 4.5
    for mark in ("hand", "chance", "third", "accent", "trial"):
        assert _contrast(colours[mark], colours["paper"]) >= 3, mark


def _poison(value: Any) -> Any:
    """Every text of a result, keys of candidates too, turned nasty."""
    if isinstance(value, dict):
        return {
            k: {NASTY + name: _poison(v) for name, v in value[k].items()}
            if k in ("candidate", "files", "versions", "seconds") and isinstance(value[k], dict)
            else _poison(value[k])
            for k in value
        }
    if isinstance(value, list):
        return [_poison(v) for v in value]
    return NASTY if isinstance(value, str) else value


def test_text_of_the_result_is_harmless() -> None:
    raw = sample_result()
    kept = copy.deepcopy(raw)
    poisoned = _poison(raw)
    for a, b in zip(poisoned["question"]["limits"], kept["question"]["limits"], strict=True):
        a["metric"], a["op"] = b["metric"], b["op"]
    clean, dirty = read(page(Result(kept))), read(page(Result(poisoned)))
    assert dirty.wrong == []
    assert dirty.loads == []
    assert dirty.handlers == []
    assert len(dirty.all("script")) == len(clean.all("script"))
    assert NASTY in dirty.all("title")[0].text
    for views in _figures(dirty).values():
        for trace in (t for view in views for t in view["figure"]["data"]):
            for shown in [trace["name"], *trace.get("hovertext", [])]:
                rest = re.sub(r"</?b>|<br>", "", shown)
                assert "<" not in rest
                assert "$" not in rest


def test_inline_json_can_not_end_its_element() -> None:
    value = {"a": "</script><!--", "b": "&amp;\u2028", "c": math.nan, "d": [1.5, None]}
    text = str(inline_json(value))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {
        "a": "</script><!--",
        "b": "&amp;\u2028",
        "c": None,
        "d": [1.5, None],
    }


SECTIONS = sorted(set(sample_result()) - {"question", "best"})


@pytest.mark.parametrize("absent", SECTIONS)
def test_a_missing_section_is_left_out(absent: str) -> None:
    raw = sample_result()
    del raw[absent]
    assert read(page(Result(raw))).wrong == []


@pytest.mark.parametrize("empty", [None, [], {}, "", 0])
def test_empty_sections_are_left_out(empty: object) -> None:
    raw = sample_result() | dict.fromkeys(SECTIONS, empty)
    parsed = read(page(Result(raw)))
    assert parsed.wrong == []
    shown = [e.attributes.get("id") for e in parsed.all("section")]
    assert {"question", "how"} <= set(shown)
    assert not {"latency", "decisions", "progress", "reproduce"} & set(shown)


def test_only_the_question_and_the_answer_are_needed() -> None:
    best = {"candidate": {"width": 16}, "metrics": {"accuracy": {"value": 0.9}}}
    parsed = read(page(Result({"question": {"task": {"name": "toy"}}, "best": best})))
    assert parsed.wrong == []
    assert "".join(e.text for e in parsed.elements if e.tag == "span").startswith("90.0% accuracy")
    assert read(page(Result({}))).wrong == []


def test_no_number_is_shown_as_nan() -> None:
    def spoil(value: Any, turn: list[int]) -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, turn) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, turn) for v in value]
        if isinstance(value, float):
            turn[0] += 1
            return (None, math.nan, math.inf, value)[turn[0] % 4]
        return value

    for shift in range(4):
        html = page(Result(spoil(sample_result(), [shift])))
        assert read(html).wrong == []
        body = html[html.index("<body>") :]
        visible = re.sub(r"<script.*?</script>", "", body, flags=re.S)
        assert not re.search(r"\b(nan|inf|None)\b", visible)


def test_a_baseline_ahead_is_said_on_top() -> None:
    raw = sample_result()
    raw["baselines"][1]["metrics"]["accuracy"]["value"] = 0.999
    warnings = [
        e for e in read(page(Result(raw))).all("p") if e.attributes.get("class") == "warning"
    ]
    assert warnings[0].text.startswith(
        "Random search is ahead on test accuracy: 99.9% against 98.1%"
    )
