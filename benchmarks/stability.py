"""Does the loop stay finite, and does its certificate hold? Every stability mode, on trained and on hostile weights.

In each mode a looped world model learns real steps of dmc/walker-walk under random actions. ``hostile`` weights are
these after further training that does nothing but make h grow. Measured on both: one-loop factors, the largest singular
value of dh'/dh, at random states and at states searched for it, against ``lipschitz_bound()``; open-loop rollouts of
10^4 steps under adversarial, bang-bang and random actions; 10^6 random latents; and how far h travels in 1024 loops.
"""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import interval, parser, report
from envs import make_env
from loopwm.dynamics import LoopedDynamics
from loopwm.dynamics.cell import MODES
from loopwm.model import MLPDecoder, MLPEncoder

TASK, LATENT, HIDDEN, BATCH, HORIZON = "dmc/walker-walk", 64, 64, 128, 3
PENALTY = 0.1  # weight of the Jacobian penalty in mode soft
DEPTHS = (1, 4, 16, 64, 256, 1024)


@cache
def transitions(count: int) -> tuple[Tensor, Tensor]:
    """obs (n, H + 1, O), normalised, and actions (n, H, A): subsequences of episodes under uniform random actions."""
    env, rng = make_env(TASK, seed=0), np.random.default_rng(0)
    obs, action, starts = [], [], []
    while len(action) < count:
        row, _ = env.reset()
        obs.append(row)
        for step in range(200):
            act = rng.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)
            starts += [len(action)] if step <= 200 - HORIZON else []
            row = env.step(act)[0]
            obs.append(row)
            action.append(act)
        action.append(np.zeros_like(act))  # keeps the two lists aligned across episodes
    o, a = torch.tensor(np.array(obs)), torch.tensor(np.array(action))
    index = torch.tensor([s for s in starts if s + HORIZON < len(o)])
    o = (o - o.mean(0)) / o.std(0).clamp_min(1e-3)
    return (
        torch.stack([o[index + t] for t in range(HORIZON + 1)], 1),
        torch.stack([a[index + t] for t in range(HORIZON)], 1),
    )


def learn(mode: str, seed: int, steps: int) -> tuple[LoopedDynamics, MLPEncoder, float]:
    """Dynamics and encoder after open-loop training against decoded observations, and the last losses' mean."""
    torch.manual_seed(seed)
    obs, action = transitions(10_000)
    encoder = MLPEncoder(obs.shape[-1], LATENT, 128)
    dynamics = LoopedDynamics(LATENT, action.shape[-1], HIDDEN, mode=mode, latent_norm=encoder.norm)
    decoder = MLPDecoder(LATENT, obs.shape[-1], 128)
    optimizer = torch.optim.Adam([p for m in (encoder, dynamics, decoder) for p in m.parameters()], 1e-3)
    stream, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        rows = torch.randint(0, len(obs), (BATCH,), generator=stream)
        depth, loss = dynamics.sample_depth(BATCH, stream), torch.zeros(())
        with dynamics.frozen():
            z = encoder(obs[rows, 0])
            for t in range(HORIZON):
                out = dynamics(z, action[rows, t], depth)
                z = out.z_next
                loss = loss + decoder.loss(z, obs[rows, t + 1]).mean() / HORIZON
            losses.append(float(loss.detach()))
            if out.penalised:
                loss = loss + PENALTY * out.jacobian_penalty(stream).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return dynamics.eval(), encoder.eval(), float(np.mean(losses[-100:]))


def make_hostile(dynamics: LoopedDynamics, z: Tensor, action: Tensor, steps: int) -> LoopedDynamics:
    """A copy trained to let h grow: what training that goes wrong could do to the weights."""
    hostile = copy.deepcopy(dynamics)
    optimizer = torch.optim.Adam(hostile.cell.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        h = hostile(z, action, 8).h
        (-torch.log1p(h.square().sum(-1)).mean()).backward()
        optimizer.step()
    return hostile


def one_loop_factor(loop, h: Tensor, iterations: int = 30) -> Tensor:
    """Largest singular value (B,) of dh'/dh at h (B, D), from below: power iteration on J^T J."""
    v = torch.randn_like(h)
    for _ in range(iterations):
        v = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        _, stretched = torch.func.jvp(loop, (h,), (v,))
        v = torch.func.vjp(loop, h)[1](stretched)[0]
    return stretched.norm(dim=-1)


@torch.no_grad()
def largest_factor(dynamics: LoopedDynamics, z: Tensor, action: Tensor, rounds: int) -> float:
    """Largest one-loop factor over random states of every size, and over states moved uphill from the worst of them."""
    dynamics = copy.deepcopy(dynamics).double()
    loop = dynamics.cell.prepare(dynamics.prelude(z.double(), action.double()))
    scale = torch.logspace(-2, 2, len(z), dtype=torch.float64).unsqueeze(-1)
    h = torch.randn(len(z), HIDDEN, dtype=torch.float64) * scale
    worst = one_loop_factor(loop, h).max()
    for _ in range(rounds):  # a random search: the factor of a ReLU block is piecewise constant, it has no gradient
        trial = h + torch.randn_like(h) * scale * 0.3
        better = one_loop_factor(loop, trial, 10) > one_loop_factor(loop, h, 10)
        h = torch.where(better.unsqueeze(-1), trial, h)
        worst = torch.maximum(worst, one_loop_factor(loop, h).max())
    return float(worst)


def sizes(h: Tensor) -> Tensor:
    """||h|| (B,), inf where it is not a number."""
    return h.norm(dim=-1).nan_to_num(nan=torch.inf, posinf=torch.inf)


@torch.no_grad()
def longest_state(dynamics: LoopedDynamics, z: Tensor, action_dim: int, steps: int, choice: str) -> float:
    """Largest ||h|| in an open-loop rollout; ``adversarial`` takes the corner, of eight, whose h is the longest."""
    worst, stream = 0.0, torch.Generator().manual_seed(0)
    with dynamics.frozen():
        for _ in range(steps):
            if choice == "random":
                action = torch.rand(len(z), action_dim, generator=stream) * 2 - 1
            else:
                tries = 8 if choice == "adversarial" else 1
                action = torch.randint(0, 2, (tries * len(z), action_dim), generator=stream) * 2.0 - 1
            out = dynamics(z.repeat(len(action) // len(z), 1), action, dynamics.mean_loops)
            size = sizes(out.h).view(-1, len(z))  # (tries, B)
            best = size.argmax(0)
            z = out.z_next.view(-1, *z.shape)[best, torch.arange(len(z))]
            worst = max(worst, float(size.max()))
            if not np.isfinite(worst):
                break
    return worst


@torch.no_grad()
def longest_from_random_latents(dynamics: LoopedDynamics, action_dim: int, count: int) -> float:
    """Largest ||h|| over random latents of sizes from 0.1 to 100 times unit normal, under random actions."""
    worst, stream = 0.0, torch.Generator().manual_seed(1)
    with dynamics.frozen():
        for _ in range(0, count, 5000):
            z = torch.randn(5000, LATENT, generator=stream) * torch.logspace(-1, 2, 5000).unsqueeze(-1)
            action = torch.rand(5000, action_dim, generator=stream) * 2 - 1
            worst = max(
                worst,
                float(
                    dynamics(z, action, dynamics.mean_loops)
                    .h.norm(dim=-1)
                    .nan_to_num(nan=torch.inf, posinf=torch.inf)
                    .max()
                ),
            )
    return worst


@torch.no_grad()
def by_loops(dynamics: LoopedDynamics, z: Tensor, action: Tensor) -> list[float]:
    """Largest ||h|| over a batch after each of ``DEPTHS`` loops; inf where it overflowed."""
    return [float(sizes(dynamics(z, action, depth).h).max()) for depth in DEPTHS]


def measure(mode: str, seed: int, args) -> list[dict]:
    """One row for the trained and one for the hostile weights."""
    quick = args.quick
    trained, encoder, loss = learn(mode, seed, 300 if quick else 3000)
    obs, action = transitions(10_000)
    with torch.no_grad():
        z = encoder(obs[:256, 0])
    rows, action_dim = [], action.shape[-1]
    hostile = make_hostile(trained, z, action[:256, 0], 30 if quick else 200)
    for weights, dynamics in (("trained", trained), ("hostile", hostile)):
        steps = 200 if quick else 10_000
        row = {"mode": mode, "seed": seed, "weights": weights, "loss": round(loss, 5)}
        row["bound"] = dynamics.lipschitz_bound()
        row["factor"] = largest_factor(dynamics, z[:64], action[:64, 0], 3 if quick else 30)
        row["holds"] = row["factor"] <= row["bound"] * (1 + 1e-9)
        for choice in ("adversarial", "bang-bang", "random"):
            row[f"longest, {choice}"] = longest_state(dynamics, z[:16], action_dim, steps, choice)
        row["longest, random latents"] = longest_from_random_latents(dynamics, action_dim, 10_000 if quick else 10**6)
        row["by_loops"] = by_loops(dynamics, z, action[:256, 0])
        print({k: v for k, v in row.items() if k != "by_loops"}, [f"{x:.3g}" for x in row["by_loops"]], flush=True)
        rows.append(row)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """||h|| against loops, trained weights full and hostile ones dashed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=130)
    for mode, color in zip(MODES, ("#1b6ca8", "#d1495b", "#66a182"), strict=False):
        for weights, style in (("trained", "-"), ("hostile", "--")):
            y = np.array([r["by_loops"] for r in rows if (r["mode"], r["weights"]) == (mode, weights)])
            y = np.where(np.isfinite(y), y, np.nan).max(0)
            axes.plot(DEPTHS, y, style, color=color, marker="o", ms=3, label=f"{mode}, {weights}")
    axes.set(xscale="log", yscale="log", xlabel="loops", ylabel="largest |h| (a line ends where it overflows)")
    axes.set_xticks(DEPTHS, [str(d) for d in DEPTHS])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def verdict(rows: list[dict]) -> tuple[dict, str]:
    """(headline, one sentence), computed from the rows."""
    headline, words = {}, []
    for mode in MODES:
        mine = [r for r in rows if r["mode"] == mode]
        for weights in ("trained", "hostile"):
            some = [r for r in mine if r["weights"] == weights]
            headline[f"{mode}, {weights}: factor"] = interval([r["factor"] for r in some])
            headline[f"{mode}, {weights}: bound"] = interval([r["bound"] for r in some])
        finite = sum(bool(np.isfinite(r["by_loops"][-1])) for r in mine)
        words.append(
            f"{mode}: bound held in {sum(r['holds'] for r in mine)} of {len(mine)} "
            f"(largest factor {max(r['factor'] for r in mine):.3g}), finite after {DEPTHS[-1]} loops in {finite}"
        )
    return headline, "; ".join(words) + "."


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--figure", type=Path, metavar="FILE")
    args = p.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = range(1 if args.quick else args.seeds)
    rows = [row for seed in seeds for mode in MODES for row in measure(mode, seed, args)]
    if args.figure:
        draw(rows, args.figure)
    report("stability", args, seeds, rows, *verdict(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
