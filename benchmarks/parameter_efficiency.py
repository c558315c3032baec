"""How many parameters an unlooped model needs for the loop's error, on the sandpile.

Loops of three widths, and a ladder of stacks in depth and width, learn one step of the sandpile of at most 8 rounds
(``benchmarks.sandpile_lab``); ``wide`` and ``single_pass`` stand beside them. The error is the share of test steps of
the trained difficulty with any cell wrong, the loop at as many loops as the largest stack has blocks (equal FLOPs). The
ratio is the parameters of the smallest control of equal error, read off the controls' front (interpolated in
logarithms), over the loop's; where no control reaches the loop it is a lower bound.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.depth_extrapolation import MODELS, choose_rates
from benchmarks.harness import interval, parser, report
from benchmarks.sandpile_lab import LOOPS, TEST, TRAINED, Recipe, load, right, summary, train_all, world_steps

LADDER = {  # family: (hidden, loops) of each size
    "looped": ((16, 16), (24, 16), (32, 16)),
    "stacked": ((16, 4), (16, 8), (16, 16), (32, 4), (32, 8), (32, 16)),
    "wide": ((32, 16),),
    "single_pass": ((32, 16),),
}
FLOOR = 1e-4  # an error of none in the test set is no more than this


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(parameters, error) that no other point beats in both, by parameters."""
    best, kept = math.inf, []
    for parameters, error in sorted(points):
        if error < best:
            kept.append((parameters, error))
            best = error
    return kept


def parameters_for(error: float, points: list[tuple[float, float]]) -> tuple[float, bool]:
    """(parameters of equal error on the controls' front, whether it reaches that error).

    Interpolated linearly in the logarithms of both; beyond the largest control its own size, as a lower bound.
    """
    line = [(math.log(n), math.log(max(e, FLOOR))) for n, e in front(points)]
    goal = math.log(max(error, FLOOR))
    if goal < line[-1][1]:
        return math.exp(line[-1][0]), False
    if goal >= line[0][1]:
        return math.exp(line[0][0]), True
    pairs = zip(line, line[1:], strict=False)
    (n0, e0), (n1, e1) = next((a, b) for a, b in pairs if b[1] <= goal <= a[1])
    return math.exp(n0 + (n1 - n0) * (goal - e0) / (e1 - e0)), True


def evaluate(recipe: Recipe, folder: Path, each: int) -> dict:
    """Error of one trained model, the loop's at ``LOOPS`` loops."""
    data = world_steps(each, TRAINED, TEST)
    depth = LOOPS if recipe.dynamics == "looped" else None
    error = 1.0 - float(right(load(recipe, folder), data, depth)[0].float().mean())
    return summary(recipe, folder) | {"error": round(error, 5)}


def means(rows: list[dict], family: str) -> list[tuple[float, float]]:
    """(parameters, mean error over seeds) of each size of a family."""
    sizes = dict.fromkeys(row["parameters"] for row in rows if row["dynamics"] == family)
    of = {n: [r["error"] for r in rows if (r["dynamics"], r["parameters"]) == (family, n)] for n in sizes}
    return [(n, float(np.mean(errors))) for n, errors in of.items()]


def draw(rows: list[dict], path: Path) -> None:
    """Error against parameters: every seed a dot, the mean of each size joined along each family's front."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=130)
    for family, color in zip(LADDER, ("#1b6ca8", "#edae49", "#66a182", "#d1495b"), strict=True):
        mine = [row for row in rows if row["dynamics"] == family]
        axes.plot([r["parameters"] for r in mine], [max(r["error"], FLOOR) for r in mine], ".", color=color, alpha=0.5)
        line = front(means(rows, family))
        axes.plot(*zip(*((n, max(e, FLOOR)) for n, e in line), strict=True), "o-", color=color, ms=4, label=family)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="share of steps with a cell wrong")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def verdict(rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence), computed from the rows."""
    controls = [point for family in LADDER if family != "looped" for point in means(rows, family)]
    headline, found = {}, []
    for n, error in sorted(means(rows, "looped")):
        errors = [r["error"] for r in rows if (r["dynamics"], r["parameters"]) == ("looped", n)]
        headline[f"error, looped, {n} parameters"] = interval(errors)
        size, reached = parameters_for(error, controls)
        found.append((size / n, reached, n, error))
    ratio, reached, n, error = found[-1]  # the largest loop: the lowest error asked of the controls
    sign = "" if reached else "at least "
    ends = "" if reached else " (no control of the ladder reaches it)"
    wins = "the loop needs fewer parameters" if ratio > 1 else "the loop needs more parameters"
    return headline, (
        f"At an error of {error:.4f} the smallest control has {sign}{ratio:.1f} times the {n} parameters of the "
        f"loop{ends}: {wins}; the other sizes: "
        + ", ".join(f"{'' if r[1] else '>= '}{r[0]:.1f}x at {r[2]}" for r in found if r[2] != n)
        + "."
    )


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=6000, help="optimiser steps of every model")
    p.add_argument("--figure", type=Path, metavar="FILE")
    args = p.parse_args(arguments)
    seeds, steps = (range(1), 200) if args.quick else (range(args.seeds), args.steps)
    folder, each = args.runs / "sandpile", 100 if args.quick else 1000
    bases = {family: replace(MODELS[family], steps=steps) for family in LADDER}
    if not args.quick:
        bases = choose_rates(bases, folder, args.jobs)
    plan = [
        replace(bases[family], hidden=hidden, loops=loops, seed=seed)
        for seed in seeds
        for family, sizes in LADDER.items()
        for hidden, loops in sizes
    ]
    train_all(plan, folder, args.jobs)
    rows = [evaluate(recipe, folder, each) for recipe in plan]
    if args.figure:
        draw(rows, args.figure)
    report("parameter_efficiency", args, seeds, rows, *verdict(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
