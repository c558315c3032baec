"""What do latents keep of the observations? The networks learn anew from a run's replay, under one change at a time.

python -m benchmarks.representation runs/x runs/y --set-change slow="agent.encoder_rate=0.1"

An agent that learns anew, with no environment, from what a run has seen in its first ``--frames`` takes minutes, and
all changes have the same data. Every fifth of 50 equal stretches of them is held out, and there stands:

- step: the error of one predicted step of the latent as a share of the step (1: no better than "nothing moves");
- reward: the share of its variance left unexplained one step ahead;
- unread: the share of each entry of symlog(obs) that a network fitted to the latents misses, the mean over the entries
  (1: nothing of it is left); ``lost``: how many of them it misses by more than half;
- rank: in how many directions the latents vary (``latent_spread``).

It says nothing of what an agent earns: the data are another's. Changes of what begins later than ``--updates`` (the
policy's gradient through the model, say) or of ``reset_every`` change nothing here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents import PlannerAgent, make_agent
from benchmarks.ablations import CHANGES
from benchmarks.branches import as_words, read_changes
from benchmarks.diagnose import UNVARIED
from benchmarks.harness import interval, parser, refusing, report
from envs import resolve_action_repeat
from loopwm.config import Config, load_config
from loopwm.inspect.measure import strict, unexplained
from loopwm.inspect.run import Run, load_run
from loopwm.model.encoders import latent_spread, step_error, symlog
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.replay import Replay

STRETCHES, HELD_OUT = 50, 5  # equal parts of the rows; every how many-th is not learnt from
LEAST = 100  # rows of a stretch
LOST = 0.5  # share of an entry
MEASURES = ("step", "reward", "unread", "lost", "rank")


def split_replay(run_dir: Path, run: Run, frames: int) -> tuple[Replay, Replay]:
    """The first ``frames`` of a run: (rows to learn from, rows held out), copied.

    A stretch ends as an episode does that was cut short, so that no sequence crosses from one into another.

    Raises:
        CheckpointError: the run's replay is without these frames, or they are too few rows.
    """
    whole, task = run.replay, run.cfg.task
    rows = frames // resolve_action_repeat(task.id, task.action_repeat) // whole.num_envs
    length = rows // STRETCHES
    if length < LEAST:
        raise CheckpointError(f"{frames} frames of {run_dir}: are {rows} rows, and {LEAST * STRETCHES} are needed")
    if rows > whole.total or len(whole) < whole.total:
        raise CheckpointError(f"{run_dir}: its replay does not hold the first {frames} frames")
    sizes = (whole.num_envs, whole.obs.shape[-1], whole.action.shape[-1])
    learnt, held = (Replay(rows * whole.num_envs, *sizes) for _ in range(2))
    for i in range(STRETCHES):
        fields = whole.slice(i * length, (i + 1) * length)
        fields["is_last"][-1] = True
        into = held if i % HELD_OUT == HELD_OUT - 1 else learnt
        into.restore(into.total, fields)
    return learnt, held


def unread(z: Tensor, obs: Tensor, z_held: Tensor, obs_held: Tensor, steps: int = 1500) -> Tensor:
    """Share of the variance of each varied entry of symlog(obs) that a network misses, held out: at most 1, (O',).

    Latents (n, Z) and observations (n, O) to fit it by, and to hold it against.
    """
    truth, truth_held = symlog(obs), symlog(obs_held)
    varied = (truth.var(0) > UNVARIED) & (truth_held.var(0) > UNVARIED)
    mean, spread = truth[:, varied].mean(0), truth[:, varied].std(0)
    truth, truth_held = ((x[:, varied] - mean) / spread for x in (truth, truth_held))
    centre, scale = z.mean(0), z.std(0) + 1e-3
    z, z_held = ((x - centre) / scale for x in (z, z_held))
    stream = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    first, second, last = nn.Linear(z.shape[1], 256), nn.Linear(256, 256), nn.Linear(256, truth.shape[1])
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(z), (256,), generator=stream)
        loss = (net(z[rows]) - truth[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        missed = (net(z_held) - truth_held).square().mean(0) / truth_held.var(0)
    return missed.clamp_max(1.0)


def transitions(agent: PlannerAgent, replay: Replay, count: int = 6000) -> tuple[Tensor, ...]:
    """obs (n, O), its z (n, Z), action (n, A), reward (n,) and the next z (n, Z) of transitions drawn alike."""
    batch = replay.sample(count, 1, rng=np.random.default_rng(0), uniform=True)
    obs, action, reward = (torch.from_numpy(x) for x in (batch.obs, batch.action[0], batch.reward[0]))
    z, z_next = agent.encode(obs)
    return obs[0], z, action, reward, z_next


def measure(agent: PlannerAgent, learnt: Replay, held: Replay) -> dict[str, Any]:
    """``MEASURES`` of an agent, and what of each entry is unread."""
    obs, z = transitions(agent, learnt, 4 * 6000)[:2]
    obs_held, z_held, action, reward, z_next = transitions(agent, held)
    out = agent.slow_model.dynamics(z_held, action, agent.config.plan_loops or None)
    missed = unread(z, obs, z_held, obs_held)
    return {
        "step": step_error(out.z_next, z_held, z_next),
        "reward": unexplained(agent.slow_model.predict(out.h)[0], reward),
        "unread": float(missed.mean()),
        "lost": int((missed > LOST).sum()),
        "rank": latent_spread(z_held)["rank"],
        "entries": [round(float(x), 3) for x in missed],
    }


def learn_anew(cfg: Config, learnt: Replay, discrete: bool, updates: int) -> PlannerAgent:
    """An agent of ``cfg`` after so many updates, its schedules where they would be by then; without resets."""
    agent = make_agent(cfg, learnt.obs.shape[-1], learnt.action.shape[-1], discrete)
    for done in range(updates):
        agent.acted = cfg.agent.seed_steps + int(done / cfg.agent.update_ratio)
        agent.update(learnt)
    return agent


def compare(run_dir: Path, changes: dict[str, tuple[str, ...]], frames: int, updates: int) -> list[dict[str, Any]]:
    """A row for each change, of one run."""
    run = load_run(run_dir)
    cfg = run.cfg
    settings = {name: load_config([*as_words(cfg), *words]) for name, words in changes.items()}
    rows = []
    for name, changed in settings.items():
        learnt, held = split_replay(run_dir, run, frames)  # anew: updates write their priorities into it
        start = time.perf_counter()
        agent = learn_anew(changed, learnt, run.discrete, updates)
        row = {"run": str(run_dir), "task": cfg.task.id, "seed": cfg.seed, "change": name, "words": changes[name]}
        found = measure(agent, learnt, held)
        found = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
        rows.append(row | found | {"seconds": round(time.perf_counter() - start, 1)})
        print(json.dumps(strict(rows[-1])), flush=True)
    return rows


@refusing
def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 2 something to correct."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("run_dirs", nargs="+", type=Path, help="runs of agent=planner, whose replay is there from the start")
    p.add_argument("--frames", type=int, default=40_000, help="of each run, from its first on")
    p.add_argument("--updates", type=int, default=12_000, help="of the networks that learn anew")
    p.add_argument("--change", nargs="*", default=[], choices=CHANGES, metavar="NAME", help=", ".join(CHANGES))
    p.add_argument("--set-change", nargs="*", default=[], metavar='NAME="KEY=VALUE ..."', help="a change of your own")
    args = p.parse_args(arguments)
    if args.updates < 1:
        p.error(f"--updates {args.updates}: must be at least 1")
    changes = read_changes(p, args.change, args.set_change)
    updates = min(args.updates, 200) if args.quick else args.updates
    rows = [row for run_dir in args.run_dirs for row in compare(run_dir, changes, args.frames, updates)]
    headline = {
        f"{name}, {measure}": interval([row[measure] for row in rows if row["change"] == name])
        for name in changes
        for measure in MEASURES
    }
    said = "; ".join(
        f"{name} {headline[f'{name}, step']['value']} and {headline[f'{name}, unread']['value']}" for name in changes
    )
    verdict = f"Error of a step and share of the observation unread, over {len(args.run_dirs)} runs: {said}."
    report("representation", args, sorted({row["seed"] for row in rows}), rows, headline, verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
