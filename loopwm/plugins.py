"""Parts that are not of this repository: MODULE:CLASS in a config, where the name of a part could stand.

As in ``task=gym/MODULE:ID`` the module is imported by its name: it has to be installed, or in a folder of PYTHONPATH.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import nn

from loopwm.config import ConfigError
from loopwm.dynamics import Dynamics, DynamicsOutput

T = TypeVar("T")
INTERFACE = (*Dynamics.__annotations__, *(name for name in vars(Dynamics) if not name.startswith("_")))


@contextmanager
def in_words(setting: str) -> Iterator[None]:
    """What code of a person's own raises ends in a ConfigError that says where; ``setting`` is what named the code."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        # The innermost frame: of a syntax error there is none, and its text says where.
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({last.filename}:{last.lineno})"
        raise ConfigError(f"{setting}: {type(error).__name__}: {error}{where}") from None


def own_class(key: str, name: str, kind: type[T]) -> type[T]:
    """The class that ``key`` names as MODULE:CLASS, a subclass of ``kind``.

    Raises:
        ConfigError: no such module, one that cannot be imported, no such class in it, or one of another kind.
    """
    setting, (module, _, attribute) = f"{key}={name!r}", name.partition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"{setting}: {module} is a module of Python's own")
    with in_words(setting):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and f"{module}.".startswith(f"{error.name}."):
                raise ConfigError(f"{setting}: {error} (is its folder on PYTHONPATH?)") from None
            raise
    found = getattr(found, attribute, None)
    if found is None:
        raise ConfigError(f"{setting}: {module} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{setting}: is no subclass of {kind.__module__}.{kind.__name__}")
    return found


def accepted(cls: type, words: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``words`` that the constructor of ``cls`` takes by name; all of them where it takes any."""
    takes = signature(cls).parameters.values()
    if any(p.kind is Parameter.VAR_KEYWORD for p in takes):
        return dict(words)
    return {name: value for name, value in words.items() if name in {p.name for p in takes}}


@torch.no_grad()
def check_dynamics(setting: str, dynamics: nn.Module, latent_width: int, action_dim: int) -> None:
    """Try dynamics of one's own on two samples, at a depth of training and at their own choice.

    Raises:
        ConfigError: something of ``loopwm.dynamics.Dynamics`` is missing; buffers, which checkpoints do not hold; a
        prediction that cannot be made, or of other shapes.
    """
    if lacks := [name for name in INTERFACE if not hasattr(dynamics, name)]:
        raise ConfigError(f"{setting}: lacks {lacks[0]} (see loopwm.dynamics.Dynamics)")
    if kept := dynamics.state_dict().keys() - dict(dynamics.named_parameters()).keys():
        raise ConfigError(f"{setting}: has a buffer, {min(kept)}, and checkpoints hold parameters alone")
    z, action = torch.zeros(2, latent_width), torch.zeros(2, action_dim)
    for depth in (dynamics.sample_depth(2, torch.Generator().manual_seed(0)), None):
        out = dynamics(z, action, depth)
        if not isinstance(out, DynamicsOutput):
            raise ConfigError(f"{setting}: predicts a {type(out).__name__}, not a loopwm.dynamics.DynamicsOutput")
        for name, found, wanted in (("z_next", out.z_next, z.shape), ("h", out.h, (2, dynamics.state_dim))):
            if found.shape[: len(wanted)] != torch.Size(wanted):
                raise ConfigError(f"{setting}: {name} has the shape {tuple(found.shape)}, not {tuple(wanted)}")
