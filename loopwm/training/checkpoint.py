"""Checkpoints: written whole or not at all, the last two kept, loaded without running anyone's code.

    checkpoints/
      00005000/state.pt      everything but the replay; its name is the env frame
      00010000/state.pt
      replay/0-2500.npz      rows [0, 2500) of every stream; a row is written once and shared by the checkpoints
      replay/2500-5000.npz
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from loopwm.training.replay import Replay

KEEP = 2


class CheckpointError(RuntimeError):
    """A run directory that cannot be used as asked; its text is one line."""


def lock_run(run_dir: Path) -> IO[str]:
    """Hold a run directory until the returned file is closed or the process ends.

    Raises:
        CheckpointError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = (run_dir / ".lock").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise CheckpointError(f"{run_dir} is in use by another process; stop it or choose another run_dir") from None
    return handle


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir / "checkpoints"
        self._replay = self.folder / "replay"

    def frames(self) -> list[int]:
        """Env frames of the complete checkpoints, oldest first."""
        found = (p.parent.name for p in self.folder.glob("*/state.pt"))
        return sorted(int(name) for name in found if name.isdigit())

    def save(self, frames: int, state: dict[str, Any], replay: Replay) -> None:
        """Write a checkpoint of ``state`` (tensors, numbers, strings, lists, dicts) and the replay's new rows."""
        self._replay.mkdir(parents=True, exist_ok=True)
        self._save_replay(replay)
        draft = self.folder / f".{frames:08d}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        state = {**state, "replay": {"total": replay.total, "rng": replay.rng.bit_generator.state}}
        with (draft / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        final = self.folder / f"{frames:08d}"
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _sync_folder(self.folder)
        for old in self.frames()[:-KEEP]:
            shutil.rmtree(self.folder / f"{old:08d}")

    def _save_replay(self, replay: Replay) -> None:
        """Append rows that no chunk holds yet; drop chunks that the ring has overwritten."""
        chunks = self._chunks()
        oldest = replay.total - len(replay)
        start = max((stop for _, stop in chunks if stop <= replay.total), default=oldest)
        start = max(start, oldest)
        if start < replay.total:
            final = self._replay / f"{start}-{replay.total}.npz"
            draft = final.with_suffix(".tmp")
            with draft.open("wb") as file:
                np.savez(file, **replay.slice(start, replay.total))
                file.flush()
                os.fsync(file.fileno())
            draft.rename(final)
        for begin, stop in chunks:
            # The kept older checkpoint may reach back further than the ring does now: leave it one chunk of slack.
            if stop < oldest - (replay.total - start):
                (self._replay / f"{begin}-{stop}.npz").unlink()

    def _chunks(self) -> list[tuple[int, int]]:
        names = (p.stem.split("-") for p in self._replay.glob("*-*.npz"))
        return sorted((int(a), int(b)) for a, b in names)

    def load(self, frames: int, replay: Replay | None = None, device: str | torch.device = "cpu") -> dict[str, Any]:
        """Read a checkpoint's state, and fill ``replay`` if one is given.

        Raises:
            CheckpointError: a file is missing or broken.
        """
        path = self.folder / f"{frames:08d}" / "state.pt"
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            if replay is not None:
                self._load_replay(replay, state["replay"]["total"])
                replay.rng.bit_generator.state = state["replay"]["rng"]
        except CheckpointError:
            raise
        except Exception as error:  # whatever a torn or foreign file makes the readers say, the fix is the same
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} cannot be read ({reason[:120]}); delete {path.parent} to go on from the one before"
            ) from None
        return state

    def _load_replay(self, replay: Replay, total: int) -> None:
        oldest, reached = max(0, total - replay.rows), None
        # Of two chunks with one start (a run killed and resumed) the longer is tried last and wins; both hold the
        # same rows, since a resumed run repeats the killed one exactly.
        for begin, stop in self._chunks():
            if stop <= oldest or begin >= total:
                continue
            if reached is not None and begin > reached:
                raise CheckpointError(f"{self._replay}: rows {reached}..{begin} are missing; start a new run_dir")
            with np.load(self._replay / f"{begin}-{stop}.npz", allow_pickle=False) as chunk:
                fields = {name: chunk[name][: total - begin] for name in Replay.FIELDS}
            replay.restore(begin, fields)
            reached = max(reached or 0, min(stop, total))
        if (reached or 0) < total:
            raise CheckpointError(f"{self._replay}: rows {reached or 0}..{total} are missing; start a new run_dir")
        replay.total = total


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
