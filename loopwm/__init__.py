"""loopwm: a looped world model for model-based reinforcement learning."""

__version__ = "0.1.0"
