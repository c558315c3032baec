"""Which gradient should a policy climb: of its value, or of its return through some steps of the model and the value?

python -m benchmarks.policy_gradients runs/x runs/y

From states that a run's policy comes to, the simulator plays small changes of the next action, and the policy after
them. What each change is truly worth is its discounted reward over ``REAL`` steps and the mean value of where they end.
Against that stands what a gradient foretells: its product with the change. Their correlation over the changes of one
state, the mean over states, is what a step along the gradient can count on; one would be all, zero none of it.

Gradients: through 0 (the value alone), 1, 2, 3 and 5 imagined steps; of the first value or of the mean of both; at the
policy's action, or the mean of some at noisy ones. A policy sits where the gradient it climbs is small, so that of its
own learning looks worse than to a policy that climbed another: compare those that it did not climb.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import PlannerAgent, load_agent
from benchmarks.diagnose import SEED, turned
from benchmarks.harness import interval, parser, report
from envs import TaskError, make_env
from loopwm.config import ConfigError
from loopwm.training.checkpoint import CheckpointError

REAL = (3, 10)  # agent steps in the simulator, before the value speaks
HORIZONS = (0, 1, 2, 3, 5)  # imagined steps
CHANGE = 0.15  # spread of the changes, action units
NOISE, DRAWS = 0.2, 16  # of the smoothed gradients, action units; actions in their mean
LATEST = 200  # agent step at which a state is taken


class Changes(NamedTuple):
    """What changes of the next action were worth, in S states: the first of K + 1 is none."""

    obs: Tensor  # (S, O)
    action: Tensor  # (S, K + 1, A)
    worth: dict[int, Tensor]  # by the steps of ``REAL``: (S, K + 1)


@torch.no_grad()
def play_changes(agent: PlannerAgent, task: str, repeat: int, states: int, changes: int) -> Changes:
    """From ``states`` episodes, each left at a step of its own.

    A simulator's state cannot be copied in general; but an episode is a function of its seed and its actions, so every
    change plays them again.

    Raises:
        TaskError: discrete actions, which have no small changes; or all episodes are over before a state was taken.
    """
    if agent.discrete:
        raise TaskError(f"{task}: its actions are discrete, and have no small changes")
    rng, longest = np.random.default_rng(SEED), max(REAL)
    env, rows = make_env(task, action_repeat=repeat, seed=SEED), []
    for state in range(states):
        obs, past = env.reset(seed=SEED + state)[0], []
        for _ in range(int(rng.integers(1, LATEST))):
            past.append(_act_of(agent, obs))
            obs, _, terminated, truncated, _ = env.step(past[-1])
            if terminated or truncated:
                break
        else:
            own = _act_of(agent, obs)
            action = np.clip(own + CHANGE * rng.standard_normal((changes + 1, len(own))), -1.0, 1.0)
            action[0] = own
            worth = [_worth(agent, env, SEED + state, [*past, first.astype(np.float32)], longest) for first in action]
            rows.append((obs, action, np.array(worth)))
    env.close()
    if not rows:
        raise TaskError(f"{task}: episodes are over within {LATEST} steps, before a state was taken")
    obs, action, worth = (torch.from_numpy(np.array(column, np.float32)) for column in zip(*rows, strict=True))
    return Changes(obs, action, {steps: worth[:, :, i] for i, steps in enumerate(REAL)})


def _worth(agent: PlannerAgent, env: Any, seed: int, actions: list[np.ndarray], longest: int) -> list[float]:
    """For each number of ``REAL``: discounted reward from the last of ``actions`` on, and the value after it."""
    obs, discount = env.reset(seed=seed)[0], agent.config.discount
    for action in actions[:-1]:
        obs = env.step(action)[0]
    found, total, action = {}, 0.0, actions[-1]
    for step in range(longest):
        obs, reward, terminated, truncated, _ = env.step(action)
        total += discount**step * float(reward)
        alive = 0.0 if terminated else discount ** (step + 1)
        action = _act_of(agent, obs)
        if step + 1 in REAL:
            z = agent.encode(torch.as_tensor(obs)[None])
            found[step + 1] = total + alive * float(agent.state_value(z))
        if terminated or truncated:
            break
    last = total + alive * float(agent.state_value(agent.encode(torch.as_tensor(obs)[None])))
    return [found.get(steps, last) for steps in REAL]


def _act_of(agent: PlannerAgent, obs: np.ndarray) -> np.ndarray:
    return agent.policy(agent.encode(torch.as_tensor(obs)[None]))[0][0].detach().numpy()


def gradient(agent: PlannerAgent, z: Tensor, horizon: int, both: bool, noise: float) -> Tensor:
    """d worth / d action at the policy's action in z (S, Z): (S, A)."""
    stream, total = torch.Generator().manual_seed(0), torch.zeros(())
    own = agent.policy(z)[0].detach()
    for _ in range(DRAWS if noise else 1):
        action = agent.policy.perturb(own, noise, 1.0, stream).requires_grad_()
        at, a, worth, discount = z, action, torch.zeros(()), torch.ones(())
        for _ in range(horizon):
            out = agent.slow_model.dynamics(at, a, agent.config.plan_loops or None)
            reward, continuation = agent.slow_model.predict(out.h)
            worth, discount = worth + discount * reward, discount * agent.config.discount * continuation
            at, a = out.z_next, agent.policy(out.z_next)[0]
        values = agent.value.values(agent.pair(at, a))
        worth = worth + discount * (values.mean(0) if both else values[0])
        total = total + torch.autograd.grad(worth.sum(), action)[0]
    return total / (DRAWS if noise else 1)


def agreement(found: Tensor, truth: Tensor) -> float:
    """Correlation over K of found and truth (S, K), the mean over the states where both vary."""
    found, truth = (x - x.mean(1, keepdim=True) for x in (found, truth))
    sizes = found.norm(dim=1) * truth.norm(dim=1)
    vary = sizes > 1e-12
    return float(((found * truth).sum(1)[vary] / sizes[vary]).mean()) if vary.any() else 0.0


def compare(run_dir: Path, states: int, changes: int) -> list[dict[str, Any]]:
    """A row for each gradient of one run."""
    agent, cfg, frames = load_agent(run_dir)
    policy = turned(agent, plan_samples=0)
    played = play_changes(policy, cfg.task.id, cfg.task.action_repeat, states, changes)
    z = policy.encode(played.obs).detach()
    step = played.action[:, 1:] - played.action[:, :1]  # (S, K, A)
    rows = []
    for horizon, both, noise in itertools.product(HORIZONS, (False, True), (0.0, NOISE)):
        foretold = (step * gradient(policy, z, horizon, both, noise).unsqueeze(1)).sum(-1)  # (S, K)
        row = {"run": str(run_dir), "task": cfg.task.id, "seed": cfg.seed, "frames": frames}
        row |= {"climbed": cfg.agent.policy_horizon, "horizon": horizon, "values": 2 if both else 1, "noise": noise}
        for steps, worth in played.worth.items():
            row[f"agreement, {steps} real steps"] = round(agreement(foretold, worth[:, 1:] - worth[:, :1]), 3)
        rows.append(row | {"states": len(z), "changes": changes})
    return rows


def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 2 something to correct."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("run_dirs", nargs="+", type=Path)
    p.add_argument("--states", type=int, default=128, help="of each run, from an episode each")
    p.add_argument("--changes", type=int, default=16, help="of the action in each state")
    args = p.parse_args(arguments)
    if args.states < 1 or args.changes < 2:
        p.error("--states must be at least 1, --changes at least 2")
    states, changes = (8, 4) if args.quick else (args.states, args.changes)
    try:
        rows = [row for run_dir in args.run_dirs for row in compare(run_dir, states, changes)]
    except (CheckpointError, ConfigError, TaskError, OSError) as error:
        print(f"policy_gradients: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(json.dumps(row))
    key, headline = f"agreement, {max(REAL)} real steps", {}
    for horizon, values, noise in itertools.product(HORIZONS, (1, 2), (0.0, NOISE)):
        same = [r[key] for r in rows if (r["horizon"], r["values"], r["noise"]) == (horizon, values, noise)]
        headline[f"{horizon} steps, {values} values, noise {noise}"] = interval(same)
    best = max(headline, key=lambda name: headline[name]["value"])
    plain = headline["0 steps, 1 values, noise 0.0"]["value"]
    verdict = f"Best over {len(args.run_dirs)} runs: {best}, {headline[best]['value']}; of the first value {plain}."
    report("policy_gradients", args, sorted({row["seed"] for row in rows}), rows, headline, verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
