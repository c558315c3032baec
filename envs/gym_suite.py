"""Any registered Gymnasium environment."""

import json
import os
from typing import Any
from urllib.parse import parse_qsl

import gymnasium
from gymnasium.error import DependencyNotInstalled

from envs.errors import RenderingUnavailable, TaskError, first_line, suggestion
from envs.rendering import check_backend, prefer_egl


def load(name: str, task: str, render: bool) -> gymnasium.Env:
    """Make the env registered as `name` ("module:id" imports the module first).

    Args:
        name: a Gymnasium id, and what its environment is told: "id?size=12&hidden=true", values as in JSON, or text.
        task: the full name, for error messages.
        render: frames are wanted.

    Raises:
        TaskError: no such id, or it needs a package which is not installed, or it cannot be told that.
        RenderingUnavailable: MUJOCO_GL asks for a backend which this machine does not have.
    """
    if render:
        prefer_egl()
    name, told = _told(name, task)
    try:
        return _make(name, told, task, render)
    except (TaskError, RenderingUnavailable):
        raise
    except Exception as error:  # whatever its constructor raises, of an argument that it does not expect, say
        raise TaskError(f"task '{task}': {type(error).__name__}: {first_line(error)}") from error


def _make(name: str, told: dict[str, Any], task: str, render: bool) -> gymnasium.Env:
    """Gymnasium's `name`, told those arguments. A mistyped name and a missing package are explained in a TaskError."""
    module, colon, _ = name.partition(":")
    if colon and (name.count(":") > 1 or not all(part.isidentifier() for part in module.split("."))):
        raise TaskError(f"task '{task}': one that a module registers is written gym/<module>:<id>")
    try:
        # No checker: it costs time at every step, and the tests run gymnasium's full one.
        # No render_mode unless one is asked for: an environment that draws nothing need not take it.
        mode = {"render_mode": "rgb_array"} if render else {}
        return gymnasium.make(name, disable_env_checker=True, **mode, **told)
    except (DependencyNotInstalled, ImportError, AttributeError, RuntimeError) as error:
        if os.environ.get("MUJOCO_GL"):
            check_backend(task)
        if isinstance(error, (AttributeError, RuntimeError)):
            raise
        module, colon, _ = name.partition(":")
        missing = colon and f"'{module.partition('.')[0]}'" in str(error) and isinstance(error, ModuleNotFoundError)
        where = " (is its folder on PYTHONPATH?)" if missing else ""
        raise TaskError(f"task '{task}' needs a package: {first_line(error)}{where}") from error
    except gymnasium.error.UnregisteredEnv as error:
        near = suggestion(f"gym/{name}", (f"gym/{other}" for other in gymnasium.registry))
        package = isinstance(error, gymnasium.error.NamespaceNotFound)  # one that is missing, or mistyped
        hint = " ".join(part for part in (near, "" if near and not package else first_line(error)) if part)
        raise TaskError(f"unknown task '{task}'; {hint}") from error
    except gymnasium.error.Error as error:
        raise TaskError(f"task '{task}': {first_line(error)}") from error


def _told(name: str, task: str) -> tuple[str, dict[str, Any]]:
    """The id alone, and the keyword arguments behind its question mark."""
    name, mark, query = name.partition("?")
    if not mark:
        return name, {}
    try:
        pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=True)  # 1e+3 is a number
    except ValueError:
        pairs = []
    told = {key: _value(text, task) for key, text in pairs}
    if not told or "" in told or len(told) < len(pairs):
        raise TaskError(f"task '{task}': what an environment is told is written ?name=value&name=value, each name once")
    taken = sorted({"render_mode", "disable_env_checker"} & told.keys())
    if taken:
        raise TaskError(f"task '{task}': {taken[0]} is not for a task to choose")
    return name, told


def _value(text: str, task: str) -> Any:
    if text in ("True", "False", "None"):  # texts that would pass for true
        raise TaskError(f"task '{task}': {text} is written {'null' if text == 'None' else text.lower()}, as in JSON")
    try:
        return json.loads(text)
    except ValueError:
        return text
