"""Frames of the worlds that live on a grid."""

import numpy as np

CELL = 16  # pixels; video codecs want sides that are multiples of 16


def grid_frame(levels: np.ndarray) -> np.ndarray:
    """Draw brightnesses (H, W) in [0, 1] as squares. Return uint8 (16 H, 16 W, 3)."""
    pixels = np.kron(levels, np.ones((CELL, CELL)))  # (16 H, 16 W)
    return np.repeat((255 * pixels).astype(np.uint8)[..., None], 3, axis=2)
