"""Return by env frames over seeds: any task, the loop and its controls.

python -m benchmarks.returns --task dmc/cup-catch --frames 100000 --seeds 3 --dynamics looped single_pass stacked wide
python -m benchmarks.returns --task eight --frames 100000 --seeds 3 --csv docs/results/returns_100k.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import at_frames, curve, interval, parser, refusing, report, run_commit, train_all, training_run
from loopwm.config import CONTROLS

EIGHT = tuple(
    f"dmc/{name}"
    for name in (
        "cartpole-swingup",
        "cup-catch",
        "cheetah-run",
        "walker-walk",
        "walker-run",
        "hopper-stand",
        "quadruped-walk",
        "finger-turn-easy",
    )
)


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line for every evaluation of every run; frames to the 500 (evaluations fall just after their mark)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("task", "dynamics", "seed", "frames", "return", "frames_per_second", "commit"))
        for row in rows:
            speed = round(float(np.median([value for _, value in row["frames_per_second"]])))
            for at, value in row["curve"]:
                names = (row["task"].removeprefix("dmc/"), row["dynamics"], row["seed"])
                table.writerow((*names, at // 500 * 500, round(value, 1), speed, row["commit"]))


@refusing
def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--task", nargs="+", default=["dmc/cartpole-swingup"], help="task names; eight: the eight of DMC")
    p.add_argument("--frames", type=int, default=50_000)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--first-seed", type=int, default=0, help="of --seeds in a row: a table can grow file by file")
    p.add_argument("--dynamics", nargs="+", default=["looped"], choices=("looped", *CONTROLS))
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, for every run")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write every evaluation of every run there")
    args = p.parse_args(arguments)
    if args.first_seed < 0:
        p.error(f"--first-seed {args.first_seed}: must be at least 0")
    if len(args.dynamics) > 1 and any(word.startswith("dynamics.name=") for word in args.set):
        p.error("--set dynamics.name: takes the place of one --dynamics, not of several")
    args.task = [task for word in args.task for task in (EIGHT if word == "eight" else (word,))]
    seeds = range(args.first_seed, args.first_seed + (2 if args.quick else args.seeds))
    frames = min(args.frames, 20_000) if args.quick else args.frames

    jobs = dict(
        training_run(args.runs, task, dynamics, seed, frames, args.set)
        for seed in seeds
        for task in args.task
        for dynamics in args.dynamics
    )
    train_all(jobs, args.jobs)

    rows, headline = [], {}
    for run_dir, words in jobs.items():
        row = dict(word.split("=", 1) for word in words)
        row["dynamics"] = row.get("dynamics.name", row["dynamics"])  # of one's own, by --set
        curves = {"curve": curve(run_dir), "frames_per_second": curve(run_dir, "time/frames_per_second")}
        rows.append(row | curves | {"commit": run_commit(run_dir)})
    if args.csv:
        write_csv(args.csv, rows)
    for task in args.task:
        for dynamics in dict.fromkeys(row["dynamics"] for row in rows):
            mine = [row for row in rows if row["task"] == task and row["dynamics"] == dynamics]
            headline[f"{task} {dynamics} @{frames}"] = interval([at_frames(row["curve"], frames) for row in mine])
    means = "; ".join(f"{name}: {figure['value']:.0f}" for name, figure in headline.items())
    report("returns", args, seeds, rows, headline, f"Mean return over {len(seeds)} seeds: {means}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
