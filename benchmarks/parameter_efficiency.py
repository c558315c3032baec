"""How many parameters an unlooped model needs for the loop's error.

Loops of several widths and a ladder of controls learn one step of a world, or five of a DMC task open loop
(``benchmarks.lab``). The error is of test data of the trained difficulty, of one step and open loop of 5, 20 and 50
(each from what was predicted of the one before), the loop at the depth of the largest stack (equal FLOPs, or fewer:
``Recipe.depth``). The ratio is the parameters of the smallest control of equal error, read off the controls' front
(interpolated in logarithms), over the loop's; where no control reaches the loop it is a lower bound, where every
control is better an upper one. It is read off the mean errors, and off those of each seed, all of which must agree
before the loop is said to need fewer. ``--more-of`` earlier results keeps their rows and learning rates and trains
the seeds and sizes that they lack; rows that lack an error are measured anew, and trained anew where their weights are
gone. A model's rate is the best on validation data after a quarter of the steps, which favours large ones; with
``--rates-in-full`` each size has its own, by whole trainings.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import earlier_rows, interval, report
from benchmarks.lab import (
    FLOOR,
    IN_A_ROW,
    TEST,
    Recipe,
    Task,
    choose_rates_in_full,
    count,
    load,
    open_loop_errors,
    predict_errors,
    prepared,
    recipe_of,
    row_name,
    summary,
    train_all,
    with_steps,
)
from benchmarks.plots import plt, save_figure
from benchmarks.tasks import TASKS, lab_parser

QUICK_STEPS = 200
Size = tuple[int, int | None]
ENDS = {"at least ": " (no control of the ladder reaches it)", "at most ": " (all are better)"}
COLORS = plt.get_cmap("tab20").colors


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(parameters, error) that no other point beats in both, by parameters."""
    best, kept = math.inf, []
    for parameters, error in sorted(points):
        if error < best:
            kept.append((parameters, error))
            best = error
    return kept


def parameters_for(error: float, points: list[tuple[float, float]]) -> tuple[float, str]:
    """(parameters of equal error on the controls' front, what kind of figure that is).

    Interpolated linearly in the logarithms of both, and then exact (""). Where no control reaches the error it is the
    size of the best of them, and "at least" so many; where all are better, that of the smallest, and "at most". Where
    all diverged (an error of infinity) the best of them is the largest, and what diverged itself reaches none of them.
    """
    if all(math.isinf(e) for _, e in points):
        sizes = [n for n, _ in points]
        return (min(sizes), "at most ") if math.isinf(error) else (max(sizes), "at least ")
    line = [(math.log(n), math.log(max(e, FLOOR))) for n, e in front(points)]
    goal = math.log(max(error, FLOOR))
    if goal < line[-1][1]:
        return math.exp(line[-1][0]), "at least "
    if goal >= line[0][1]:
        return math.exp(line[0][0]), "at most " if goal > line[0][1] else ""
    pairs = zip(line, line[1:], strict=False)
    (n0, e0), (n1, e1) = next((a, b) for a, b in pairs if b[1] <= goal <= a[1])
    return math.exp(n0 + (n1 - n0) * (goal - e0) / (e1 - e0)), ""


def evaluate(task: Task, name: str, recipe: Recipe, folder: Path, each: int) -> dict:
    """Errors of one trained model, at ``Recipe.depth``."""
    data = task.examples(each, task.trained, TEST)
    model = load(task, recipe, folder)
    found = task.measures(predict_errors(task, model, data, recipe.depth())[0], data.difficulty)
    if task.in_a_row:
        sequence = task.sequence(each, max(task.in_a_row), IN_A_ROW)
        errors = open_loop_errors(task, model, sequence, recipe.depth())
        found |= {row_name(steps): task.pool(errors[:, steps - 1]) for steps in task.in_a_row}
    found = {measure: round(error, 5) for measure, error in found.items()}
    return summary(recipe, folder) | {"model": name, "error": found}


def by_size(rows: list[dict], model: str, measure: str) -> dict[Size, float]:
    """(parameters, loops) -> mean error over seeds of each size of a model, small to large.

    Loops of one width differ in their number alone, and have the same parameters.
    """
    found: dict[Size, list[float]] = {}
    for row in rows:
        if row["model"] == model:
            found.setdefault((row["parameters"], row.get("loops")), []).append(row["error"][measure])
    return {size: float(np.mean(errors)) for size, errors in sorted(found.items())}


def means(rows: list[dict], model: str, measure: str) -> list[tuple[float, float]]:
    """(parameters, mean error over seeds) of each size of a model."""
    return [(n, error) for (n, _), error in by_size(rows, model, measure).items()]


def draw_ladder(axes: plt.Axes, rows: list[dict], model: str, measure: str, style: str, color: str, label: str) -> None:
    """One model: every seed a dot, the mean of each size joined along its front; nothing where all diverged."""
    mine = [(r["parameters"], max(r["error"][measure], FLOOR)) for r in rows if r["model"] == model]
    line = front(means(rows, model, measure))
    if line:
        axes.plot(*zip(*mine, strict=True), ".", color=color, alpha=0.5)
        axes.plot(*zip(*((n, max(e, FLOOR)) for n, e in line), strict=True), style, color=color, ms=5, label=label)


def draw(task: Task, rows: list[dict], path: Path) -> None:
    """Error against parameters: every seed a dot, the mean of each size joined along each model's front.

    Loops are circles on lines, controls crosses on dashes.
    """
    measures = list(rows[0]["error"])
    figure, panels = plt.subplots(1, len(measures), figsize=(3.6 + 4.2 * len(measures), 3.8), dpi=130, squeeze=False)
    for axes, measure in zip(panels[0], measures, strict=True):
        for place, model in enumerate(task.ladder):
            marks = ("x", "o") if place < len(COLORS) else ("+", "s")  # twenty colours, and there may be more models
            style = marks[1] + "-" if task.models[model].shares else marks[0] + "--"
            draw_ladder(axes, rows, model, measure, style, COLORS[place % len(COLORS)], model)
        axes.set(xscale="log", yscale="log", xlabel="parameters", title=f"{task.name}: {measure}")
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel(task.error_name)
    size = min(8.0, 8.0 * 19 / len(task.ladder))  # so many lines are as high as a panel
    panels[0][-1].legend(fontsize=size, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1.0))  # off the dots
    figure.tight_layout()
    save_figure(figure, path)


class Ratio(NamedTuple):
    """Parameters of the smallest control of equal error over those of a loop; ``kind`` as of ``parameters_for``."""

    error: float  # mean over seeds
    ratio: float
    kind: str
    model: str  # with its loops, where it has another size of as many parameters
    parameters: int
    each: list[tuple[float, str]]  # (ratio, kind) of each seed against that seed's own controls
    errors: list[float]  # of each seed

    @property
    def fewer(self) -> bool:
        """Whether the loop needs fewer, by the means and by every seed.

        How few a control needs for an error that all of them are better than ("at most") was not measured.
        """
        return all(ratio > 1 and kind != "at most " for ratio, kind in [(self.ratio, self.kind), *self.each])

    def __str__(self) -> str:
        low, high = min(self.each), max(self.each)
        return f"{self.kind}{self.ratio:.1f} times (by seed {low[1]}{low[0]:.1f} to {high[1]}{high[0]:.1f})"


def ratios(task: Task, rows: list[dict], measure: str) -> list[Ratio]:
    """One for each model of the ladder that shares weights and each of its sizes."""
    sharing = [name for name, recipe in task.models.items() if recipe.shares and name in task.ladder]

    def compare(some: list[dict], name: str, size: Size) -> tuple[float, tuple[float, str]]:
        controls = [p for model in task.ladder if model not in sharing for p in means(some, model, measure)]
        error = by_size(some, name, measure)[size]
        needed, kind = parameters_for(error, controls)
        return error, (needed / size[0], kind)

    by_seed = [[row for row in rows if row["seed"] == seed] for seed in sorted({row["seed"] for row in rows})]
    found = []
    for name in sharing:
        known = by_size(rows, name, measure)
        for n, loops in known:
            error, (ratio, kind) = compare(rows, name, (n, loops))
            errors, each = map(list, zip(*(compare(mine, name, (n, loops)) for mine in by_seed), strict=True))
            alone = sum(n == other for other, _ in known) == 1
            found.append(Ratio(error, ratio, kind, name if alone else f"{name}, {loops} loops", n, each, errors))
    return found


def verdict(task: Task, rows: list[dict]) -> tuple[dict, str]:
    """(headline, a sentence a measure), computed from the rows; a ratio's bounds are the range of the seeds."""
    headline, sentences = {}, []
    for measure in rows[0]["error"]:
        found = ratios(task, rows, measure)
        for r in found:
            headline[f"{measure}: error, {r.model}, {r.parameters} parameters"] = interval(r.errors)
            of_seeds = [ratio for ratio, _ in r.each]
            sizes = {"value": r.ratio, "low": min(of_seeds), "high": max(of_seeds)}
            headline[f"{measure}: {r.kind}ratio, {r.model}, {r.parameters} parameters"] = {
                key: round(value, 2) for key, value in sizes.items()
            }
        best = min(found)  # the lowest error asked of the controls
        ends = ENDS.get(best.kind, "")
        wins = "the loop needs fewer parameters" if best.fewer else "the loop is not shown to need fewer parameters"
        others = ", ".join(f"{r} of {r.parameters} ({r.model})" for r in found if r is not best)
        sentences.append(
            f"{measure}: at an error of {best.error:.4f} the smallest control has {best} the {best.parameters} "
            f"parameters of {best.model}{ends}: {wins}" + (f"; the others: {others}." if others else ".")
        )
    return headline, " ".join(sentences)


def earlier_sizes(task: Task, path: Path, steps: int | None) -> dict[tuple[str, Recipe], dict]:
    """(model, recipe) -> row of an earlier result, all of sizes of the ladder after ``steps`` (None: the task's).

    Raises:
        ValueError: it is none of this benchmark, of this task, or of so many steps.
    """
    found = earlier_rows(path, "parameter_efficiency", task.name)
    try:
        rows = {(row["model"], recipe_of(row)): row for row in found if row["error"]}
        for row in rows.values():  # JSON has no infinity: None is of a training that diverged
            row["error"] = {name: math.inf if error is None else error for name, error in row["error"].items()}
        parameters = {key: row["parameters"] for key, row in rows.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no result of this benchmark ({type(error).__name__})") from None
    for name, recipe in rows:
        base = task.models.get(name) if (recipe.hidden, recipe.loops) in task.ladder.get(name, ()) else None
        free = {key: getattr(recipe, key) for key in ("hidden", "loops", "seed", "learning_rate")}
        if base is None or recipe != replace(base, steps=steps or base.steps, **free):
            raise ValueError(
                f"{path}: {name} is not of this ladder after {steps or 'its usual'} steps: see --steps, --sizes"
            )
        if parameters[name, recipe] != count(task.model(recipe)):
            raise ValueError(f"{path}: {name} has another number of parameters on {task.name}")
    return rows


def earlier_results(task: Task, paths: list[Path], steps: int | None) -> dict[tuple[str, Recipe], dict]:
    """``earlier_sizes`` of several files.

    Raises:
        ValueError: as there, or a size has two learning rates in them.
    """
    found, rates = {}, {}
    for path in paths:
        rows = earlier_sizes(task, path, steps)
        for name, recipe in rows:
            rate = rates.setdefault((name, recipe.hidden, recipe.loops), recipe.learning_rate)
            if rate != recipe.learning_rate:
                raise ValueError(f"{path}: {name} of width {recipe.hidden} has another learning rate, {rate:g}, before")
        found |= rows
    return found


def sizes(
    task: Task, args: argparse.Namespace, folder: Path, earlier: dict[tuple[str, Recipe], dict]
) -> dict[tuple[str, int, int], Recipe]:
    """(model, hidden, loops) -> recipe of each size of the ladder, at the rate of an earlier result or its model's."""
    models = {name: task.models[name] for name in task.ladder}
    bases = with_steps(models, args, QUICK_STEPS)
    known = {name: replace(bases[name], learning_rate=r.learning_rate) for name, r in earlier}
    if not args.rates_in_full:
        unknown = {name: recipe for name, recipe in models.items() if name not in known}
        bases |= known | prepared(task, unknown, folder, args, QUICK_STEPS)
    found = {
        (name, hidden, loops): replace(bases[name], hidden=hidden, loops=loops)
        for name, some in task.ladder.items()
        for hidden, loops in some
    }
    rates = {(name, r.hidden, r.loops): r.learning_rate for name, r in earlier}
    return {key: replace(r, learning_rate=rates.get(key, r.learning_rate)) for key, r in found.items()}


def size(text: str) -> tuple[int, int]:
    """The type of an option: WIDTHxLOOPS. Raises argparse.ArgumentTypeError."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found or int(found[2]) < 4:  # a random depth is drawn in quarters of the loops
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxLOOPS, such as 32x16, of 4 loops or more")
    return int(found[1]), int(found[2])


def main(arguments: list[str]) -> None:
    p = lab_parser(__doc__.splitlines()[0], "sandpile")
    p.add_argument(
        "--more-of", type=Path, nargs="+", metavar="FILE", help="earlier results of this task, to add seeds or sizes"
    )
    p.add_argument(
        "--rates-in-full",
        action="store_true",
        help="a rate for each size, by whole trainings of all seeds; of --more-of for sizes that it lacks",
    )
    p.add_argument("--models", nargs="+", metavar="NAME", help="some of the ladder, loops and controls (default: all)")
    p.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        metavar="WIDTHxLOOPS",
        help="sizes of every model, instead of those of its ladder",
    )
    args = p.parse_args(arguments)
    task, folder = TASKS[args.task](args.runs), args.runs / args.task
    seeds, each = (range(1), 100) if args.quick else (range(args.seeds), 1000)
    asked = tuple(args.sizes or ())
    task.ladder = {name: tuple(dict.fromkeys((*some, *asked))) for name, some in task.ladder.items()}
    try:
        earlier = earlier_results(task, args.more_of or [], args.steps)
    except ValueError as error:
        p.error(f"--more-of {error}")
    if earlier and args.quick:
        p.error("--more-of: not with --quick")
    if args.models:
        known = set(args.models) <= set(task.ladder)
        if not known or {True, False} != {task.models[name].shares for name in args.models}:
            p.error(f"--models: loops and controls of {', '.join(map(repr, task.ladder))}")
        task.ladder = {name: some for name, some in task.ladder.items() if name in args.models}
    if asked:
        task.ladder = dict.fromkeys(task.ladder, asked)
    earlier = {(n, r): row for (n, r), row in earlier.items() if (r.hidden, r.loops) in task.ladder.get(n, ())}
    ladder = sizes(task, args, folder, earlier)
    if {name for name, _ in earlier} >= set(task.ladder) and not args.rates_in_full:
        args.rates = None  # nothing was chosen from them: the earlier result's stand in the rows
    if args.rates_in_full:
        rated = {(name, r.hidden, r.loops) for name, r in earlier}
        ladder |= choose_rates_in_full(task, {k: r for k, r in ladder.items() if k not in rated}, seeds, folder, args)
    plan = [(key[0], replace(recipe, seed=seed)) for seed in seeds for key, recipe in ladder.items()]
    whole = {key: row for key, row in earlier.items() if set(row["error"]) == set(task.measured)}
    train_all(task, [recipe for name, recipe in plan if (name, recipe) not in whole], folder, args.jobs, args.device)
    rows = [whole.get((name, recipe)) or evaluate(task, name, recipe, folder, each) for name, recipe in plan]
    if args.figure:
        draw(task, rows, args.figure)
    report("parameter_efficiency", args, seeds, rows, *verdict(task, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
