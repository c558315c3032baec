"""Where a world model's observations are decoded: at every imagined step, or at the last alone (deferred decoding).

Small world models (encoder, looped dynamics, decoder; the default agent's sizes) learn five steps of a DMC task open
loop by one of the ways below, with the same data, updates and first weights, each at its own learning rate (the best on
validation data after whole trainings of seed 0). ``published`` is deferred decoding as in 2606.18208 (section 3.5),
with paths that cost something where their steps are longer than the mean between encoded observations; the ways called
``deferred`` have a penalty on the mean signed error of latents in its place (``deferred_decoding_loss``). All weights
are one. Errors are of decoded observations 1 to 50 steps ahead, in standard deviations.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import interval, report
from benchmarks.lab import TEST, TRAINING, VALIDATION, Examples
from benchmarks.tasks import TASKS, lab_parser
from benchmarks.vector_tasks import Control
from benchmarks.walker_models import LOOPS, make_model
from loopwm.model import WorldModel, decoding_horizon, deferred_decoding_loss

BATCH, STEPS, QUICK_STEPS = 256, 2000, 100
RATES = (1e-3, 2e-3, 4e-3)
BASE = "every"


class Way(NamedTuple):
    """What is asked of an imagined rollout of K steps."""

    every: bool = False  # decode all its steps, not the last alone
    latent: float = 0.0  # weight of the latents' error at the steps between
    drift: float = 0.0  # weight of their mean signed error
    path: float = 0.0  # weight of what their path is longer than that of the encoded observations
    curriculum: bool = False  # K from 1 upwards over the first half of training


WAYS = {
    BASE: Way(every=True),
    "every_latent": Way(every=True, latent=1.0),
    "last": Way(),
    "published": Way(latent=1.0, path=1.0, curriculum=True),
    "deferred": Way(latent=1.0, drift=1.0, curriculum=True),
    "deferred_no_drift": Way(latent=1.0, curriculum=True),
    "deferred_no_curriculum": Way(latent=1.0, drift=1.0),
}


class Training(NamedTuple):
    """One training, and what its file is called by."""

    way: str
    learning_rate: float
    seed: int
    steps: int
    each: int  # test windows

    def path(self, folder: Path) -> Path:
        return folder / f"{self.way}_{self.learning_rate:g}_{self.seed}_{self.steps}_{self.each}.json"


def way_loss(model: WorldModel, way: Way, obs: Tensor, actions: Tensor, after: Tensor, depth: Tensor) -> Tensor:
    """Loss () of a rollout from obs (B, O) under actions (K, B, A), which led to the observations after (K, B, O)."""
    with torch.no_grad():
        z_target = model.encode(after)  # (K, B, Z)
    with model.frozen():
        rollout = model.rollout(model.encode(obs), actions, depth)
    real = torch.cat([rollout.z[:1].detach(), z_target])  # (K + 1, B, Z)
    budget = torch.linalg.vector_norm(real[1:] - real[:-1], dim=-1).mean() if way.path else None
    found = deferred_decoding_loss(model, rollout, z_target, after[-1], torch.ones(actions.shape[:2]), budget)
    decoding = model.decoder.loss(rollout.z[1:], after).mean() if way.every else found["decoding"]
    return decoding + sum(getattr(way, name) * found[name] for name in ("latent", "drift", "path") if name in found)


@torch.no_grad()
def errors(task: Control, model: WorldModel, data: Examples) -> Tensor:
    """(B, H) mean squared error of every decoded step, at ``LOOPS`` loops."""
    obs, actions = data.inputs
    rollout = model.rollout(model.encode(obs), actions.movedim(1, 0), LOOPS)
    return task.errors(model.decode(rollout.z[1:]).movedim(0, 1), data.target)


def train(task: Control, training: Training, folder: Path) -> dict:
    """Train and evaluate one model; what stands in its file already is read from there."""
    path = training.path(folder)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    way, data, start = WAYS[training.way], task.examples(30_000, 0, TRAINING), time.perf_counter()
    (obs, actions), after = data.inputs, data.target
    model = make_model(obs.shape[-1], actions.shape[-1], "certified", training.seed)
    adam = torch.optim.Adam(model.parameters(), training.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, training.steps)
    rng, stream = np.random.default_rng(training.seed), torch.Generator().manual_seed(training.seed)
    for step in range(training.steps):
        rows = torch.from_numpy(rng.integers(0, len(obs), BATCH))
        k = decoding_horizon(step / training.steps, task.trained_horizon) if way.curriculum else task.trained_horizon
        sequence = (actions[rows, :k].movedim(1, 0), after[rows, :k].movedim(1, 0))  # (K, B, A), (K, B, O)
        loss = way_loss(model, way, obs[rows], *sequence, model.dynamics.sample_depth(BATCH, stream))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        adam.step()
        scheduler.step()
    seconds = round(time.perf_counter() - start, 1)
    check, test = task.examples(4000, 0, VALIDATION), task.examples(training.each, 0, TEST)
    found = task.measures(errors(task, model, test), test.difficulty)
    row = training._asdict() | {
        "seconds": seconds,
        "validation": task.pool(errors(task, model, check)),
        "error": {name: round(e, 5) for name, e in found.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(row), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
    print(f"{task.name} {path.stem:44s} {seconds:6.0f} s  {row['validation']:.4f}", flush=True)
    return row


def train_all(task: Control, trainings: Iterable[Training], folder: Path, args: argparse.Namespace) -> list[dict]:
    """The rows of ``trainings``, ``args.jobs`` of them trained at a time."""
    for data in (TRAINING, VALIDATION, TEST):
        task.steps(data)  # collected once, not by every process
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        found = [pool.submit(train, task, training, folder) for training in trainings]
        return [row.result() for row in found]


def verdict(rows: list[dict]) -> tuple[dict, str]:
    """(headline, a sentence a way): on how many seeds a way's error is lower than that of decoding every step."""
    headline, said = {}, []
    by_way = {way: [row for row in rows if row["way"] == way] for way in WAYS}
    for way, mine in by_way.items():
        for measure in rows[0]["error"]:
            headline[f"{way}: error, {measure}"] = interval([row["error"][measure] for row in mine])
        headline[f"{way}: seconds"] = interval([row["seconds"] for row in mine])
        if way == BASE:
            continue
        change = []
        for measure in rows[0]["error"]:
            ours, theirs = ([row["error"][measure] for row in some] for some in (mine, by_way[BASE]))
            lower = sum(a < b for a, b in zip(ours, theirs, strict=True))
            ratio = np.mean(ours) / np.mean(theirs) - 1.0
            change.append(f"{ratio:+.0%} at {measure} (lower on {lower} of {len(ours)} seeds)")
        said.append(f"{way}: {', '.join(change)}")
    return headline, "Error beside decoding every step: " + "; ".join(said) + "."


def main(arguments: list[str]) -> None:
    worlds = [name for name in TASKS if isinstance(TASKS[name](Path()), Control)]
    p = lab_parser(__doc__.splitlines()[0], "walker-walk-random", worlds)
    p.set_defaults(rates=RATES)
    args = p.parse_args(arguments)
    task, folder = TASKS[args.task](args.runs), args.runs / args.task / "deferred"
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    rates, seeds, each = (args.rates[:1], range(1), 100) if args.quick else (args.rates, range(args.seeds), 1000)
    tried = train_all(task, [Training(way, rate, 0, steps, each) for way in WAYS for rate in rates], folder, args)
    best = {way: min((r for r in tried if r["way"] == way), key=lambda r: r["validation"]) for way in WAYS}
    plan = [Training(way, best[way]["learning_rate"], seed, steps, each) for seed in seeds for way in WAYS]
    rows = train_all(task, plan, folder, args)
    report("deferred_decoding", args, seeds, rows, *verdict(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
