"""The worlds of the laboratory by name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path

from benchmarks.grid_tasks import Permutation, Sandpile
from benchmarks.harness import device_option, parser
from benchmarks.lab import RATES, Task
from benchmarks.token_tasks import TokenPermutation
from benchmarks.vector_tasks import Control, TimeWarp

TASKS: dict[str, Callable[[Path], Task]] = {
    "sandpile": lambda runs: Sandpile(),
    "permutation": lambda runs: Permutation(),
    "permutation-tokens": lambda runs: TokenPermutation(),
    "timewarp-cartpole-swingup": lambda runs: TimeWarp(runs, "cartpole-swingup"),
    "timewarp-walker-walk": lambda runs: TimeWarp(runs, "walker-walk"),
    "walker-walk-random": lambda runs: Control(runs, "walker-walk", policy=False),
    "walker-walk-policy": lambda runs: Control(runs, "walker-walk", policy=True),
    "cheetah-run-random": lambda runs: Control(runs, "cheetah-run", policy=False),
    "cheetah-run-policy": lambda runs: Control(runs, "cheetah-run", policy=True),
}
WITH_DIFFICULTY = (
    "sandpile",
    "permutation",
    "permutation-tokens",
    "timewarp-cartpole-swingup",
    "timewarp-walker-walk",
)


def positive(text: str) -> float:
    """The type of an option: a number above zero. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return value


def lab_parser(description: str, task: str, names: Collection[str] = TASKS) -> argparse.ArgumentParser:
    """The options of a benchmark of the laboratory: ``parser``'s, and which world, seeds and steps."""
    p = parser(description)
    p.add_argument("--task", choices=sorted(names), default=task)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, help="optimiser steps of every model (default: the task's)")
    p.add_argument(
        "--rates", type=positive, nargs="+", metavar="RATE", default=RATES, help="learning rates to choose from"
    )
    p.add_argument("--figure", type=Path, metavar="FILE")
    p.add_argument(
        "--device", type=device_option, default="cpu", help="cpu or cuda: where models train, --jobs at once"
    )
    return p
