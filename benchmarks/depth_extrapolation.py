"""Steps harder than any in training, at depths from a quarter to sixteen times the controls'.

Loop and controls learn one step of a world up to some difficulty (``benchmarks.lab``), and are tested far beyond it;
on the sandpile also on a larger grid. On DMC tasks they learn five steps open loop, and what is beyond is longer
rollouts. The learning rate of each model is chosen on validation data of the trained difficulty. ``--models`` trains
some of a task's models alone; what the verdict says of controls it says of those.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import interval, report
from benchmarks.lab import TEST, Recipe, Task, load, predict_errors, prepared, summary, train_all
from benchmarks.plots import plt, save_figure
from benchmarks.tasks import TASKS, lab_parser

FACTORS = (0.25, 0.5, 1, 2, 4, 16)  # depths over the controls'
LONGEST = 99  # no world of ours is as difficult


def depths_of(recipe: Recipe) -> list[int | str | None]:
    """Those a model is tested at; a control has its own, and so has a loop whose depth is timed or fixed."""
    return list(dict.fromkeys(recipe.depth(factor) for factor in FACTORS))


def deep(recipe: Recipe) -> int | str | None:
    """Four times the controls' depth, or its own: what stands for a loop in the headline."""
    return recipe.depth(4)


def evaluate(task: Task, name: str, recipe: Recipe, folder: Path, each: int) -> list[dict]:
    """One row a size of the world and depth."""
    model, rows = load(task, recipe, folder), []
    for size in task.sizes:
        data = task.examples(each, LONGEST, TEST, size)
        for depth in depths_of(recipe):
            errors = predict_errors(task, model, data, depth)[0]
            error = {group: round(e, 5) for group, e in task.breakdown(errors, data.difficulty).items()}
            rows.append({"model": name, "seed": recipe.seed, "size": size, "depth": depth, "error": error})
    return [row | {k: v for k, v in summary(recipe, folder).items() if k not in row} for row in rows]


def mean_error(rows: list[dict], name: str, size: int, depth: int | str | None, group: str) -> list[float]:
    """Of every seed."""
    return [r["error"][group] for r in rows if (r["model"], r["size"], r["depth"]) == (name, size, depth)]


def draw(task: Task, rows: list[dict], path: Path) -> None:
    """Error against difficulty at ``deep``, and against depth. Loops are dots or squares, controls crosses."""
    figure, (left, beside) = plt.subplots(1, 2, figsize=(12, 4.2), dpi=130, layout="constrained")
    size, found = task.sizes[0], list(rows[0]["error"])
    for place, (name, recipe) in enumerate(task.models.items()):
        # Ten colours, and more models: the next ten have other marks, and are dashed on the left.
        marks = ("o", "x") if place < 10 else ("s", "+")
        look = {"color": f"C{place % 10}", "marker": marks[not recipe.shares], "ms": 4}
        scores = np.array([mean_error(rows, name, size, deep(recipe), group) for group in found])  # (groups, seeds)
        left.plot(found, scores.mean(1), "--" if place >= 10 else "-", label=name, **look)
        left.fill_between(found, scores.min(1), scores.max(1), color=look["color"], alpha=0.15, linewidth=0)
        if len(depths_of(recipe)) > 1:
            for group, style in zip((task.edge, task.beyond[0]), (":", "-"), strict=True):
                y = [np.mean(mean_error(rows, name, size, d, group)) for d in depths_of(recipe)]
                beside.plot(FACTORS, y, style, **look)
    left.axvspan(found.index(task.edge) + 0.5, len(found) - 0.5, color="#eeeeee", zorder=0)
    left.set(xlabel=f"{task.unit or 'open loop'} (grey: more than in training)", ylabel=task.error_name)
    beside.axvline(1.0, color="#bbbbbb", linewidth=0.8)
    groups = f"dotted: {task.edge} {task.unit}, lines: {task.beyond[0]}"
    beside.set(xscale="log", xlabel="loops over the controls' depth (grey: equal)", title=groups)
    beside.title.set_fontsize(9)
    beside.set_xticks(FACTORS, [str(f) for f in FACTORS])
    beside.minorticks_off()
    for axes in (left, beside):
        if task.exact:
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_yscale("log")  # what was trained on and what was not are far apart
        axes.grid(alpha=0.25)
    figure.legend(
        *left.get_legend_handles_labels(), fontsize=7, frameon=False, handlelength=3.5, loc="outside right upper"
    )
    save_figure(figure, path)


def verdict(task: Task, rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence), computed from the rows."""
    headline, means, size = {}, {}, task.sizes[0]
    for name, recipe in task.models.items():
        for group in (task.edge, *task.beyond):
            headline[f"{name}: error, {group} {task.unit}"] = interval(
                mean_error(rows, name, size, deep(recipe), group)
            )
            means[name, group] = float(np.mean(mean_error(rows, name, size, deep(recipe), group)))
    group, loop = task.beyond[0], task.models["looped"]
    furthest = float(np.mean(mean_error(rows, "looped", size, depths_of(loop)[-1], group)))
    keeps = "keeps" if task.within(furthest, means["looped", group], 0.01) else "loses"
    others = ", ".join(f"{n} {means[n, group]:.2f}" for n, r in task.models.items() if r.shares and n != "looped")
    return headline, (
        f"Trained on {task.edge} {task.unit} at most, the loop, at {deep(loop)} loops for the controls' FLOPs of "
        f"{loop.loops}, {beside_controls(task, rows, means)} and {keeps} its answers at {depths_of(loop)[-1]} "
        f"({furthest:.2f})" + (f"; other loops: {others}." if others else ".")
    )


def beside_controls(task: Task, rows: list[dict], means: dict[tuple[str, str], float]) -> str:
    """What the loop is on the first group beyond the trained, by the mean errors of (model, group), in words."""
    group, size = task.beyond[0], task.sizes[0]
    error = f"{means['looped', group]:.2f}"
    controls = [name for name, recipe in task.models.items() if not recipe.shares]
    if not controls:
        return f"has an error of {error} on {group}"
    best = min(controls, key=lambda name: means[name, group])
    mine, theirs = (mean_error(rows, n, size, deep(task.models[n]), group) for n in ("looped", best))
    ahead = means["looped", group] < means[best, group]
    word = "beats every control" if ahead else "does not beat every control"
    if ahead and any(a >= b for a, b in zip(mine, theirs, strict=True)):
        word += " on the mean, not in every seed,"
    return f"{word} on {group} (error {error} against {means[best, group]:.2f} of {best})"


def main(arguments: list[str]) -> None:
    p = lab_parser(__doc__.splitlines()[0], "sandpile")
    p.add_argument("--models", nargs="+", metavar="NAME", help="some of the task's, 'looped' among them (default: all)")
    args = p.parse_args(arguments)
    task, folder = TASKS[args.task](args.runs), args.runs / args.task
    if args.models and not {"looped"} <= set(args.models) <= set(task.models):
        p.error(f"--models: 'looped' and some of {', '.join(map(repr, task.models))}")
    task.models = {name: recipe for name, recipe in task.models.items() if name in (args.models or task.models)}
    seeds, each = (range(1), 100) if args.quick else (range(args.seeds), 400)
    recipes = prepared(task, task.models, folder, args, quick_steps=400)
    plan = [(name, replace(recipe, seed=seed)) for seed in seeds for name, recipe in recipes.items()]
    train_all(task, [recipe for _, recipe in plan], folder, args.jobs, args.device)
    rows = [row for name, recipe in plan for row in evaluate(task, name, recipe, folder, each)]
    if args.figure:
        draw(task, rows, args.figure)
    report("depth_extrapolation", args, seeds, rows, *verdict(task, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
