"""One change at a time from the checkpoint of a finished run: what a setting does late, without another start's noise.

python -m benchmarks.branches runs/x runs/y --frames 20000 --set-change slow="agent.learning_rate=3e-4"
python -m benchmarks.branches runs/x --change one_step_returns policy_alone

Every branch goes on with the run's weights, optimisers and replay, so two of them differ by what is changed and by the
chaos of what follows, where two runs of two seeds differ by a hundred and more. It says nothing of early learning.
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np

from benchmarks.ablations import CHANGES, parse_changes
from benchmarks.harness import curve, interval, parser, report, train_all
from loopwm.config import Config, ConfigError, flatten, load_config
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.run_dir import read_run

UNCHANGED = "unchanged"
# What would make a branch first do, all at once, what its run left undone.
REFUSED = ("agent.update_ratio", "seed")


def as_words(cfg: Config) -> list[str]:
    """The command line that gives ``cfg``."""
    flat = {key: value for key, value in flatten(cfg).items() if not key.startswith("task.") and key != "run_dir"}
    return [f"task={cfg.task.id}", f"task.action_repeat={cfg.task.action_repeat}"] + [
        f"{key}={value}" for key, value in flat.items()
    ]


def branch(run: Path, folder: Path, frames: int, words: tuple[str, ...]) -> tuple[Path, list[str]]:
    """(directory, overrides) of a copy of ``run`` that goes on for ``frames`` with ``words``; copied where it is new.

    Raises:
        CheckpointError, ConfigError: not a run, or words that are not settings.
    """
    cfg, at = read_run(run)
    overrides = [*as_words(cfg), *words, f"frames={at + frames}", f"eval_every={max(1, frames // 2)}"]
    load_config(overrides)
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        draft.parent.mkdir(parents=True, exist_ok=True)
        rest = shutil.ignore_patterns("summary.json", "events.*", ".lock", "config.yaml", "videos", "train.log")
        shutil.copytree(run, draft, ignore=rest)
        draft.rename(folder)
    return folder, overrides


def gained(run_dir: Path, after: int) -> float:
    """Mean of the evaluations past ``after`` frames."""
    return float(np.mean([value for at, value in curve(run_dir) if at > after]))


def read_changes(p: ArgumentParser, named: list[str], own: list[str]) -> dict[str, tuple[str, ...]]:
    """What the command line asks for; ends with one line where it cannot be done."""
    try:
        changes = {name: CHANGES[name] for name in named} | parse_changes(own)
    except KeyError as error:
        p.error(f"--change {error.args[0]!r}: choose from {', '.join(CHANGES)}")
    for name, words in changes.items():
        keys = {word.partition("=")[0] for word in words}
        if not words or name == UNCHANGED:
            p.error(f'--set-change {name!r}: needs NAME="KEY=VALUE ..."')
        if bad := [key for key in keys if key in REFUSED or "." not in key]:
            p.error(f"{name}: {bad[0]} cannot change in the middle of a run")
    if not changes:
        p.error("name a --change or a --set-change")
    return {UNCHANGED: ()} | changes


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("run", type=Path, nargs="+", help="finished runs, each with a checkpoint")
    p.add_argument("--frames", type=int, default=20_000, help="how far each branch goes on, env frames")
    p.add_argument("--change", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(CHANGES)}")
    p.add_argument("--set-change", nargs="*", default=[], metavar='NAME="KEY=VALUE ..."', help="a change of your own")
    args = p.parse_args(arguments)
    changes = read_changes(p, args.change, args.set_change)
    frames, folder = min(args.frames, 4000) if args.quick else args.frames, args.runs / "branches"
    try:
        starts = {run: read_run(run)[1] for run in args.run}
        jobs = {
            (run, name): branch(run, folder / f"{run.resolve().name}__{name}_{frames}", frames, words)
            for run in args.run
            for name, words in changes.items()
        }
    except (CheckpointError, ConfigError) as error:
        p.error(str(error))
    train_all(dict(jobs.values()), args.jobs)

    rows, headline = [], {}
    for name, words in changes.items():
        gains = [gained(jobs[run, name][0], starts[run]) for run in args.run]
        rows += [
            {"run": str(run), "from": starts[run], "change": name, "words": words, "return": value}
            for run, value in zip(args.run, gains, strict=True)
        ]
        if name == UNCHANGED:
            base = gains
        else:
            headline[f"{name} - {UNCHANGED}"] = interval(np.subtract(gains, base))
    found = "; ".join(f"{name} {figure['value']:+.0f}" for name, figure in headline.items())
    verdict = f"Mean return over the {frames} frames after a checkpoint, over {len(args.run)} runs: {found}."
    report("branches", args, [], rows, headline, verdict)


if __name__ == "__main__":
    main(sys.argv[1:])
