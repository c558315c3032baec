"""The command line: KEY=VALUE words, and the groups of configs/ that some of them choose from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from loopwm.schema import ConfigError, is_own, last_part, listed, nearest, not_among

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"


def split(overrides: Iterable[str], keys: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Command-line words -> group choices {group: option} and values {dotted key: text}, names checked.

    Args:
        keys: all dotted keys that hold a value.

    Raises ConfigError.
    """
    choices: dict[str, str] = {}
    named: dict[str, str] = {}  # by GROUP.name
    values: dict[str, str] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if "/" in key and key.partition("/")[0] in groups()["task"]:
            raise ConfigError(f"{word!r} is not KEY=VALUE: did you mean task={word}?")
        if not equals:
            if key.startswith("-"):
                raise ConfigError(f"{word!r}: the only option is --help; settings are KEY=VALUE words")
            near = key if key in keys or key in groups() else nearest(key, (*keys, *groups()))
            raise ConfigError(f"{word!r} is not KEY=VALUE: did you mean {near}=...?")
        if key == "task":
            choices[key], slash, _ = text.partition("/")
            if choices[key] not in groups()[key]:
                suites = listed(groups()[key])
                raise ConfigError(f"task={text!r}: unknown suite, valid are {suites}; write task=SUITE/ID")
            if slash:
                values["task.id"] = text
        elif key in groups():
            choices[key] = text
            if text not in groups()[key]:
                own = f"; one's own is dynamics.name={text}" if key == "dynamics" and is_own(text) else ""
                raise ConfigError(f"{key}={text!r}: {not_among(text, groups()[key])}{own}")
        elif key.endswith(".name") and text in groups().get(key.removesuffix(".name"), ()):
            named[key.removesuffix(".name")] = text  # which may set more than the name, as for a control its mode
        elif key in keys:
            values[key] = text
        else:
            raise unknown(key, keys)
    for group, name in named.items():
        option = choices.setdefault(group, name)
        if option != name and _name_of(group, option) != name:  # agent.name=planner says nothing new of agent=fast
            raise ConfigError(f"{group}={option} and {group}.name={name}: choose one of them, by {group}=NAME")
    return choices, values


def _name_of(group: str, option: str) -> str | None:
    """What an option of a group sets GROUP.name to."""
    return yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text(encoding="utf-8")).get("name")


_COMPOSING = threading.Lock()  # Hydra keeps what it composes with in a global


def compose_groups(choices: Mapping[str, str]) -> dict[str, Any]:
    """Hydra's composition of configs/config.yaml with these choices, as plain dicts."""
    # Imported here: reading a saved config needs no Hydra.
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with _COMPOSING, initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose("config", [f"{group}={option}" for group, option in choices.items()])
        return OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{CONFIG_DIR}: a file there is broken: {str(error).splitlines()[0]}") from error


def unknown(key: str, keys: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, or that is a section."""
    inside = [known for known in keys if known.startswith(f"{key}.")]
    if inside:
        return ConfigError(f"{key} is a section, not a value: set one of {listed(inside)}")
    twins = [known for known in keys if last_part(known) == last_part(key)]  # right name, wrong section
    near = " or ".join(twins) or nearest(key, (*keys, *groups()))
    return ConfigError(f"unknown key {key!r}: did you mean {near}?")


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """The groups of configs/ and their options: one folder a group, one yaml file an option."""
    if not CONFIG_DIR.is_dir():
        raise ConfigError(f"{CONFIG_DIR} is missing: install from a checkout with `pip install -e .`")
    folders = sorted(folder for folder in CONFIG_DIR.iterdir() if folder.is_dir())
    return {folder.name: tuple(sorted(file.stem for file in folder.glob("*.yaml"))) for folder in folders}
