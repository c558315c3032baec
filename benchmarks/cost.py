"""What the loop costs a further time, and what the default agent costs on one core.

python -m benchmarks.cost --of loop --figure docs/figures/cost.png    time and memory against loops, width and batch
python -m benchmarks.cost --of agent    frames/s while learning, a planned action, parameters, replay memory
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import loop_cost
from benchmarks.harness import curve, device_name, device_option, median_seconds, parser, report, train

CORE = 0
# The kernel's own high-water mark of this process; getrusage's is inherited from the parent through exec.
REPLAY_PROBE = """
import numpy as np
from loopwm.training.replay import Replay

def megabytes(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

rows, start = 1_000_000, megabytes("VmRSS")
replay = Replay(rows, 1, {obs}, {action})
obs, action = np.ones((1, {obs}), np.float32), np.ones((1, {action}), np.float32)
flags = np.zeros(1, bool)
for _ in range(rows):
    replay.add(obs, action, np.ones(1), flags, flags)
replay.sample(256, 5)
print(megabytes("VmRSS") - start, megabytes("VmHWM"))
"""


def frames_per_second(args, seeds: range, dynamics: str) -> list[float]:
    """Frames/s of env, act and update together, from the first update on (evaluations are not in it)."""
    rates = []
    for seed in seeds:
        words = ["task=dmc/cartpole-swingup", f"dynamics={dynamics}", "frames=20000", f"seed={seed}"]
        run_dir = args.runs / f"fps_{dynamics}_s{seed}"
        train(run_dir, [*words, "eval_every=20000"], core=CORE)
        seconds = np.zeros(2)
        frames = []
        for i, at in enumerate((4000, 20000)):
            for name in ("env", "act", "update"):
                frame, value = [p for p in curve(run_dir, f"time/{name}_seconds") if p[0] <= at * 1.01][-1]
                seconds[i] += value
            frames.append(frame)
        rates.append((frames[1] - frames[0]) / (seconds[1] - seconds[0]))
    return rates


def planned_action(obs_dim: int, action_dim: int) -> tuple[list[float], dict[str, int]]:
    """Milliseconds of each of 200 planned actions of the default agent, and its parameters."""
    from agents import make_agent
    from loopwm.config import load_config

    agent = make_agent(load_config([]), obs_dim, action_dim, discrete=False)
    obs = np.random.default_rng(0).normal(size=(1, obs_dim)).astype(np.float32)
    first = np.zeros(1, bool)
    return [1e3 * s for s in median_seconds(lambda: agent.act(obs, first=first), 200)], agent.parameter_counts


def replay_memory() -> tuple[float, float]:
    """MB that a full replay of 1 M rows adds to a fresh process, and that process's peak."""
    command = [sys.executable, "-c", REPLAY_PROBE.format(obs=24, action=6)]
    probe = subprocess.run(command, capture_output=True, text=True, check=True)
    replay, process = (float(x) for x in probe.stdout.split())
    return replay, process


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    """Median, lowest, highest."""
    return {
        "value": round(float(np.median(values)), digits),
        "low": round(min(values), digits),
        "high": round(max(values), digits),
    }


def agent_cost(args: argparse.Namespace, seeds: range) -> tuple[list[dict], dict, str]:
    """(rows, headline, one sentence) of the default agent and, while learning, of its controls."""
    rows, headline = [], {}
    for dynamics in args.dynamics[:1] if args.quick else args.dynamics:
        rates = frames_per_second(args, seeds, dynamics)
        rows.append({"dynamics": dynamics, "frames_per_second": rates})
        headline[f"frames/s learning, cartpole, {dynamics}"] = spread(rates)
    for name, dims in (("cartpole-swingup", (5, 1)), ("cheetah-run", (17, 6)), ("walker-walk", (24, 6))):
        times, parameters = planned_action(*dims)
        rows.append({"task": name, "planned_action_ms": times, "parameters": parameters})
        headline[f"planned action, {name}, ms"] = spread(times, 2)
        total = parameters["total"]
        headline[f"parameters, {name}"] = {"value": total, "low": total, "high": total}
    replay, process = replay_memory()
    headline["replay of 1 M rows (24 + 6 numbers), MB"] = spread([replay])
    headline["its process at its peak, MB"] = spread([process])
    rate = headline[f"frames/s learning, cartpole, {args.dynamics[0]}"]["value"]
    verdict = f"The default agent learns at {rate:.0f} frames/s on one core (medians; lowest and highest in brackets)."
    return rows, headline, verdict


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--of", nargs="+", default=["loop", "agent"], choices=("loop", "agent"), help="what is measured")
    p.add_argument("--seeds", type=int, default=5, help="of the agent")
    p.add_argument("--dynamics", nargs="+", default=["looped", "single_pass", "stacked", "wide"], help="of the agent")
    p.add_argument("--device", type=device_option, default="cpu", help="of the loop: cpu or cuda")
    p.add_argument("--figure", type=Path, metavar="FILE", help="of the loop")
    args = p.parse_args(arguments)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORE})
    seeds = range(1 if args.quick else args.seeds)
    rows, headline, verdicts = [], {}, []
    if "loop" in args.of:
        effort = loop_cost.QUICK if args.quick else loop_cost.Effort()
        rows, headline, verdict = loop_cost.measure(effort, args.device)
        verdicts.append(f"On {device_name(args.device)}: {verdict}")
        if args.figure:
            loop_cost.draw(rows, args.figure)
    if "agent" in args.of:
        more_rows, more_headline, verdict = agent_cost(args, seeds)
        rows, headline, verdicts = rows + more_rows, headline | more_headline, [*verdicts, verdict]
    report("cost", args, seeds, rows, headline, " ".join(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
