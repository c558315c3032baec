"""matplotlib without a screen, and how a benchmark keeps a figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure``, in a folder that is made for it, and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


__all__ = ["plt", "save_figure"]
