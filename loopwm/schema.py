"""Typed sections of a config: what a field may be, how text becomes it, and one line for every mistake.

A section is a frozen dataclass whose fields say in their types what they may hold. Which sections there are stands in
``loopwm.config``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar, get_type_hints

T = TypeVar("T", bound="Section")


class ConfigError(ValueError):
    """A setting a person can correct; its text is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


# ---------------------------------------------------------------------------------------- rules for values


class Within(NamedTuple):
    """A number from `low` to `high`; an `open` range leaves its two ends out."""

    low: float
    high: float = math.inf
    open: bool = False

    def complaint(self, value: float) -> str | None:
        """What is wrong with `value`, or None."""
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        if inside:
            return None
        if self.high == math.inf:
            return f"must be {'above' if self.open else 'at least'} {self.low}"
        return f"must be {'strictly ' if self.open else ''}between {self.low} and {self.high}"


class OneOf(NamedTuple):
    """One of a few words; where it is `open`, also MODULE:NAME, a part of one's own (see `loopwm.plugins`)."""

    words: tuple[str, ...]
    open: bool = False

    def complaint(self, value: str) -> str | None:
        """What is wrong with `value`, or None."""
        if value in self.words or (self.open and re.fullmatch(r"\w+(\.\w+)*:\w+", value)):
            return None
        return not_among(value, self.words) + ("; one's own is MODULE:CLASS" if self.open else "")


class Matches(NamedTuple):
    """A text of a certain form; `form` says it in words."""

    regex: str
    form: str

    def complaint(self, value: str) -> str | None:
        """What is wrong with `value`, or None."""
        return None if re.fullmatch(self.regex, value) else f"must be {self.form}"


# ---------------------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class Section:
    """A frozen part of the config: it converts and checks its fields when it is made, by whichever way."""

    SECTION: ClassVar[str] = ""  # the name of the part in dotted keys

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            value = _parse(_join(self.SECTION, name), kind, getattr(self, name))
            object.__setattr__(self, name, value)  # the one write; the instance is frozen from here on
        self.check()

    def check(self) -> None:
        """Checks across fields; raises ConfigError."""


def build(cls: type[T], tree: object, unknown: Callable[[str], ConfigError]) -> T:
    """Nested dicts -> a checked section; missing keys are errors, and so are unknown ones, those of ``unknown(key)``.

    Raises ConfigError.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{cls.SECTION or 'the config'} must be a mapping of keys to values, not {tree!r}")
    types = _kinds(cls)
    for key in tree:
        if key not in types:
            raise unknown(_join(cls.SECTION, str(key)))
    for item in fields(cls):
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in tree:
            raise ConfigError(f"{_join(cls.SECTION, item.name)} is missing")
    return cls(**{key: build(types[key], v, unknown) if _is_section(types[key]) else v for key, v in tree.items()})


def leaves(cls: type[Section]) -> Iterator[tuple[str, type[Section], Field]]:
    """(dotted key, section, field) of everything that holds a value, in a section and those inside it."""
    for item in fields(cls):
        kind = _kinds(cls)[item.name]
        if _is_section(kind):
            yield from leaves(kind)
        else:
            yield _join(cls.SECTION, item.name), cls, item


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


@cache
def _kinds(cls: type[Section]) -> dict[str, Any]:
    """Field name -> its annotated type."""
    hints = get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in fields(cls)}


def _parse(key: str, kind: Any, value: Any) -> Any:
    """`value` as the type of the field `key`, within its rules."""
    base, rules = (kind.__origin__, kind.__metadata__) if hasattr(kind, "__metadata__") else (kind, ())
    if _is_section(base):
        if not isinstance(value, base):
            raise ConfigError(f"{key} must be a {base.__name__}, not {value!r}")
        return value
    wanted, convert = _CONVERTERS[base]
    try:
        value = convert(value)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError):
        raise ConfigError(f"{key}={value!r}: must be {wanted}") from None
    for rule in rules:
        if complaint := rule.complaint(value):
            raise ConfigError(f"{key}={value!r}: {complaint}")
    return value


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[value.lower()]


def _to_int(value: Any) -> int:
    """An int from an int, a whole float, or their text: 100000, 1e5, "100_000"."""
    if isinstance(value, str):
        value = float(value) if re.search(r"[.eE]", value) else int(value)
    if isinstance(value, bool) or value != int(value):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_CONVERTERS = {
    bool: ("true or false", _to_bool),
    int: ("a whole number", _to_int),
    float: ("a number", _to_float),
    str: ("text", _to_str),
}


# ---------------------------------------------------------------------------------------- words in messages


def is_own(name: str) -> bool:
    """Whether what is named is a part of one's own, MODULE:CLASS (see `loopwm.plugins`)."""
    return ":" in name


def not_among(word: str, words: Iterable[str]) -> str:
    words = tuple(words)
    return f"did you mean {nearest(word, words)}? (valid: {listed(words)})"


def nearest(key: str, known: Iterable[str]) -> str:
    """The name in `known` most like `key`, by the whole name and by its last part."""

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, key.lower(), name).ratio()
        last = difflib.SequenceMatcher(None, last_part(key.lower()), last_part(name)).ratio()
        return whole + last

    return max(known, key=likeness)


def last_part(key: str) -> str:
    return key.rpartition(".")[2]


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def listed(words: Iterable[str]) -> str:
    return ", ".join(words)
