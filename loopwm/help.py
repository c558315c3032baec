"""What ``python train.py --help`` prints: every setting with its default and meaning, read off the schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING
from functools import cache

from loopwm.config import Config
from loopwm.schema import Section, leaves
from loopwm.words import groups

FIELD = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)  # name: Type = default  # meaning


def usage() -> str:
    """How to write a command, then a line a setting."""
    choices = "  ".join(f"{name}={'|'.join(options)}" for name, options in groups().items() if name != "task")
    head = (
        "python train.py task=SUITE/ID [KEY=VALUE ...]\n\n"
        "task=dmc/<domain>-<task> or task=gym/<Gymnasium id>\n"
        f"{choices}\n"
    )
    return "\n".join([head, *_settings(), ""])


def _settings() -> Iterator[str]:
    """``key=default  meaning`` of every setting."""
    for key, section, item in leaves(Config):
        default = "" if item.default is MISSING else item.default
        yield f"  {key + '=' + str(default):34s} {_meanings(section)[item.name]}"


@cache
def _meanings(section: type[Section]) -> dict[str, str]:
    return dict(FIELD.findall(inspect.getsource(section)))
