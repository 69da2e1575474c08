"""The tables and sentences of a race's page: one source for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espalier.bench.entrants import BASELINE
from espalier.bench.verdicts import amount, chance, unit_name, word
from espalier.report import numbers


@dataclass(frozen=True)
class Sheet:
    """One table: a caption, heads, rows of text; `marks` a style for each row."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[str, ...]


def order(result: Mapping[str, Any]) -> list[str]:
    """The strategies, best first by mean rank."""
    mean = result["ranks"]["mean"]
    return sorted(mean, key=lambda n: (mean[n], n))


def _marks(result: Mapping[str, Any], names: list[str]) -> tuple[str, ...]:
    tests = result["significance"]
    good = [n == BASELINE or tests[n]["better"] for n in names]
    return tuple("" if ok else "unproven" for ok in good)


def budgets(result: Mapping[str, Any]) -> Sheet:
    """Mean regret at the usual budgets, and how soon the best was found."""
    names = order(result)
    counts = list(next(iter(result["budgets"].values())))
    unit = unit_name(result["unit"])
    rows = []
    for name in names:
        cells = [_bounded(result["budgets"][name][c]) for c in counts]
        best = result["queries_to_best"][name]
        found = (
            "in fewer than half of the seeds" if best["median"] is None else f"{best['median']:g}"
        )
        test = _number(result["test"][name]["mean"], result["unit"])
        rows.append((name, *cells, test, f"{found} ({best['found']:.0%})"))
    heads = ("strategy", *(f"after {c}" for c in counts), "test at the end", "queries to the best")
    caption = (
        f"Mean test regret{f' in {unit}' if unit else ''} after some numbers of queries, [95% interval]; "
        "the mean test result at the end; the median number of queries until the best row by "
        "validation was found (seeds that found it)"
    )
    return Sheet(caption, heads, tuple(rows), _marks(result, names))


def _bounded(band: Mapping[str, float]) -> str:
    return f"{band['mean']:.3g} [{band['low']:.3g}, {band['high']:.3g}]"


def _number(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.2f}%"
    if unit == "%":
        return f"{value:.2f}%"
    return f"{numbers.significant(value, 4)}{' ' + unit if unit else ''}"


def volume(result: Mapping[str, Any]) -> Sheet | None:
    """The share of the hypervolume at the usual budgets."""
    curves = result["hypervolume"]
    if not curves:
        return None
    steps = next(iter(curves.values()))["queries"]
    shown = [q for q in steps if q in (10, 25, 50, 100, 150, 200, 300, 500, 1000, steps[-1])]
    names = order(result)
    rows = []
    for name in names:
        curve = curves[name]
        at = [curve["queries"].index(q) for q in shown]
        rows.append(
            (name, *(f"{curve['mean'][i]:.4f} [{curve['low'][i]:.4f}, {curve['high'][i]:.4f}]" for i in at))
        )  # fmt: skip
    heads = ("strategy", *(f"after {q}" for q in shown))
    caption = "Mean share of the table's hypervolume, [95% interval]"
    return Sheet(caption, heads, tuple(rows), _marks(result, names))


def ranks(result: Mapping[str, Any]) -> Sheet:
    """Mean ranks, and each strategy against random search."""
    names = order(result)
    rows = []
    by = result["judged_by"]
    for name in names:
        rank = f"{result['ranks']['mean'][name]:.2f}"
        test = result["significance"].get(name)
        if test is None:
            rows.append(
                (name, rank, numbers.DASH, numbers.DASH, "the baseline", _overhead(result, name))
            )
            continue
        gap = [test["difference"], test["difference_low"], test["difference_high"]]
        shown = f"{gap[0]:+.3g} [{gap[1]:+.3g}, {gap[2]:+.3g}]"
        rows.append(
            (name, rank, shown, chance(test["p_holm"]), word(test), _overhead(result, name))
        )
    what = "missing hypervolume" if by == "hypervolume" else "regret"
    heads = (
        "strategy",
        "mean rank",
        f"{what} less random's",
        "p (Holm)",
        "than random",
        "own time",
    )
    caption = f"Ranks by {by} at the last query, seeds as blocks; paired sign-flip test of the mean"
    return Sheet(caption, heads, tuple(rows), _marks(result, names))


def brief(result: Mapping[str, Any]) -> Sheet:
    """What a terminal shows: rank, the score at the end, the test result, own time."""
    names = order(result)
    volume = result["judged_by"] == "hypervolume"
    rows = []
    for name in names:
        score = (
            f"{result['hypervolume'][name]['mean'][-1]:.4f}"
            if volume
            else amount(result["regret"][name], result["unit"])
        )
        test = _number(result["test"][name]["mean"], result["unit"])
        rank = f"{result['ranks']['mean'][name]:.2f}"
        rows.append((name, rank, score, test, _overhead(result, name)))
    what = "hypervolume" if volume else "mean regret"
    heads = ("strategy", "mean rank", what, "mean test", "own time")
    return Sheet(title_of(result), heads, tuple(rows), _marks(result, names))


def title_of(result: Mapping[str, Any]) -> str:
    """What was raced, on one line."""
    count = len(result["curves"])
    runs = f"{result['queries']} queries, {result['seeds']} seeds"
    return f"{count} strategies on {result['table']}, {runs}"


def _overhead(result: Mapping[str, Any], name: str) -> str:
    return f"{numbers.show(result['overhead_ms'][name], 'own_ms', digits=2)} a query"


def ranks_caption(result: Mapping[str, Any]) -> str:
    """What the ranks' figure shows."""
    found = result["ranks"]
    text = "Mean rank over seeds, ties shared."
    if found["critical_difference"]:
        text += (
            f" Bars are half of Nemenyi's critical difference ({found['critical_difference']:.2f}): "
            "strategies whose bars overlap are not told apart at 5%."
        )
    if found["friedman_p"] is not None:
        text += f" Friedman's test that all are alike: {chance(found['friedman_p'])}."
    return text


def ceiling(result: Mapping[str, Any]) -> list[str]:
    """What no strategy can do better, in sentences."""
    found, unit = result["ceiling"], result["unit"]
    kept = "" if found["kept"] == found["rows"] else f" that keep the limits ({found['kept']:,})"
    out = [
        f"The best test result among the table's {found['rows']:,} rows{kept} is "
        f"{_number(found['best'], unit)}; the row that is best by validation has "
        f"{_number(found['chosen'], unit)}. Whoever chooses by validation and finds it still has a "
        f"regret of {amount(found['regret'], unit)}."
    ]
    if "tau" in found:
        out.append(
            f"Validation and test order the rows with Kendall's tau {found['tau']:.3f}: no "
            "estimator fitted to validation can be expected to order the test results better."
        )
    if "seeds" in found:
        out.append(
            f"{found['seeds']} trainings of one network differ by a standard deviation of "
            f"{amount(found['spread'], unit)} on average; two of them order the networks with "
            f"Kendall's tau {found['seed_tau']:.3f}. Smaller differences between networks are noise."
        )
    return out


def improvement_caption(result: Mapping[str, Any]) -> str:
    """What the figure of relative improvement shows."""
    found = result["improvement"]
    return (
        "100 (found - average) / average of the test results (Yang et al., 2020), turned for metrics "
        f"to be minimised. The average of all {found['networks']:,} rows that keep the limits, none "
        f"chosen, is {_number(found['random_average'], result['unit'])}. Bars are 95% bootstrap intervals."
    )


def hows(result: Mapping[str, Any]) -> list[str]:
    """How each number came about."""
    out = [
        f"The table: {result['source']}.",
        f"What is best so far is chosen by {result['choice']} among the rows that keep the limits; "
        f"{result['report']} ({result['how']}) is reported."
        if result["choice"] != result["report"]
        else f"{result['choice']} ({result['how']}) both chooses and reports: the table has no "
        "second reading of it.",
        "Every candidate asked for is one query, also one that breaks a limit. Before any row keeps "
        "the limits, regret is the largest that the table allows.",
    ]
    if result["workers"]:
        out.append(
            f"{result['workers']} workers are simulated in virtual time: a free one asks for a "
            "candidate and is told when its seconds are over."
        )
    out.append(
        "Virtual seconds are those of training every epoch, as the table recorded them."
        if result["seconds_known"]
        else "The table knows no training times: a query counts 1."
    )
    out.append(
        "Intervals are percentile bootstrap intervals of the mean over seeds, 1,000 resamples."
    )
    return out


def estimators(result: Mapping[str, Any]) -> list[Sheet]:
    """The criteria of every estimator; none where none were judged."""
    found: Mapping[str, Any] = result.get("estimators") or {}
    if not found:
        return []
    names = sorted(found, key=lambda n: -(numbers.real(found[n]["kendall"]["value"]) or -2.0))
    marks = ("",) * len(names)
    share = next(iter(found.values()))["precision"]
    heads = ("estimator", "Kendall's tau", "Spearman", *(f"P@{_k(k)}" for k in share),
             *(f"BR@{_k(k)}" for k in share))  # fmt: skip
    rows = []
    for name in names:
        one = found[name]
        cells = [_figure(one["kendall"]), _figure(one["spearman"])]
        cells += [_figure(one["precision"][k]) for k in share]
        cells += [_figure(one["best_rank"][k], 4) for k in share]
        rows.append((name, *cells))
    out = [
        Sheet("Order, precision and best rank among the best by score", heads, tuple(rows), marks)
    ]
    sized = [n for n in names if "by_complexity" in found[n]]
    if sized:
        groups = found[sized[0]]["by_complexity"]
        heads = ("estimator", *(f"{_span(g)}" for g in groups))
        rows = [
            (n, *(f"{100 * g['gap']:+.1f} (tau {numbers.significant(g['kendall'], 2)})"
                  for g in found[n]["by_complexity"]))
            for n in sized
        ]  # fmt: skip
        caption = "Rank gap in per cent, and tau inside, of networks from small to large"
        out.append(Sheet(caption, heads, tuple(rows), ("",) * len(sized)))
    return out


def _k(k: str) -> str:
    return f"{float(k):.0%}" if float(k) < 1 else k


def _span(group: Mapping[str, float]) -> str:
    return f"{numbers.significant(group['low'])} to {numbers.significant(group['high'])}"


def _figure(band: Mapping[str, Any], digits: int = 3) -> str:
    value, low, high = (numbers.real(band[k]) for k in ("value", "low", "high"))
    if value is None:
        return numbers.DASH
    text = f"{value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
