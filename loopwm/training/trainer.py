"""The training loop. All it touches are interfaces: an agent, a vector environment, a replay, a logger."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from loopwm.memory import OutOfMemory, memory_in_words
from loopwm.training.checkpoint import CheckpointError, Checkpoints
from loopwm.training.interrupt import Interrupt
from loopwm.training.logger import Logger
from loopwm.training.progress import Progress
from loopwm.training.protocols import Agent
from loopwm.training.random_state import random_state, set_random_state
from loopwm.training.replay import Replay
from loopwm.training.rollout import RolloutResult, rollout
from loopwm.training.video import VideoError, film_episode

EVAL_SEED = 2**33  # added to the run's seed; training seeds are below 2**32, so the two never meet
FAILED_SEED = 2**34  # times the frame at which an environment failed: of the episodes with which the run goes on


class Diverged(RuntimeError):
    """What is learnt is no number any more; its text is one line."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Distances in env frames, but for the counts."""

    frames: int  # length of the run
    eval_every: int
    eval_episodes: int  # count
    log_every: int
    checkpoint_every: int
    video_every: int  # 0: one at the end
    action_repeat: int  # env frames in one agent step
    keep_checkpoints: int  # the newest so many, count


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
        self.checkpoints = Checkpoints(run_dir, schedule.keep_checkpoints)
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
        self.evaluated = 0  # frames at that evaluation
        self._logged = (0, 0.0)  # frames and seconds at the last log line
        self._saved = False  # whether the newest checkpoint is of this very step

    # ---- the loop -----------------------------------------------------------------------------------------

    @memory_in_words()
    def run(self) -> dict[str, Any]:
        """Train to the end, or until Ctrl-C; returns what summary.json says.

        Raises:
            OutOfMemory: a plan or a batch is larger than the memory; the checkpoints are as they were, or of an
                evaluation that is made again by ``resume``.
            Diverged: and the last checkpoint is from before that.
            Exception: the environment's own; what was learnt until then is in a checkpoint.
        """
        s = self.schedule
        with self._begun(), Interrupt() as interrupt, Progress(s.frames, self.frames) as bar:
            self._evaluate_if_due(bar, interrupt)  # of a run that was stopped at that
            while self.frames < s.frames and not interrupt.requested:
                # act
                clock = time.perf_counter()
                action = self.agent.act(self.obs, first=self.first, explore=True)
                clock = self._lap("act", clock)
                # step
                obs, reward, terminated, truncated, _ = self._step(action)
                clock = self._lap("env", clock)
                # store
                self.replay.add(self.obs, self.agent.encode_action(action), reward, terminated, self.last)
                frames = self._count(obs, reward, terminated | truncated)
                # learn
                # parts learn at their own pace: keep the latest of each
                self.metrics |= self.agent.learn(self.replay, self.agent_steps) or {}
                self._lap("update", clock)
                # log, evaluate, checkpoint
                bar.advance(frames)
                finished = self.frames >= s.frames
                if self._due(s.log_every, frames) or finished:
                    self._log(bar)
                self._evaluate_if_due(bar, interrupt)
                if s.video_every and self._due(s.video_every, frames):
                    self._film()
                if self._due(s.checkpoint_every, frames):
                    self._save()
            bar.close()  # its clock is of the training
            return self._finish()

    def _count(self, obs: np.ndarray, reward: np.ndarray, ended: np.ndarray) -> int:
        """Move on to obs; returns how many env frames the step took (an autoreset takes none)."""
        self._saved = False
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

    def _step(self, action: np.ndarray) -> tuple:
        """What the environments answer. If one raises, a checkpoint is written first, without their state.

        A run that is resumed from it begins new episodes: the same ones would end in the same error.
        """
        try:
            return self.venv.step(action)
        except Exception:
            self._save(failed=True)
            raise

    def _lap(self, name: str, since: float) -> float:
        now = time.perf_counter()
        self.timers[name] += now - since
        return now

    # ---- begin and end ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        """Where the newest checkpoint is, or at the start; whatever happens, the log and the replay are closed."""
        try:
            self._begin()
            yield
        finally:
            self.replay.close()
            if self.logger is not None:
                self.logger.close()

    def _begin(self) -> None:
        self.checkpoints.put_back()
        state = self.checkpoints.load_newest(self.replay)
        if state:
            self._restore(state)
        else:
            self.obs, _ = self.venv.reset(seed=self.seed)
        self.logger = Logger(self.run_dir, self.frames)
        self._started = time.perf_counter() - self.seconds

    def _finish(self) -> dict[str, Any]:
        self.seconds = time.perf_counter() - self._started
        if not self._saved:
            self._save()
        finished = self.frames >= self.schedule.frames and self.evaluated == self.frames
        if finished and not self.metrics:
            tqdm.write(f"nothing was learnt: {self.agent_steps:,} agent steps are no more than the random first ones")
        result = self._write_summary(finished)
        if finished:
            numbers = {k: v for k, v in result.items() if type(v) in (int, float)}
            self.logger.hparams(self.summary["config"], numbers)
            self._film()  # last: the slowest, and nothing depends on it
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
            "mean_loops": self.agent.diagnostics(self.replay).get("loop/mean") if self.metrics else None,
            "parameters": self.agent.parameter_counts,
            "finished": finished,
        }
        draft = self.run_dir / ".summary.json.tmp"
        draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.run_dir / "summary.json")
        return result

    # ---- what is seen -------------------------------------------------------------------------------------

    def _log(self, bar: Progress) -> None:
        """One log line; the only place where metrics leave the device."""
        seconds = sum(self.timers.values())
        frames_before, seconds_before = self._logged
        rate = (self.frames - frames_before) / max(seconds - seconds_before, 1e-9)
        self._logged = (self.frames, seconds)
        scalars = self._numbers()
        if self.metrics:
            scalars |= self.agent.diagnostics(self.replay)
        if self.recent:
            scalars["train/return"] = float(np.mean(self.recent[-5:]))
        scalars |= {f"time/{name}_seconds": value for name, value in self.timers.items()}
        scalars |= {"time/frames_per_second": rate, "train/agent_steps": self.agent_steps}
        self.logger.write(self.frames, scalars)
        bar.show(**{"return": scalars.get("train/return"), "loops": scalars.get("loop/mean")})

    def _numbers(self) -> dict[str, float]:
        """The latest metrics. Raises Diverged if one is no finite number."""
        numbers = {name: float(value) for name, value in self.metrics.items()}
        for name, value in numbers.items():
            if not np.isfinite(value):
                raise Diverged(
                    f"the agent has diverged: {name} is {value} at frame {self.frames:,}, so nothing was kept since "
                    "the last checkpoint; smaller rewards, or a smaller agent.learning_rate, may help"
                )
        return numbers

    def _evaluate_if_due(self, bar: Progress, interrupt: Interrupt) -> None:
        """At the end, and where a multiple of ``eval_every`` was passed since the last one."""
        s = self.schedule
        due = self.frames >= s.frames or self.frames // s.eval_every > self.evaluated // s.eval_every
        if not due or self.evaluated == self.frames:
            return
        start = time.perf_counter()
        try:
            found = rollout(
                self.agent,
                self.eval_venv,
                s.eval_episodes,
                seed=self.seed + EVAL_SEED,
                stop=lambda: interrupt.requested,
            )
        except OutOfMemory:  # made again when the run goes on, with fewer eval_samples perhaps
            self._save()
            raise
        except Exception:
            self.evaluation, self.evaluated = None, self.frames  # the same agent would fail on the same episodes again
            self._save()
            raise
        if found is None:  # interrupted: evaluated when the run goes on
            return
        self.evaluation, self.evaluated, self._saved = found, self.frames, False
        returns, lengths = found.returns, found.lengths
        scalars = {
            "eval/return": float(returns.mean()),
            "eval/return_std": float(returns.std()),
            "eval/length": float(lengths.mean()),
            "time/eval_seconds": time.perf_counter() - start,
            "time/total_seconds": time.perf_counter() - self._started,
        }
        self.logger.write(self.frames, scalars)
        bar.show(eval=returns.mean())
        bar.write(f"{self.frames:>9,} frames  eval return {returns.mean():8.2f} +- {returns.std():.2f}")

    def _film(self) -> None:
        """Film an evaluation episode, where there is GL; training never depends on it."""
        if self.make_video_env is None:
            return
        path = self.run_dir / "videos" / f"{self.frames:08d}.mp4"
        try:
            images = film_episode(self.agent, self.make_video_env, self.seed + EVAL_SEED, path)
        except VideoError as error:
            tqdm.write(str(error))
            self.make_video_env = None
            return
        self.logger.stills(self.frames, images)

    # ---- exact resume -------------------------------------------------------------------------------------

    def _save(self, failed: bool = False) -> None:
        """Write a checkpoint, of an environment that has ``failed`` without its state. Raises Diverged, OSError."""
        state = {
            "metrics": self._numbers(),
            "agent": self.agent.state_dict(),
            "dims": self.dims,
            "env": [{k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in one.items()}
                    for one in (() if failed else self._env_state())],
            "frames": self.frames,
            "agent_steps": self.agent_steps,
            "seconds": time.perf_counter() - self._started,
            "timers": self.timers,
            "obs": torch.as_tensor(self.obs),
            "first": torch.as_tensor(self.first),
            "last": torch.as_tensor(self.last),
            "episode_return": torch.as_tensor(self.episode_return),
            "recent": self.recent,
            "evaluated": self.evaluated,
            "evaluation": None if self.evaluation is None else [torch.as_tensor(x) for x in self.evaluation],
            "rng": random_state(),
        }  # fmt: skip
        self.logger.flush()
        self.checkpoints.save(self.frames, state, self.replay)
        self._saved = True

    def _env_state(self) -> list[dict]:
        """Of each environment; none where their processes have ended, as by the SIGTERM that ends this one."""
        try:
            return self.save_env(self.venv)
        except Exception as error:
            tqdm.write(f"the environments' state is not in this checkpoint: {str(error) or type(error).__name__}")
            return []

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.agent.load_state_dict(state["agent"])
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{self.run_dir}: its checkpoint is of another agent ({reason})") from None
        states = [{k: _plain(v) for k, v in one.items()} for one in state["env"]]
        self.obs = state["obs"].numpy()
        self.frames, self.agent_steps, self.seconds = state["frames"], state["agent_steps"], state["seconds"]
        self.timers, self.recent, self.metrics = state["timers"], state["recent"], state["metrics"]
        self.first, self.last = state["first"].numpy(), state["last"].numpy()
        self.episode_return = state["episode_return"].numpy()
        if state["evaluation"] is not None:
            self.evaluation = RolloutResult(*(x.numpy() for x in state["evaluation"]))
        self.evaluated = state.get("evaluated", self.frames)  # where an older version says nothing, all were made
        self._logged = (self.frames, sum(self.timers.values()))
        if not states:
            self._begin_new_episodes("this environment had failed", self.seed + FAILED_SEED * (self.frames + 1))
        elif not self._repeated(states):
            self._begin_new_episodes("this environment is not deterministic")
        else:
            self._saved = True
        set_random_state(state["rng"])

    def _repeated(self, states: list[dict]) -> bool:
        """Whether the environment came again to where it was."""
        try:
            return np.array_equal(self.restore_env(self.venv, states), self.obs)
        except (RuntimeError, ValueError):  # the episode ended, or failed, before its recorded actions did
            return False

    def _begin_new_episodes(self, why: str, seed: int | None = None) -> None:
        """The environment is not where it was: what the replay holds of its episodes ends here."""
        tqdm.write(f"{why}: resuming with new episodes, not bit for bit")
        idle = np.zeros((len(self.obs), self.dims[1]), np.float32)
        self.replay.add(self.obs, idle, np.zeros(len(idle)), np.zeros(len(idle)), np.ones_like(self.last))
        self.obs, _ = self.venv.reset(seed=seed)
        self.first, self.last = np.ones_like(self.first), np.zeros_like(self.last)
        self.episode_return[:] = 0.0


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value
