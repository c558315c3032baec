"""What one more loop costs, in time and memory, against loops, width and batch; adaptive depth and controls beside it.

Part of ``python -m benchmarks.cost``. A prediction with one loop is the whole of it: prelude, injection, loop, coda. A
further loop is cheap if it costs little of that. The cases of one width and use are timed in turn, in a new random
order every round, so that what else the machine does falls on all of them; ratios are taken within a round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from benchmarks.plots import plt, save_figure
from loopwm.dynamics import DYNAMICS, LatentNorm

ACTION, HORIZON = 6, 3  # the default agent's on walker-walk
MEAN, MOST = 4, 16  # loops of the default agent's predictions, and what adaptive depth may take
AIM = 0.6  # a further loop, as a share of a prediction with one


class Use(NamedTuple):
    """How predictions are asked for."""

    batch: int
    train: bool = False  # forward and backward through HORIZON steps, weights normalised once; else forward alone
    calls: int = 1  # predictions of other rows, one after the other, in one timed call


USES = {"act": Use(1, calls=16), "plan": Use(64), "plan_wide": Use(512), "train": Use(64, True)}
USES["train_wide"] = Use(256, True)


class Effort(NamedTuple):
    """What is measured, and how long."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    loops: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    uses: tuple[str, ...] = tuple(USES)
    seconds: float = 20.0  # of rounds for one width and use
    flops: float = 2e11  # most for one timed call: depths beyond the adaptive one's cap are left out where above it


QUICK = Effort((32, 64, 256), (1, 4, 16, 64), ("act", "plan", "train"), 2.0, 1e10)


# ---- arithmetic ----------------------------------------------------------------------------------


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """Median and 95 % percentile-bootstrap interval over rounds."""
    x = np.asarray(values, float)
    draws = np.median(np.random.default_rng(0).choice(x, (2000, len(x))), 1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {name: float(f"{v:.4g}") for name, v in (("value", np.median(x)), ("low", low), ("high", high))}


def further_loop(loops: Sequence[int], seconds: np.ndarray) -> np.ndarray:
    """(rounds,) least-squares slope of seconds (rounds, depths) over loops, as a share of the prediction with one."""
    x = np.asarray(loops, float) - np.mean(loops)
    return seconds @ x / (x @ x) / seconds[:, list(loops).index(1)]


# ---- cases ---------------------------------------------------------------------------------------


def make(name: str, width: int, device: torch.device, **words) -> nn.Module:
    """A dynamics of Z = D = ``width``, without zero weights: they would make every sample halt at once."""
    torch.manual_seed(0)
    dynamics = DYNAMICS[name](width, ACTION, width, MEAN, MOST, latent_norm=LatentNorm(width), **words)
    with torch.no_grad():
        for p in dynamics.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.orthogonal_(p)
    return dynamics.to(device)


def inputs(use: Use, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """z (calls, B, Z) of sizes from 0.1 to 10, that halt at different loops, and actions (calls, B, A)."""
    stream = torch.Generator().manual_seed(0)
    rows = use.calls * use.batch
    size = torch.logspace(-1, 1, rows)[torch.randperm(rows, generator=stream)].unsqueeze(1)
    z = (size * torch.randn(rows, width, generator=stream)).to(device)
    action = (torch.rand(rows, ACTION, generator=stream) * 2 - 1).to(device)
    return z.view(use.calls, use.batch, width), action.view(use.calls, use.batch, ACTION)


def predict(dynamics: nn.Module, use: Use, z: Tensor, action: Tensor, depth) -> Callable[[], None]:
    """One timed call of this use."""

    def forward() -> None:
        with torch.no_grad():
            for one, a in zip(z, action, strict=True):
                dynamics(one, a, depth)

    def train() -> None:
        with dynamics.frozen():
            latent = z[0]
            for _ in range(HORIZON):
                latent = dynamics(latent, action[0], depth).z_next
            latent.square().mean().backward()
        dynamics.zero_grad()

    return train if use.train else forward


def equal_mean_tolerance(dynamics: nn.Module, z: Tensor, action: Tensor) -> tuple[float, float]:
    """Set the residual rule's tolerance to where the mean over all rows is nearest to MEAN: (tolerance, mean loops)."""
    low, high, found = -6.0, 0.0, []  # log10
    for _ in range(25):
        middle = (low + high) / 2
        dynamics.halting.tolerance = 10**middle
        with torch.no_grad():
            mean = float(dynamics(z.flatten(0, 1), action.flatten(0, 1)).loops.double().mean())
        found.append((abs(mean - MEAN), 10**middle, mean))
        low, high = (low, middle) if mean < MEAN else (middle, high)
    _, dynamics.halting.tolerance, mean = min(found)
    return dynamics.halting.tolerance, mean


def equal_mean_schedule(dynamics: nn.Module, batch: int):
    """(schedule, mean loops): the one of 200 that training may draw whose mean is nearest to MEAN."""
    draws = [dynamics.sample_depth(batch, torch.Generator().manual_seed(seed)) for seed in range(200)]
    best = min(draws, key=lambda s: abs(float(s.loops.double().mean()) - MEAN))
    return best, float(best.loops.double().mean())


class Case(NamedTuple):
    """What is timed: a dynamics at a depth, or adaptive."""

    dynamics: str
    loops: float  # mean over the rows
    adaptive: bool
    call: Callable[[], None]
    model: nn.Module


def cases(use: Use, width: int, effort: Effort, device: torch.device) -> list[Case]:
    """The loop at every depth that is affordable, adaptive at the default's mean, and the controls at their own."""
    z, action = inputs(use, width, device)
    looped = make("looped", width, device)
    one_loop = 8 * width**2 * use.batch * use.calls * (3 * HORIZON if use.train else 1)  # FLOPs
    deep = [t for t in effort.loops if t <= MOST or t * one_loop <= effort.flops]
    found = [Case("looped", t, False, predict(looped, use, z, action, t), looped) for t in deep]
    if use.train:
        depth, mean = equal_mean_schedule(looped, use.batch)
    else:
        depth, (_, mean) = None, equal_mean_tolerance(looped, z, action)
    found.append(Case("looped", mean, True, predict(looped, use, z, action, depth), looped))
    for name in DYNAMICS:
        if name != "looped":
            control = make(name, width, device)
            found.append(Case(name, control.mean_loops, False, predict(control, use, z, action, None), control))
    return found


# ---- measuring -----------------------------------------------------------------------------------


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    """Of one call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(calls: Sequence[Callable[[], None]], seconds: float, device: torch.device) -> np.ndarray:
    """Seconds (rounds, calls): 5 to 100 rounds, as many as fit, each in an order of its own, after two for warmth."""
    for _ in range(2):
        once = sum(seconds_of(call, device) for call in calls)
    rng, rounds = np.random.default_rng(0), int(np.clip(seconds / once, 5, 100))
    taken = np.zeros((rounds, len(calls)))
    for row in taken:
        for i in rng.permutation(len(calls)):
            row[i] = seconds_of(calls[i], device)
    return taken


def measure_group(name: str, width: int, effort: Effort, device: torch.device) -> dict:
    """Everything about one use and width."""
    use = USES[name]
    tried = cases(use, width, effort, device)
    with ExitStack() as stack, torch.set_grad_enabled(use.train):
        if not use.train:  # acting and planning do not change the weights
            for model in {id(case.model): case.model for case in tried}.values():
                stack.enter_context(model.frozen())
        taken = interleaved([case.call for case in tried], effort.seconds, device) / use.calls
    fixed = [i for i, case in enumerate(tried) if case.dynamics == "looped" and not case.adaptive]
    at_mean, at_most = (next(i for i in fixed if tried[i].loops == depth) for depth in (MEAN, MOST))
    rows = [
        {
            "dynamics": case.dynamics,
            "loops": case.loops,
            "adaptive": case.adaptive,
            "ms": median_interval(1e3 * taken[:, i]),
            "of_mean": median_interval(taken[:, i] / taken[:, at_mean]),  # the loop at fixed depth MEAN is 1
            "of_most": median_interval(taken[:, i] / taken[:, at_most]),  # the loop at fixed depth MOST is 1
            "peak_bytes": peak_bytes(case.call, device),
        }
        for i, case in enumerate(tried)
    ]
    slope = median_interval(further_loop([tried[i].loops for i in fixed], taken[:, fixed]))
    return {"use": name, "batch": use.batch, "width": width, "rounds": len(taken), "slope": slope, "cases": rows}


def measure(effort: Effort, device: torch.device) -> tuple[list[dict], dict, str]:
    """(rows, headline, one sentence)."""
    rows = []
    for width in effort.widths:
        for name in effort.uses:
            rows.append(measure_group(name, width, effort, device))
            print(f"{name:10s} width {width:4d}: a further loop {rows[-1]['slope']}", flush=True)
    return rows, *conclude(rows)


def pick(row: dict, **what) -> dict:
    """The one case of a row with these values."""
    return next(case for case in row["cases"] if all(case[key] == value for key, value in what.items()))


def conclude(rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence), computed from the rows."""
    width = min((row["width"] for row in rows), key=lambda w: abs(math.log(w / 64)))  # the default agent's, or nearest
    headline, adaptive = {}, [pick(row, adaptive=True) for row in rows]
    for row in rows:
        headline[f"further loop, {row['use']}, width {row['width']}"] = row["slope"]
    for row in (row for row in rows if row["width"] == width):
        for case in row["cases"]:
            if case["adaptive"]:
                headline[f"adaptive / {MOST} loops, {row['use']}, width {width}"] = case["of_most"]
            if case["adaptive"] or case["dynamics"] != "looped":
                name = "adaptive" if case["adaptive"] else case["dynamics"]
                headline[f"{name} / {MEAN} loops, {row['use']}, width {width}"] = case["of_mean"]
    met = sum(row["slope"]["value"] <= AIM for row in rows)
    here = ", ".join(f"{row['slope']['value']:.2f} ({row['use']})" for row in rows if row["width"] == width)
    worst = max(rows, key=lambda row: row["slope"]["value"])
    of_mean, of_most = ([case[key]["value"] for case in adaptive] for key in ("of_mean", "of_most"))
    return headline, (
        f"At width {width} a further loop costs {here} of a prediction with one; at most {AIM} in {met} of {len(rows)} "
        f"cases, worst {worst['slope']['value']:.2f} ({worst['use']}, width {worst['width']}); adaptive depth of mean "
        f"{MEAN} and cap {MOST} costs {min(of_mean):.2f} to {max(of_mean):.2f} times {MEAN} loops for all (median "
        f"{np.median(of_mean):.2f}), and {np.median(of_most):.2f} times {MOST} loops for all."
    )


def draw(rows: list[dict], path: Path) -> None:
    """Time against loops; slope against width; peak memory of training against loops."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), dpi=130)
    for name in dict.fromkeys(row["use"] for row in rows):
        mine = [row for row in rows if row["use"] == name]
        slopes = [row["slope"] for row in mine]
        spread = [[s["value"] - s["low"] for s in slopes], [s["high"] - s["value"] for s in slopes]]
        axes[1].errorbar([r["width"] for r in mine], [s["value"] for s in slopes], spread, marker="o", ms=3, label=name)
        row = min(mine, key=lambda r: abs(math.log(r["width"] / 64)))
        fixed = [case for case in row["cases"] if case["dynamics"] == "looped" and not case["adaptive"]]
        loops = [case["loops"] for case in fixed]
        axes[0].plot(loops, [c["ms"]["value"] for c in fixed], marker="o", ms=3, label=f"{name}, width {row['width']}")
        axes[2].plot(loops, [c["peak_bytes"] / 1e6 for c in fixed], marker="o", ms=3, label=name)
    axes[1].axhline(AIM, color="#bbbbbb", linewidth=0.8)
    axes[0].set(xscale="log", yscale="log", xlabel="loops", ylabel="ms")
    axes[1].set(xscale="log", ylim=(0, None), xlabel="width", ylabel="a further loop / a prediction with one")
    axes[2].set(xscale="log", yscale="log", xlabel="loops", ylabel="peak memory, MB")
    loops = sorted({case["loops"] for row in rows for case in row["cases"] if not case["adaptive"]})
    for one, ticks in zip(axes, (loops, sorted({row["width"] for row in rows}), loops), strict=True):
        one.set_xticks(ticks, [str(tick) for tick in ticks])
        one.minorticks_off()
        one.grid(alpha=0.25)
    axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save_figure(figure, path)
