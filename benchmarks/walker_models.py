"""Small world models, of walker-walk trained on random actions, and weights that were made to grow."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from benchmarks.loop_probes import step_growth
from envs import make_env
from loopwm.dynamics import LoopedDynamics
from loopwm.model import MLPDecoder, MLPEncoder, WorldModel, deferred_decoding_loss
from loopwm.model.losses import weighted_sum, world_model_losses
from loopwm.training.replay import Replay

TASK = "dmc/walker-walk"
LATENT, LOOPS, MAX_LOOPS = 64, 4, 8  # the default agent's sizes
HORIZON, BATCH = 3, 64
# the default agent's, and one of the decoder, which keeps latents about the world where no value does
WEIGHTS = {"consistency": 1.0, "reward": 0.2, "continuation": 0.2, "jacobian": 0.1, "decoding": 1.0}


def random_transitions(steps: int, seed: int) -> Replay:
    """``steps`` transitions of uniform actions, episode after episode."""
    env, rng = make_env(TASK, seed=seed), np.random.default_rng(seed)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    replay, obs = Replay(2 * steps + 2, 1, obs_dim, action_dim, seed=seed), env.reset()[0]
    for _ in range(steps):
        action = rng.uniform(-1.0, 1.0, action_dim).astype(np.float32)
        after, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs[None], action[None], np.array([reward]), np.array([terminated]), np.array([False]))
        obs = after
        if terminated or truncated:
            replay.add(obs[None], action[None], np.zeros(1), np.array([False]), np.array([True]))
            obs = env.reset()[0]
    env.close()
    return replay


def make_model(obs_dim: int, action_dim: int, mode: str, seed: int) -> WorldModel:
    """A world model of the default agent's sizes, freshly initialised."""
    torch.manual_seed(seed)
    encoder = MLPEncoder(obs_dim, LATENT, 2 * LATENT)
    dynamics = LoopedDynamics(LATENT, action_dim, LATENT, LOOPS, MAX_LOOPS, mode=mode, latent_norm=encoder.norm)
    return WorldModel(encoder, dynamics, LATENT, MLPDecoder(LATENT, obs_dim, 2 * LATENT))


def train_model(replay: Replay, mode: str, seed: int, steps: int) -> tuple[WorldModel, float]:
    """A trained model and the mean of its loss over the last tenth of the steps."""
    model = make_model(replay.obs.shape[-1], replay.action.shape[-1], mode, seed)
    stream = torch.Generator().manual_seed(seed)
    adam, rng, kept = torch.optim.Adam(model.parameters(), 1e-3), np.random.default_rng(seed), []
    for step in range(steps):
        obs, action, reward, terminated, mask = map(torch.from_numpy, replay.sample(BATCH, HORIZON, rng)[:5])
        with torch.no_grad():
            z_target = model.encode(obs[1:])  # (H, B, Z)
        depth = model.dynamics.sample_depth(BATCH, stream)
        with model.frozen():
            rollout = model.rollout(model.encode(obs[0]), action, depth)
            losses = world_model_losses(model, rollout, z_target, reward, terminated, mask, stream)
            losses["decoding"] = deferred_decoding_loss(model, rollout, z_target, obs[-1], mask)["decoding"]
            total = weighted_sum(losses, {name: WEIGHTS[name] for name in losses})
            adam.zero_grad()
            total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        adam.step()
        kept += [float(total.detach())] if step >= 0.9 * steps else []
    return model, float(np.mean(kept))


def hostile(model: WorldModel, z: Tensor, action: Tensor, steps: int, rate: float = 0.01) -> tuple[WorldModel, int]:
    """The model after ``steps`` of Adam that make the loop's steps and its state grow, and how many it survived.

    The ascent ends early where a gradient leaves the finite numbers: those weights have broken by themselves.
    """
    model = copy.deepcopy(model)
    weights = [*model.dynamics.prelude.parameters(), *model.dynamics.cell.parameters()]
    adam = torch.optim.Adam(weights, rate, maximize=True)
    for step in range(steps):
        adam.zero_grad()
        states = model.dynamics.trajectory(z, action, MAX_LOOPS)
        (step_growth(states) + states[-1].norm(dim=-1).log()).mean().backward()
        if not all(bool(p.grad.isfinite().all()) for p in weights):
            return model, step
        adam.step()
    return model, steps


def real_latents(model: WorldModel, replay: Replay, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(z (count, Z), action (count, A), z of the observation after it (count, Z)) of the data."""
    batch = replay.sample(count, 1, np.random.default_rng(seed))
    with torch.no_grad():
        z = model.encode(torch.from_numpy(batch.obs))  # (2, count, Z)
    return z[0], torch.from_numpy(batch.action[0]), z[1]
