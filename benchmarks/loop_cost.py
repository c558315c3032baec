"""What a loop costs: forward, forward and backward, and the memory kept for backward, against loops and width.

One prediction of the default dynamics, one thread. A further loop is cheaper than the first because prelude, injection
and coda are paid once: the slope is (time of 2 T loops - time of T) / T over the time of a one-loop prediction. Beside
it the unlooped controls of the same FLOPs, and adaptive depth against the fixed depth of the same mean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import parser, report
from loopwm.dynamics import DYNAMICS, RandomHalting

LATENT, ACTIONS = 64, 6
LOOPS = (1, 2, 4, 8, 16, 32, 64)
WIDTHS = (32, 64, 128, 256, 512, 1024)
BATCHES = {"acting": 1, "planning": 64, "training": 256}
SLOPE_LOOPS = 16  # the slope is between these and twice as many


def kept_bytes(action: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for its backward pass, without the weights' own."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = action()
    del kept
    return sum(seen.values())


def interleaved_medians(actions: dict[object, Callable[[], object]], repeats: int) -> dict[object, float]:
    """Median milliseconds of each call; they take turns, so that a drifting machine is fair to all."""
    times: dict[object, list[float]] = {key: [] for key in actions}
    for turn in range(repeats + 2):
        for key, action in actions.items():
            start = time.perf_counter()
            action()
            if turn >= 2:  # the first two warm up
                times[key].append(1e3 * (time.perf_counter() - start))
    return {key: float(np.median(values)) for key, values in times.items()}


def passes(dynamics, batch: int) -> tuple[Callable, Callable, Callable]:
    """(forward without gradient, forward with gradient, forward and backward), each of a depth."""
    z, action = torch.randn(batch, LATENT), torch.randn(batch, ACTIONS)

    def forward(depth: int | None) -> Tensor:
        with torch.no_grad(), dynamics.frozen():
            return dynamics(z, action, depth).z_next

    def tracked(depth: int | None) -> Tensor:
        with dynamics.frozen():
            return dynamics(z, action, depth).z_next

    def both(depth: int | None) -> None:
        dynamics.zero_grad()
        tracked(depth).square().mean().backward()

    return forward, tracked, both


def slope(times: dict[int, float], loops: int = SLOPE_LOOPS) -> float:
    """Time of one further loop, over that of a whole one-loop prediction."""
    return (times[2 * loops] - times[loops]) / loops / times[1]


def by_loops(width: int, repeats: int) -> list[dict]:
    """One row a batch size: milliseconds and kept bytes for each number of loops."""
    rows, dynamics = [], DYNAMICS["looped"](LATENT, ACTIONS, width)
    for use, batch in BATCHES.items():
        forward, tracked, both = passes(dynamics, batch)
        row = {"width": width, "use": use, "batch": batch}
        for kind, run in (("forward", forward), ("forward and backward", both)):
            times = interleaved_medians({n: lambda n=n, run=run: run(n) for n in LOOPS}, repeats)
            row[kind] = {n: round(ms, 4) for n, ms in times.items()}
            row[f"slope, {kind}"] = round(slope(times), 4)
        row["kept_bytes"] = {n: kept_bytes(lambda n=n, run=tracked: run(n)) for n in LOOPS}
        rows.append(row)
    return rows


def of_controls(repeats: int) -> list[dict]:
    """Loop and controls at the default width, batch and 4 loops: milliseconds and parameters."""
    models = {name: make(LATENT, ACTIONS, 64) for name, make in DYNAMICS.items()}
    runs = {name: passes(model, BATCHES["training"]) for name, model in models.items()}
    forward = interleaved_medians({name: lambda r=r: r[0](4) for name, r in runs.items()}, repeats)
    both = interleaved_medians({name: lambda r=r: r[2](4) for name, r in runs.items()}, repeats)
    return [
        {
            "dynamics": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "forward": round(forward[name], 4),
            "forward and backward": round(both[name], 4),
        }
        for name, model in models.items()
    ]


def adaptive(repeats: int) -> list[dict]:
    """Depths uniform on 1 .. 2 m - 1 by a rule that costs nothing, against fixed depths: what leaving early saves."""
    rows = []
    for use, batch in BATCHES.items():
        for mean in (4, 16):
            dynamics = DYNAMICS["looped"](LATENT, ACTIONS, 64, mean_loops=mean, max_loops=2 * mean)
            dynamics.halting = RandomHalting(torch.arange(1, 2 * mean))
            forward, _, _ = passes(dynamics, batch)
            calls = {"adaptive": None, "mean": mean, "max": 2 * mean}
            times = interleaved_medians({k: lambda d=d, run=forward: run(d) for k, d in calls.items()}, repeats)
            rows.append({"use": use, "batch": batch, "mean_loops": mean} | {k: round(v, 4) for k, v in times.items()})
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Milliseconds against loops, a panel a batch size, a line a width."""
    figure, panels = plt.subplots(1, len(BATCHES), figsize=(11, 3.6), dpi=130)
    for axes, (use, batch) in zip(panels, BATCHES.items(), strict=True):
        for row in (row for row in rows if row.get("use") == use and "width" in row):
            axes.plot(
                LOOPS, list(row["forward and backward"].values()), marker="o", ms=3, label=f"width {row['width']}"
            )
        axes.set(xscale="log", yscale="log", xlabel="loops", title=f"{use}, batch {batch}")
        axes.set_xticks(LOOPS, [str(n) for n in LOOPS])
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("forward and backward, ms")
    panels[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--figure", type=Path, metavar="FILE")
    args = p.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    widths, repeats = (WIDTHS[1:3], 5) if args.quick else (WIDTHS, 41)
    rows = [row for width in widths for row in by_loops(width, repeats)] + of_controls(repeats) + adaptive(repeats)
    if args.figure:
        draw(rows, args.figure)
    headline, name = {}, "slope, forward and backward"
    for use in BATCHES:
        slopes = {row["width"]: row[name] for row in rows if row.get("use") == use and "width" in row}
        low, high = min(slopes.values()), max(slopes.values())
        headline[f"slope of a further loop, width 64, {use}"] = {"value": slopes[64], "low": low, "high": high}
    worst = max(row[name] for row in rows if name in row)
    verdict = (
        f"A further loop costs {headline['slope of a further loop, width 64, training']['value']:.2f} of a one-loop "
        f"prediction at the default width and training batch, {worst:.2f} at worst over widths and batches (brackets: "
        "least and most over widths)."
    )
    report("loop_cost", args, [0], rows, headline, verdict)


if __name__ == "__main__":
    main(sys.argv[1:])
