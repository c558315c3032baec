"""Can the loop be made to blow up? Every stability mode under hostile weights, actions, latents, states and depths.

Small world models of walker-walk are trained in every mode of ``MODES`` (``benchmarks.walker_models``), and their
weights are then also pushed to make the loop grow. Each is searched for the largest factor of one loop, for actions
that make an open-loop rollout grow, among random latents, and at 1 to 1024 loops (``benchmarks.loop_probes``). What is
found is a lower bound on the worst case; the certificate is an upper one, and has to lie above it.

python -m benchmarks.stability --json docs/results/stability.json --figure docs/figures/stability.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.harness import interval, parser, report
from benchmarks.loop_probes import (
    STARTS,
    depth_errors,
    hostile_factor,
    hostile_rollout,
    random_factor,
    random_latents,
    state_radius,
)
from benchmarks.plots import plt, save_figure
from benchmarks.walker_models import hostile, random_transitions, real_latents, train_model
from loopwm.dynamics import MODES
from loopwm.model import WorldModel
from loopwm.training.replay import Replay

PUBLISHED = "linear"  # the constraint of 2606.18208: the one to beat
WEIGHTS = ("trained", "hostile")
NORMED, UNNORMED = ("fresh", "carried"), "no_latent_norm"  # of STARTS: where ||z|| is fixed, and where it is free
COLORS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182")


class Effort(NamedTuple):
    """How hard each search tries."""

    transitions: int = 20_000
    training: int = 4000  # optimiser steps
    pushes: int = 200  # optimiser steps that make the weights hostile
    ascent: int = 500  # steps of the search for hostile states
    points: int = 64  # states searched at once
    rollout: int = 10_000  # predictions of a rollout
    rollouts: int = 8  # of each kind of action
    latents: int = 1_000_000


QUICK = Effort(2000, 300, 60, 60, 16, 300, 4, 20_000)
random_transitions = cache(random_transitions)


def probe(model: WorldModel, replay: Replay, effort: Effort, seed: int) -> dict:
    """Everything that is asked of one set of weights."""
    dynamics, stream = model.dynamics, torch.Generator().manual_seed(seed)
    z, action, after = real_latents(model, replay, effort.points, seed)
    starts = z[: effort.rollouts]
    return {
        "bound": dynamics.lipschitz_bound(),
        "radius": max(state_radius(dynamics), float(dynamics.start(starts).norm(dim=-1).max())),
        "random_factor": random_factor(dynamics, z, action, stream),
        "hostile_factor": hostile_factor(dynamics, z, action, stream, effort.ascent),
        "depth": depth_errors(dynamics, z, action, after),
        "latents": random_latents(dynamics, effort.latents, action.shape[1], stream),
        "rollouts": {
            start: hostile_rollout(dynamics, starts, action.shape[1], start, effort.rollout, stream) for start in STARTS
        },
    }


def measure(job: tuple[str, int, Effort]) -> list[dict]:
    """The rows of one mode and seed: trained weights, and the same made hostile."""
    mode, seed, effort = job
    torch.set_num_threads(1)
    replay = random_transitions(effort.transitions, seed)
    model, loss = train_model(replay, mode, seed, effort.training)
    z, action, _ = real_latents(model, replay, effort.points, seed + 1)
    pushed, pushes = hostile(model, z, action, effort.pushes)
    rows = []
    for weights, tried, note in zip(WEIGHTS, (model, pushed), ({"loss": loss}, {"pushes": pushes}), strict=True):
        rows.append({"mode": mode, "seed": seed, "weights": weights} | note | probe(tried, replay, effort, seed))
        print(summary(rows[-1]), flush=True)
    return rows


def rollouts(rows: list[dict], *starts: str) -> list[dict]:
    """Every kind of action, from these starts."""
    return [r for row in rows for start in starts for r in row["rollouts"][start].values()]


def factor(row: dict) -> float:
    """The largest factor of one loop that any search found."""
    return max(row["random_factor"], row["hostile_factor"])


def breaches(row: dict) -> list[str]:
    """Which certified figures of a row turned out false; none may. To float32 rounding, in which the weights are."""
    largest = max(r["largest_state"] for r in rollouts([row], *NORMED))
    false = {
        "factor": factor(row) > row["bound"] * (1 + 1e-6),
        "radius": largest > row["radius"] * (1 + 1e-4),
        "latents": row["latents"]["state_over_radius"] > 1 + 1e-4,
        "distance": not row["depth"]["sound"],
    }
    return [name for name, is_false in false.items() if is_false]


def summary(row: dict) -> str:
    """One line."""
    of = rollouts([row], *NORMED)
    return (
        f"{row['mode']:10s} seed {row['seed']} {row['weights']:8s} factor {factor(row):.4g}, bound {row['bound']:.4g}; "
        f"bounded rollouts {sum(r['bounded'] for r in of)}/{len(of)}; "
        f"settles with depth: {'yes' if row['depth']['converged'] else 'no'}; breaches: {breaches(row) or 'none'}"
    )


def tally(rows: list[dict]) -> dict[str, float]:
    """What share of them held."""
    normed, latents = rollouts(rows, *NORMED), [row["latents"] for row in rows]
    return {
        "rollouts finite": float(np.mean([r["finite"] for r in normed])),
        "rollouts bounded": float(np.mean([r["bounded"] for r in normed])),
        "latents finite": sum(r["finite"] for r in latents) / sum(r["count"] for r in latents),
        "weights that settle with depth": float(np.mean([row["depth"]["converged"] for row in rows])),
        "rollouts finite without the latent norm": float(np.mean([r["finite"] for r in rollouts(rows, UNNORMED)])),
    }


def conclude(rows: list[dict], effort: Effort) -> tuple[dict, str]:
    """(headline, one sentence), computed from the rows."""
    headline, held, failed, drift = {}, [], [], []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        for weights in WEIGHTS:
            of = [row for row in mine if row["weights"] == weights]
            headline[f"{mode}, {weights} weights: largest factor"] = interval([factor(row) for row in of])
            headline[f"{mode}, {weights} weights: its bound"] = interval([row["bound"] for row in of])
        by_seed = [tally([row for row in mine if row["seed"] == seed]) for seed in {row["seed"] for row in mine}]
        for name in by_seed[0]:
            headline[f"{mode}: {name}"] = interval([share[name] for share in by_seed])
        share, worst, false = tally(mine), max(map(factor, mine)), sum(bool(breaches(row)) for row in mine)
        good = min(share["rollouts bounded"], share["latents finite"]) == 1.0 and worst < 1.0 and not false
        (held if good else failed).append(
            f"{mode} (largest factor {worst:.3g}, {share['rollouts bounded']:.0%} of rollouts bounded, "
            f"{share['latents finite']:.3%} of latents finite, {false} false bounds)"
        )
        drift.append(f"{share['rollouts finite without the latent norm']:.0%} {mode}")
    lost = any(text.startswith(PUBLISHED) for text in failed)
    beaten = "beaten" if held and lost else "not beaten" if PUBLISHED in {row["mode"] for row in rows} else "not run"
    return headline, (
        f"Over {len({row['seed'] for row in rows})} seed(s), trained and hostile weights, {effort.rollout} steps: "
        f"contracting and bounded throughout {', '.join(held) or 'no mode'}; not so {', '.join(failed) or 'none'}; "
        f"the published mode is {beaten}. No mode bounds z itself: rollouts finite "
        f"without the latent norm {', '.join(drift)}."
    )


def draw(rows: list[dict], path: Path) -> None:
    """Factor against bound; largest state of carried rollouts; distance to the fixed point. Crosses: not finite."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), dpi=130)
    ends = [f(row) for row in rows for f in (factor, lambda row: row["bound"])]
    left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#bbbbbb", linewidth=0.8, zorder=0)
    left.axhline(1.0, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for i, (mode, color) in enumerate(zip(modes, COLORS, strict=False)):
        for weights, marker, style in zip(WEIGHTS, "o^", ("-", "--"), strict=True):
            mine = [row for row in rows if (row["mode"], row["weights"]) == (mode, weights)]
            bounds, factors = [row["bound"] for row in mine], [factor(row) for row in mine]
            left.scatter(bounds, factors, marker=marker, s=18, color=color, label=f"{mode}, {weights}")
            for row in mine:
                curves = [r["curve"] for r in row["rollouts"]["carried"].values()]
                steps, largest = [t for t, _ in curves[0]], np.max([[size for _, size in c] for c in curves], 0)
                line(middle, steps, largest, color, style, 0.97 - 0.04 * i)
            depth = mine[0]["depth"]["loops"]
            line(right, depth, np.median([r["depth"]["error"] for r in mine], 0), color, style, 0.97 - 0.04 * i)
            right.plot(depth, np.median([r["depth"]["certified"] for r in mine], 0), ":", color=color, linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="lipschitz_bound()", ylabel="largest factor found")
    middle.set(xscale="log", yscale="log", xlabel="steps, h carried over", ylabel="largest ||h|| under any action")
    right.set(xscale="log", yscale="log", xlabel="loops (dotted: certified)", ylabel="distance to the fixed point")
    right.set_ylim(bottom=1e-14)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
    left.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


def line(axes, x: Sequence[float], y: np.ndarray, color: str, style: str, height: float) -> None:
    """A curve, and a cross at the first x where y is not finite."""
    axes.plot(x, np.where(np.isfinite(y), y, np.nan), style, color=color, linewidth=1)
    if not np.isfinite(y).all():
        first = x[int(np.argmin(np.isfinite(y)))]
        axes.plot([first], [height], "x", color=color, transform=axes.get_xaxis_transform())


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    p.add_argument("--figure", type=Path, metavar="FILE")
    args = p.parse_args(arguments)
    seeds, effort = (range(1), QUICK) if args.quick else (range(args.seeds), Effort())
    jobs = [(mode, seed, effort) for seed in seeds for mode in args.mode]
    if args.jobs == 1:
        results = [measure(job) for job in jobs]
    else:
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            results = list(pool.map(measure, jobs))
    rows = [row for result in results for row in result]
    if args.figure:
        draw(rows, args.figure)
    headline, verdict = conclude(rows, effort)
    report("stability", args, seeds, rows, headline, verdict)


if __name__ == "__main__":
    main(sys.argv[1:])
