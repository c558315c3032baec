"""Memory that cannot be had, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loopwm.config import ConfigError

# What torch's allocators say (a CPU's, and of a tensor larger than any); a GPU's have a class of their own.
TORCH_SAYS = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


class OutOfMemory(ConfigError):
    """A network, a batch, a plan or a replay is larger than the memory of this machine."""


@contextmanager
def memory_in_words() -> Iterator[None]:
    """What is run inside it, or is decorated by it, raises OutOfMemory where memory ends, as far as it is told so.

    (Where the system promises more than it has, it kills the process instead.)
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not any(words in said for words in TORCH_SAYS):
            raise
        # The source line of an allocator stands in brackets before what it says.
        said = said.rpartition("] ")[2].removeprefix("err == 0. ")[:160]
        raise OutOfMemory(f"not enough memory for these settings ({said or 'MemoryError'})") from None
