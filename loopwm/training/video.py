"""One episode as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loopwm.training.protocols import Agent
from loopwm.training.rollout import rollout


def record_episode(agent: Agent, venv: Any, seed: int) -> tuple[np.ndarray, float]:
    """Play one deterministic episode in ``venv`` (made with rendering) -> (frames (T, H, W, 3) uint8, its return)."""
    images: list[np.ndarray] = []

    def keep(finished: int) -> None:
        if not finished:
            images.append(venv.call("render")[0])

    result = rollout(agent, venv, 1, seed=seed, on_step=keep)
    return np.stack(images), float(result.returns[0])


def save_video(path: Path, images: np.ndarray, fps: float) -> None:
    """Write frames (T, H, W, 3) uint8 as mp4."""
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, list(images), fps=fps, macro_block_size=8)
