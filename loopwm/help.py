"""What ``python train.py --help`` prints: every setting with its default and meaning, read off the schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields

from loopwm import config
from loopwm.schema import Section, section_of
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
    return "\n".join([head, *settings(config.Config), ""])


def settings(section: type[Section]) -> Iterator[str]:
    """``key=default  meaning`` of every field of a section and of those inside it."""
    meanings = dict(FIELD.findall(inspect.getsource(section)))
    for item in fields(section):
        inner = section_of(section, item.name)
        if inner is not None:
            yield from settings(inner)
            continue
        key = f"{section.SECTION}.{item.name}" if section.SECTION else item.name
        default = "" if item.default is MISSING else item.default
        yield f"  {key + '=' + str(default):34s} {meanings[item.name]}"
