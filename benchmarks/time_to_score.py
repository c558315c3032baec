"""Wall-clock from process start to an evaluation of at least 800 on dmc/cartpole-swingup, one run at a time.

Start-up, training and all evaluations are inside the clock. Both readings are reported: the first evaluation (mean of
five episodes) at or above the score, and the first of two in a row.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, RunFailed, curve, parser, refusing, report, why_failed
from loopwm.training.interrupt import INTERRUPTED


def timed_run(run_dir: Path, words: list[str], score: float) -> dict[str, float | None]:
    """Train until two evaluations in a row reach ``score`` -> seconds and frames of both readings.

    Raises:
        RunFailed: training failed.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    seen: list[tuple[float, int, float]] = []  # (seconds, frames, return)
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "train.py", *words, f"run_dir={run_dir}"], cwd=ROOT, stdout=log, stderr=log
        )
        while process.poll() is None:
            time.sleep(0.1)
            points = curve(run_dir)
            now = time.perf_counter() - start
            seen += [(now, frames, value) for frames, value in points[len(seen) :]]
            if len(seen) > 1 and min(seen[-1][2], seen[-2][2]) >= score:
                process.terminate()
                process.wait()
                break
    if process.returncode not in (0, INTERRUPTED):  # the latter where it was stopped here
        raise RunFailed(why_failed(process.returncode, Path(log.name)))
    first = next((point for point in seen if point[2] >= score), None)
    pair = next((b for a, b in zip(seen, seen[1:], strict=False) if min(a[2], b[2]) >= score), None)
    return {
        "first_seconds": first and first[0],
        "first_frames": first and first[1],
        "second_seconds": pair and pair[0],
        "second_frames": pair and pair[1],
    }


@refusing
def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--task", default="dmc/cartpole-swingup")
    p.add_argument("--score", type=float, default=800.0)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--frames", type=int, default=100_000, help="give up there")
    p.add_argument("--dynamics", default="looped")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, such as agent=fast")
    args = p.parse_args(arguments)
    seeds = range(2 if args.quick else args.seeds)
    rows = []
    for seed in seeds:
        words = [f"task={args.task}", f"dynamics={args.dynamics}", f"seed={seed}", f"frames={args.frames}", *args.set]
        row = {"seed": seed} | timed_run(args.runs / f"time_{args.dynamics}_s{seed}", words, args.score)
        rows.append(row)
        print(row, flush=True)
    headline = {}
    for key in ("first_seconds", "second_seconds", "first_frames"):
        values = [float("inf") if row[key] is None else row[key] for row in rows]
        figures = {"value": float(np.median(values)), "low": float(min(values)), "high": float(max(values))}
        # A seed that never got there counts as infinitely slow; JSON has no word for that but null.
        headline[key] = {name: round(x, 1) if np.isfinite(x) else None for name, x in figures.items()}
    reached = {key: sum(row[key] is not None for row in rows) for key in ("first_seconds", "second_seconds")}
    verdict = (
        f"Median of {len(rows)} seeds (range in brackets; none: not within {args.frames} frames): first evaluation >= "
        f"{args.score:g} after {headline['first_seconds']['value']} s ({reached['first_seconds']} seeds got there), "
        f"two in a row after {headline['second_seconds']['value']} s ({reached['second_seconds']} seeds)."
    )
    report("time_to_score", args, seeds, rows, headline, verdict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
