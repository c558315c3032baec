"""What the parts of a loop are worth: one of them changed at a time, on a world that needs depth.

Every design is an uncertified loop of the laboratory (``benchmarks.grid_tasks``) that starts from h0, with one thing
else: how the input is injected, how the training depth is drawn (for each batch, uniformly; always the same; or for
each example by one of the library's samplers, of the same mean), a loss at a random earlier loop too, or a block of
two layers in the place of one. That has half as many loops, so that all have the same FLOPs, and the parameters of a
second layer; the two are gone through in turn (ABAB) or each for all of its loops (AABB: MobileLLM, 2402.14905). Each
design has the learning rate that is best on validation data after whole trainings of the first ``--rate-seeds``.
Errors are of the trained difficulty, one step and open loop of several, at the loops of the controls' FLOPs, and of
harder steps than any in training at four times as many.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.depth_extrapolation import LONGEST
from benchmarks.harness import interval, report
from benchmarks.lab import FLOOR, TEST, Recipe, Task, choose_rates_in_full, load, predict_errors, train_all, with_steps
from benchmarks.parameter_efficiency import evaluate as evaluate_trained
from benchmarks.plots import plt, save_figure
from benchmarks.tasks import TASKS, lab_parser
from loopwm.dynamics import DEPTH_SAMPLERS, INJECTIONS

BASE = "as it is"
RATES = (4e-3, 8e-3, 1.6e-2)  # 8e-3 is the best of 2e-3 to 16e-3 for this loop on permutations (docs/results.md)
QUICK_STEPS, DEEP = 200, 4  # times the loops of the controls' FLOPs, for steps harder than any in training


def designs(task: Task) -> dict[str, Recipe]:
    """Name -> recipe: a loop that starts from h0, and those that differ from it in one thing."""
    base = replace(task.models["looped"], free_loops=0)
    found = {BASE: base}
    found |= {f"injection {name}": replace(base, injection=name) for name in INJECTIONS if name != base.injection}
    found |= {"one depth": replace(base, fixed=True)}
    found |= {f"each its depth, {name}": replace(base, sampler=name) for name in DEPTH_SAMPLERS if name != "fixed"}
    found |= {"early loss": replace(base, early=1.0)}
    twice = replace(base, layers=(1, 2, 1), loops=base.loops // 2)
    return found | {f"two layers {order}": replace(twice, order=order) for order in ("abab", "aabb")}


def evaluate(task: Task, name: str, recipe: Recipe, folder: Path, each: int) -> dict:
    """Errors of one trained design."""
    row = evaluate_trained(task, name, recipe, folder, each)
    data = task.examples(each, LONGEST, TEST)
    errors = predict_errors(task, load(task, recipe, folder), data, DEEP * recipe.loops)[0]
    harder = task.breakdown(errors, data.difficulty)
    row["error"] |= {f"{group} {task.unit}": round(harder[group], 5) for group in task.beyond}
    return row


def verdict(rows: list[dict]) -> tuple[dict, str]:
    """(headline, a sentence): by which measures a design is better or worse than the loop as it is, on every seed."""
    headline, said = {}, []
    names, measures = list(dict.fromkeys(row["model"] for row in rows)), list(rows[0]["error"])
    found = {n: {m: [r["error"][m] for r in rows if r["model"] == n] for m in measures} for n in names}
    for name in names:
        headline |= {f"{name}: error, {m}": interval(found[name][m]) for m in measures}
        pairs = {m: list(zip(found[name][m], found[BASE][m], strict=True)) for m in measures}
        better = [m for m in measures if all(a < b for a, b in pairs[m])]
        worse = [m for m in measures if all(a > b for a, b in pairs[m])]
        parts = [f"{word} by {', '.join(some)}" for word, some in (("better", better), ("worse", worse)) if some]
        if name != BASE:
            said.append(f"{name}: " + (" and ".join(parts) or "no difference that every seed has"))
    seeds = len(found[BASE][measures[0]])
    chance = f"one in {2 ** (seeds - 1)} would agree on every seed by chance" if seeds > 1 else "all are of one seed"
    compared = f"Of {len(said) * len(measures)} comparisons {chance}."
    return headline, f"Beside the loop {BASE}, on every seed: {'; '.join(said)}. {compared}"


def draw(task: Task, rows: list[dict], path: Path) -> None:
    """Error of every design and measure: every seed a dot, the mean a line."""
    names, measures = list(dict.fromkeys(row["model"] for row in rows))[::-1], list(rows[0]["error"])
    figure, panels = plt.subplots(1, len(measures), figsize=(2.4 * len(measures) + 1.6, 3.6), dpi=130, sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        for place, name in enumerate(names):
            errors = [max(row["error"][measure], FLOOR) for row in rows if row["model"] == name]
            axes.plot(errors, [place] * len(errors), ".", color="C0", alpha=0.6)
            axes.plot(np.mean(errors), place, "|", color="C3", ms=12, mew=2)
        axes.set(xscale="log", title=measure)
        axes.grid(alpha=0.25)
    panels[0].set_yticks(range(len(names)), names)
    figure.supxlabel(task.error_name.split(",")[0], fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def main(arguments: list[str]) -> None:
    p = lab_parser(__doc__.splitlines()[0], "permutation", ("permutation", "sandpile"))
    p.add_argument("--rate-seeds", type=int, default=1, help="seeds by whose mean a rate is chosen, from 0 on")
    p.set_defaults(rates=RATES)
    args = p.parse_args(arguments)
    if args.rate_seeds < 1:
        p.error(f"--rate-seeds {args.rate_seeds}: at least 1")
    task, folder = TASKS[args.task](args.runs), args.runs / args.task
    seeds, each = (range(1), 100) if args.quick else (range(args.seeds), 1000)
    plan = with_steps(designs(task), args, QUICK_STEPS)
    if not args.quick:
        plan = choose_rates_in_full(task, plan, range(args.rate_seeds), folder, args)
    runs = [(name, replace(recipe, seed=seed)) for seed in seeds for name, recipe in plan.items()]
    train_all(task, [recipe for _, recipe in runs], folder, args.jobs, args.device)
    rows = [evaluate(task, name, recipe, folder, each) for name, recipe in runs]
    if args.figure:
        draw(task, rows, args.figure)
    report("loop_design", args, seeds, rows, *verdict(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
