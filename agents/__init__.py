"""Agents, and how one is made from a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path

import torch

from agents.actor_critic import ContinuousPolicy, DiscretePolicy, ValueEnsemble
from agents.novelty import Novelty
from agents.planner import PlannerAgent
from loopwm.build import make_world_model
from loopwm.config import DEVICES, Config, ConfigError
from loopwm.memory import memory_in_words
from loopwm.training.checkpoint import CheckpointError, Checkpoints
from loopwm.training.protocols import Agent
from loopwm.training.run_dir import read_run

AGENTS = {"planner": PlannerAgent}


@memory_in_words()
def make_agent(cfg: Config, obs_dim: int, action_dim: int, discrete: bool, device: torch.device | str = "cpu") -> Agent:
    """The agent that a config describes, freshly initialised from ``cfg.seed``.

    Args:
        obs_dim: O. action_dim: A, or the number of actions where ``discrete``.

    Raises:
        OutOfMemory: networks of these sizes are larger than the memory.
    """
    device = torch.device(device)
    torch.manual_seed(cfg.seed)
    world_model = make_world_model(cfg, obs_dim, action_dim).to(device)
    z, c = world_model.encoder.width, cfg.agent
    policy = (DiscretePolicy if discrete else ContinuousPolicy)(z, action_dim, c.policy_dim, c.activation).to(device)
    width = z + action_dim + (world_model.dynamics.state_dim if c.value_loops else 0)
    value = ValueEnsemble(width, c.value_dim, loss=c.loss_of_values(discrete), activation=c.activation).to(device)
    seeks = c.novelty_spread and c.plan_collect and c.plan_samples
    novelty = Novelty(z, torch.Generator().manual_seed(cfg.seed)).to(device) if seeks else None
    parts = (world_model, policy, value)
    return AGENTS[c.name](*parts, obs_dim, action_dim, c, seed=cfg.seed, device=device, novelty=novelty)


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda where there is one, else cpu.

    Raises:
        ConfigError: the name of no kind of device, or a cuda device that is not there.
    """
    if complaint := DEVICES.complaint(name):
        raise ConfigError(f"device={name!r}: {complaint}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch sees no cuda device here; use device=cpu or device=auto")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(f"device={name!r}: torch sees no such device here; the last is cuda:{last}")
    return torch.device(name)


def use_threads(count: int) -> None:
    """Torch's threads inside one operation, for the whole process; 0: as they are."""
    if count:
        torch.set_num_threads(count)


def load_agent(
    run_dir: str | Path,
    *,
    plan_loops: int | None = None,
    plan_samples: int | None = None,
    device: str = "cpu",
    frames: int | None = None,
) -> tuple[Agent, Config, int]:
    """The agent of a run's checkpoint, ready to act: (agent, config, env frames it was trained for).

    Args:
        run_dir: what ``train.py`` wrote, or a file of ``agents.export``.
        plan_loops, plan_samples: replace the run's own planning budget, in evaluations too; see ``PlannerConfig``.
        device: as in ``resolve_device``.
        frames: of the checkpoint, env frames (``keep_checkpoints`` says how many there are); None: the newest.

    Raises:
        CheckpointError: not a run directory nor an exported agent, or a broken one, or none of ``frames``.
        ConfigError: a broken config, or no such device.
    """
    from agents.export import SUFFIX, read_exported, restore_exported  # here, so that it can be run as a program too

    path, target = Path(run_dir), resolve_device(device)
    restore: Callable[[Agent], None]
    if path.suffix == SUFFIX and not path.is_dir():
        tensors, said, cfg = read_exported(path)
        if frames not in (None, said["frames"]):
            raise CheckpointError(f"{path} holds no agent at frame {frames}, but at {said['frames']}")
        frames, dims = said["frames"], said["dims"]
        restore = partial(restore_exported, tensors=tensors, acted=said["acted"])
    else:
        cfg, frames = read_run(path, frames)
        state = Checkpoints(path).load(frames)  # onto the CPU, as the trainer does; restoring copies to the device
        if not isinstance(state, dict) or not {"dims", "agent"} <= state.keys() or len(state["dims"]) != 3:
            raise CheckpointError(f"{path}: its checkpoint at frame {frames} is not one of this program")
        dims = [int(n) for n in state["dims"][:2]] + [bool(state["dims"][2])]
        restore = methodcaller("load_state_dict", state["agent"])
    changes = {"plan_loops": plan_loops, "plan_samples": plan_samples, "eval_samples": plan_samples}
    changes = {name: value for name, value in changes.items() if value is not None}
    cfg = dataclasses.replace(cfg, agent=dataclasses.replace(cfg.agent, **changes))
    try:
        agent = make_agent(cfg, *dims, device=target)
        restore(agent)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{run_dir}: its checkpoint does not fit its config ({reason})") from None
    return agent, cfg, frames


__all__ = [
    "AGENTS",
    "Agent",
    "PlannerAgent",
    "load_agent",
    "make_agent",
    "make_world_model",
    "resolve_device",
    "use_threads",
]
