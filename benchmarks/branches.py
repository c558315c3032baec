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

from benchmarks.ablations import CHANGES, own_changes
from benchmarks.harness import curve, interval, parser, refusing, report, train_all
from loopwm.config import Config, flatten, load_config, save_config
from loopwm.training.run_dir import read_run

UNCHANGED = "unchanged"
# What would make a branch first do, all at once, what its run left undone.
REFUSED = ("agent.update_ratio", "seed")


def as_words(cfg: Config) -> list[str]:
    """The command line that gives ``cfg``, but for its directory."""
    told = ("task.suite", "task.id", "run_dir")  # the first two by task=
    return [f"task={cfg.task.id}", *(f"{key}={value}" for key, value in flatten(cfg).items() if key not in told)]


def branch(run: Path, folder: Path, cfg: Config) -> None:
    """Copy what ``run`` goes on from, where there is no copy yet, as a run of the settings ``cfg``."""
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.copytree(run / "checkpoints", draft / "checkpoints")
        shutil.copy(run / "metrics.jsonl", draft)
        save_config(cfg, draft / "config.yaml")
        draft.rename(folder)


def gained(run_dir: Path, after: int) -> float:
    """Mean of the evaluations past ``after`` frames."""
    return float(np.mean([value for at, value in curve(run_dir) if at > after]))


def read_changes(p: ArgumentParser, named: list[str], own: list[str]) -> dict[str, tuple[str, ...]]:
    """What the command line asks for; ends with one line where it cannot be done."""
    changes = {name: CHANGES[name] for name in named} | own_changes(p, own, UNCHANGED)
    for name, words in changes.items():
        keys = (word.partition("=")[0] for word in words)
        if bad := [key for key in keys if key in REFUSED or "." not in key]:
            p.error(f"{name}: {bad[0]} cannot change in the middle of a run")
    if not changes:
        p.error("name a --change or a --set-change")
    return {UNCHANGED: ()} | changes


@refusing
def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("run", type=Path, nargs="+", help="finished runs, each with a checkpoint")
    p.add_argument("--frames", type=int, default=20_000, help="how far each branch goes on, env frames")
    p.add_argument("--change", nargs="*", default=[], choices=CHANGES, metavar="NAME", help=", ".join(CHANGES))
    p.add_argument("--set-change", nargs="*", default=[], metavar='NAME="KEY=VALUE ..."', help="a change of your own")
    args = p.parse_args(arguments)
    changes = read_changes(p, args.change, args.set_change)
    frames, folder = min(args.frames, 4000) if args.quick else args.frames, args.runs / "branches"
    jobs: dict[tuple[Path, str], tuple[Path, list[str]]] = {}
    found = {run: read_run(run) for run in args.run}
    for run, (cfg, at) in found.items():
        for name, words in changes.items():
            length = [f"frames={at + frames}", f"eval_every={max(1, frames // 2)}"]
            overrides = [*as_words(cfg), *words, *length]
            load_config(overrides)  # before anything is copied or trained
            jobs[run, name] = folder / f"{run.resolve().name}__{name}_{frames}", overrides
    for (run, _), (copy, overrides) in jobs.items():
        branch(run, copy, load_config(overrides))
    train_all(dict(jobs.values()), args.jobs)

    rows, headline = [], {}
    for name, words in changes.items():
        gains = [gained(jobs[run, name][0], found[run][1]) for run in args.run]
        rows += [
            {"run": str(run), "from": found[run][1], "change": name, "words": words, "return": value}
            for run, value in zip(args.run, gains, strict=True)
        ]
        if name == UNCHANGED:
            base = gains
        else:
            headline[f"{name} - {UNCHANGED}"] = interval(np.subtract(gains, base))
    differences = "; ".join(f"{name} {figure['value']:+.0f}" for name, figure in headline.items())
    verdict = f"Mean return over the {frames} frames after a checkpoint, over {len(args.run)} runs: {differences}."
    report("branches", args, [], rows, headline, verdict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
