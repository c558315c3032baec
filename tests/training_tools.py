"""What the tests of training and of the command line share: a tiny agent, and runs of train.py."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from loopwm.training import trainer
from loopwm.training.checkpoint import Checkpoints
from loopwm.training.replay import Replay
from loopwm.training.run_dir import read_run
from loopwm.training.video import VideoError

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("encoder.latent_dim=8", "encoder.hidden_dim=16", "dynamics.hidden_dim=8", "dynamics.block_dim=16"),
    *("agent.value_dim=16", "agent.policy_dim=16", "agent.head_dim=16", "agent.seed_steps=20"),
    *("agent.batch_size=16", "agent.model_batch_size=8", "agent.plan_samples=0", "agent.plan_iterations=1"),
    *("agent.update_ratio=0.1", "threads=1", "eval_episodes=1", "replay.capacity=2000"),
]
CARTPOLE = ["task=gym/CartPole-v1", *TINY]  # short episodes of many lengths, discrete actions
SWINGUP = ["task=dmc/cartpole-swingup", "task.action_repeat=20", *TINY]  # 50 steps an episode
SWINGUP += ["agent.seed_steps=4", "agent.update_ratio=1"]


def forbid_filming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every film of the trainer fail, as on a machine without GL."""

    def fail(*_):
        raise VideoError("no video: not in this test")

    monkeypatch.setattr(trainer, "film_episode", fail)


def run(run_dir: Path, *words: str) -> int:
    """train.py in this process; returns its exit code."""
    return train.main([*words, f"run_dir={run_dir}"])


def start(run_dir: Path, *words: str) -> subprocess.Popen:
    """train.py in a process (group) of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words, f"run_dir={run_dir}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MUJOCO_GL": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl, torn lines left out."""
    path, found = run_dir / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def untimed(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock says."""
    return [{k: v for k, v in one.items() if not k.startswith("time/")} for one in lines(run_dir)]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 60.0) -> None:
    """Poll until ``condition()``; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended by itself: {process.communicate()}"
        assert time.monotonic() < end, "too slow"
        time.sleep(0.002)


def content(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint without its clocks, and its replay with all rows in order."""
    cfg, frames = read_run(run_dir)
    obs_dim, action_dim, _ = Checkpoints(run_dir).load(frames)["dims"]
    replay = Replay(cfg.replay.capacity, cfg.num_envs, obs_dim, action_dim)
    state = Checkpoints(run_dir).load_newest(replay)
    state.pop("seconds"), state.pop("timers")
    return state | {"rows": replay.slice(replay.total - len(replay), replay.total)}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nests of dicts, lists and arrays differ, if only by a bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return differences(dict(enumerate(a)), dict(enumerate(b)), where)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return [] if a.dtype == b.dtype and np.array_equal(a, b) else [where]
    return [] if type(a) is type(b) and a == b else [where]
