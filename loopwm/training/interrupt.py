"""Ctrl-C and SIGTERM end a run between two steps, where a checkpoint can be written."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
STOPPING = b"\nstopping after this step, with a checkpoint; once more stops at once, without\n"


class Interrupt:
    """While entered, the first Ctrl-C (or SIGTERM) only sets ``requested``; a second one does not wait.

    Only the main thread can catch signals: entered in another one, this does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):
            os.write(2, STOPPING)  # not print: a handler may run inside another print

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
