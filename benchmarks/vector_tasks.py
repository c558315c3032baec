"""Continuous worlds for the laboratory: DeepMind Control open loop, and TimeWarp, one step of 1 to 16 held ones.

The latent is the observation itself, standardised by the training data, so that all parameters are the dynamics' own
and errors are in standard deviations: 1 is what predicting the mean of the data gets.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents import load_agent
from benchmarks.harness import ROOT
from benchmarks.in_turn import Untied
from benchmarks.lab import IN_A_ROW, TEST, TRAINING, VALIDATION, Examples, Recipe, Task, kept
from envs import make_env
from loopwm.dynamics import DYNAMICS, DynamicsOutput, RepeatedDynamics
from loopwm.dynamics.repeated import Split

MODELS = {
    "looped": Recipe("looped", "certified", steps=2000, hidden=64, loops=8),
    "stacked": Recipe("stacked", steps=2000, hidden=64, loops=8),
    "wide": Recipe("wide", steps=2000, hidden=64, loops=8),
    "single_pass": Recipe("single_pass", steps=2000, hidden=64, loops=8),
    "deep_thin": Recipe("deep_thin", steps=2000, hidden=64, loops=8),
    "looped, linear": Recipe("looped", steps=2000, hidden=64, loops=8),
    "looped, lipsdp": Recipe("looped", "lipsdp", steps=2000, hidden=64, loops=8),
}
LADDER = {
    "looped": ((32, 8), (64, 8), (128, 8)),
    "looped, linear": ((64, 8), (128, 8)),
    "looped, lipsdp": ((32, 8), (64, 8), (128, 8)),
    "stacked": ((32, 4), (32, 8), (64, 4), (64, 8)),
    "wide": ((32, 8), (64, 8)),
    "single_pass": ((32, 8), (64, 8), (128, 8), (256, 8)),
    "deep_thin": ((64, 8),),
}
# Loops of worlds whose inputs say how many steps of something one of theirs takes: a loop for each, and, to tell what
# that gains from what is gained by no random depth, always as many.
STEPWISE = {
    "looped, a loop a step": replace(MODELS["looped"], timed=True),
    "looped, linear, a loop a step": replace(MODELS["looped, linear"], timed=True),
    "looped, lipsdp, a loop a step": replace(MODELS["looped, lipsdp"], timed=True),
    "looped, fixed depth": replace(MODELS["looped"], fixed=True),
    "looped, linear, fixed depth": replace(MODELS["looped, linear"], fixed=True),
    "looped, lipsdp, fixed depth": replace(MODELS["looped, lipsdp"], fixed=True),
}
# Blocks with a linear layer beside their own, and the controls of the same cells.
SKIPPING = {
    "looped, lipsdp, skip": replace(MODELS["looped, lipsdp"], skip=True),
    "looped, lipsdp, skip, fixed depth": replace(MODELS["looped, lipsdp"], skip=True, fixed=True),
    "looped, lipsdp, skip, a loop a step": replace(MODELS["looped, lipsdp"], skip=True, timed=True),
    "looped, linear, skip": replace(MODELS["looped, linear"], skip=True),
    "looped, linear, skip, a loop a step": replace(MODELS["looped, linear"], skip=True, timed=True),
    "looped, linear, skip, fixed depth": replace(MODELS["looped, linear"], skip=True, fixed=True),
    "stacked, skip": replace(MODELS["stacked"], skip=True),
}
# One control step, applied for as many as an action is held, each time to what was predicted before; ``loops`` are
# those of one such step.
REPEATED = {
    "looped, linear, repeated": replace(MODELS["looped, linear"], loops=4, fixed=True, repeated=True),
    "looped, repeated": replace(MODELS["looped"], loops=4, fixed=True, repeated=True),
    "looped, lipsdp, skip, repeated": replace(MODELS["looped, lipsdp"], loops=4, skip=True, fixed=True, repeated=True),
    "single_pass, repeated": replace(MODELS["single_pass"], repeated=True),
    "stacked, repeated": replace(MODELS["stacked"], loops=2, repeated=True),
}
# The controls of repetition: each control step has weights of its own.
REPEATED |= {
    f"{name}, untied": replace(REPEATED[name], untied=True) for name in ("single_pass, repeated", "stacked, repeated")
}
REPEATED_LADDER = {
    "looped, linear, repeated": ((16, 4), (32, 2), (32, 4), (64, 2), (64, 4)),
    "looped, repeated": ((32, 4), (64, 4)),
    "looped, lipsdp, skip, repeated": ((32, 4),),
    "single_pass, repeated": ((32, 8), (64, 8), (128, 8)),
    "stacked, repeated": ((32, 2), (32, 4), (64, 2)),
    "single_pass, repeated, untied": ((16, 8), (32, 8)),
    "stacked, repeated, untied": ((16, 2), (32, 2)),
}
SETTLED = 1e-3  # relative step at which a state counts as the fixed point
CORRELATION = 0.8  # of a random action with the one before


class VectorModel(nn.Module):
    """Standardised observation and actions -> the observations after each.

    ``split`` and ``most`` are of ``RepeatedDynamics``, which a repeated recipe has; untied, it has ``places`` of them.
    """

    def __init__(
        self, recipe: Recipe, obs_dim: int, action_dim: int, split: Split | None = None, most: int = 1, places: int = 1
    ):
        super().__init__()
        prelude, block, coda = recipe.layers
        self.warm, ways = recipe.warm, {}
        if recipe.looped:
            ways = {"gradient": recipe.gradient, "solver": recipe.solver, "halt_tolerance": SETTLED}
            ways |= {"depth_sampler": "fixed"} if recipe.fixed else {}

        def dynamics() -> nn.Module:
            return DYNAMICS[recipe.dynamics](
                obs_dim,
                action_dim - recipe.repeated,
                recipe.hidden,
                recipe.loops,
                4 * recipe.loops,
                mode=recipe.mode,
                prelude_layers=prelude,
                block_layers=block,
                coda_layers=coda,
                skip=recipe.skip,
                **ways,
            )

        if recipe.untied:
            self.dynamics: nn.Module = Untied([dynamics() for _ in range(places)], split)
        else:
            self.dynamics = RepeatedDynamics(dynamics(), split, most) if recipe.repeated else dynamics()

    def forward(
        self, obs: Tensor, actions: Tensor, depth: int | Tensor | None = None, h0: Tensor | None = None
    ) -> tuple[Tensor, DynamicsOutput]:
        """obs (B, O), actions (B, H, A) -> (observations (B, H, O), the last step's output).

        h0 is of the first step; with a warm start each later one begins where the one before it ended.
        """
        steps = []
        for action in actions.unbind(1):
            out = self.dynamics(obs, action, depth, h0)
            obs, h0 = out.z_next, out.h if self.warm else None
            steps.append(obs)
        return torch.stack(steps, 1), out

    def trajectory(self, obs: Tensor, actions: Tensor, loops: int) -> tuple[Tensor, list[Tensor]]:
        """Of one step, obs (B, O), actions (B, 1, A): (states (loops + 1, B, D), (B, 1, O) after each of the loops)."""
        states = self.dynamics.trajectory(obs, actions[:, 0], loops)
        return states, [self.dynamics.coda(obs, h).unsqueeze(1) for h in states[1:]]


class VectorTask(Task):
    """Arrays of steps on disk, in folder: obs, action, after, difficulty, episode; standardised on the way out."""

    models, ladder = MODELS, LADDER
    exact, batch = False, 256
    error_name = "root mean squared error, standard deviations"
    collected = {TRAINING: 40_000, VALIDATION: 8_000, TEST: 16_000, IN_A_ROW: 16_000}  # decisions
    env_id: str

    def __init__(self, runs: Path):
        self.runs = runs

    def steps(self, seed: int) -> dict[str, np.ndarray]:
        """The data of a seed, collected once."""
        return kept(self.runs / self.name / f"data_{seed}.npz", lambda: self.collect(self.collected[seed], seed))

    def source(self, seed: int) -> str:
        """The environment that the data of a seed are of."""
        return self.env_id

    def windows(self, episode: np.ndarray, each: int, length: int, seed: int) -> np.ndarray:
        """(n, length) rows that follow one another in one of the episodes (N,); at most ``each`` of them, at random."""
        whole = np.flatnonzero(episode[: 1 - length or None] == episode[length - 1 :])
        return np.random.default_rng(seed).permutation(whole)[:each, None] + np.arange(length)

    def collect(self, count: int, seed: int) -> dict[str, np.ndarray]:
        """``count`` decisions, episode after episode."""
        env, rng, rows = make_env(self.source(seed), seed=seed), np.random.default_rng(seed), []
        episode = 0
        while len(rows) < count:
            obs, over, action = env.reset()[0], False, None
            act = self.actor(episode, rng, env.action_space.shape[0])
            while not over and len(rows) < count:
                action = act(obs, action)
                after, _, terminated, truncated, info = env.step(action)
                rows.append((obs, action, after, info.get("difficulty", 0), episode))
                obs, over = after, terminated or truncated
            episode += 1
        env.close()
        names = ("obs", "action", "after", "difficulty", "episode")
        arrays = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}

    def actor(self, episode: int, rng: np.random.Generator, action_dim: int):
        """(obs, action before) -> action: here noise that is correlated in time and uniform at each."""
        x = np.zeros(action_dim)

        def act(obs: np.ndarray, before: np.ndarray | None) -> np.ndarray:
            nonlocal x
            fresh = rng.standard_normal(action_dim)
            x = fresh if before is None else CORRELATION * x + math.sqrt(1.0 - CORRELATION**2) * fresh
            return np.array([math.erf(v / math.sqrt(2.0)) for v in x], np.float32)

        return act

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """(mean (O,), standard deviation (O,)) of the training data."""
        obs = torch.from_numpy(self.steps(TRAINING)["obs"])
        return obs.mean(0), obs.std(0).clamp_min(1e-3)

    def standardised(self, obs: np.ndarray) -> Tensor:
        mean, std = self.scale
        return (torch.from_numpy(obs) - mean) / std

    def model(self, recipe: Recipe, **repeated: Any) -> VectorModel:
        """``repeated`` are the arguments of ``VectorModel`` for repeated recipes."""
        data = self.steps(TRAINING)
        return VectorModel(recipe, data["obs"].shape[-1], self.action_dim(data), **repeated)

    def action_dim(self, data: dict[str, np.ndarray]) -> int:
        return data["action"].shape[-1]

    def losses(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.errors(prediction, target).mean(1)

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, H) mean squared error of each step."""
        return (prediction - target).square().mean(-1)

    def pool(self, errors: Tensor) -> float:
        """Root of the mean: what diverged to no number counts as infinite."""
        return math.sqrt(float(errors.double().nan_to_num(math.inf, math.inf).mean()))


class Control(VectorTask):
    """A DMC task, 5 open-loop steps in training and 50 in the test, under random actions or a trained agent's.

    A random action is one of noise with a correlation of 0.8 in time. The agent is the one in ``pretrained/``: the
    default's after 100k frames; it acts by its policy, in every second episode with half of random noise added. Depth
    in training is drawn per sequence, as in the agents.
    """

    unit, trained, bins = "", 0, ((0, 0),)
    horizons = (1, 5, 20, 50)
    in_a_row = ()  # they are
    trained_horizon = 5

    def __init__(self, runs: Path, task: str, policy: bool):
        super().__init__(runs)
        self.env_id, self.policy = f"dmc/{task}", policy
        self.name = f"{task}-{'policy' if policy else 'random'}"

    def actor(self, episode: int, rng: np.random.Generator, action_dim: int):
        noise = super().actor(episode, rng, action_dim)
        if not self.policy:
            return noise
        shipped = ROOT / "pretrained" / f"{self.env_id.removeprefix('dmc/')}.safetensors"
        agent, first = load_agent(shipped, plan_samples=0)[0].evaluator(), True

        def act(obs: np.ndarray, before: np.ndarray | None) -> np.ndarray:
            nonlocal first
            action = agent.act(obs[None], first=np.array([first]))[0]
            first = False
            return np.clip(action + 0.5 * (episode % 2) * noise(obs, before), -1.0, 1.0).astype(np.float32)

        return act

    def examples(self, each: int, longest: int, seed: int, size: int | None = None) -> Examples:
        """Windows of one episode: of 5 steps in training and validation, of 50 in the test; at most ``each``."""
        data, horizon = self.steps(seed), self.horizons[-1] if seed == TEST else self.trained_horizon
        window = self.windows(data["episode"], each, horizon, seed)
        inputs = (self.standardised(data["obs"][window[:, 0]]), torch.from_numpy(data["action"][window]))
        return Examples(inputs, self.standardised(data["after"][window]), torch.zeros(len(window), dtype=torch.long))

    def loss(self, model: nn.Module, recipe: Recipe, batch: Examples, rng: np.random.Generator) -> Tensor:
        depth = model.dynamics.sample_depth(len(batch))  # none with implicit gradients
        return self.losses(model(*batch.inputs, depth=depth)[0], batch.target).mean()

    edge = f"{trained_horizon} steps"
    beyond = ["20 steps", "50 steps"]

    def breakdown(self, errors: Tensor, difficulty: Tensor) -> dict[str, float]:
        found = zip(self.measured, self.horizons, strict=True)
        return {name: self.pool(errors[:, h - 1]) for name, h in found if h <= errors.shape[1]}

    measures = breakdown

    @property
    def measured(self) -> list[str]:
        return [f"{h} step{'s' * (h > 1)}" for h in self.horizons]


class TimeWarp(VectorTask):
    """One decision of ``loopwm/TimeWarp``: an action held for 1 to 16 control steps, of which at most 8 in training."""

    models = MODELS | STEPWISE | SKIPPING | REPEATED
    ladder = LADDER | dict.fromkeys([*STEPWISE, *SKIPPING], ((64, 8),)) | REPEATED_LADDER
    # Controls as small as the repeated ones too.
    ladder |= {"stacked": ((16, 4), (16, 8), *LADDER["stacked"]), "deep_thin": ((32, 8), (64, 8))}
    ladder |= {"stacked, skip": ((16, 4), (32, 4), (64, 4), (64, 8))}
    unit, trained = "held control steps", 8
    bins = ((1, 2), (3, 4), (5, 8), (9, 12), (13, 16))

    def __init__(self, runs: Path, task: str):
        super().__init__(runs)
        self.name, self.env_id = f"timewarp-{task}", f"gym/loopwm/TimeWarp-{task}-v0"

    def model(self, recipe: Recipe) -> VectorModel:
        return super().model(recipe, split=self.held, most=2 * self.trained, places=self.trained)

    def held(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """What ``decisions`` made of an action (n, A) -> (the action itself (n, A - 1), its control steps (n,))."""
        return action[:, :-1], (action[:, -1] * self.trained).round().long()

    def examples(self, each: int, longest: int, seed: int, size: int | None = None) -> Examples:
        """At most ``each`` steps of every bin, fewer where the data has no more."""
        data, rng = self.steps(seed), np.random.default_rng(seed)
        k = data["difficulty"].astype(np.int64)
        bins = [(low, min(high, longest)) for low, high in self.bins if low <= longest]
        rows = [rng.permutation(np.flatnonzero((k >= low) & (k <= high)))[:each] for low, high in bins]
        return self.decisions(data, np.concatenate(rows))

    def source(self, seed: int) -> str:
        return f"{self.env_id}?max_hold={self.trained}" if seed == IN_A_ROW else self.env_id

    def sequence(self, each: int, steps: int, seed: int) -> list[Examples]:
        """Of episodes of their own, in which no hold is longer than in training."""
        data = self.steps(seed)
        return [self.decisions(data, rows) for rows in self.windows(data["episode"], each, steps, seed).T]

    def carried(self, inputs: tuple[Tensor, ...], prediction: Tensor) -> tuple[Tensor, ...]:
        return prediction[:, 0], inputs[1]

    def decisions(self, data: dict[str, np.ndarray], rows: np.ndarray) -> Examples:
        """inputs: standardised observation (n, O), action and share of the longest trained hold (n, 1, A)."""
        k = data["difficulty"].astype(np.int64)
        action = np.concatenate([data["action"][rows, :-1], k[rows, None].astype(np.float32) / self.trained], -1)
        inputs = (self.standardised(data["obs"][rows]), torch.from_numpy(action)[:, None])
        return Examples(inputs, self.standardised(data["after"][rows])[:, None], torch.from_numpy(k[rows]))
