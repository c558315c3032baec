"""Does the model know what an action does, one step ahead? What a plan chooses by.

python -m benchmarks.action_effects runs/x runs/y

From states that a run's policy comes to, the simulator plays small changes of the next action, as in
``benchmarks.policy_gradients``; what they led to stands against what was foretold, over the changes of one state:

- latent: the share that the model explains of how the next latents differ (1: all; 0: no better than their mean);
- value, by the model: correlation of the value of the latent that it imagines with that of the real one;
- action value: correlation of the mean of both values of the action with the reward and the value after it, which they
  learn to be.

Means over the states, of ``latent`` the median: where nothing moves, errors are large shares of next to nothing.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import PlannerAgent, load_agent
from benchmarks.diagnose import SEED
from benchmarks.harness import interval, refusing, report
from benchmarks.policy_gradients import agreement, asked, changed_actions
from envs import make_env

MEASURES = ("latent", "value, by the model", "action value")


def explained(found: Tensor, truth: Tensor) -> float:
    """Share of the differences within the rows of truth (S, K, Z) that found (S, K, Z) explains, the median over S."""
    found, truth = (x - x.mean(1, keepdim=True) for x in (found, truth))
    spread = truth.square().sum((1, 2)).clamp_min(1e-12)
    return float((1.0 - (found - truth).square().sum((1, 2)) / spread).median())


@torch.no_grad()
def effects(
    agent: PlannerAgent, obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, after: Tensor
) -> dict[str, float]:
    """``MEASURES`` for obs (S, O), action (S, K, A), reward and terminated (S, K), observations after (S, K, O)."""
    states, changes = reward.shape
    z = agent.encode(obs).repeat_interleave(changes, 0)  # (S * K, Z)
    flat, depth = action.flatten(0, 1), agent.config.plan_loops or None
    real = agent.encode(after)  # (S, K, Z)
    imagined = agent.slow_model.dynamics(z, flat, depth).z_next.view_as(real)
    worth = agent.state_value(real)  # (S, K)
    value = agent.value.values(agent.value_input(z, flat)).mean(0).view(states, changes)
    learnt = reward + agent.config.discount * (1.0 - terminated) * worth
    found = (explained(imagined, real), agreement(agent.state_value(imagined), worth), agreement(value, learnt))
    return dict(zip(MEASURES, found, strict=True))


def measure(run_dir: Path, states: int, changes: int) -> dict[str, Any]:
    """A row for one run."""
    agent, cfg, frames = load_agent(run_dir)
    rows = []
    with closing(make_env(cfg.task.id, action_repeat=cfg.task.action_repeat, seed=SEED)) as env:
        for seed, past, obs, action in changed_actions(agent, env, cfg.task.id, states, changes):
            came = []
            for first in action:
                env.reset(seed=seed)
                for earlier in past:
                    env.step(earlier)
                came.append(env.step(first)[:3])
            after, reward, terminated = zip(*came, strict=True)
            rows.append((obs, action, reward, terminated, after))
    found = effects(agent, *(torch.from_numpy(np.array(c, np.float32)) for c in zip(*rows, strict=True)))
    names = {"run": run_dir.name, "task": cfg.task.id, "seed": cfg.seed, "frames": frames, "states": len(rows)}
    return names | {name: round(value, 3) for name, value in found.items()}


@refusing
def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 2 something to correct."""
    args, states, changes = asked(__doc__, arguments)
    rows = [measure(run_dir, states, changes) for run_dir in args.run_dirs]
    for row in rows:
        print(json.dumps(row))
    headline = {name: interval([row[name] for row in rows]) for name in MEASURES}
    verdict = (
        f"Over {len(rows)} runs the model explains {headline['latent']['value']} of what an action changes in the next "
        f"latent; its value there agrees with the real one's by {headline['value, by the model']['value']}, and the "
        f"action's own value with what it is to learn by {headline['action value']['value']}."
    )
    report("action_effects", args, sorted({row["seed"] for row in rows}), rows, headline, verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
