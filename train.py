"""Train an agent: ``python train.py task=dmc/cartpole-swingup dynamics.mean_loops=4 run_dir=runs/x``.

The training loop is ``loopwm.training.trainer.Trainer.run``, the gradient step ``agents.planner.PlannerAgent.update``,
the loop of loops ``loopwm.dynamics.looped.LoopedDynamics``. Every setting stands in ``loopwm/config.py``.
"""

import functools
import sys
from pathlib import Path

import torch

from agents import make_agent, resolve_device
from envs import TaskError, make_vector_env, resolve_action_repeat, restore_vector_env, space_dims, vector_env_state
from loopwm.config import Config, ConfigError, load_config
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.replay import Replay
from loopwm.training.run_dir import describe, open_run
from loopwm.training.trainer import Schedule, Trainer

USER_ERRORS = (ConfigError, TaskError, CheckpointError)
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


def build(cfg: Config, run_dir: Path) -> Trainer:
    """Environments, agent, replay and trainer of one run."""
    task, repeat = cfg.task.id, resolve_action_repeat(cfg.task.id, cfg.task.action_repeat)
    make = functools.partial(make_vector_env, task, action_repeat=repeat)
    venv = make(cfg.num_envs, seed=cfg.seed, workers=cfg.workers)
    obs_dim, action_dim, discrete = space_dims(venv)
    schedule = Schedule(
        cfg.frames, cfg.eval_every, cfg.eval_episodes, cfg.log_every, cfg.checkpoint_every, cfg.video_every, repeat
    )
    return Trainer(
        make_agent(cfg, obs_dim, action_dim, discrete, resolve_device(cfg.device)),
        venv,
        make(min(cfg.eval_episodes, 10)),
        Replay(cfg.replay.capacity, cfg.num_envs, obs_dim, action_dim, seed=cfg.seed, path=cfg.replay.path),
        run_dir,
        schedule,
        seed=cfg.seed,
        save_env=vector_env_state,
        restore_env=restore_vector_env,
        make_video_env=functools.partial(make, 1, render=True),
        summary=describe(cfg),
    )


def main(arguments: list[str]) -> int:
    """Exit code: 0 trained to the end, 2 something to correct, 130 interrupted (resume=true goes on)."""
    try:
        cfg = load_config(arguments)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        run_dir, lock = open_run(cfg)
        with lock:
            result = build(cfg, run_dir).run()
    except USER_ERRORS as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print(f"evaluation   {result['eval_return_mean']} +- {result['eval_return_std']} at {result['frames']:,} frames")
    print(f"run          {run_dir}\ncurves       tensorboard --logdir {run_dir.parent}")
    if not result["finished"]:
        print(f"interrupted; to go on: python train.py {' '.join(arguments)} run_dir={run_dir} resume=true")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
