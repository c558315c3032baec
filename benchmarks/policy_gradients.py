"""Which gradient should a policy climb: of its value, or of its return through some steps of the model and the value?

python -m benchmarks.policy_gradients runs/x runs/y

From states that a run's policy comes to, the simulator plays small changes of the next action, and the policy after
them. What each change was worth is (a) the discounted reward of 30 steps, or (b) that of 10 and the mean value of where
they end. Against that stands what a gradient foretells: its product with the change. Their correlation over the changes
of one state, the mean over states, is what a step along the gradient can count on; one would be all, zero none of it.
Neither truth is whole: (a) leaves out what comes later, and (b) shares the value with what it judges.

Gradients: through 0 (the value alone), 1, 2, 3 and 5 imagined steps; of the first value or of the mean of both; at the
policy's action, or the mean of some at noisy ones (the first action alone; ``policy_std`` is on every one). A policy
sits where the gradient it climbs is small, so its own (``climbed``) looks worse than it did to the policy that learnt.
"""

from __future__ import annotations

import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import PlannerAgent, load_agent
from benchmarks.diagnose import SEED
from benchmarks.harness import interval, parser, refusing, report
from envs import TaskError, make_env

REWARDS, BOOTSTRAP = 30, 10  # agent steps in the simulator, of (a) and (b)
TRUTHS = (f"rewards of {REWARDS} steps", f"rewards of {BOOTSTRAP} steps and the value")
HORIZONS = (0, 1, 2, 3, 5)  # imagined steps
CHANGE = 0.15  # spread of the changes, action units
NOISE, DRAWS = 0.2, 16  # of the smoothed gradients, action units; actions in their mean
LATEST = 200  # agent step before which a state is taken, at random; an episode that is over sooner is left out


class Kind(NamedTuple):
    """Of a gradient."""

    horizon: int  # imagined steps
    values: int  # the first, or the mean of two
    noise: float  # action units

    def __str__(self) -> str:
        return f"{self.horizon} steps, {self.values} values, noise {self.noise}"


KINDS = tuple(itertools.starmap(Kind, itertools.product(HORIZONS, (1, 2), (0.0, NOISE))))
COMPARED = (Kind(0, 1, 0.0), Kind(3, 2, NOISE))  # in the verdict


class Changes(NamedTuple):
    """What K changed actions were worth in each of S states."""

    obs: Tensor  # (S, O)
    action: Tensor  # (S, K, A)
    worth: dict[str, Tensor]  # by the names of ``TRUTHS``: (S, K)


def changed_actions(
    agent: PlannerAgent, env: Any, task: str, states: int, changes: int
) -> Iterator[tuple[int, list[np.ndarray], np.ndarray, np.ndarray]]:
    """Of each of ``states`` episodes of the policy, left at a step of its own: its seed, the actions so far, the
    observation (O,) that they led to, and ``changes`` actions (K, A) near the policy's there.

    Raises:
        TaskError: discrete actions, which have no small changes; or all episodes are over before a state was taken.
    """
    if agent.discrete:
        raise TaskError(f"{task}: its actions are discrete, and have no small changes")
    rng, taken = np.random.default_rng(SEED), 0
    for seed in range(SEED, SEED + states):
        obs, past = env.reset(seed=seed)[0], []
        for _ in range(int(rng.integers(1, LATEST))):
            past.append(_act_of(agent, obs))
            obs, _, terminated, truncated, _ = env.step(past[-1])
            if terminated or truncated:
                break
        else:
            own, taken = _act_of(agent, obs), taken + 1
            action = np.clip(own + CHANGE * rng.standard_normal((changes, len(own))), -1.0, 1.0).astype(np.float32)
            yield seed, past, obs, action
    if not taken:
        raise TaskError(f"{task}: episodes are over within {LATEST} steps, before a state was taken")


@torch.no_grad()
def play_changes(agent: PlannerAgent, task: str, repeat: int, states: int, changes: int) -> Changes:
    """From ``states`` episodes, each left at a step of its own.

    A simulator's state cannot be copied in general; but an episode is a function of its seed and its actions, so every
    change plays them again.

    Raises:
        TaskError: discrete actions, which have no small changes; or all episodes are over before a state was taken.
    """
    rows = []
    with closing(make_env(task, action_repeat=repeat, seed=SEED)) as env:
        for seed, past, obs, action in changed_actions(agent, env, task, states, changes):
            worth = [_worth(agent, env, seed, [*past, first]) for first in action]
            rows.append((obs, action, np.array(worth)))
    obs, action, worth = (torch.from_numpy(np.array(column, np.float32)) for column in zip(*rows, strict=True))
    return Changes(obs, action, {name: worth[:, :, i] for i, name in enumerate(TRUTHS)})


def _worth(agent: PlannerAgent, env: Any, seed: int, actions: list[np.ndarray]) -> tuple[float, float]:
    """What the last of ``actions``, and the policy after it, were worth by each of ``TRUTHS``."""
    obs, discount = env.reset(seed=seed)[0], agent.config.discount
    for action in actions[:-1]:
        obs = env.step(action)[0]
    total, bootstrapped, action = 0.0, None, actions[-1]
    for step in range(1, REWARDS + 1):
        obs, reward, terminated, truncated, _ = env.step(action)
        total += discount ** (step - 1) * float(reward)
        over = terminated or truncated
        if bootstrapped is None and (over or step == BOOTSTRAP):
            value = float(agent.state_value(agent.encode(torch.as_tensor(obs)[None])))
            bootstrapped = total + (0.0 if terminated else discount**step * value)
        if over:
            break
        action = _act_of(agent, obs)
    return total, bootstrapped


def _act_of(agent: PlannerAgent, obs: np.ndarray) -> np.ndarray:
    return agent.policy(agent.encode(torch.as_tensor(obs)[None]))[0][0].detach().numpy()


def gradient(agent: PlannerAgent, z: Tensor, kind: Kind) -> Tensor:
    """d worth / d action at the policy's action in z (S, Z): (S, A)."""
    stream, total, draws = torch.Generator().manual_seed(0), torch.zeros(()), DRAWS if kind.noise else 1
    own = agent.policy(z)[0].detach()
    for _ in range(draws):
        first = agent.policy.perturb(own, kind.noise, 1.0, stream).requires_grad_()
        reward, discount, inputs = agent.imagine(z, first, lambda at: agent.policy(at)[0], kind.horizon)
        worth = reward + discount * agent.value.values(inputs)[: kind.values].mean(0)
        total = total + torch.autograd.grad(worth.sum(), first)[0]
    return total / draws


def agreement(found: Tensor, truth: Tensor) -> float:
    """Correlation over K of found and truth (S, K), the mean over the states where both vary."""
    found, truth = (x - x.mean(1, keepdim=True) for x in (found, truth))
    sizes = found.norm(dim=1) * truth.norm(dim=1)
    vary = sizes > 1e-12
    return float(((found * truth).sum(1)[vary] / sizes[vary]).mean()) if vary.any() else 0.0


def compare(run_dir: Path, states: int, changes: int) -> list[dict[str, Any]]:
    """A row for each gradient of one run."""
    agent, cfg, frames = load_agent(run_dir)
    played = play_changes(agent, cfg.task.id, cfg.task.action_repeat, states, changes)
    z = agent.encode(played.obs).detach()
    step = played.action - agent.policy(z)[0].detach().unsqueeze(1)  # (S, K, A)
    terms = agent.policy_terms()
    learnt = Kind(terms.horizon, 2 if terms.horizon else 1, terms.std)
    rows = []
    for kind in KINDS:
        foretold = (step * gradient(agent, z, kind).unsqueeze(1)).sum(-1)  # (S, K)
        row = {"run": run_dir.name, "task": cfg.task.id, "seed": cfg.seed, "frames": frames}
        row |= kind._asdict() | {"climbed": kind == learnt}
        row |= {name: round(agreement(foretold, worth), 3) for name, worth in played.worth.items()}
        rows.append(row | {"states": len(z), "changes": changes})
    return rows


def asked(doc: str, arguments: list[str]) -> tuple[Namespace, int, int]:
    """The command line of a benchmark that plays changes: (all of it, states of each run, changes in each state)."""
    p = parser(doc.splitlines()[0])
    p.add_argument("run_dirs", nargs="+", type=Path)
    p.add_argument("--states", type=int, default=128, help="of each run, from an episode each")
    p.add_argument("--changes", type=int, default=16, help="of the action in each state")
    args = p.parse_args(arguments)
    if args.states < 1 or args.changes < 2:
        p.error("--states must be at least 1, --changes at least 2")
    return args, *((8, 4) if args.quick else (args.states, args.changes))


@refusing
def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 2 something to correct."""
    args, states, changes = asked(__doc__, arguments)
    rows = [row for run_dir in args.run_dirs for row in compare(run_dir, states, changes)]
    for row in rows:
        print(json.dumps(row))
    headline, said = {}, []
    for name in TRUTHS:
        found = {
            k: interval([r[name] for r in rows if k == Kind(r["horizon"], r["values"], r["noise"])]) for k in KINDS
        }
        headline |= {f"{name}: {kind}": figure for kind, figure in found.items()}
        alone, through = (found[kind]["value"] for kind in COMPARED)
        said.append(f"{alone} and {through} by the {name}")
    verdict = (
        f"Over {len(args.run_dirs)} runs the gradient of the first value alone and that through three imagined steps, "
        f"with both values and noise, agree with what actions were worth by {'; '.join(said)}."
    )
    report("policy_gradients", args, sorted({row["seed"] for row in rows}), rows, headline, verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
