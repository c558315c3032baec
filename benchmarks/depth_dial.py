"""A trained agent's loops turned down and up while it plans: what its model, its return and its time gain or lose.

python -m benchmarks.depth_dial runs/x runs/y --loops 1 2 4 8 16

Each run plays the same episodes with every number of loops (0: adaptive, by the run's own halting rule), and by its
policy alone, which predicts nothing. The model is held against one set of episodes, those of the policy, open loop
under the actions that were taken. Episodes and plan noise are alike throughout, so differences are paired. What the
value reads (``value_loops``) stays as it was trained.
"""

from __future__ import annotations

import itertools
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import PlannerAgent, load_agent
from benchmarks.ablations import paired
from benchmarks.diagnose import Episodes, episode_returns, model_errors, play, turned
from benchmarks.harness import median_seconds, parser, refusing, report
from loopwm.config import Config, ConfigError

POLICY = "policy alone"
ERRORS = ("reward, 1 ahead", "reward, 3 ahead", "latent, 3 ahead", "latent, 10 ahead")


def predictions(agent: PlannerAgent, data: Episodes, loops: int) -> dict[str, float]:
    """Share of variance left unexplained, by ``ERRORS``, and the mean loops of a prediction one step ahead."""
    found = model_errors(agent, data, loops or None)
    z = agent.encode(data.obs.flatten(0, 1))  # (T * E, Z)
    spent = agent.slow_model.dynamics(z, data.action.flatten(0, 1), loops or None).loops.double().mean()
    return {name: round(found[name], 4) for name in ERRORS} | {"loops spent": round(float(spent), 2)}


def load_looped(run_dir: Path) -> tuple[PlannerAgent, Config, int]:
    """What ``load_agent`` gives.

    Raises:
        ConfigError: its agent has no loops, or evaluates without plans, so that nothing would turn.
    """
    agent, cfg, frames = load_agent(run_dir)
    if cfg.dynamics.name != "looped" or not min(cfg.agent.plan_samples, cfg.agent.eval_samples):
        raise ConfigError(f"{run_dir}: nothing to turn: its agent has no loops, or evaluates without plans")
    return agent, cfg, frames


@torch.no_grad()
def dial(
    run_dir: Path, loaded: PlannerAgent, cfg: Config, frames: int, loops: list[int], episodes: int
) -> list[dict[str, Any]]:
    """One row for the policy alone and one for each number of loops."""
    policy, envs = turned(loaded, plan_samples=0), (cfg.task.id, cfg.task.action_repeat)
    data = play(policy, *envs, episodes)
    names = {"run": str(run_dir), "task": cfg.task.id, "dynamics": cfg.dynamics.name, "seed": cfg.seed}
    names |= {"frames": frames, "plan_loops": cfg.agent.plan_loops}
    rows = []
    for setting in (POLICY, *loops):
        agent = policy if setting == POLICY else turned(loaded, plan_loops=setting)
        act, states = agent.evaluator().act, itertools.cycle(data.obs[:, :1].numpy())
        seconds = median_seconds(lambda: act(next(states), first=np.ones(1, bool)), 50)  # noqa: B023 (called at once)
        returns = episode_returns(agent, *envs, episodes)
        row = names | {"loops": setting, "return": round(float(returns.mean()), 1)}
        row |= {"returns": [round(float(x), 1) for x in returns]}
        row |= {"milliseconds an action": round(1e3 * float(np.median(seconds)), 2)}
        row |= {} if setting == POLICY else predictions(agent, data, setting)
        rows.append(row)
        print(*(f"{name}={value}" for name, value in row.items() if name not in ("returns", "run")), flush=True)
    return rows


def differences(rows: list[dict], base: int) -> dict[str, dict[str, float]]:
    """Setting -> its mean return over runs minus that of ``base`` loops, with a 95 % interval over the runs."""
    by_setting: dict[Any, list[float]] = {}
    for row in rows:
        by_setting.setdefault(row["loops"], []).append(row["return"])
    label = {setting: setting if setting == POLICY else f"{setting or 'adaptive'} loops" for setting in by_setting}
    others = [setting for setting in by_setting if setting != base]
    return {f"return, {label[x]} minus {label[base]}": paired(by_setting[x], by_setting[base]) for x in others}


def verdict(found: dict[str, dict[str, float]], runs: int) -> str:
    """Which settings are shown to differ in return."""
    clear = [name for name, figure in found.items() if figure["low"] > 0 or figure["high"] < 0]
    said = f"differ: {', '.join(clear)}" if clear else "no setting is shown to differ"
    return f"Over {runs} runs, by 95 % intervals, not corrected for their number: {said}."


def checked(p: ArgumentParser, arguments: list[str]) -> Any:
    """The arguments; ends with one line where they cannot be right."""
    args = p.parse_args(arguments)
    if args.episodes < 1 or min(args.loops) < 0 or len(set(args.loops)) < len(args.loops):
        p.error("--episodes must be at least 1, and --loops different whole numbers (0: adaptive)")
    if args.base not in args.loops:
        p.error(f"--base {args.base}: must be one of --loops")
    if len({run_dir.resolve() for run_dir in args.run_dirs}) < max(2, len(args.run_dirs)):
        p.error("two runs at the least, each named once: an interval needs them")
    return args


@refusing
def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 2 something to correct."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("run_dirs", nargs="+", type=Path)
    p.add_argument("--loops", nargs="+", type=int, default=[1, 2, 4, 8, 16, 0])
    p.add_argument("--base", type=int, default=4, help="the number of loops that the others are compared with")
    p.add_argument("--episodes", type=int, default=10)
    args = checked(p, arguments)
    episodes = 2 if args.quick else args.episodes
    loaded = [(run_dir, *load_looped(run_dir)) for run_dir in args.run_dirs]  # before minutes are spent on any
    rows = [row for one in loaded for row in dial(*one, args.loops, episodes)]
    found = differences(rows, args.base)
    report("depth_dial", args, sorted({row["seed"] for row in rows}), rows, found, verdict(found, len(args.run_dirs)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
