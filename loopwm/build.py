"""A world model from a config: the one place that knows both."""

from __future__ import annotations

from torch import nn

from loopwm.config import Config, ConfigError
from loopwm.dynamics import DYNAMICS, HALTING, Dynamics, HaltingRule
from loopwm.model import ENCODERS, WorldModel
from loopwm.model.decoders import LinearDecoder
from loopwm.plugins import accepted, part

INTERFACE = (*Dynamics.__annotations__, *(name for name in vars(Dynamics) if not name.startswith("_")))


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
    if lacks := [name for name in INTERFACE if not hasattr(dynamics, name)]:  # of one's own
        raise ConfigError(f"dynamics.name={cfg.dynamics.name!r}: lacks {lacks[0]} (see loopwm.dynamics.Dynamics)")
    decoder = LinearDecoder(encoder.width, obs_dim) if cfg.agent.observation_weight else None
    return WorldModel(encoder, dynamics, cfg.agent.head_dim, decoder, cfg.agent.activation, grid=encoder.side > 0)


def _make_dynamics(cfg: Config, action_dim: int, latent_norm: nn.Module, side: int) -> nn.Module:
    e, d = cfg.encoder, cfg.dynamics
    halting = d.halting if d.halting in HALTING else part("dynamics.halting", d.halting, {}, HaltingRule)
    words = {
        "mean_loops": d.mean_loops,
        "max_loops": d.max_loops,
        "min_loops": d.min_loops,
        "block": d.block,
        "block_dim": d.block_dim,
        "prelude_layers": d.prelude_layers,
        "block_layers": d.block_layers,
        "order": d.order,
        "coda_layers": d.coda_layers,
        "mode": d.mode,
        "gamma": d.gamma,
        "injection": d.injection,
        "activation": d.activation,
        "skip": d.skip,
        "depth_sampler": d.depth_sampler,
        "halt_tolerance": d.halt_tolerance,
        "halting": halting,
        "patience": d.patience,
        "solver": d.solver,
        "gradient": d.gradient,
        "latent_norm": latent_norm,
        "side": side,
    }
    make = part("dynamics.name", d.name, DYNAMICS, nn.Module)
    return make(e.latent_dim, action_dim, d.hidden_dim, **accepted(make, words))
