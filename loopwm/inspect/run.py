"""The world model that a run acts with, and the experience it has learnt from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loopwm.build import make_world_model
from loopwm.config import Config, ConfigError
from loopwm.model import WorldModel
from loopwm.training.checkpoint import CheckpointError, Checkpoints
from loopwm.training.replay import Replay
from loopwm.training.run_dir import read_run


class Run(NamedTuple):
    """A run as it stood at its newest checkpoint."""

    model: WorldModel  # the slow copy, by which the agent acts
    replay: Replay
    cfg: Config
    frames: int
    discrete: bool  # the actions


class Windows(NamedTuple):
    """B stretches of H steps within one episode each, time first."""

    obs: Tensor  # (H + 1, B, O)
    action: Tensor  # (H, B, A)
    reward: Tensor  # (H, B)


def load_run(run_dir: Path) -> Run:
    """The newest checkpoint of ``run_dir``.

    Raises:
        CheckpointError: not a run directory, or a broken one. ConfigError: its config is broken.
    """
    cfg, frames = read_run(run_dir)
    checkpoints = Checkpoints(run_dir)
    misfit = f"{run_dir}: its checkpoint does not fit its config"
    try:
        obs_dim, action_dim, discrete = checkpoints.load(frames)["dims"]
        replay = Replay(cfg.replay.capacity, cfg.num_envs, obs_dim, action_dim)  # in memory: its files are the run's
        state = checkpoints.load_newest(replay)  # an older one, if the newest lacks rows of its replay
        model = make_world_model(cfg, obs_dim, action_dim)
        flat = state["agent"]["targets"]["model"]  # one vector, in the order of the parameters
        if flat.numel() != sum(p.numel() for p in model.parameters()):
            raise CheckpointError(f"{misfit} (another number of parameters)")
        torch.nn.utils.vector_to_parameters(flat, model.parameters())
        frames = state["frames"]
    except (CheckpointError, ConfigError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{misfit} ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None
    if not flat.isfinite().all():
        raise CheckpointError(f"{run_dir}: its world model diverged, there is nothing but no numbers to look at")
    return Run(model.eval().requires_grad_(False), replay, cfg, frames, discrete)


def draw_windows(replay: Replay, count: int, lengths: tuple[int, ...], seed: int = 0) -> Windows:
    """At most ``count`` windows from anywhere in the replay, of the first of ``lengths`` that its episodes have.

    The same for the same seed. Raises CheckpointError: no episode is as long as the last of ``lengths``.
    """
    if len(replay) < 2:
        raise CheckpointError("the replay holds nothing yet")
    for steps in lengths:
        batch = replay.sample(4 * count, steps, np.random.default_rng(seed), uniform=True)
        whole = np.flatnonzero(batch.mask.all(0))[:count]  # those that met no end
        if len(whole):
            return Windows(*(torch.from_numpy(x[:, whole]) for x in batch[:3]))
    raise CheckpointError(f"the replay holds no episode of {lengths[-1]} steps to look at")
