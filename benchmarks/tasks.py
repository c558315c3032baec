"""The worlds of the laboratory by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.grid_tasks import Permutation, Sandpile
from benchmarks.lab import Task
from benchmarks.vector_tasks import Control, TimeWarp

TASKS: dict[str, Callable[[Path], Task]] = {
    "sandpile": lambda runs: Sandpile(),
    "permutation": lambda runs: Permutation(),
    "timewarp-cartpole-swingup": lambda runs: TimeWarp(runs, "cartpole-swingup"),
    "walker-walk-random": lambda runs: Control(runs, "walker-walk", policy=False),
    "walker-walk-policy": lambda runs: Control(runs, "walker-walk", policy=True),
    "cheetah-run-random": lambda runs: Control(runs, "cheetah-run", policy=False),
    "cheetah-run-policy": lambda runs: Control(runs, "cheetah-run", policy=True),
}
WITH_DIFFICULTY = ("sandpile", "permutation", "timewarp-cartpole-swingup")
