"""What the benchmarks share: training runs as a user starts them, intervals over seeds, one JSON shape."""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch

from agents import resolve_device
from envs import TaskError
from loopwm.config import ConfigError, load_config, read_config
from loopwm.inspect.measure import strict
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.run_dir import changed_settings, commit, file_name, versions

ROOT = Path(__file__).resolve().parents[1]
NOT_OPTIONS = ("quick", "task", "json", "csv", "figure", "runs", "jobs")  # of how a result was made, else written down
LOAD_AT_START = round(os.getloadavg()[0], 2)


def cores() -> list[int | None]:
    """Those that this process may use, by number; where nobody says which, as many Nones."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--quick", action="store_true", help="minutes instead of hours: fewer seeds and frames")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks", help="where training runs are kept")
    p.add_argument("--jobs", type=int, default=len(cores()), help="training runs side by side, a core each")
    return p


class RunFailed(Exception):
    """A training run that a benchmark needs was not made, or is another one."""


def refusing(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """A benchmark's ``main`` that answers what cannot be read, played or trained with one line and exit code 2."""

    @functools.wraps(main)
    def answer(arguments: list[str]) -> int:
        try:
            return main(arguments) or 0
        except (CheckpointError, ConfigError, RunFailed, TaskError, OSError) as error:
            print(f"{Path(main.__code__.co_filename).stem}: {error}", file=sys.stderr)
            return 2

    return answer


def device_option(name: str) -> torch.device:
    """The type of an option ``--device``: auto, cpu, cuda or cuda:N."""
    try:
        return resolve_device(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device_name(device: torch.device) -> str:
    """What was measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"


def interval(values: Sequence[float], samples: int = 10_000) -> dict[str, float]:
    """Mean and 95 % percentile-bootstrap interval over seeds."""
    x = np.asarray(values, float)
    draws = np.random.default_rng(0).choice(x, (samples, len(x))).mean(1)
    with np.errstate(invalid="ignore"):  # of what diverged the ends are no numbers
        low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": round(float(x.mean()), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "load_at_start": LOAD_AT_START}


def report(
    name: str, args: argparse.Namespace, seeds: Sequence[int], rows: list[dict], headline: dict, verdict: str
) -> None:
    """Print the result, and write it as JSON where asked."""
    result = {
        "benchmark": name,
        "quick": args.quick,
        **({"task": args.task} if getattr(args, "task", None) else {}),
        "options": {name: value for name, value in vars(args).items() if name not in NOT_OPTIONS and value is not None},
        "seeds": list(seeds),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "headline": headline,
        "verdict": verdict,
    }
    for key, value in headline.items():
        print(f"{key:48s} {value['value']!s:>10} [{value['low']}, {value['high']}]")
    print(verdict)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(strict(result), indent=1, allow_nan=False, default=str)
        args.json.write_text(text + "\n", encoding="utf-8")


def earlier_rows(path: Path, benchmark: str, task: str) -> list[dict[str, Any]]:
    """The rows of a result that ``report`` wrote.

    Raises:
        ValueError: it is none of this benchmark, or of its ``--quick``, or of another task.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [dict(row) for row in result["rows"]]
        whole = rows and result["benchmark"] == benchmark and not result["quick"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no result of this benchmark ({type(error).__name__})") from None
    if not whole or result.get("task", task) != task:  # files of before say it by their own name alone
        raise ValueError(f"{path}: not a whole result of this benchmark on {task}")
    return rows


def training_run(
    runs: Path, task: str, dynamics: str, seed: int, frames: int, settings: Sequence[str]
) -> tuple[Path, list[str]]:
    """(directory, overrides) of one run: the settings named here are in the name, and ``train`` checks the others."""
    extra = "".join(f"_{word}" for word in settings).replace("/", "-")
    name = f"{file_name(task)}_{dynamics}_{frames}{extra}_s{seed}"
    return runs / name, [f"task={task}", f"dynamics={dynamics}", f"seed={seed}", f"frames={frames}", *settings]


def curve(run_dir: Path, tag: str = "eval/return") -> list[tuple[int, float]]:
    """(env frames, value) of one tag of a run."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["frames"], row[tag]) for row in rows if tag in row]


def read_returns(path: Path) -> list[tuple[str, str, int, int, float]]:
    """(task, dynamics, seed, env frames, return) of every evaluation in a CSV of ``benchmarks.returns``.

    Raises:
        ConfigError: it is none.
    """
    columns = {"task": str, "dynamics": str, "seed": int, "frames": int, "return": float}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [tuple(convert(row[name]) for name, convert in columns.items()) for row in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError, csv.Error):  # ValueError: also what is no UTF-8
        raise ConfigError(f"{path}: not a CSV of benchmarks.returns") from None


def run_commit(run_dir: Path) -> str:
    """The commit that a finished run was trained at, or last resumed at; empty for runs that did not note it down."""
    return json.loads((run_dir / "summary.json").read_text()).get("commit") or ""


def at_frames(points: list[tuple[int, float]], frames: int) -> float:
    """The value of the last point at or before ``frames``."""
    return up_to(points, frames)[-1][1]


def up_to(points: list[tuple[int, float]], frames: int) -> list[tuple[int, float]]:
    """The points at or before ``frames``; evaluations fall a few frames after their mark."""
    return [point for point in points if point[0] <= frames + 64]


def train(run_dir: Path, overrides: Sequence[str], core: int | None = None, one_thread: bool = False) -> Path:
    """Train to the end as a user would, on one core and thread if ``core`` is given; a finished run is kept.

    Raises:
        RunFailed: the run kept there had other settings (an older default, say), or training failed.
    """
    summary = run_dir / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["finished"]:
        if changed := changed_settings(read_config(run_dir / "config.yaml"), load_config(overrides)):
            raise RunFailed(f"{run_dir} was run with {', '.join(changed)}: remove it, or name other --runs")
        return run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"run_dir={run_dir}", "resume=true"]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    env = {**os.environ, "MUJOCO_GL": "disabled"}  # no film: it would be half a minute of software rendering a run
    if core is not None or one_thread:
        env["OMP_NUM_THREADS"] = "1"
    with (run_dir / "train.log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=env)
    if done.returncode:
        raise RunFailed(why_failed(done.returncode, run_dir / "train.log"))
    return run_dir


def why_failed(code: int, log: Path) -> str:
    """What to say of a ``train.py`` that ended with ``code``: its own last line, where it knew what was wrong."""
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return said[-1] if code == 2 and said else f"train.py ended with {code}: see {log}"


def train_all(jobs: dict[Path, Sequence[str]], workers: int) -> None:
    """Train several runs, ``workers`` at a time, one thread each, on the cores this process may use in turn.

    They are pinned there where ``taskset`` is at hand.
    """
    mine, free = cores() if shutil.which("taskset") else [None], Queue()
    for worker in range(workers):
        free.put(mine[worker % len(mine)])

    def one(item: tuple[Path, Sequence[str]]) -> None:
        core = free.get()
        try:
            start = time.perf_counter()
            train(item[0], item[1], core, one_thread=True)
            points = curve(item[0])
            last = f"{points[-1][1]:.1f} at {points[-1][0]}" if points else "no evaluation"
            print(f"{item[0].name:48s} {time.perf_counter() - start:7.0f} s  {last}", flush=True)
        finally:
            free.put(core)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, jobs.items()))


def median_seconds(action: Callable[[], object], repeats: int, warmup: int = 5) -> list[float]:
    """Seconds of each of ``repeats`` calls, after a warm-up."""
    for _ in range(warmup):
        action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times
