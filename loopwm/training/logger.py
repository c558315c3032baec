"""One set of numbers, written twice: TensorBoard for eyes, metrics.jsonl for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from loopwm.training.video import film_strip


class Logger:
    """Scalars on env frames as x axis.

    Args:
        run_dir: where events and metrics.jsonl are written.
        frames: where the run goes on from, 0 for a new one; what was logged after that is dropped from both.
    """

    def __init__(self, run_dir: Path, frames: int = 0):
        self._path = run_dir / "metrics.jsonl"
        if self._path.exists():
            self._drop_after(frames)
        earlier = any(run_dir.glob("events.out.tfevents.*"))
        purge = frames + 1 if earlier else None  # TensorBoard then forgets what was logged from there on
        self._writer = SummaryWriter(str(run_dir), purge_step=purge, flush_secs=10)
        self._file = self._path.open("a", encoding="utf-8")

    def _drop_after(self, frames: int) -> None:
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["frames"] <= frames:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill in mid-write
        draft = self._path.with_suffix(".tmp")
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        draft.replace(self._path)

    def write(self, frames: int, scalars: Mapping[str, float]) -> None:
        """Log scalars (tag -> value) at an env frame."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, frames)
        self._file.write(json.dumps({"frames": frames, **{k: round(float(v), 6) for k, v in scalars.items()}}) + "\n")
        self._file.flush()

    def stills(self, frames: int, images: np.ndarray) -> None:
        """Show an episode (T, H, W, 3) uint8 as six stills (TensorBoard's own video needs moviepy)."""
        self._writer.add_image("eval/episode", film_strip(images), frames, dataformats="HWC")

    def hparams(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Show the config and the final metrics in TensorBoard's HPARAMS tab, in the run itself."""
        for summary in hparams(dict(config), {f"final/{k}": v for k, v in metrics.items()}):
            self._writer.file_writer.add_summary(summary)
        for tag, value in metrics.items():
            self._writer.add_scalar(f"final/{tag}", value)

    def flush(self) -> None:
        """Hand everything to the operating system, so that a kill takes nothing of it."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
        self._file.close()
