"""What a person can get wrong: each error is one line which says what to do about it."""

import difflib
from collections.abc import Iterable


class TaskError(ValueError):
    """The task's name is unknown, or its environment cannot be used here, fails, or answers with what is no number."""


class RenderingUnavailable(RuntimeError):
    """Frames were asked for, and this machine or this process cannot draw them."""


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return "did you mean 'x'?", with up to three names if none is clearly meant, or "" if none is near."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.9)
    near = near or difflib.get_close_matches(name, valid, n=3)
    return f"did you mean {' or '.join(repr(other) for other in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
