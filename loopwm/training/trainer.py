"""The training loop. Everything it touches is an interface: an agent, a vector environment, a replay, a logger."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from loopwm.training.checkpoint import Checkpoints
from loopwm.training.logger import Logger
from loopwm.training.protocols import Agent
from loopwm.training.replay import Replay
from loopwm.training.rollout import RolloutResult, rollout
from loopwm.training.video import record_episode, save_video

EVAL_SEED = 2**33  # added to the run's seed; training seeds are below 2**32, so the two never meet


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Distances in env frames."""

    frames: int  # length of the run
    eval_every: int
    eval_episodes: int
    log_every: int
    checkpoint_every: int
    video_every: int  # 0: one at the end
    action_repeat: int  # env frames in one agent step


class Trainer:
    """Train ``agent`` on ``venv`` for ``schedule.frames`` env frames.

    Args:
        venv: N training environments (NEXT_STEP autoreset). eval_venv: environments of the evaluations.
        save_env, restore_env: read and rebuild the state of ``venv`` in mid-episode (see ``envs.resume``).
        make_video_env: one environment that renders; may raise RuntimeError where the machine cannot.
        summary: what summary.json says beside the results (task, names, versions).
    """

    def __init__(
        self,
        agent: Agent,
        venv: Any,
        eval_venv: Any,
        replay: Replay,
        run_dir: Path,
        schedule: Schedule,
        *,
        seed: int,
        save_env: Callable[[Any], list[dict]],
        restore_env: Callable[[Any, list[dict]], np.ndarray],
        make_video_env: Callable[[], Any],
        summary: dict[str, Any],
    ):
        self.agent, self.venv, self.eval_venv, self.replay = agent, venv, eval_venv, replay
        self.run_dir, self.schedule, self.seed = run_dir, schedule, seed
        self.save_env, self.restore_env, self.summary = save_env, restore_env, summary
        self.make_video_env: Callable[[], Any] | None = make_video_env
        self.checkpoints = Checkpoints(run_dir)
        self.logger: Logger | None = None
        self.frames, self.agent_steps, self.seconds = 0, 0, 0.0
        envs = venv.num_envs
        self.obs = np.zeros((envs, replay.obs.shape[-1]), np.float32)
        space = venv.single_action_space
        self.dims = [replay.obs.shape[-1], replay.action.shape[-1], hasattr(space, "n")]  # O, A, discrete
        self.first = np.ones(envs, bool)  # obs begins an episode
        self.last = np.zeros(envs, bool)  # obs ended an episode: the next step only resets
        self.episode_return, self.recent = np.zeros(envs), []
        self.metrics: dict[str, Any] = {}  # of the latest update
        self.timers = dict.fromkeys(("env", "act", "update"), 0.0)
        self.evaluation: RolloutResult | None = None
        self._logged = (0, 0.0)  # frames and seconds at the last log line
        self._stop = False

    # ---- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end, or until Ctrl-C; returns what summary.json says."""
        s = self.schedule
        self._begin()
        with self._interruptible(), self._progress() as bar:
            while self.frames < s.frames and not self._stop:
                # act
                clock = time.perf_counter()
                action = self.agent.act(self.obs, first=self.first, explore=True)
                clock = self._lap("act", clock)
                # step
                obs, reward, terminated, truncated, _ = self.venv.step(action)
                clock = self._lap("env", clock)
                # store
                self.replay.add(self.obs, self.agent.encode_action(action), reward, terminated, self.last)
                frames = self._count(obs, reward, terminated | truncated)
                # learn
                metrics = self.agent.learn(self.replay, self.agent_steps)
                self.metrics = metrics or self.metrics
                self._lap("update", clock)
                # log, evaluate, checkpoint
                bar.update(frames)
                if self._due(s.log_every, frames):
                    self._log(bar)
                if self._due(s.eval_every, frames) or self.frames >= s.frames:
                    self._evaluate(bar)
                if s.video_every and self._due(s.video_every, frames):
                    self._film()
                if self._due(s.checkpoint_every, frames):
                    self._save()
        return self._finish()

    def _count(self, obs: np.ndarray, reward: np.ndarray, ended: np.ndarray) -> int:
        """Move on to obs; returns how many env frames the step took (an autoreset takes none)."""
        stepped = int((~self.last).sum())
        self.agent_steps += stepped
        frames = stepped * self.schedule.action_repeat
        self.frames += frames
        self.episode_return += reward
        for i in np.flatnonzero(ended):
            self.recent = [*self.recent[-9:], float(self.episode_return[i])]
            self.episode_return[i] = 0.0
        self.obs, self.first, self.last = obs, self.last, ended
        return frames

    def _due(self, every: int, frames: int) -> bool:
        """Whether the last step passed a multiple of ``every``."""
        return self.frames // every > (self.frames - frames) // every

    def _lap(self, name: str, since: float) -> float:
        now = time.perf_counter()
        self.timers[name] += now - since
        return now

    # ---- begin and end ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        frames = self.checkpoints.frames()
        self.logger = Logger(self.run_dir, frames[-1] if frames else None)
        if frames:
            self._restore(frames[-1])
        else:
            self.obs, _ = self.venv.reset(seed=self.seed)
        self._started = time.perf_counter() - self.seconds

    def _finish(self) -> dict[str, Any]:
        self.seconds = time.perf_counter() - self._started
        if not self.checkpoints.frames() or self.checkpoints.frames()[-1] != self.frames:
            self._save()
        finished = self.frames >= self.schedule.frames
        if finished:
            self._film()
        result = self._write_summary(finished)
        if finished:
            numbers = {k: v for k, v in result.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
            self.logger.hparams(self.summary["config"], numbers)
        self.logger.close()
        return result

    def _write_summary(self, finished: bool) -> dict[str, Any]:
        returns = self.evaluation.returns if self.evaluation is not None else None
        result = {k: v for k, v in self.summary.items() if k != "config"}
        result |= {
            "frames": self.frames,
            "agent_steps": self.agent_steps,
            "seconds": round(self.seconds, 2),
            "frames_per_second": round(self.frames / max(sum(self.timers.values()), 1e-9), 1),
            "eval_return_mean": None if returns is None else round(float(returns.mean()), 3),
            "eval_return_std": None if returns is None else round(float(returns.std()), 3),
            "eval_episodes": 0 if returns is None else len(returns),
            "mean_loops": self._scalar("loop/mean"),
            "parameters": self.agent.parameter_counts,
            "finished": finished,
        }
        draft = self.run_dir / ".summary.json.tmp"
        draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.run_dir / "summary.json")
        return result

    def _interruptible(self) -> _Interrupt:
        return _Interrupt(self)

    # ---- what is seen -------------------------------------------------------------------------------------------

    def _progress(self) -> tqdm:
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} frames [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        return tqdm(
            total=self.schedule.frames, initial=self.frames, unit="frame", dynamic_ncols=True, bar_format=form
        )

    def _scalar(self, name: str) -> float | None:
        value = self.metrics.get(name)
        return None if value is None else round(float(value), 4)

    def _log(self, bar: tqdm) -> None:
        """One log line; the only place where metrics leave the device."""
        seconds = sum(self.timers.values())
        frames_before, seconds_before = self._logged
        rate = (self.frames - frames_before) / max(seconds - seconds_before, 1e-9)
        self._logged = (self.frames, seconds)
        scalars = {name: float(value) for name, value in self.metrics.items()}
        if self.metrics:
            scalars |= self.agent.diagnostics(self.replay)
        if self.recent:
            scalars["train/return"] = float(np.mean(self.recent[-5:]))
        scalars |= {f"time/{name}_seconds": value for name, value in self.timers.items()}
        scalars |= {"time/frames_per_second": rate, "train/agent_steps": self.agent_steps}
        self.logger.write(self.frames, scalars)
        self._show(bar, scalars)

    def _show(self, bar: tqdm, scalars: dict[str, float]) -> None:
        shown = {"return": scalars.get("train/return"), "loops": scalars.get("loop/mean")}
        if self.evaluation is not None:
            shown["eval"] = self.evaluation.returns.mean()
        bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None}, refresh=False)

    def _evaluate(self, bar: tqdm) -> None:
        start = time.perf_counter()
        self.evaluation = rollout(
            self.agent, self.eval_venv, self.schedule.eval_episodes, seed=self.seed + EVAL_SEED
        )
        returns, lengths = self.evaluation.returns, self.evaluation.lengths
        scalars = {
            "eval/return": float(returns.mean()),
            "eval/return_std": float(returns.std()),
            "eval/length": float(lengths.mean()),
            "time/eval_seconds": time.perf_counter() - start,
            "time/total_seconds": time.perf_counter() - self._started,
        }
        self.logger.write(self.frames, scalars)
        bar.write(f"{self.frames:>9,} frames  eval return {returns.mean():8.2f} +- {returns.std():.2f}")

    def _film(self) -> None:
        """Film an evaluation episode, where there is GL; training never depends on it."""
        if self.make_video_env is None:
            return
        try:
            venv = self.make_video_env()
        except RuntimeError as error:
            tqdm.write(f"no video: {error}")
            self.make_video_env = None
            return
        images, _ = record_episode(self.agent, venv, self.seed + EVAL_SEED)
        save_video(self.run_dir / "videos" / f"{self.frames:08d}.mp4", images, venv.metadata.get("render_fps", 30))
        self.logger.stills(self.frames, images)
        venv.close()

    # ---- exact resume -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "agent": self.agent.state_dict(),
            "dims": self.dims,
            "env": [{k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in one.items()}
                    for one in self.save_env(self.venv)],
            "frames": self.frames,
            "agent_steps": self.agent_steps,
            "seconds": time.perf_counter() - self._started,
            "timers": self.timers,
            "obs": torch.as_tensor(self.obs),
            "first": torch.as_tensor(self.first),
            "last": torch.as_tensor(self.last),
            "episode_return": torch.as_tensor(self.episode_return),
            "recent": self.recent,
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "evaluation": None if self.evaluation is None else [torch.as_tensor(x) for x in self.evaluation],
            "rng": _rng_state(),
        }  # fmt: skip
        self.checkpoints.save(self.frames, state, self.replay)

    def _restore(self, frames: int) -> None:
        state = self.checkpoints.load(frames, self.replay)
        self.agent.load_state_dict(state["agent"])
        states = [{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in one.items()} for one in state["env"]]
        self.obs = self.restore_env(self.venv, states)
        self.frames, self.agent_steps, self.seconds = state["frames"], state["agent_steps"], state["seconds"]
        self.timers, self.recent, self.metrics = state["timers"], state["recent"], state["metrics"]
        self.first, self.last = state["first"].numpy(), state["last"].numpy()
        self.episode_return = state["episode_return"].numpy()
        if state["evaluation"] is not None:
            self.evaluation = RolloutResult(*(x.numpy() for x in state["evaluation"]))
        self._logged = (self.frames, sum(self.timers.values()))
        if not np.array_equal(self.obs, state["obs"].numpy()):
            self._begin_new_episodes()
        _set_rng_state(state["rng"])

    def _begin_new_episodes(self) -> None:
        """The environment did not repeat itself; what the replay holds of its unfinished episodes ends here."""
        tqdm.write("this environment is not deterministic: resuming with new episodes, not bit for bit")
        newest = (self.replay.total - 1) % self.replay.rows
        self.replay.is_last[newest] = True
        self.obs, _ = self.venv.reset()
        self.first, self.last = np.ones_like(self.first), np.zeros_like(self.last)
        self.episode_return[:] = 0.0


class _Interrupt:
    """The first Ctrl-C (or SIGTERM) ends the loop after the current step, so that a checkpoint is written."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __enter__(self) -> None:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, signum: int, frame: Any) -> None:
        self.trainer._stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one does not wait

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def _rng_state() -> dict[str, Any]:
    """The global streams of python, numpy and torch, as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.as_tensor(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
