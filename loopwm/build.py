"""A world model from a config: the one place that knows both."""

from __future__ import annotations

from torch import nn

from loopwm.config import Config, ConfigError
from loopwm.dynamics import DYNAMICS
from loopwm.model import ENCODERS, WorldModel
from loopwm.model.decoders import LinearDecoder


def make_world_model(cfg: Config, obs_dim: int, action_dim: int) -> WorldModel:
    """The world model that a config describes. Raises ConfigError: no model has such sizes."""
    e = cfg.encoder
    sizes = (obs_dim, e.latent_dim, e.hidden_dim, e.layers, cfg.agent.activation)
    try:
        encoder = ENCODERS[e.name](*sizes, **({"side": e.side} if e.side else {}))
    except ValueError as error:
        raise ConfigError(f"encoder={e.name}: {error}") from None
    try:
        dynamics = _make_dynamics(cfg, action_dim, encoder.norm, encoder.side)
    except ValueError as error:
        raise ConfigError(f"dynamics={cfg.dynamics.name}: {error}") from None
    decoder = LinearDecoder(encoder.width, obs_dim) if cfg.agent.observation_weight else None
    return WorldModel(encoder, dynamics, cfg.agent.head_dim, decoder, cfg.agent.activation, grid=encoder.side > 0)


def _make_dynamics(cfg: Config, action_dim: int, latent_norm: nn.Module, side: int) -> nn.Module:
    e, d = cfg.encoder, cfg.dynamics
    return DYNAMICS[d.name](
        e.latent_dim,
        action_dim,
        d.hidden_dim,
        d.mean_loops,
        d.max_loops,
        min_loops=d.min_loops,
        block=d.block,
        block_dim=d.block_dim,
        prelude_layers=d.prelude_layers,
        block_layers=d.block_layers,
        order=d.order,
        coda_layers=d.coda_layers,
        mode=d.mode,
        gamma=d.gamma,
        injection=d.injection,
        activation=d.activation,
        skip=d.skip,
        depth_sampler=d.depth_sampler,
        halt_tolerance=d.halt_tolerance,
        halting=d.halting,
        patience=d.patience,
        solver=d.solver,
        gradient=d.gradient,
        latent_norm=latent_norm,
        side=side,
    )
