"""The world model around the looped dynamics."""

from loopwm.model.decoders import DECODERS, LinearDecoder, MLPDecoder
from loopwm.model.deferred import decoding_horizon, deferred_decoding_loss
from loopwm.model.encoders import ENCODERS, MLPEncoder
from loopwm.model.world_model import Rollout, Step, WorldModel

__all__ = [
    "DECODERS",
    "ENCODERS",
    "LinearDecoder",
    "MLPDecoder",
    "MLPEncoder",
    "Rollout",
    "Step",
    "WorldModel",
    "decoding_horizon",
    "deferred_decoding_loss",
]
