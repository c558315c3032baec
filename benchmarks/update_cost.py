"""Milliseconds of one update and of one planned action, by device and setting; on a GPU also how busy it is.

python -m benchmarks.update_cost --device cpu cuda
python -m benchmarks.update_cost --variant "" "size=large" "agent.value_dim=224"

Random transitions of walker-run's sizes stand for an environment, so only what the agent itself takes is counted:
frames/s are those of one update and one action for every two frames, an upper bound on what ``train.py`` shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable

import numpy as np
import torch

from agents import make_agent
from benchmarks.cost import spread
from benchmarks.harness import device_name, device_option, parser, report
from benchmarks.loop_cost import interleaved
from loopwm.config import Config, ConfigError, load_config
from loopwm.training.protocols import Agent
from loopwm.training.replay import Replay

OBS, ACTION, EPISODE, REPEAT = 24, 6, 500, 2  # of dmc/walker-run
SECONDS = 5.0  # for each setting and device; a hundred rounds at most
VARIANTS = (
    "",
    "agent=fast",
    "size=small",
    "size=large",
    "dynamics=single_pass",
    "dynamics=stacked",
    "agent.batch_size=1024 agent.model_batch_size=512",
)


def prepared(cfg: Config, device: torch.device, rows: int = 3000) -> tuple[Agent, Replay]:
    """An agent past its seed phase, and a replay of random transitions."""
    rng = np.random.default_rng(0)
    replay = Replay(rows, 1, OBS, ACTION, seed=0)
    for row in range(rows):
        obs, action = rng.normal(size=(1, OBS)).astype(np.float32), rng.uniform(-1.0, 1.0, (1, ACTION))
        last = np.array([row % EPISODE == EPISODE - 1])
        replay.add(obs, action.astype(np.float32), rng.uniform(size=1), np.zeros(1, bool), last)
    agent = make_agent(cfg, OBS, ACTION, False, device)
    agent.acted = cfg.agent.seed_steps + cfg.agent.explore_decay_steps
    # Of random rewards nothing is learnt, and where all scores are alike a plan seeks what is new: not what is timed.
    agent.config = dataclasses.replace(agent.config, novelty_spread=1e-9)
    return agent, replay


def kernels(call: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """(kernels, milliseconds in which one runs) of one call on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) / repeats, sum(event.device_time for event in events) / repeats / 1e3


class Case:
    """One setting on one device."""

    def __init__(self, variant: str, cfg: Config, device: torch.device):
        self.variant, self.device = variant or "default", device
        self.agent, self.replay = prepared(cfg, device)
        c = self.agent.config
        self.cycle = math.lcm(c.model_every, c.policy_every)  # updates until every part has been updated
        self.obs, self.first = np.random.default_rng(1).normal(size=(1, OBS)).astype(np.float32), np.zeros(1, bool)

    def update(self) -> None:
        """A whole cycle, until the device is done."""
        for _ in range(self.cycle):
            self.agent.update(self.replay)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def act(self) -> None:  # its result is on the CPU
        self.agent.act(self.obs, explore=True, first=self.first)

    def row(self, cycles: np.ndarray, actions: np.ndarray) -> dict:
        """Medians of seconds (rounds,) of a cycle and of an action, on one CPU thread beside the device."""
        update_ms = 1e3 * float(np.median(cycles)) / self.cycle
        action_ms = 1e3 * float(np.median(actions))
        seconds = (self.agent.config.update_ratio * update_ms + action_ms) / 1e3
        row = {
            "variant": self.variant,
            "device": device_name(self.device),
            "parameters": self.agent.parameter_counts["total"],
            "update_ms": round(update_ms, 2),
            "action_ms": round(action_ms, 2),
            "frames_per_second": round(REPEAT / seconds, 1),
        }
        if self.device.type == "cuda":
            count, busy = kernels(self.update)
            row |= {"kernels_per_update": round(count / self.cycle), "busy_ms": round(busy / self.cycle, 2)}
        return row


def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--device", nargs="+", type=device_option, default=[torch.device("cpu")], help="cpu, cuda, or both")
    p.add_argument("--variant", nargs="+", default=list(VARIANTS), metavar='"KEY=VALUE ..."', help="settings; '': none")
    args = p.parse_args(arguments)
    try:  # all of them, before minutes are spent on the first
        configs = {variant: load_config(["task=dmc/walker-run", *variant.split()]) for variant in args.variant}
    except ConfigError as error:
        p.error(str(error))
    torch.set_num_threads(1)
    pairs = itertools.product(args.variant, args.device)
    cases = [Case(variant, configs[variant], device) for variant, device in pairs]
    # Machines drift, by a third within minutes: settings that are timed in turn share what they meet.
    calls = [call for case in cases for call in (case.update, case.act)]
    taken = interleaved(calls, (0.0 if args.quick else SECONDS) * len(cases), torch.device("cpu"))  # updates wait
    rows = [case.row(*taken[:, 2 * i : 2 * i + 2].T) for i, case in enumerate(cases)]
    for row in rows:
        print(row)
    headline = {f"{row['variant']}, {row['device']}: frames/s": spread([row["frames_per_second"]]) for row in rows}
    best = max(rows, key=lambda row: row["frames_per_second"])
    verdict = f"Fastest: {best['variant']} on {best['device']}, {best['frames_per_second']} frames/s at most."
    report("update_cost", args, [0], rows, headline, verdict)


if __name__ == "__main__":
    main(sys.argv[1:])
