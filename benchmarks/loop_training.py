"""Ways to train one and the same loop: back through its loops, or at its fixed point; cold or warm starts.

Each way learns a continuous world of the laboratory (``benchmarks.vector_tasks``) with the same data, steps and first
weights. Unrolled loops have a random or a fixed number in training; implicit gradients (Bai et al. 2019, 1909.01377)
hold at the fixed point, which plain iteration or Anderson acceleration goes to until a step is a thousandth of the
state. A warm start begins each step of a rollout at the loop state of the one before, so it needs a task of several.
Errors are on test data of the trained difficulty (DMC: 1 to 50 steps ahead) at ``Recipe.depth``, after 32 loops, and at
rest: where that rule stops with the way's own solver, or at four times the recipe's loops. ``loops to rest`` are those
of the last step.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import interval, report
from benchmarks.lab import TEST, Recipe, Task, load, predict_errors, prepared, summary, train_all
from benchmarks.tasks import TASKS, lab_parser
from benchmarks.vector_tasks import Control, VectorTask
from loopwm.dynamics import MODES

FULL = 32  # loops
BASE = "unrolled"


def ways(task: Task, mode: str = "certified") -> dict[str, Recipe]:
    """Name -> recipe, all of the same parameters; implicit gradients need a certificate.

    Where a task draws a depth for each batch (1/4 to 5/4 of the recipe's loops, so 3/4 on the mean) there are also the
    mean as a fixed depth, and two spreads around the whole: what chance costs and what a lower mean costs, apart.
    """
    base = replace(task.models["looped"], mode=mode)
    found = {
        BASE: base,
        "fixed": replace(base, fixed=True),
        "fixed_thrice": replace(base, fixed=True, loops=3 * base.loops),
    }
    if not isinstance(task, Control):
        found["fixed_mean"] = replace(base, fixed=True, loops=base.loops * 3 // 4)
        found["around"] = replace(base, quarters=(2, 6))
        found["widely_around"] = replace(base, quarters=(1, 7))
    if MODES[mode].certified:
        found["implicit"] = replace(base, gradient="implicit")
        found["implicit_anderson"] = replace(base, gradient="implicit", solver="anderson")
    return found | ({"warm_start": replace(base, warm=True)} if isinstance(task, Control) else {})


def evaluate(task: VectorTask, name: str, recipe: Recipe, folder: Path, each: int) -> dict:
    """Errors and loops of one trained model."""
    model, data = load(task, recipe, folder), task.examples(each, task.trained, TEST)
    found = {}
    for label, depth in (("trained depth", recipe.depth()), (f"{FULL} loops", FULL), ("settled", None)):
        errors, loops = predict_errors(task, model, data, depth)
        found |= {f"{m}, {label}": round(e, 5) for m, e in task.measures(errors, data.difficulty).items()}
    update = round(1e3 * summary(recipe, folder)["seconds"] / recipe.steps, 2)
    spent = round(float(loops.double().mean()), 2)
    return summary(recipe, folder) | {
        "way": name,
        "error": found,
        "milliseconds an update": update,
        "loops to rest": spent,
    }


def verdict(task: VectorTask, rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence): which ways have a lower error than unrolling, on every seed, and what they take."""
    headline, said = {}, []
    by_way = {name: [row for row in rows if row["way"] == name] for name in dict.fromkeys(r["way"] for r in rows)}
    trained = [measure for measure in rows[0]["error"] if measure.endswith("trained depth")]
    first = next((m for m in trained if m.startswith(f"{task.edge},")), trained[0])  # of several, the trained horizon
    base = [row["error"][first] for row in by_way[BASE]]
    for name, mine in by_way.items():
        for measure in rows[0]["error"]:
            headline[f"{name}: error, {measure}"] = interval([row["error"][measure] for row in mine])
        for figure in ("milliseconds an update", "loops to rest"):
            headline[f"{name}: {figure}"] = interval([row[figure] for row in mine])
        if name != BASE:
            pairs = list(zip((row["error"][first] for row in mine), base, strict=True))
            lower, higher = all(a < b for a, b in pairs), all(a > b for a, b in pairs)
            word = "a lower error than unrolling on every seed" if lower else "no lower error on every seed"
            word = "a higher error than unrolling on every seed" if higher else word
            times = np.mean([r["milliseconds an update"] for r in mine])
            times /= np.mean([r["milliseconds an update"] for r in by_way[BASE]])
            said.append(f"{name} has {word}, at {times:.1f} times its time of an update")
    return headline, f"By {first}: " + "; ".join(said) + "."


def main(arguments: list[str]) -> None:
    worlds = [name for name in TASKS if isinstance(TASKS[name](Path()), VectorTask)]
    p = lab_parser(__doc__.splitlines()[0], "timewarp-cartpole-swingup", worlds)
    p.add_argument("--mode", choices=sorted(MODES), default="certified")
    p.add_argument("--ways", nargs="+", metavar="NAME", help=f"some of them, {BASE!r} among them (default: all)")
    args = p.parse_args(arguments)
    task, folder = TASKS[args.task](args.runs), args.runs / args.task
    seeds, each = (range(1), 100) if args.quick else (range(args.seeds), 1000)
    plan = ways(task, args.mode)
    if args.ways and not {BASE} <= set(args.ways) <= set(plan):
        p.error(f"--ways: {BASE!r} and some of {', '.join(map(repr, list(plan)[1:]))}")
    plan = {name: recipe for name, recipe in plan.items() if name in (args.ways or plan)}
    plan = prepared(task, plan, folder, args, quick_steps=200)
    runs = [(name, replace(recipe, seed=seed)) for seed in seeds for name, recipe in plan.items()]
    train_all(task, [recipe for _, recipe in runs], folder, args.jobs, args.device)
    rows = [evaluate(task, name, recipe, folder, each) for name, recipe in runs]
    report("loop_training", args, seeds, rows, *verdict(task, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
