"""Evaluate a run: ``python evaluate.py RUN_DIR --episodes 10 --loops 8 --video out.mp4 --json``.

It plays the trainer's own rollout, deterministic, on seeds of its own.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

from agents import load_agent, use_threads
from envs import LONGEST_EVALUATION, RenderingUnavailable, TaskError, make_vector_env, space_dims
from loopwm.config import ConfigError
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.interrupt import INTERRUPTED
from loopwm.training.rollout import rollout
from loopwm.training.video import VideoError, film_episode

USER_ERRORS = (ConfigError, TaskError, CheckpointError, RenderingUnavailable, VideoError, OSError)


def parse(arguments: list[str]) -> argparse.Namespace:
    def at_least(least: int, text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    count, whole = functools.partial(at_least, 1), functools.partial(at_least, 0)
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="what train.py wrote, or a file of agents.export")
    parser.add_argument("--episodes", type=count, default=10)
    parser.add_argument("--loops", type=whole, help="in each prediction of a plan; 0: adaptive (default: the run's)")
    parser.add_argument("--samples", type=whole, help="action sequences in a plan; 0: the policy alone acts")
    parser.add_argument("--frames", type=count, help="the checkpoint to take, env frames (default: the newest)")
    parser.add_argument("--seed", type=whole, default=2**34, help="of the episodes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu)")
    parser.add_argument("--video", type=Path, metavar="FILE.mp4", help="film an episode, with the first one's start")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {message}\n")  # one line, without the usage
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Exit code: 0 evaluated, 2 something to correct, 130 interrupted."""
    args = parse(arguments)
    try:
        budget = {"plan_loops": args.loops, "plan_samples": args.samples}
        agent, cfg, frames = load_agent(args.run_dir, **budget, device=args.device, frames=args.frames)
        if args.loops is not None and not agent.looped:
            raise ConfigError(f"--loops: dynamics={cfg.dynamics.name} has no loop whose depth could be chosen")
        planning = min(cfg.agent.plan_samples, cfg.agent.eval_samples) > 0
        if args.loops is not None and not planning:
            raise ConfigError("--loops: the policy alone acts, and it makes no predictions")
        use_threads(cfg.threads)
        told = {"action_repeat": cfg.task.action_repeat, "longest": LONGEST_EVALUATION}
        make = functools.partial(make_vector_env, cfg.task.id, **told)
        venv = make(min(args.episodes, 10))
        if space_dims(venv) != (agent.obs_dim, agent.action_dim, agent.discrete):
            raise TaskError(f"task '{cfg.task.id}' has other observations or actions than this agent was trained on")
        result = rollout(agent, venv, args.episodes, seed=args.seed)
        summary = {"run_dir": str(args.run_dir), "task": cfg.task.id, "frames": frames, "eval_episodes": args.episodes}
        summary |= {"eval_return_mean": float(result.returns.mean()), "eval_return_std": float(result.returns.std())}
        summary |= {"eval_returns": result.returns.tolist(), "eval_length_mean": float(result.lengths.mean())}
        summary["loops"] = cfg.agent.plan_loops or "adaptive" if agent.looped and planning else None
        line = f"{summary['task']}  return {summary['eval_return_mean']:.2f} +- {summary['eval_return_std']:.2f}"
        print(json.dumps(summary) if args.json else f"{line}  ({args.episodes} episodes, {frames:,} frames trained)")
        if args.video:
            film_episode(agent, functools.partial(make, 1, render=True), args.seed, args.video)
    except USER_ERRORS as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
