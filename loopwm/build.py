"""A world model from a config: the one place that knows both."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from loopwm.config import Config, ConfigError
from loopwm.dynamics import DYNAMICS, HaltingRule, LoopedDynamics
from loopwm.model import ENCODERS, WorldModel
from loopwm.model.decoders import LinearDecoder
from loopwm.plugins import accepted, check_dynamics, in_words, own_class
from loopwm.schema import is_own


def make_world_model(cfg: Config, obs_dim: int, action_dim: int) -> WorldModel:
    """The world model that a config describes. Raises ConfigError: no model has such sizes, or such parts."""
    e = cfg.encoder
    sizes = (obs_dim, e.latent_dim, e.hidden_dim, e.layers, cfg.agent.activation)
    try:
        encoder = ENCODERS[e.name](*sizes, **({"side": e.side} if e.side else {}))
    except ValueError as error:
        raise ConfigError(f"encoder={e.name}: {error}") from None
    try:
        named = {"name": cfg.dynamics.name, "halting": cfg.dynamics.halting}
        own = [f"dynamics.{key}={name!r}" for key, name in named.items() if is_own(name)]
        with in_words(" ".join(own)) if own else nullcontext():
            dynamics = _make_dynamics(cfg, action_dim, encoder.norm, encoder.side)
            if own:
                check_dynamics(own[0], dynamics, encoder.width, action_dim)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"dynamics={cfg.dynamics.name}: {error}") from None
    if cfg.agent.early_weight and not isinstance(dynamics, LoopedDynamics):
        raise ConfigError("agent.early_weight: needs a subclass of loopwm.dynamics.LoopedDynamics")
    decoder = LinearDecoder(encoder.width, obs_dim) if cfg.agent.observation_weight else None
    return WorldModel(encoder, dynamics, cfg.agent.head_dim, decoder, cfg.agent.activation, grid=encoder.side > 0)


def _make_dynamics(cfg: Config, action_dim: int, latent_norm: nn.Module, side: int) -> nn.Module:
    e, d = cfg.encoder, cfg.dynamics
    halting = own_class("dynamics.halting", d.halting, HaltingRule) if is_own(d.halting) else d.halting
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
    if not is_own(d.name):
        return DYNAMICS[d.name](e.latent_dim, action_dim, d.hidden_dim, **words)
    make = own_class("dynamics.name", d.name, nn.Module)
    taken, usual = accepted(make, words), type(d)()
    for name in ("halting", "solver", "gradient"):
        if name not in taken and getattr(d, name) != getattr(usual, name):
            raise ConfigError(f"dynamics.{name}={getattr(d, name)}: {d.name} takes no such setting")
    return make(e.latent_dim, action_dim, d.hidden_dim, **taken)
