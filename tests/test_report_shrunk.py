"""The page of a shrink: what is in the result stands in it, and any text is only text."""

from __future__ import annotations

from typing import Any

import pytest

from espalier.report import front, markdown, page, shrunk
from espalier.report.reading import Result
from report_html import read
from report_sample import sample_result

HOSTILE = "</script><img src=x onerror=alert(1)>"


def shrink_result() -> dict[str, Any]:
    """A search's sample with what a shrink adds."""
    raw = sample_result()
    stages = [
        {"stage": "cut", "quality": 0.12, "seconds": 0.5, "kept": True},
        {"stage": "fine-tuned", "quality": 0.91, "seconds": 7.5, "kept": True},
    ]
    worse = [*stages[:1], {"stage": "fine-tuned", "quality": 0.1, "seconds": 9.0, "kept": False}]
    raw["shrink"] = {
        "original": {"metrics": {
            "latency_ms": {"value": 0.5, "unit": "ms"},
            "accuracy_validation": {"value": 0.99},
        }},
        "solver": {"name": "allocate", "why": f"because {HOSTILE}"},
        "images": 512,
        "measure": "divergence",
        "rounds": [
            {"name": "shrunk", "predicted": 0.2, "measured": 0.31, "kept": False},
            {"name": "shrunk", "predicted": 0.19, "measured": 0.28, "kept": True},
        ],
        "spent": [
            {"layer": "stem", "metric": "latency_ms", "original": 0.2, "spent": 0.1},
            {"layer": HOSTILE, "metric": "latency_ms", "original": 0.1, "spent": 0.0},
            {"layer": "stem", "metric": "params", "original": 1000.0, "spent": 250.0},
        ],
        "sensitivity": [
            {"decision": "width:a", "option": 4, "harm": 2.0, "saved": {"latency_ms": 0.25}},
            {"decision": "width:a", "option": 8, "harm": 0.0, "saved": {"latency_ms": 0.0}, "chosen": True},
            {"decision": "depth:b", "option": 0, "harm": None, "saved": {}},
        ],
        "repair": [
            {"name": "shrunk", "latency_ms": 0.28, "stages": stages},
            {"name": "random", "latency_ms": 0.29, "stages": worse},
        ],
        "ignored": [{"layer": "fc", "kind": "width", "reason": "the model's output"}],
    }  # fmt: skip
    return raw


def test_every_section_stands_in_the_page_and_nothing_runs() -> None:
    text = page.page(Result(shrink_result()))
    found = read(text)
    assert found.wrong == []
    assert found.loads == []
    assert found.handlers == []
    ids = {e.attributes.get("id") for e in found.all("section")}
    assert {"spent", "sensitivity", "repair", "decided"} <= ids
    assert "img src=x" not in text.replace("&lt;img", "")
    assert "because &lt;/script&gt;" in text


def test_a_search_has_none_of_them() -> None:
    found = read(page.page(Result(sample_result())))
    ids = {e.attributes.get("id") for e in found.all("section")}
    assert not {"spent", "sensitivity", "repair", "decided"} & ids


def test_layers_are_shares_of_the_largest_of_each_cost() -> None:
    heads, layers = shrunk.spent(Result(shrink_result()))
    assert len(heads) == 2
    assert heads[1] == "parameters: 0.25k of 1k"
    stem, gone = layers
    latency, params = stem.parts
    assert latency is not None
    assert (latency.was, latency.now) == (1.0, pytest.approx(0.5))
    assert "(50%)" in latency.text
    assert params is not None
    assert params.text == "250 (25%)"
    assert gone.parts[0] is not None
    assert gone.parts[0].text == "gone"
    assert gone.parts[1] is None


def test_the_most_harmful_decision_comes_first_and_the_choice_is_marked() -> None:
    (first, options), (second, unknown) = shrunk.sensitivity(Result(shrink_result()))
    assert (first, second) == ("width:a", "depth:b")
    assert [o.chosen for o in options] == [False, True]
    assert [o.harm_bar for o in options] == [1.0, 0.0]
    assert options[0].saved == "25.0%"
    assert unknown[0].harm == "–"


def test_stages_say_what_was_not_kept() -> None:
    heads, rows = shrunk.stages(Result(shrink_result()))
    assert heads == ["cut", "fine-tuned", "time"]
    assert rows[0] == ("shrunk", ["12.0%", "91.0%", "7.5 s"])
    assert rows[1][1][1] == "10.0%, not kept"
    assert "91.0%" in markdown.markdown(Result(shrink_result()))


def test_the_figure_leads_from_before_to_after_beside_the_original() -> None:
    (view,) = shrunk.repair(Result(shrink_result()))
    ours, other, original = view["figure"]["data"]
    assert (ours["x"], ours["y"]) == ([0.28, 0.28], [0.12, 0.91])
    assert ours["marker"]["symbol"] == ["star-open", "star"]
    assert (other["name"], other["y"]) == ("random", [0.12])  # what was not kept it does not have
    assert (original["x"], original["y"]) == ([0.5], [0.99])
    (limit,) = view["figure"]["layout"]["shapes"]
    assert limit["x0"] == limit["x1"] == 0.3


def test_a_network_has_one_mark_in_all_figures() -> None:
    raw = shrink_result()
    name = raw["baselines"][0]["name"]
    raw["shrink"]["repair"][1]["name"] = name
    result = Result(raw)
    data = [shrunk.repair(result)[0]["figure"]["data"], front.front(result)[0]["figure"]["data"]]
    marks = []
    for traces in data:
        mark = next(t["marker"] for t in traces if t["name"].startswith(name))
        symbol = mark["symbol"]
        marks.append((mark["color"], symbol if isinstance(symbol, str) else symbol[-1]))
    assert marks[0] == marks[1]
    assert marks[0] != ("@accent", "star")


@pytest.mark.parametrize(
    "broken", [{}, {"spent": 3}, {"repair": [{"stages": None}]}, {"solver": {}}]
)
def test_absent_or_broken_sections_are_left_out(broken: dict[str, Any]) -> None:
    raw = sample_result() | {"shrink": broken}
    assert read(page.page(Result(raw))).wrong == []
    markdown.markdown(Result(raw))
