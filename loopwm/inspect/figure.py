"""The picture of a report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

INK = ("#1b6ca8", "#d1495b", "#66a182", "#7d5ba6")


def draw(found: dict[str, Any], path: Path) -> None:
    """``found`` is what ``loopwm.inspect.__main__.measure`` gives; panels of the loop only where there is one."""
    panels = [_settling, _depths, _choices, _horizon] if found["looped"] else [_horizon]
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, min(len(panels), 2), figsize=(5.0 * min(len(panels), 2), 3.6 * rows), dpi=130)
    for panel, one in zip(panels, axes.flat if len(panels) > 1 else [axes], strict=True):
        panel(one, found)
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    title = f"{found['task']}, {found['dynamics']}, seed {found['seed']}, after {found['frames']:,} frames"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _settling(axes: plt.Axes, found: dict[str, Any]) -> None:
    """Distance to where the loop ends, against loops."""
    low, middle, high = zip(*found["settling"]["distance"], strict=True)
    loops = range(len(middle))
    axes.plot(loops, middle, color=INK[0], label="median")
    axes.fill_between(loops, low, high, color=INK[0], alpha=0.2, linewidth=0, label="8 of 10 states")
    bound = found["settling"]["bound"]
    if bound < 1.0:
        certified = [high[0] * bound**t for t in loops]
        axes.plot(loops, certified, "--", color=INK[1], label=f"certified: {bound:.2f} a loop")
    _mark(axes, found)
    end = "fixed point" if found["settling"]["settled"] else "state after 512 loops: it has not settled"
    axes.set(yscale="log", xlabel="loops", ylabel=f"distance to the {end}", title="How the loop settles")
    sizes = [x for x in (*low, *high) if math.isfinite(x)] or [1.0]  # a loop that grows may end in no number
    axes.set_ylim(max(1e-6, 0.5 * min(sizes)), 3.0 * max(1e-6, *sizes))
    axes.legend(fontsize=7, frameon=False)


def _depths(axes: plt.Axes, found: dict[str, Any]) -> None:
    """What a prediction gains by depth."""
    rows = [row for row in found["depths"] if row["depth"]]
    loops = [row["depth"] for row in rows]
    for name, color, style in zip(found["ahead"], INK[:2] * 2, ("-", "-", "--", "--"), strict=False):
        axes.plot(loops, [row[name] for row in rows], style, color=color, marker="o", ms=3, label=name)
    _mark(axes, found)
    axes.set(xscale="log", yscale="log", xlabel="loops", ylabel="share of variance unexplained")
    axes.set_title("What depth buys")
    axes.set_xticks(loops, [str(n) for n in loops])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=7, frameon=False)


def _choices(axes: plt.Axes, found: dict[str, Any]) -> None:
    """How deep predictions go that may choose."""
    counts = found["chosen"]
    axes.bar(range(1, len(counts) + 1), [n / sum(counts) for n in counts], color=INK[2])
    axes.set(xlabel="loops", ylabel="share of predictions", title=f"Depth by the halting rule ({found['halting']})")


def _horizon(axes: plt.Axes, found: dict[str, Any]) -> None:
    """Open-loop error against steps ahead."""
    curves = found["horizon"].items()
    for i, (color, (label, curve)) in enumerate(zip(INK, curves, strict=False)):
        axes.plot(range(1, len(curve) + 1), curve, color=color, label=label, linewidth=3.0 - i)  # one may hide another
    axes.axhline(1.0, color="#bbbbbb", linewidth=0.8)
    axes.set(xlabel="steps ahead, open loop", ylabel="latent: share of variance unexplained", title="How far it sees")
    axes.set_ylim(0.0, min(2.0, axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False)


def _mark(axes: plt.Axes, found: dict[str, Any]) -> None:
    axes.axvline(found["mean_loops"], color="#888888", linewidth=0.8, linestyle=":", label="trained mean")
