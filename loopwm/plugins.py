"""Parts that are not of this repository: MODULE:NAME in a config, where the name of a part could stand.

As in ``task=gym/MODULE:ID`` the module is imported by its name: it has to be installed, or in a folder of PYTHONPATH.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar

from loopwm.config import ConfigError

T = TypeVar("T")


def part(key: str, name: str, known: Mapping[str, type[T]], kind: type[T]) -> type[T]:
    """The class that a setting names: one of ``known``, or by MODULE:NAME any subclass of ``kind``.

    Args:
        key: of the setting, for the error message.

    Raises:
        ConfigError: no such module, nothing of that name in it, or something else than such a class.
    """
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"{key}={name!r}: {error} (is its folder on PYTHONPATH?)") from None
    except AttributeError:
        raise ConfigError(f"{key}={name!r}: {module} has no {attribute}") from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{key}={name!r}: is no subclass of {kind.__module__}.{kind.__name__}")
    return found


def accepted(cls: type, words: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``words`` that the constructor of ``cls`` takes by name; all of them where it takes any."""
    takes = signature(cls).parameters.values()
    if any(p.kind is Parameter.VAR_KEYWORD for p in takes):
        return dict(words)
    return {name: value for name, value in words.items() if name in {p.name for p in takes}}
