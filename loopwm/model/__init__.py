"""The world model around the looped dynamics."""

from loopwm.model.encoders import ENCODERS, MLPEncoder
from loopwm.model.world_model import Rollout, Step, WorldModel

__all__ = ["ENCODERS", "MLPEncoder", "Rollout", "Step", "WorldModel"]
