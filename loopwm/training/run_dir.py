"""A run directory: who may write into it, and what it says about itself."""

from __future__ import annotations

import contextlib
import glob
import itertools
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from loopwm.config import Config, ConfigError, flatten, read_config
from loopwm.training.checkpoint import CheckpointError, Checkpoints, lock_run

PACKAGES = ("torch", "numpy", "gymnasium", "dm-control", "mujoco")  # whose versions a run notes down

# What a resumed run may change: where and how long it runs, and what it shows. Else it would be another run.
FREE_ON_RESUME = {
    "frames", "run_dir", "resume", "eval_every", "eval_episodes", "log_every", "checkpoint_every", "keep_checkpoints",
    "video_every", "device", "threads", "workers", "replay.path", "agent.eval_samples",
}  # fmt: skip


def open_run(cfg: Config) -> tuple[Path, IO[str]]:
    """Claim the run directory of ``cfg``; returns (directory, lock to hold while it is used).

    Without ``run_dir``, resuming takes the newest run of the same settings under runs/, if there is one.
    config.yaml is left to the caller, to be written once the run can begin: a mistyped task claims nothing.

    Raises:
        CheckpointError: it is in use, holds a run and ``resume`` is false, or holds checkpoints of nobody knows which.
        OSError: it cannot be written.
        ConfigError: ``resume`` is true and the saved run was another one.
    """
    run_dir = Path(cfg.run_dir) if cfg.run_dir else cfg.resume and _newest_run(cfg) or _new_run(cfg)
    if run_dir.is_file():
        raise CheckpointError(f"run_dir={run_dir}: is a file, and a run is written to a folder")
    lock = lock_run(run_dir)
    try:
        _check_claim(run_dir, cfg)
    except Exception:
        lock.close()  # now: who keeps the error keeps this frame
        raise
    return run_dir, lock


def _check_claim(run_dir: Path, cfg: Config) -> None:
    """That ``cfg`` may begin or go on there. Raises what ``open_run`` does."""
    saved = run_dir / "config.yaml"
    if saved.exists():
        if not cfg.resume:
            raise CheckpointError(f"{run_dir} already holds a run: add resume=true to go on, or choose another run_dir")
        changed = changed_settings(read_config(saved), cfg)
        if changed:
            raise ConfigError(f"{run_dir} was begun with {'; '.join(changed)}: resume it with the same settings")
    elif Checkpoints(run_dir).frames():
        raise CheckpointError(f"{run_dir} holds checkpoints but no config.yaml: choose another run_dir")
    elif cfg.resume:
        print(f"{run_dir} holds no run to resume: a new one begins there", file=sys.stderr)


@contextlib.contextmanager
def claimed(run_dir: Path, lock: IO[str], named: bool) -> Iterator[None]:
    """Hold ``lock``; a folder that named itself (not ``named``) goes again if nothing could be begun in it."""
    with lock:
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                if not named and [path.name for path in run_dir.iterdir()] == [".lock"]:
                    (run_dir / ".lock").unlink()
                    run_dir.rmdir()
            raise


def last_words(result: dict[str, Any], run_dir: Path, arguments: list[str]) -> str:
    """What ``train.py`` says of a run when it stops: its evaluation, where it lies, how to go on if it is not over.

    Args:
        result: what summary.json holds. arguments: those of the command line.
    """
    said = [f"run          {run_dir}", f"curves       tensorboard --logdir {run_dir.parent}"]
    if result["eval_return_mean"] is not None:
        said.insert(0, f"evaluation   {result['eval_return_mean']:.2f} +- {result['eval_return_std']:.2f}")
    if not result["finished"]:
        kept = [word for word in arguments if word.partition("=")[0] not in ("run_dir", "resume")]
        again = shlex.join([*kept, f"run_dir={run_dir}", "resume=true"])
        said.append(f"interrupted at {result['frames']:,} frames; to go on: python train.py {again}")
    return "\n".join(said)


def _slug(cfg: Config) -> str:
    return f"{file_name(cfg.task.id)}-{cfg.dynamics.name}-s{cfg.seed}-"


def file_name(task: str) -> str:
    """A task's name as part of a path."""
    return re.sub(r"[^\w.:=,+-]", "-", task)[:120]


def _new_run(cfg: Config) -> Path:
    """A folder of its own under runs/, also for runs that begin in the same second."""
    name = _slug(cfg) + time.strftime("%Y%m%d-%H%M%S")
    for i in itertools.count(1):
        run_dir = Path("runs", name if i == 1 else f"{name}-{i}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            return run_dir


def _newest_run(cfg: Config) -> Path | None:
    """The newest run under runs/ that named itself and had the settings of ``cfg``."""
    found = sorted(Path("runs").glob(f"{glob.escape(_slug(cfg))}*/config.yaml"), reverse=True)
    for path in found:
        with contextlib.suppress(ConfigError):  # a broken config is not the one
            if not changed_settings(read_config(path), cfg):
                return path.parent
    return None


def changed_settings(old: Config, new: Config) -> list[str]:
    """What differs of the settings that make a run what it is, as "key=old (now new)"."""
    both = old.task.suite == new.task.suite == "dmc"
    before, after = (_as_it_learns(cfg) if both else flatten(cfg) for cfg in (old, new))
    return [
        f"{key}={before.get(key)} (now {value})"
        for key, value in after.items()
        if key not in FREE_ON_RESUME and before.get(key) != value
    ]


def _as_it_learns(cfg: Config) -> dict[str, Any]:
    """``flatten`` on DeepMind Control, which has no discrete actions: without what is of those alone."""
    flat = flatten(cfg)
    del flat["agent.smooth_share"]
    return flat | {"agent.value_loss": cfg.agent.loss_of_values(discrete=False)}


def read_run(run_dir: Path, frames: int | None = None) -> tuple[Config, int]:
    """Config and checkpoint (env frames) of a run: the one at ``frames``, or the newest.

    Raises:
        CheckpointError: not a run directory, or no complete checkpoint in it, or none at ``frames``.
    """
    if not (run_dir / "config.yaml").exists():
        raise CheckpointError(f"{run_dir} is not a run directory: it has no config.yaml")
    saved = Checkpoints(run_dir).frames()
    if not saved:
        raise CheckpointError(f"{run_dir} holds no complete checkpoint yet")
    if frames is not None and frames not in saved:
        raise CheckpointError(f"{run_dir} holds no checkpoint at frame {frames}, but at {', '.join(map(str, saved))}")
    return read_config(run_dir / "config.yaml"), saved[-1] if frames is None else frames


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def commit() -> str | None:
    """The commit of the code that runs, with ``+`` where it was changed since; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed as a package, perhaps inside someone else's repository
        return None
    git = ["git", "-C", str(root)]
    try:
        asked = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        head, changes = (subprocess.run([*git, *words], capture_output=True, text=True, check=True) for words in asked)
    except (OSError, subprocess.CalledProcessError):  # no git here, or a broken checkout: training goes on without
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def describe(cfg: Config) -> dict[str, Any]:
    """What summary.json says of a run beside its results; ``config`` is for the hparams view."""
    return {
        "task": cfg.task.id,
        "agent": cfg.agent.name,
        "dynamics": cfg.dynamics.name,
        "seed": cfg.seed,
        "commit": commit(),
        "versions": versions(),
        "config": flatten(cfg),
    }
