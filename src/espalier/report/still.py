"""The front as a file: an SVG for a README, drawn by matplotlib where that is installed."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from espalier.report import numbers
from espalier.report.front import quality_range
from espalier.report.reading import Entry, Result

_ACCENT, _INK, _SOFT, _LINE = "#1f6b4a", "#1d211f", "#8b918d", "#dfe0da"
_OTHERS = ("#a3620a", "#3b62a6", "#8a3b8f", "#5b635e")


def still(result: Result) -> bytes | None:
    """The front against the first cost as SVG; None without matplotlib or without data."""
    if not result.axes or result.best.value(result.quality) is None:
        return None
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # a fixed salt and no date: the same result gives the same file
    with matplotlib.rc_context({"svg.hashsalt": "espalier", "font.size": 9}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        _draw(figure.add_subplot(), result, result.axes[0])
        out = BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _draw(axes: Any, result: Result, metric: str) -> None:
    quality = result.quality
    pairs = [(numbers.real(t.get(metric)), numbers.real(t.get(quality))) for t in result.trials]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    if known:
        axes.scatter(
            *zip(*known, strict=True), s=8, color=_SOFT, alpha=0.35, lw=0, label="tried (estimate)"
        )
    own = [e for e in result.entries() if e not in result.baselines]
    _plot(axes, result, own, metric, "front, trained", _ACCENT, "o", 28)
    for i, other in enumerate(result.baselines):
        _plot(axes, result, [other], metric, other.name, _OTHERS[i % 4], "Ds^P"[i % 4], 44)
    _plot(axes, result, [result.best], metric, "chosen", _ACCENT, "*", 190)
    limit = result.limit(metric)
    if limit:
        axes.axvline(limit.bound, color="#9a3412", lw=1, ls="--")
        text = f" limit {numbers.show(limit.bound, metric, limit.unit)}"
        axes.text(
            limit.bound,
            1.01,
            text,
            color="#9a3412",
            transform=axes.get_xaxis_transform(),
            ha="right",
        )
    _dress(axes, result, metric)


def _dress(axes: Any, result: Result, metric: str) -> None:
    """Axes, ticks and legend as in the page."""
    unit = result.best.unit(metric)
    axes.set_ylim(*quality_range(result))
    axes.set_xlabel(_plain(numbers.label(metric)))
    axes.set_ylabel(_plain(f"test {numbers.label(result.quality)}"))
    axes.xaxis.set_major_formatter(lambda v, _: numbers.show(v, metric, unit))
    axes.yaxis.set_major_formatter(
        lambda v, _: numbers.show(v, result.quality, result.best.unit(result.quality))
    )
    axes.grid(color=_LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _plot(
    axes: Any, result: Result, entries: list[Entry], metric: str, name: str, colour: str,
    mark: str, size: int,
) -> None:  # fmt: skip
    pairs = [(e.value(metric), e.value(result.quality)) for e in entries]
    known = sorted((x, y) for x, y in pairs if x is not None and y is not None)
    if not known:
        return
    xs, ys = zip(*known, strict=True)
    if len(known) > 1:
        axes.step(xs, ys, where="post", color=colour, lw=1.2)
    axes.scatter(
        xs, ys, s=size, color=colour, marker=mark, label=_plain(name), zorder=3, edgecolor="white"
    )


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
