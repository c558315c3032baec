"""An agent to act with as one small file that holds no code: ``python -m agents.export RUN_DIR FILE.safetensors``.

The file holds what acting needs (the slow world model, policy and values) and, as its metadata, the config. It is read
by ``load_agent`` and ``evaluate.py`` wherever a run directory is; training cannot go on from it. Where its config names
dynamics as MODULE:CLASS, that module is imported from the machine that loads it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from loopwm.config import Config, ConfigError, parse_config, to_dict
from loopwm.training.checkpoint import CheckpointError

SUFFIX = ".safetensors"
FORMAT = "loopwm-agent-1"


def save_exported(path: Path, agent: Any, cfg: Config, frames: int) -> Path:
    """Write ``agent`` for acting, atomically; the folder is made.

    Raises:
        CheckpointError: a name without ``.safetensors``, which could not be told from a run directory.
        OSError: it cannot be written.
    """
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path}: the name of an exported agent ends in {SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _acting(agent).items()}
    dims = [agent.obs_dim, agent.action_dim, agent.discrete]
    here = {"run_dir": "", "resume": False}  # where it was trained is nobody else's business
    config = to_dict(dataclasses.replace(cfg, **here, replay=dataclasses.replace(cfg.replay, path="")))
    said = {"format": FORMAT, "config": config, "dims": dims, "frames": frames, "acted": agent.acted}
    draft = path.with_name(f".{path.name}.tmp")
    try:
        # As bytes: files that safetensors writes itself are for their owner's eyes alone.
        draft.write_bytes(save(tensors, {name: json.dumps(value) for name, value in said.items()}))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def read_exported(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Config]:
    """(tensors, metadata, config) of an exported agent.

    Raises:
        CheckpointError: no such file, or not an exported agent. ConfigError: its config is broken.
    """
    try:
        with safe_open(path, "pt") as file:
            said = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if said["format"] != FORMAT:
            raise KeyError(said["format"])
        obs_dim, action_dim, discrete = said["dims"]
        numbers = (obs_dim, action_dim, said["frames"], said["acted"])
        if not all(type(n) is int and n >= 0 for n in numbers) or type(discrete) is not bool:
            raise ValueError("its numbers are none")
        return tensors, said, parse_config(said["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is not an agent that `python -m agents.export` wrote ({reason})") from None


def restore_exported(agent: Any, tensors: dict[str, torch.Tensor], acted: int) -> None:
    """Put the tensors of ``read_exported`` into an agent made from its config.

    Raises:
        RuntimeError, KeyError: they are of another one.
    """
    parts = _parts(agent)
    unknown = [name for name in tensors if name.partition(".")[0] not in parts]
    if unknown:
        raise KeyError(unknown[0])
    for part, module in parts.items():
        own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == part}
        module.load_state_dict(own)
    agent.world_model.load_state_dict(agent.slow_model.state_dict())
    agent.acted = acted


def _parts(agent: Any) -> dict[str, torch.nn.Module]:
    return {"model": agent.slow_model, "policy": agent.policy, "value": agent.value}


def _acting(agent: Any) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": t for part, module in _parts(agent).items() for name, t in module.state_dict().items()}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 something to correct."""
    from agents import load_agent

    p = argparse.ArgumentParser(prog="agents.export", description=__doc__.splitlines()[0])
    p.add_argument("run_dir", type=Path, help="what train.py wrote")
    p.add_argument("file", type=Path, help=f"to write, FILE{SUFFIX}")
    p.error = lambda message: p.exit(2, f"agents.export: {message}\n")  # one line, without the usage
    args = p.parse_args(arguments)
    try:
        path = save_exported(args.file, *load_agent(args.run_dir))
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"agents.export: {error}", file=sys.stderr)
        return 2
    print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
