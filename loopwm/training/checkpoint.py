"""Checkpoints: written whole or not at all, the last ones kept, loaded without running anyone's code.

checkpoints/
  00005000/state.pt      everything but the rows of the replay; its name is the env frame
  00010000/state.pt
  replay/0-2500.npz      rows [0, 2500) of every stream; a row is written once and shared by the checkpoints
  replay/2500-5000.npz
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from loopwm.training.lock import lock_folder
from loopwm.training.replay import Replay

ASIDE = ".old"  # of the folder that a new one takes the place of
KEEP = 2  # unless told otherwise; the last but one is for a disk that tears the last


class CheckpointError(RuntimeError):
    """A run directory that cannot be used as asked; its text is one line."""


def lock_run(run_dir: Path) -> IO[str]:
    """Hold a run directory until the returned file is closed or the process ends.

    Raises:
        CheckpointError: another process holds it. OSError: it cannot be written.
    """
    handle = lock_folder(run_dir)
    if handle is None:
        raise CheckpointError(f"{run_dir} is in use by another process; stop it or choose another run_dir")
    return handle


class Checkpoints:
    """The checkpoints of one run directory, of which ``save`` leaves the newest ``keep``."""

    def __init__(self, run_dir: Path, keep: int = KEEP):
        self.folder, self.keep = run_dir / "checkpoints", keep
        self._replay = self.folder / "replay"
        self._unreadable: list[int] = []  # frames of those that load_newest passed over
        self._rows = 0  # rows of a stream that the chunks on disk hold, of the run as this process goes on with it

    def frames(self) -> list[int]:
        """Env frames of the complete checkpoints, oldest first."""
        found = (p.parent.name.removeprefix(".").removesuffix(ASIDE) for p in self.folder.glob("*/state.pt"))
        return sorted({int(name) for name in found if name.isdigit()})

    # ---- writing ------------------------------------------------------------------------------------------

    def save(self, frames: int, state: dict[str, Any], replay: Replay) -> None:
        """Write ``state`` (tensors, numbers, strings, lists, dicts) and the replay's new rows.

        Raises:
            OSError: it cannot be written (disk full); the earlier checkpoints are as they were.
        """
        self._replay.mkdir(parents=True, exist_ok=True)
        self._drop_drafts()
        before = self._rows
        self._save_replay(replay)
        draft, final = self.folder / f".{frames:08d}.tmp", self.folder / f"{frames:08d}"
        draft.mkdir()
        state = {**state, "replay": replay.state_dict()}
        buffer = io.BytesIO()  # torch.save into a file hides what the disk says
        torch.save(state, buffer)
        _write(draft / "state.pt", buffer.getbuffer())
        if final.exists():  # unreadable, or of the same frame: kept until the new one stands
            final.rename(self._aside(frames))
        draft.rename(final)
        _sync_folder(self.folder)
        self.put_back()
        self._drop_old(frames, before - replay.rows)

    def _aside(self, frames: int) -> Path:
        return self.folder / f".{frames:08d}{ASIDE}"

    def put_back(self) -> None:
        """A checkpoint that was put aside for a new one of its frame: back, if a kill kept that from coming.

        Of the run's owner alone, which the others who read here are not.
        """
        for aside in self.folder.glob(f".*{ASIDE}"):
            final = self.folder / aside.name.removeprefix(".").removesuffix(ASIDE)
            if final.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(final)

    def _drop_drafts(self) -> None:
        """What a kill in mid-write left."""
        for draft in self.folder.glob(".*.tmp"):
            shutil.rmtree(draft)
        for draft in self._replay.glob("*.tmp"):
            draft.unlink()

    def _save_replay(self, replay: Replay) -> None:
        """Append the rows that no chunk holds yet."""
        for begin, stop in self._chunks():
            if stop > self._rows:  # of a process that was killed before its checkpoint was whole
                self._chunk(begin, stop).unlink()
        start = max(self._rows, replay.total - len(replay))
        if start < replay.total:
            buffer = io.BytesIO()
            np.savez(buffer, **replay.slice(start, replay.total))
            final = self._chunk(start, replay.total)
            draft = final.with_suffix(".tmp")
            _write(draft, buffer.getbuffer())
            draft.rename(final)
            _sync_folder(self._replay)
        self._rows = replay.total

    def _drop_old(self, frames: int, oldest: int) -> None:
        """Leave this checkpoint and those before it, ``keep`` in all, and the rows from ``oldest`` on."""
        keep = [f for f in self.frames() if f <= frames and (f == frames or f not in self._unreadable)][-self.keep :]
        for old in set(self.frames()) - set(keep):
            shutil.rmtree(self.folder / f"{old:08d}")
        for begin, stop in self._chunks():
            if stop <= oldest:
                self._chunk(begin, stop).unlink()

    def _chunk(self, begin: int, stop: int) -> Path:
        return self._replay / f"{begin}-{stop}.npz"

    def _chunks(self) -> list[tuple[int, int]]:
        names = (p.stem.split("-") for p in self._replay.glob("*-*.npz"))
        return sorted((int(a), int(b)) for a, b in names)

    # ---- reading ------------------------------------------------------------------------------------------

    def load_newest(self, replay: Replay) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, its rows put into ``replay``; None where there is none.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        errors = []
        for frames in reversed(self.frames()):
            try:
                state = self._read(frames, replay)
            except CheckpointError as error:
                errors.append(error)
                self._unreadable.append(frames)
                continue
            for error in errors:
                print(f"warning: {error}; going on from frame {frames}", file=sys.stderr)
            return state
        if errors:
            others = "".join(f", nor {error}" for error in errors[1:])
            raise CheckpointError(f"{errors[0]}{others}; choose another run_dir to start anew")
        return None

    def load(self, frames: int) -> dict[str, Any]:
        """Read a checkpoint's state, its tensors onto the CPU.

        Raises:
            CheckpointError: it is missing or broken.
        """
        try:
            return self._read(frames)
        except CheckpointError as error:
            earlier = [at for at in self.frames() if at < frames]
            broken = self.folder / f"{frames:08d}"
            hint = f"; take frame {earlier[-1]} (evaluate.py --frames), or delete {broken}" if earlier else ""
            raise CheckpointError(f"{error}{hint}") from None

    def _read(self, frames: int, replay: Replay | None = None) -> dict[str, Any]:
        path = self.folder / f"{frames:08d}" / "state.pt"
        if not path.exists():  # the moment in which another takes its place
            path = self._aside(frames) / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if replay is not None:
                self._load_replay(replay, state["replay"]["total"])
                replay.load_state_dict(state["replay"])
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # whatever a torn or foreign file makes the readers say, the fix is the same
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read ({reason[:120]})") from None
        return state

    def _load_replay(self, replay: Replay, total: int) -> None:
        reached = max(0, total - replay.rows)
        for begin, stop in self._chunks():
            if stop <= reached or stop > total:  # overwritten in the ring, or newer than the checkpoint
                continue
            if begin > reached:
                break
            with np.load(self._chunk(begin, stop), allow_pickle=False) as chunk:
                replay.restore(begin, {name: chunk[name] for name in Replay.FIELDS})
            reached = stop
        if reached < total:
            raise CheckpointError(f"{self._replay} cannot be read (rows {reached}..{total} are missing)")
        replay.total = self._rows = total


def _write(path: Path, data: bytes | memoryview) -> None:
    """Write a file down to the disk."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
