"""A run directory: who may write into it, and what it says about itself."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from loopwm.config import Config, ConfigError, flatten, read_config, save_config
from loopwm.training.checkpoint import CheckpointError, Checkpoints, lock_run

# What a resumed run may change: where and how long it runs, and what it shows. Anything else would be another run.
FREE_ON_RESUME = {
    "frames", "run_dir", "resume", "eval_every", "eval_episodes", "log_every", "checkpoint_every", "device", "threads",
    "workers", "video", "replay.path",
}  # fmt: skip


def open_run(cfg: Config) -> tuple[Path, IO[str]]:
    """Claim the run directory of ``cfg`` and write config.yaml; returns (directory, lock to hold while it is used).

    Raises:
        CheckpointError: it is in use, or holds a run and ``resume`` is false.
        ConfigError: ``resume`` is true and the saved run was another one.
    """
    run_dir = Path(cfg.run_dir or f"runs/{_slug(cfg)}")
    lock = lock_run(run_dir)
    saved = run_dir / "config.yaml"
    if saved.exists():
        if not cfg.resume:
            raise CheckpointError(f"{run_dir} already holds a run: add resume=true to go on, or choose another run_dir")
        changed = _changes(read_config(saved), cfg)
        if changed:
            raise ConfigError(f"{run_dir} was begun with {'; '.join(changed)}: resume it with the same settings")
    save_config(cfg, saved)
    return run_dir, lock


def _slug(cfg: Config) -> str:
    task = cfg.task.id.replace("/", "-")
    return f"{task}-{cfg.dynamics.name}-s{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _changes(old: Config, new: Config) -> list[str]:
    before, after = flatten(old), flatten(new)
    return [
        f"{key}={before.get(key)} (now {value})"
        for key, value in after.items()
        if key not in FREE_ON_RESUME and before.get(key) != value
    ]


def read_run(run_dir: Path) -> tuple[Config, int]:
    """Config and newest checkpoint (env frames) of a run.

    Raises:
        CheckpointError: not a run directory, or no complete checkpoint in it.
    """
    if not (run_dir / "config.yaml").exists():
        raise CheckpointError(f"{run_dir} is not a run directory: it has no config.yaml")
    frames = Checkpoints(run_dir).frames()
    if not frames:
        raise CheckpointError(f"{run_dir} holds no complete checkpoint yet")
    return read_config(run_dir / "config.yaml"), frames[-1]


def describe(cfg: Config, packages: Iterable[str] = ("torch", "numpy", "gymnasium", "dm-control", "mujoco")) -> dict[str, Any]:
    """What summary.json says of a run beside its results; ``config`` is for the hparams view."""
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {
        "task": cfg.task.id,
        "agent": cfg.agent.name,
        "dynamics": cfg.dynamics.name,
        "seed": cfg.seed,
        "versions": versions,
        "config": flatten(cfg),
    }
