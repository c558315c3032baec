"""The main figure of the models alone, from results that other benchmarks wrote: nothing is trained here.

Upper row: share of steps with every part right against how hard a step is, trained range and beyond it. Lower row:
share wrong against parameters, within the trained range. Looped models are those that are told no step's difficulty.

python -m benchmarks.headline --out docs/figures/headline.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.parameter_efficiency import draw_ladder
from benchmarks.plots import plt, save_figure

LOOPED, ONCE, STACK, DEEP, OTHER = "#1b6ca8", "#7fb2d9", "#d1495b", "#8c2f3d", "#999999"


class Line(NamedTuple):
    """One line of the upper row."""

    file: str
    model: str
    depth: int | None  # loops; None: of what is applied once
    label: str
    color: str
    style: str = "-"


class Ladder(NamedTuple):
    """One model of all its sizes, in the lower row."""

    model: str
    label: str
    color: str
    style: str = "o-"


CERTIFIED = "looped, certified in the sup norm"
SANDPILE = "depth_extrapolation_sandpile"
PERMUTATION = "depth_extrapolation_permutation"
DEPTH = {
    "permutations, trained on up to 8 letters": [
        Line(f"{PERMUTATION}_untold", "looped, untold", 64, "looped, 64 loops, 30k", LOOPED),
        Line(f"{PERMUTATION}_untold", "looped, untold", 16, "looped, 16 loops (the stack's FLOPs), 30k", ONCE),
        Line(PERMUTATION, "stacked", None, "stacked, 16 blocks, 339k", STACK),
        Line(f"{PERMUTATION}_deep_stack", "stacked, twice as deep", None, "stacked, 32 blocks, 669k", DEEP),
        Line(PERMUTATION, "wide, sees all", None, "wide, 337k", OTHER),
    ],
    "sandpile, trained on up to 8 rounds": [
        Line(SANDPILE, "looped, of the same cells, uncertified, untold", depth, label, color)
        for depth, label, color in (
            (64, "looped, 64 loops, 8k", LOOPED),
            (16, "looped, 16 loops (the stack's FLOPs), 8k", ONCE),
        )
    ]
    + [
        Line(SANDPILE, f"{CERTIFIED}, untold", 64, "looped, certified, 64 loops, 8k", LOOPED, ":"),
        Line(SANDPILE, "stacked, of the same cells, uncertified", None, "stacked, 86k", STACK),
        Line("depth_extrapolation", "wide", None, "wide, 170k", OTHER),
    ],
}
PARAMETERS = {
    "parameter_efficiency_permutation": [
        Ladder("looped, untold", "looped", LOOPED),
        Ladder("stacked", "stacked", STACK, "x--"),
        Ladder("wide, sees all", "wide", OTHER, "x--"),
        Ladder("deep_thin", "deep_thin", "#7d5ba6", "x--"),
    ],
    "parameter_efficiency_sandpile_rates": [
        Ladder("looped, of the same cells, uncertified, untold", "looped", LOOPED),
        Ladder(f"{CERTIFIED}, untold", "looped, certified", ONCE),
        Ladder("stacked, of the same cells, uncertified", "stacked, the same cells", STACK, "x--"),
        Ladder("stacked", "stacked, convolutions", DEEP, "x--"),
        Ladder("deep_thin", "deep_thin, convolutions", "#7d5ba6", "x--"),
    ],
}


def rows_of(folder: Path, name: str) -> list[dict]:
    """The rows of a result; those of older files hold the share right."""
    rows = json.loads((folder / f"{name}.json").read_text())["rows"]
    return [row | {"error": {k: 1 - v for k, v in row["right"].items()}} if "right" in row else row for row in rows]


def shares_right(folder: Path, line: Line) -> tuple[list[str], np.ndarray]:
    """Names of the groups of difficulty, and the share right (seeds, groups), on the world's own size."""
    rows = [row for row in rows_of(folder, line.file) if row["model"] == line.model]
    size = rows[0]["size"]
    mine = [r for r in rows if r["size"] == size and line.depth in (None, r["depth"])]
    names = [name for name in mine[0]["error"] if name not in ("0", "0-0")]  # what asks for nothing is right always
    return names, np.array([[1 - row["error"][name] for name in names] for row in mine])


def draw_depth(axes: plt.Axes, title: str, folder: Path, lines: list[Line]) -> None:
    """Raises ValueError where lines have other groups of difficulty than the first: they would not be comparable."""
    groups: list[str] = []
    for line in lines:
        names, right = shares_right(folder, line)
        groups = groups or names
        if names != groups:
            raise ValueError(f"{line.file}: {line.model!r} has the groups {names}, not {groups}")
        label = f"{line.label} ({len(right)} seeds)"
        axes.plot(range(len(names)), right.mean(0), line.style, marker="o", ms=4, color=line.color, label=label)
        axes.fill_between(range(len(names)), right.min(0), right.max(0), color=line.color, alpha=0.15, linewidth=0)
    axes.axvspan(len(names) - 2.5, len(names) - 0.6, color="0.93", zorder=0)  # the last two groups are beyond it
    axes.set(title=f"{title} (grey: beyond)", ylabel="share right", ylim=(-0.03, 1.03), xlim=(-0.3, len(names) - 0.6))
    axes.set_xticks(range(len(names)), [name.replace("17-99", "17 and more") for name in names])


def draw_parameters(axes: plt.Axes, title: str, folder: Path, file: str, ladders: list[Ladder]) -> None:
    rows = rows_of(folder, file)
    measure = next(iter(rows[0]["error"]))  # one prediction; rollouts follow
    for ladder in ladders:
        draw_ladder(axes, rows, ladder.model, measure, ladder.style, ladder.color, ladder.label)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="share wrong", title=title)


def main(arguments: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the results")
    p.add_argument("--out", type=Path, default=Path("docs/figures/headline.png"))
    args = p.parse_args(arguments)
    figure, panels = plt.subplots(2, 2, figsize=(11.5, 8), dpi=110, layout="constrained")
    for axes, (title, lines) in zip(panels[0], DEPTH.items(), strict=True):
        draw_depth(axes, title, args.results, lines)
    for axes, (file, ladders), world in zip(panels[1], PARAMETERS.items(), ("permutations", "sandpile"), strict=True):
        draw_parameters(axes, f"{world}, trained range: error against parameters", args.results, file, ladders)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7.5, frameon=False)
    save_figure(figure, args.out)
    print(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
