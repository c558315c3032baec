"""One episode as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loopwm.training.protocols import Agent
from loopwm.training.rollout import rollout

LONGEST_FILM = 1500  # frames of an episode, which are in memory at once


class VideoError(RuntimeError):
    """No video; the text is one line that says why."""


def film_episode(agent: Agent, make_env: Callable[[], Any], seed: int, path: Path) -> np.ndarray:
    """Play one deterministic episode and write it as mp4; returns its frames (T, H, W, 3) uint8, T <= LONGEST_FILM.

    Args:
        make_env: makes a vector environment of one, with rendering.

    Raises:
        VideoError: this machine cannot draw the task or write the file.
    """
    try:
        venv = make_env()
        try:
            images = record_episode(agent, venv, seed)
        finally:
            venv.close()
        save_video(path, images, venv.metadata.get("render_fps", 30))
    except Exception as error:  # GL, ffmpeg and every environment's renderer fail in kinds of their own
        raise VideoError(f"no video: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    return images


def record_episode(agent: Agent, venv: Any, seed: int) -> np.ndarray:
    """Play one deterministic episode in ``venv`` (made with rendering), as long as it is or a film may be.

    Returns:
        frames (T, H, W, 3) uint8.
    """
    images: list[np.ndarray] = []

    def keep(finished: int) -> None:
        if not finished:
            images.append(venv.call("render")[0])

    rollout(agent, venv, 1, seed=seed, on_step=keep, stop=lambda: len(images) == LONGEST_FILM)
    return np.stack(images)


def film_strip(images: np.ndarray, count: int = 6) -> np.ndarray:
    """``count`` evenly spaced frames of (T, H, W, 3) side by side: (H, count * W, 3)."""
    return np.concatenate([images[i] for i in np.linspace(0, len(images) - 1, count).astype(int)], 1)


def save_video(path: Path, images: np.ndarray, fps: float) -> None:
    """Write frames (T, H, W, 3) uint8 as mp4."""
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix says what is written
    try:
        imageio.mimwrite(draft, list(images), fps=fps, macro_block_size=8)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
