"""What the worlds' constructors and actions share."""

import numpy as np


def is_whole(value: object, least: int) -> bool:
    """Whether `value` is an integer (True and False are none) of at least `least`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def equal_bins(action: np.ndarray, count: int) -> np.ndarray:
    """Cut entries (...,) in [-1, 1] into `count` equal bins: int64 (...,) in 0..count - 1, also of entries beyond.

    Raises:
        ValueError: an entry that is no number.
    """
    bins = np.floor((np.asarray(action, np.float64) + 1) / 2 * count)
    if np.isnan(bins).any():
        raise ValueError(f"an action must be of numbers, got {action}")
    return np.clip(bins, 0, count - 1).astype(np.int64)  # an entry of exactly 1 belongs to the last bin
