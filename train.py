"""Train an agent: ``python train.py task=dmc/cartpole-swingup dynamics.mean_loops=4 run_dir=runs/x``.

The training loop is ``Trainer.run`` in loopwm/training/trainer.py, the gradient step ``PlannerAgent.update`` in
agents/planner.py, the loop of loops ``LoopedDynamics`` in loopwm/dynamics/looped.py; settings are in loopwm/config.py.
"""

import functools
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import envs
from agents import make_agent, resolve_device, use_threads
from loopwm.config import Config, ConfigError, load_config, save_config
from loopwm.help import usage
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.interrupt import INTERRUPTED
from loopwm.training.random_state import seed_random
from loopwm.training.replay import Replay
from loopwm.training.run_dir import claimed, describe, last_words, open_run
from loopwm.training.trainer import Diverged, Schedule, Trainer

# OSError: a disk that is full or read-only, a file that cannot be opened; its text names it.
USER_ERRORS = (ConfigError, CheckpointError, Diverged, envs.TaskError, envs.RenderingUnavailable, OSError)


def build(cfg: Config, run_dir: Path) -> Trainer:
    """Environments, agent, replay and trainer of one run."""
    task, repeat = cfg.task.id, envs.resolve_action_repeat(cfg.task.id, cfg.task.action_repeat)
    device = resolve_device(cfg.device)
    seed_random(cfg.seed)
    make = functools.partial(envs.make_vector_env, task, action_repeat=repeat)
    venv = make(cfg.num_envs, seed=cfg.seed, workers=cfg.workers)
    obs_dim, action_dim, discrete = envs.space_dims(venv)
    schedule = {f.name: getattr(cfg, f.name) for f in fields(Schedule) if f.name != "action_repeat"}
    return Trainer(
        make_agent(cfg, obs_dim, action_dim, discrete, device),
        venv,
        make(min(cfg.eval_episodes, 10), longest=envs.LONGEST_EVALUATION),
        Replay(cfg.replay.capacity, cfg.num_envs, obs_dim, action_dim, seed=cfg.seed, path=cfg.replay.path),
        run_dir,
        Schedule(**schedule, action_repeat=repeat),
        seed=cfg.seed,
        save_env=envs.vector_env_state,
        restore_env=envs.restore_vector_env,
        make_video_env=functools.partial(make, 1, render=True, longest=envs.LONGEST_EVALUATION),
        summary=describe(cfg),
    )


def train(cfg: Config) -> tuple[dict[str, Any], Path]:
    """One run, new or resumed: (what its summary.json holds, its directory, for ``load_agent``). Raises USER_ERRORS."""
    use_threads(cfg.threads)
    run_dir, lock = open_run(cfg)
    with claimed(run_dir, lock, named=bool(cfg.run_dir)):
        trainer = build(cfg, run_dir)
        save_config(cfg, run_dir / "config.yaml")
        return trainer.run(), run_dir


def main(arguments: list[str]) -> int:
    """Exit code: 0 trained to the end, 2 something to correct, 130 interrupted (resume=true goes on)."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    try:
        result, run_dir = train(load_config(arguments))
    except USER_ERRORS as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped at once; resume=true goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    print(last_words(result, run_dir, arguments))
    return 0 if result["finished"] else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
