"""Roll an agent out: the one function by which the trainer and evaluate.py measure it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from loopwm.memory import memory_in_words
from loopwm.training.protocols import Agent


class RolloutResult(NamedTuple):
    """One entry per episode."""

    returns: np.ndarray  # (E,) undiscounted sums of reward
    lengths: np.ndarray  # (E,) agent steps
    terminated: np.ndarray  # (E,) bool, ended by the task rather than by a time limit


@memory_in_words()
def rollout(
    agent: Agent,
    venv: Any,
    episodes: int,
    *,
    seed: int,
    on_step: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> RolloutResult | None:
    """Play ``episodes`` whole episodes deterministically; None if it is told to stop before their end.

    Every environment plays the same number of episodes (rounded up; the surplus is dropped in a fixed order),
    so short episodes are not over-represented.

    Args:
        venv: N environments in NEXT_STEP autoreset mode.
        seed: of their episodes.
        on_step: called after the reset and after each step with the number of episodes finished by
            environment 0; for videos.
        stop: asked before each step.

    Raises:
        OutOfMemory: a plan is larger than the memory.
    """
    agent, envs = agent.evaluator(), venv.num_envs
    quota = -(-episodes // envs)
    obs, _ = venv.reset(seed=seed)
    first, total, length = np.ones(envs, bool), np.zeros(envs), np.zeros(envs, int)
    resetting = np.zeros(envs, bool)  # this step only begins a new episode
    done: list[list[tuple[float, int, bool]]] = [[] for _ in range(envs)]
    if on_step:
        on_step(0)
    while min(len(d) for d in done) < quota:
        if stop():
            return None
        obs, reward, terminated, truncated, _ = venv.step(agent.act(obs, first=first))
        first = resetting
        total += reward
        length += ~resetting
        resetting = terminated | truncated
        for i in np.flatnonzero(resetting):
            done[i].append((float(total[i]), int(length[i]), bool(terminated[i])))
            total[i], length[i] = 0.0, 0
        if on_step:
            on_step(len(done[0]))
    rows = [done[i][k] for k in range(quota) for i in range(envs)][:episodes]
    returns, lengths, ends = zip(*rows, strict=True)
    return RolloutResult(np.array(returns), np.array(lengths), np.array(ends))
