"""Return by env frames over seeds: any task, the loop and its controls.

python -m benchmarks.returns --task dmc/cup-catch --frames 100000 --seeds 3 --dynamics looped single_pass stacked wide
"""

from __future__ import annotations

import sys

from benchmarks.harness import at_frames, curve, interval, parser, report, train_all, training_run

CONTROLS = ("single_pass", "stacked", "wide", "deep_thin")


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--task", nargs="+", default=["dmc/cartpole-swingup"])
    p.add_argument("--frames", type=int, default=50_000)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--dynamics", nargs="+", default=["looped"], choices=("looped", *CONTROLS))
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, for every run")
    args = p.parse_args(arguments)
    seeds = range(2 if args.quick else args.seeds)
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
        rows.append(row | {"curve": curve(run_dir), "frames_per_second": curve(run_dir, "time/frames_per_second")})
    for task in args.task:
        for dynamics in args.dynamics:
            mine = [row for row in rows if row["task"] == task and row["dynamics"] == dynamics]
            headline[f"{task} {dynamics} @{frames}"] = interval([at_frames(row["curve"], frames) for row in mine])
    means = "; ".join(f"{name}: {figure['value']:.0f}" for name, figure in headline.items())
    report("returns", args, seeds, rows, headline, f"Mean return over {len(seeds)} seeds: {means}.")


if __name__ == "__main__":
    main(sys.argv[1:])
