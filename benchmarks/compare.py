"""Does the loop help the agent? Interquartile means over tasks and seeds, and the probability of improvement.

python -m benchmarks.compare docs/results/returns_100k.csv docs/results/single_pass_100k.csv --frames 100000
python -m benchmarks.compare docs/results/returns_100k.csv docs/results/controls_40k.csv --frames 40000 --task cup-catch

By rliable (Agarwal et al. 2021, arXiv 2108.13264): stratified bootstrap over the seeds of each task. Returns are
divided by 1000, the most that a DMC task gives. Needs ``pip install -e '.[stats]'``. And the differences paired by
task, of means over seeds, with Student's interval over the tasks: what other tasks might give. With one seed that is
all. Seeds that some task or dynamics lacks are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.ablations import paired
from benchmarks.harness import parser, read_returns, report
from loopwm.config import ConfigError

MOST = 1000.0  # return of a DMC episode
Scores = dict[str, dict[str, dict[int, float]]]  # dynamics -> task -> seed -> return


def read_scores(paths: Iterable[Path], frames: int) -> Scores:
    """CSV of ``benchmarks.returns`` -> dynamics -> task -> seed -> return at ``frames``.

    Raises:
        ConfigError: a file without the columns, a run that stands there twice, or none that got to ``frames``.
    """
    scores: Scores = {}
    for path in paths:
        for task, name, seed, at, value in read_returns(path):
            if at != frames:
                continue
            seeds = scores.setdefault(name, {}).setdefault(task, {})
            if seed in seeds:
                raise ConfigError(f"{path}: {name} on {task} with seed {seed} at {frames} frames is there twice")
            seeds[seed] = value / MOST
    if not scores:
        raise ConfigError(f"no run in these files has an evaluation at {frames} frames")
    return scores


def only(scores: Scores, dynamics: list[str] | None, tasks: list[str] | None) -> Scores:
    """The part of ``read_scores`` that has these names; None: all of it. So that what few have leaves nobody out.

    Raises:
        ConfigError: a name that the files do not have.
    """
    known = {"dynamics": scores, "task": {task for by_task in scores.values() for task in by_task}}
    for word, names in (("dynamics", dynamics), ("task", tasks)):
        for name in names or ():
            if name not in known[word]:
                raise ConfigError(f"--{word} {name!r}: the files have {', '.join(sorted(known[word]))}")
    return {
        name: {task: seeds for task, seeds in by_task.items() if tasks is None or task in tasks}
        for name, by_task in scores.items()
        if dynamics is None or name in dynamics
    }


def matrices(scores: Scores) -> tuple[list[str], list[int], dict[str, np.ndarray]]:
    """(tasks, seeds, dynamics -> (seeds, tasks)) of the tasks that every dynamics has, and the seeds that all have."""
    if len(scores) < 2:
        raise ConfigError(f"nothing to compare: the files have {', '.join(scores)} alone")
    tasks = sorted(set.intersection(*(set(by_task) for by_task in scores.values())))
    if not tasks:
        raise ConfigError("the dynamics in these files share no task")
    seeds = sorted(set.intersection(*(set(by_task[t]) for by_task in scores.values() for t in tasks)))
    if len(seeds) * len(tasks) < 2:
        raise ConfigError(f"the runs in these files share {len(seeds)} seeds of {len(tasks)} tasks: too few")
    return (
        tasks,
        seeds,
        {name: np.array([[by_task[t][s] for t in tasks] for s in seeds]) for name, by_task in sorted(scores.items())},
    )


def compare(runs: dict[str, np.ndarray], base: str, samples: int) -> dict[str, dict[str, float]]:
    """IQM of each dynamics and the probability that ``base`` is the better one, with 95 % bootstrap intervals."""
    from rliable import library, metrics  # an extra: nothing else needs it

    np.random.seed(0)  # rliable resamples by numpy's global stream, whichever it is given
    values, bounds = library.get_interval_estimates(runs, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=samples)
    found = {f"IQM, {name}": _figure(values[name], bounds[name]) for name in runs}
    pairs = {f"{base},{name}": (runs[base], runs[name]) for name in runs if name != base}
    if pairs:
        values, bounds = library.get_interval_estimates(pairs, metrics.probability_of_improvement, reps=samples // 10)
    for pair in pairs:
        found[f"P({base} > {pair.split(',')[1]})"] = _figure(values[pair], bounds[pair])
    return found


def differences(runs: dict[str, np.ndarray], base: str) -> dict[str, dict[str, float]]:
    """Mean difference of return between ``base`` and each other, paired by task (of one task: by seed)."""
    by_pair = {name: list(run.mean(0) if run.shape[1] > 1 else run[:, 0]) for name, run in runs.items()}
    return {f"{base} minus {name}": paired(by_pair[base], mine) for name, mine in by_pair.items() if name != base}


def _figure(value: np.ndarray, bounds: np.ndarray) -> dict[str, float]:
    low, high = np.asarray(bounds).ravel()
    return {"value": round(float(np.ravel(value)[0]), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def verdict(found: dict[str, dict[str, float]], base: str, tasks: list[str], seeds: int) -> str:
    """One sentence: which controls the loop is shown to beat, or to lose to (with one seed: over the tasks)."""
    odds = {name: (figure, 0.5) for name, figure in found.items() if name.startswith("P(")}
    odds = odds or {name: (figure, 0.0) for name, figure in found.items() if " minus " in name}
    better = [name for name, (figure, even) in odds.items() if figure["low"] > even]
    worse = [name for name, (figure, even) in odds.items() if figure["high"] < even]
    said = [f"{base} is better: {', '.join(better)}"] if better else []
    said += [f"{base} is worse: {', '.join(worse)}"] if worse else []
    ends = "; ".join(said) or "no interval excludes that they are alike, so no difference is shown"
    return f"Over {len(tasks)} tasks and {seeds} seeds: {ends}."


def main(arguments: list[str]) -> int:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("results", type=Path, nargs="+", help="CSV files of benchmarks.returns")
    p.add_argument("--frames", type=int, default=100_000)
    p.add_argument("--base", default="looped", help="the dynamics that the others are compared with")
    p.add_argument("--dynamics", nargs="+", help="these alone (default: all that the files have)")
    p.add_argument("--task", nargs="+", help="these alone, as the files name them (default: all)")
    args = p.parse_args(arguments)
    try:
        tasks, seeds, runs = matrices(only(read_scores(args.results, args.frames), args.dynamics, args.task))
        if args.base not in runs:
            raise ConfigError(f"--base {args.base!r}: the files have {', '.join(runs)}")
        found = differences(runs, args.base)
        if len(runs[args.base]) > 1:
            found |= compare(runs, args.base, 500 if args.quick else 20_000)
    except ImportError as error:
        print(f"compare: needs rliable ({error}): pip install -e '.[stats]'", file=sys.stderr)
        return 2
    except (ConfigError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    rows = [{"dynamics": name, "task": task, "returns": [round(float(v) * MOST, 1) for v in runs[name][:, i]]}
            for name in runs for i, task in enumerate(tasks)]  # fmt: skip
    report("compare", args, seeds, rows, found, verdict(found, args.base, tasks, len(seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
