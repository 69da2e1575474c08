"""Fills the tables of benchmarks.md from benchmarks/results: run before building the site.

What stands between `<!-- table: NAME -->` and `<!-- end -->` is written anew by the function of that
name; a table whose results are not there is left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = Path(__file__).parent / "benchmarks.md"
TITLES = {
    "nb201:dataset=cifar10": "NAS-Bench-201, CIFAR-10",
    "nb201:dataset=cifar100": "NAS-Bench-201, CIFAR-100",
    "nb_macro": "NAS-Bench-Macro",
}
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def strategies_quality(found: dict[str, Any]) -> str:
    """Mean regret of every strategy on every table, best at the last budget first."""
    budgets = [str(b) for b in (25, 50, 100, 150, 300)]
    parts = []
    for name, part in found["tables"].items():
        rows = {n: r for n, r in part["strategies"].items() if "budgets" in r}

        def last(item: tuple[str, Any]) -> tuple[float, ...]:
            # runs that were shorter stand behind, by what they reached
            means = [item[1]["budgets"].get(b, {"mean": float("inf")})["mean"] for b in budgets]
            return tuple(reversed(means))

        lines = []
        for n, r in sorted(rows.items(), key=last):
            cells = [f"{r['budgets'][b]['mean']:.2f}" if b in r["budgets"] else "" for b in budgets]
            best = r["queries_to_best"]["median"]
            lines.append([n, r["seeds"], *cells, best if best else "not found"])
        head = ["strategy", "seeds", *budgets, "queries to the best, median"]
        parts.append(f"**{TITLES[name]}**\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def strategies_speed(found: dict[str, Any]) -> str:
    """Processor milliseconds a candidate, and what a trial on record costs."""
    asked = found["ask_and_tell_ms"]
    columns = ("nb201, batch 1", "nb201, batch 20", "twenty, batch 1", "twenty, batch 20")
    head = ["strategy", "NAS-Bench-201's space, one at a time", "20 at a time",
            "20 decisions, one at a time", "20 at a time"]  # fmt: skip
    lines = [
        [n, *(number(asked[c][n]["cpu_ms"]) if n in asked[c] else "" for c in columns)]
        for n in asked[columns[0]]
    ]
    trials = [[n, r["cpu_ms"], r["wall_ms"]] for n, r in found["records"].items()]
    head_trials = ["a trial on record", "processor ms", "wall ms"]
    runs = [
        [n, number(r["cpu_seconds"]), number(r["wall_seconds"])]
        for n, r in found["regularised_evolution_100_runs_of_300"].items()
    ]
    head_runs = ["100 runs of 300 queries of regularised evolution", "processor s", "wall s"]
    return "\n\n".join((table(head, lines), table(head_trials, trials), table(head_runs, runs)))


def predictors(found: dict[str, Any]) -> str:
    """Kendall's tau by the number of labels."""
    parts = []
    for name, part in found["tables"].items():
        sizes = ["10", "20", "50", "78", "156", "500"]
        lines = [
            [n, *(f"{r['tau'][s]:.3f}" if s in r["tau"] else "" for s in sizes)]
            for n, r in part.items()
        ]
        parts.append(f"**{TITLES[name]}**\n\n{table(['predictor', *sizes], lines)}")
    return "\n\n".join(parts)


def one_shot_rank(found: dict[str, Any]) -> str:
    """Kendall's tau of one-shot estimates by how weights are shared, best first."""
    lines = [
        [
            n,
            r["seeds"],
            f"{r['tau_test']:.3f} ({r['tau_test_sd']:.3f})",
            f"{r['tau_validation']:.3f} ({r['tau_validation_sd']:.3f})",
            round(r["steps"]),
            round(r["seconds"]),
        ]
        for n, r in found["summary"].items()
    ]
    head = ["sharing", "seeds", "tau, test (sd)", "tau, validation (sd)", "steps", "processor s"]
    lines.append(
        ["multiply-accumulates, no training", "", f"{found['free']['macs']:.3f}", "", "", ""]
    )
    return table(head, lines)


def supernet_speed(found: dict[str, Any]) -> str:
    """Times faster than the fastest peer, by the wall's clock and by the processor's."""
    parts = []
    for threads, part in found["threads"].items():
        lines = []
        for name, row in part["against_peers"].items():
            peers = row["peers"].values()
            lines.append(
                [
                    name,
                    f"{row['least_times_faster']:.2f}",
                    f"{min(p['times_less_cpu'] for p in peers):.2f}",
                    f"{row['most_memory']:.2f}",
                    row["goal"],
                    "yes" if row["met"] else "no",
                ]
            )
        head = ["step", "times faster, wall", "processor", "memory", "goal", "met (by the wall)"]
        own = [
            [
                name,
                *(f"{row[k]:.2f}" if k in row else "" for k in ("memory", "peak_mib", "seconds")),
            ]
            for name, row in part["of_espalier"].items()
        ]
        head_own = ["within Espalier", "memory", "peak memory", "time"]
        title = f"**{threads} thread{'s' if threads != '1' else ''}, {found['rounds']} rounds**"
        parts.append("\n\n".join((title, table(head, lines), table(head_own, own))))
    return "\n\n".join(parts)


def relax_quality(found: dict[str, Any]) -> str:
    """The table that the benchmark wrote."""
    return "\n".join(found["table"])


def shrink_vs_peers(found: dict[str, Any]) -> str:
    """Test accuracy of every method at every share of the latency, a table a model."""
    parts = []
    for model in dict.fromkeys(o["model"] for o in found["originals"]):
        lines = [line for line in found["summary"] if line["model"] == model]
        rows = [row for row in found["rows"] if row["model"] == model]
        asked = {n: len({r["seed"] for r in rows if r["method"] == n}) for n in _methods(rows)}
        cells = [
            [n, seeds, *(_reached(line.get(n), seeds) for line in lines)]
            for n, seeds in asked.items()
        ]
        for told, key in (
            ("espalier, ahead of the best of the others", "ahead_of_best"),
            ("espalier mix, ahead of the best of the others", "mix_ahead_of_best"),
            ("espalier mix, ahead of the better of widths or bits alone", "mix_ahead_of_either"),
        ):
            ahead = [f"{100 * line[key]:+.1f}" if key in line else "" for line in lines]
            if any(ahead):
                cells.append([told, "", *ahead])
        head = ["", "seeds", *(f"{line['share']:.0%}" for line in lines)]
        tests = (o["test"] for o in found["originals"] if o["model"] == model)
        own = " and ".join(f"{100 * test:.1f}" for test in tests)
        parts.append(f"**{model}**, {own}\n\n{table(head, cells)}")
    return "\n\n".join(parts)


def _methods(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ours first, then by name."""
    return sorted({r["method"] for r in rows}, key=lambda n: (not n.startswith("espalier"), n))


def _reached(cell: dict[str, Any] | None, seeds: int) -> str:
    """Mean accuracy, its span, the share of the latency; how many seeds have no such network."""
    if cell is None:
        return "can't"
    span = f"{100 * cell['min']:.1f} to {100 * cell['max']:.1f}, {cell['ratio']:.0%}"
    short = seeds - cell["seeds"]
    return f"{100 * cell['test']:.1f} ({span})" + (f"; {short} can't" if short else "")


LANGUAGE = {
    "dense": "the byte model, 1.07 million weights",
    "stories": "the Llama of 260,032 weights",
    "experts": "the mixture of 8 experts that reads bytes, 3.3 million weights",
    "looking": "the byte model that copies",
    "bytes": "the byte model of six blocks",
}


def language_vs_peers(found: dict[str, Any]) -> str:
    """Held-out loss of every way at every share of the bytes, a table a model."""
    parts = []
    for model, shares in found["summary"].items():
        rows = [r for r in found["rows"] if r["model"] == model]
        names = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "untouched"))
        before = next(iter(shares.values()))["untouched"]["loss"]
        names = sorted(set(names) - {"espalier mix"}, key=lambda n: ("espalier" not in n, n))
        mix = [f"{shares[s]['espalier mix']['loss']:.3f}" for s in shares]
        lines = [["espalier mix", *mix]]
        lines += [[n, *(_loss(shares[s].get(n)) for s in shares)] for n in names]
        parts.append(f"**{LANGUAGE[model]}**, {before:.3f} before\n\n{table(['', *shares], lines)}")
    return "\n\n".join(parts)


def _loss(cell: dict[str, Any] | None) -> str:
    """Mean loss, and in how many draws the mix is lower."""
    if cell is None:
        return "can't"
    return f"{cell['loss']:.3f} ({cell['mix_is_lower']} of {cell['of']})"


def language_kv(found: dict[str, Any]) -> str:
    """Bits a byte, and the loss of what was copied, at every share of the cache, a table a subject."""
    parts = []
    for subject, own in found["summary"].items():
        shares = sorted({n.split("@")[1] for n in own if "@" in n and "," not in n}, reverse=True)
        names = list(dict.fromkeys(n.split("@")[0] for n in own if isinstance(own[n], dict)))
        names = [n for n in names if n != "exact"]
        lines = [[n, *(_kept(own.get(f"{n}@{s}")) for s in shares)] for n in sorted(names)]
        lines.sort(key=lambda line: (line[0] != "mix", "mix" not in line[0], line[0]))
        for key, what in (("bits_per_byte", "bits a byte"), ("answer_loss", "what was copied")):
            told = [own.get(f"ahead of rivals@{s}, {key}", "") for s in shares]
            if any(told):
                lines.append([f"the mix is ahead of all others in {what}", *told])
        head = ["", *(f"{float(s):.0%}" for s in shares)]
        about = f"{_kept(own['exact'])} with the exact cache"
        parts.append(f"**{LANGUAGE[subject]}**, {about}\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def _kept(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "can't"
    answer = f", {cell['answer_loss']:.3f}" if "answer_loss" in cell else ""
    return f"{cell['bits_per_byte']:.3f}{answer}"


def recipes(_: dict[str, Any]) -> str:
    """How often each recipe's check held."""
    lines = []
    for path in sorted(RESULTS.glob("recipe_*.json")):
        found = json.loads(path.read_text())
        name = found["recipe"]
        held = f"{found['held']} of {found['judged']}" if found["judged"] else "not judged"
        lines.append([f"[{name}](recipes/{name}.md)", found["scale"], held])
    return table(["recipe", "scale", "the check held for"], lines)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "strategies_quality": ("strategies_quality.json", strategies_quality),
    "strategies_speed": ("strategies_speed.json", strategies_speed),
    "predictors": ("predictors.json", predictors),
    "one_shot_rank": ("one_shot_rank.json", one_shot_rank),
    "supernet_speed": ("supernet_speed.json", supernet_speed),
    "relax_quality": ("relax_quality.json", relax_quality),
    "shrink_vs_peers": ("shrink_vs_peers.json", shrink_vs_peers),
    "shrink_mix": ("shrink_mix.json", shrink_vs_peers),
    "language_vs_peers": ("language_vs_peers.json", language_vs_peers),
    "language_kv": ("language_kv.json", language_kv),
    "recipes": ("", recipes),
}


def filled(text: str) -> str:
    """The page with its tables written anew. Errors: `KeyError` for a table without a function."""

    def fill(match: re.Match[str]) -> str:
        file, write = TABLES[match[2]]
        path = RESULTS / file
        if not path.exists():
            return match[0]
        found = {} if path.is_dir() else json.loads(path.read_text())
        return f"{match[1]}\n{write(found)}\n\n{match[3]}"

    return _MARKED.sub(fill, text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
