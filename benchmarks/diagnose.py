"""What holds a trained agent back: its model, its value, its policy or its planner.

python -m benchmarks.diagnose runs/x runs/y

Each run plays episodes by its policy alone, and what it imagined on the way is held against what came:

- model: reward and latent, 1 to 10 steps open loop under the actions that were taken, as a share of their variance
  left unexplained (1: no better than their mean), at the planner's own number of loops and at twice as many;
- latents: how much they differ from state to state (1 at most, by the latent norm) and in how many directions; how much
  of the observation a linear readout misses, fitted on some episodes and held against others; and the error of one
  step as a share of the step (1: no better than to predict that nothing moves);
- value: the mean of both values against the discounted return that followed, where so much of the episode was left
  that all but a twentieth of it is known; no figure where episodes are too short for that. Values learn of actions with
  the target's noise (``smooth_std``, ``smooth_share``), so the same of episodes with that noise says how much of the
  bias is its doing;
- plan: how far apart the scores of the sequences that one plan draws lie, and how far the value at the end of an
  imagined sequence lies from that of the state which really came, which should be less;
- policy and planner: their returns on the same episodes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import PlannerAgent, load_agent
from agents.mppi import score_all
from benchmarks.harness import interval, parser, refusing, report
from envs import LONGEST_EVALUATION, TaskError, make_vector_env
from loopwm.inspect.measure import unexplained
from loopwm.model.encoders import latent_spread, step_error, symlog
from loopwm.training.rollout import rollout

STEPS = (1, 3, 5, 10)  # ahead
SEED = 2**35  # of the episodes: neither training nor evaluation has them
UNVARIED = 1e-4  # variance of an entry of symlog(obs) that is as good as constant
TAIL = 0.05  # share of a discounted return that may lie beyond the end of its episode


class Episodes(NamedTuple):
    """E episodes side by side, as far as the shortest goes: T steps, time first."""

    obs: Tensor  # (T, E, O)
    action: Tensor  # (T, E, A), as the replay keeps them
    reward: Tensor  # (T, E)


def turned(agent: PlannerAgent, **settings: int) -> PlannerAgent:
    """The same networks with other settings of the agent."""
    view = copy.copy(agent)
    view.config = dataclasses.replace(agent.config, **settings)
    return view


def play(agent: PlannerAgent, task: str, repeat: int, episodes: int, noisy: bool = False) -> Episodes:
    """Episodes side by side, until the first of them ends; ``noisy``: with the noise of the value's targets.

    Raises:
        TaskError: that is too soon to look ``max(STEPS)`` ahead.
    """
    venv = make_vector_env(task, episodes, seed=SEED, action_repeat=repeat, longest=LONGEST_EVALUATION)
    agent = agent.evaluator()
    obs, rows, ended = venv.reset(seed=SEED)[0], [], False
    first, stream = np.ones(episodes, bool), torch.Generator().manual_seed(SEED)
    while not ended:
        action = agent.act(obs, first=first)
        if noisy:
            row = torch.as_tensor(agent.encode_action(action), dtype=torch.float32)  # (E, A)
            row = agent.smoothed(row, stream)
            action = (row.argmax(-1) if agent.discrete else row).numpy()
        after, reward, terminated, truncated, _ = venv.step(action)
        rows.append((obs.copy(), agent.encode_action(action), reward))
        obs, first, ended = after, np.zeros(episodes, bool), bool((terminated | truncated).any())
    venv.close()
    if len(rows) <= max(STEPS) + 1:
        raise TaskError(f"{task}: an episode ended after {len(rows)} steps, and {max(STEPS) + 2} are needed")
    return Episodes(*(torch.from_numpy(np.array(column, np.float32)) for column in zip(*rows, strict=True)))


def episode_returns(agent: PlannerAgent, task: str, repeat: int, episodes: int) -> np.ndarray:
    """Returns (E,) of the same episodes for every agent, played to their ends."""
    venv = make_vector_env(task, episodes, action_repeat=repeat, longest=LONGEST_EVALUATION)
    found = rollout(agent, venv, episodes, seed=SEED).returns
    venv.close()
    return found


def windows(data: Episodes, length: int) -> Tensor:
    """The ``length`` actions from every step on that has so many after it: (length, T' * E, A)."""
    starts = data.obs.shape[0] - length
    return torch.stack([data.action[k : k + starts].flatten(0, 1) for k in range(length)])


def model_errors(agent: PlannerAgent, data: Episodes, depth: int | None) -> dict[str, float]:
    """Share of variance left unexplained of reward and latent, ``STEPS`` ahead from every step."""
    model, longest = agent.slow_model, max(STEPS)
    starts = data.obs.shape[0] - longest
    z = model.encode(data.obs)  # (T, E, Z)
    imagined = model.rollout(z[:starts].flatten(0, 1), windows(data, longest), depth)
    reward = model.predict(imagined.h)[0]  # (H, T' * E)
    found = {}
    for k in STEPS:
        truth = data.reward[k - 1 : k - 1 + starts].flatten()
        found[f"reward, {k} ahead"] = unexplained(reward[k - 1], truth)
        found[f"latent, {k} ahead"] = unexplained(imagined.z[k], z[k : k + starts].flatten(0, 1))
    return found


def latent_quality(agent: PlannerAgent, data: Episodes, depth: int | None) -> dict[str, float]:
    """What the latents keep of the observations, and whether the model knows where they move.

    A latent that is trained to be predicted keeps least what is hard to predict, and may collapse altogether. No figure
    of the step where nothing moves, nor of the readout from less than two rows for each weight, where nothing varies or
    of what is no number. Latents that differ by next to nothing can still be read: look at their variance beside it.
    """
    z = agent.encode(data.obs)  # (T, E, Z)
    found = {f"latent, {name}": value for name, value in latent_spread(z).items()}
    ahead = agent.slow_model.dynamics(z[:-1].flatten(0, 1), data.action[:-1].flatten(0, 1), depth).z_next
    error = step_error(ahead.view_as(z[1:]), z[:-1], z[1:])
    if not np.isnan(error):
        found["latent, error of a step"] = error
    both = torch.cat([z, torch.ones_like(z[..., :1])], -1).double(), symlog(data.obs)
    (fitted, tried), (seen, unseen) = ([x[:, half::2].flatten(0, 1) for half in (0, 1)] for x in both)
    varied = unseen.var(0) > UNVARIED
    if len(tried) >= 2 * tried.shape[1] and varied.any() and z.isfinite().all():
        readout = torch.linalg.lstsq(fitted, seen[:, varied].double(), driver="gelsd").solution
        missed = (tried @ readout - unseen[:, varied]).square().mean(0) / unseen[:, varied].var(0)
        found["observation, unread"] = float(missed.clamp_max(1.0).mean())
    return found


def value_errors(agent: PlannerAgent, data: Episodes) -> dict[str, float]:
    """Bias, error and correlation of the value with the discounted return of the policy that it should foretell.

    Nothing where no step has enough of its episode before it.
    """
    discount = agent.config.discount
    left = int(np.ceil(np.log(TAIL) / np.log(discount)))
    returns, total = torch.zeros_like(data.reward), torch.zeros(data.reward.shape[1])
    for t in reversed(range(len(data.reward))):
        total = data.reward[t] + discount * total
        returns[t] = total
    starts = len(data.reward) - left
    if starts < 2:
        return {}
    value = agent.value.values(agent.value_input(agent.encode(data.obs[:starts]), data.action[:starts]))  # (2, T', E)
    mean, truth = value.mean(0).flatten(), returns[:starts].flatten()
    return {
        "return, discounted": float(truth.mean()),
        "value minus return": float((mean - truth).mean()),
        "value, unexplained": unexplained(mean, truth),
        "value, correlation": float(torch.corrcoef(torch.stack([mean, truth]))[0, 1]),
        "values apart": float((value[0] - value[1]).abs().mean()),
    }


def plan_errors(agent: PlannerAgent, data: Episodes, depth: int | None, states: int = 64) -> dict[str, float]:
    """What a plan decides by, and how wrong the value is that its sequences end in: in units of the return.

    The scores' spread is the standard deviation over a plan's drawn sequences, the median over ``states`` states.
    Nothing where plans have less than two.
    """
    if agent.config.plan_samples < 2:
        return {}
    horizon, model = agent.config.plan_horizon, agent.slow_model
    z = model.encode(data.obs)  # (T, E, Z)
    begin, came = z[:-horizon].flatten(0, 1), z[horizon:].flatten(0, 1)  # (T' * E, Z)
    imagined = model.rollout(begin, windows(data, horizon), depth).z[-1]
    worth = [agent.state_value(end) for end in (imagined, came)]  # (T' * E,)
    some = begin[torch.linspace(0, len(begin) - 1, min(states, len(begin))).long()]  # (N, Z)
    drawn = agent.draw_plans(some)  # (H, N, S, A)
    return {
        "value at a plan's end, imagined minus real, rms": float((worth[0] - worth[1]).square().mean().sqrt()),
        "scores of a plan, spread": float(score_all(agent.score, some, drawn).std(1).median()),
    }


@torch.no_grad()
def diagnose(run_dir: Path, episodes: int) -> dict[str, Any]:
    """Everything about one run."""
    agent, cfg, frames = load_agent(run_dir)
    policy = turned(agent, plan_samples=0)
    envs = (cfg.task.id, cfg.task.action_repeat)
    data, depth = play(policy, *envs, episodes), cfg.agent.plan_loops or None
    found = {
        f"return, {name}": float(episode_returns(one, *envs, episodes).mean())
        for name, one in (("policy", policy), ("planner", agent))
    }
    found |= value_errors(policy, data)
    noisy = value_errors(policy, play(policy, *envs, episodes, noisy=True))
    found |= {f"{name}, with the target's noise": noisy[name] for name in noisy if "return" in name}
    found |= latent_quality(agent, data, depth)
    found |= model_errors(agent, data, depth) | plan_errors(agent, data, depth)
    if depth:
        found |= {f"{name}, twice the loops": v for name, v in model_errors(agent, data, 2 * depth).items()}
    names = {"run": str(run_dir), "task": cfg.task.id, "dynamics": cfg.dynamics.name, "seed": cfg.seed}
    return names | {"frames": frames} | {name: round(value, 4) for name, value in found.items()}


@refusing
def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 2 something to correct."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("run_dirs", nargs="+", type=Path)
    p.add_argument("--episodes", type=int, default=10)
    args = p.parse_args(arguments)
    if args.episodes < 1:
        p.error(f"--episodes {args.episodes}: must be at least 1")
    rows = [diagnose(run_dir, 2 if args.quick else args.episodes) for run_dir in args.run_dirs]
    for row in rows:
        print(json.dumps(row, indent=1))
    names = ("return, policy", "return, planner", "value minus return", "reward, 3 ahead")
    headline = {name: interval([row[name] for row in rows]) for name in names if all(name in row for row in rows)}
    better = sum(row["return, planner"] > row["return, policy"] for row in rows)
    verdict = f"The planner is above its own policy in {better} of {len(rows)} runs."
    report("diagnose", args, [row["seed"] for row in rows], rows, headline, verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
