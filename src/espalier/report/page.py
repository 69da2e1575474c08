"""The report as one HTML page that holds everything it needs and loads nothing."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from espalier.report import (
    drawing,
    figures,
    front,
    language,
    layers,
    numbers,
    shrunk,
    tables,
    verdict,
    words,
)
from espalier.report.reading import Result, mapping, plain

_HEIGHTS = {
    **{"front": 480, "architecture": 340, "progress": 340, "latency": 420, "repair": 400},
    "budget": 400,
}
_HARM = {
    "loss": "the task's loss",
    "divergence": "how far outputs are from the original's",
    "gradient": "the change of outputs, weighted by the gradient of the loss",
}


def page(result: Result) -> str:
    """The whole page. All text of the result is escaped; the page's own policy forbids loading."""
    views = figures.figures(result)
    stages = layers.stages(result.network)
    heads, rows = tables.comparison(result)
    return _environment().get_template("page.html.j2").render(
        result=result,
        verdict=verdict.verdict(result),
        parts=verdict.parts(result),
        warnings=[*verdict.broken(result), *verdict.ahead(result)],
        lead=verdict.lead(result),
        question=words.question(result),
        decisions=_decisions(result),
        **_shrink(result),
        tiles=tables.tiles(result),
        drawing=drawing.draw(stages),
        stages=stages,
        views=views,
        heights=_HEIGHTS,
        outside=front.outside(result),
        trust=tables.trust(result),
        counts=tables.counts(result),
        trusted=words.trusted(result),
        effects=tables.effects(result),
        heads=heads,
        rows=rows,
        readings=tables.readings(result),
        hows=words.HOW,
        seconds=tables.seconds(result),
        figures_json=inline_json(views),
        # the library's own file, not text of the result
        plotly=Markup(get_plotlyjs()) if views else "",
        numbers=numbers,
        words=words,
    )  # fmt: skip


def _shrink(result: Result) -> dict[str, Any]:
    """What only the page of a shrink has."""
    spent_heads, spent_rows = shrunk.spent(result)
    stage_heads, stage_rows = shrunk.stages(result)
    layer_heads, layer_rows = language.layers(result)
    measure = str(result.shrink.get("measure") or "")
    solver = mapping(result.shrink.get("solver"))
    return {
        "spent_heads": spent_heads,
        "spent_rows": spent_rows,
        "sensitive": shrunk.sensitivity(result),
        "solver": (str(solver.get("name") or ""), str(solver.get("why") or "")),
        "harm_images": numbers.whole(result.shrink.get("images")),
        "harm_word": _HARM.get(measure, measure),
        "stage_heads": stage_heads,
        "stage_rows": stage_rows,
        "rounds": shrunk.rounds(result),
        "left_alone": shrunk.ignored(result),
        "layer_heads": layer_heads,
        "layer_rows": layer_rows,
        **language.about(result),
    }


def inline_json(value: Any) -> Markup:
    """JSON that can stand inside a script element: no text in it can end the element."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # safe: every < > & is written as an escape


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("espalier.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _decisions(result: Result) -> list[tuple[str, str, str]]:
    """Name, options and chosen option of every decision of the family's space."""
    found = result.family.get("decisions")
    out = []
    for d in found if isinstance(found, (list, tuple)) else []:
        if not isinstance(d, dict) or "name" not in d:
            continue
        options = d.get("options")
        if isinstance(options, (list, tuple)):
            text = ", ".join(words.option(o) for o in options)
        else:
            text = f"{words.option(d.get('low'))} to {words.option(d.get('high'))}"
        chosen = result.best.candidate.get(d["name"])
        out.append((str(d["name"]), text, words.option(chosen)))
    return out
