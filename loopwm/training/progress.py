"""The one progress bar: frames, frames/s, time left, and the latest returns and loops."""

from __future__ import annotations

import sys

from tqdm import tqdm

FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} frames [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """A bar over env frames. Into a file it writes a line a minute, not a screenful.

    Args:
        frames: length of the run. start: where it goes on from.
    """

    def __init__(self, frames: int, start: int):
        pause = 0.2 if sys.stderr.isatty() else 60.0  # seconds between two drawings
        super().__init__(
            total=max(frames, start),
            initial=start,
            unit="frame",
            bar_format=FORMAT,
            dynamic_ncols=True,
            mininterval=pause,
            maxinterval=2 * pause,
        )
        self._values: dict[str, str] = {}

    def advance(self, frames: int) -> None:
        """Count env frames; those of parallel environments beyond the last are not shown."""
        self.update(min(frames, self.total - self.n))

    def show(self, **values: float | None) -> None:
        """Put values behind the bar; None leaves what is there."""
        self._values |= {name: f"{value:.4g}" for name, value in values.items() if value is not None}
        self.set_postfix(self._values, refresh=False)
