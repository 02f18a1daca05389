"""Pictures of results: ``python -m benchmarks.plots RESULT.json... --output FOLDER``, as SVG and PNG.

For each result: the distribution of every case, the ratios to the reference, and the stacked parts of
what has parts (a boot). Gauges that are no times have no picture: the table has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .compare import read
from .statistics import CURVE, quantile

COLUMNS = 3

# The same result gives the same file, and its text is text.
matplotlib.rcParams.update({"svg.hashsalt": "chv", "svg.fonttype": "none"})


def distributions(report: dict[str, Any]) -> Figure | None:
    """One small plot a case: which part of the samples lies below which time."""
    cases = [
        case for case in report["cases"] if any("curve_ns" in who for who in case["contestants"].values())
    ]
    if not cases:
        return None
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    size = (4.2 * columns, 2.8 * rows + 0.4)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, case in zip(axes.flat, cases, strict=False):
        for name, who in case["contestants"].items():
            if "curve_ns" in who:
                axis.plot([ns / 1000 for ns in who["curve_ns"]], CURVE, label=name, linewidth=1.2)
        axis.set_title(case["name"], fontsize=9)
        axis.set_xscale("log")
        axis.set_xlabel("us", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_visible(False)
    lines: dict[str, Any] = {}
    for axis in axes.flat:
        lines.update({line.get_label(): line for line in axis.get_lines()})
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8)
    figure.suptitle(f"{report['benchmark']}: the part of the samples that is below a time", fontsize=11)
    return figure


def ratios(report: dict[str, Any]) -> Figure | None:
    """Bars of each contestant's ratio to the reference, with the spread between rounds."""
    key = f"ratio_to_{report['reference']}"
    cases = [case for case in report["cases"] if any(key in who for who in case["contestants"].values())]
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    names = [name for name in names if name != report["reference"]]
    if not cases or not names:
        return None
    figure, axis = pyplot.subplots(figsize=(max(7.0, 1.1 * len(cases)), 4.2))
    width = 0.8 / len(names)
    bars: list[tuple[float, float]] = []
    for number, name in enumerate(names):
        at, heights, spreads = [], [], []
        for place, case in enumerate(cases):
            who = case["contestants"].get(name, {})
            if key in who:
                at.append(place + (number - len(names) / 2 + 0.5) * width)
                heights.append(who[key])
                spreads.append(who["ratio_spread"] / 2)
        axis.bar(at, heights, width, yerr=spreads, label=name, error_kw={"linewidth": 0.8})
        bars += zip(at, heights, strict=True)
    cut_off(axis, bars)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(cases)), [case["name"] for case in cases], rotation=30, ha="right", fontsize=8)
    finish_axis(axis, f"{report['benchmark']}: median of the rounds' ratios to {report['reference']}")
    figure.tight_layout()
    return figure


def cut_off(axis: Axes, bars: list[tuple[float, float]]) -> None:
    """Where a few bars are far higher than the others, show those: the high ones end in their number."""
    ordered = sorted(height for _, height in bars)
    top = 1.5 * quantile(ordered, 0.8)
    if ordered[-1] < 2 * top:
        return
    axis.set_ylim(0, top)
    for at, height in bars:
        if height > top:
            axis.text(at, 0.99 * top, f"{height:.3g}", rotation=90, ha="center", va="top", fontsize=7)


def parts(report: dict[str, Any]) -> Figure | None:
    """Stacked bars of what contestants' times consist of (``parts_ms`` of a contestant)."""
    bars = [
        (f"{case['name']}\n{name}", who["parts_ms"])
        for case in report["cases"]
        for name, who in case["contestants"].items()
        if "parts_ms" in who
    ]
    if not bars:
        return None
    figure, axis = pyplot.subplots(figsize=(max(7.0, 0.9 * len(bars)), 4.5))
    bottoms = [0.0] * len(bars)
    for part in dict.fromkeys(part for _, found in bars for part in found):
        heights = [found.get(part, 0.0) for _, found in bars]
        axis.bar(range(len(bars)), heights, bottom=bottoms, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axis.set_xticks(range(len(bars)), [label for label, _ in bars], rotation=30, ha="right", fontsize=7)
    axis.set_ylabel("ms")
    finish_axis(axis, f"{report['benchmark']}: what the time consists of")
    figure.tight_layout()
    return figure


def finish_axis(axis: Axes, title: str) -> None:
    """What all bar charts have."""
    axis.set_title(title, fontsize=11)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)


KINDS = {"distributions": distributions, "ratios": ratios, "parts": parts}


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write all pictures that a result gives; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, draw in KINDS.items():
        figure = draw(report)
        if figure is None:
            continue
        for suffix in ("svg", "png"):
            path = folder / f"{report['benchmark']}-{kind}.{suffix}"
            figure.savefig(path, dpi=110, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
        pyplot.close(figure)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Print the names of what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    for path in options.results:
        for written in plot(read(path), options.output):
            print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
