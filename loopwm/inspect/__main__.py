"""What the loop of a run does, as a picture and a page: ``python -m loopwm.inspect RUN_DIR [--out DIR]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from loopwm.config import ConfigError
from loopwm.dynamics import LoopedDynamics
from loopwm.inspect.figure import draw
from loopwm.inspect.measure import SETTLED, chosen_depths, depth_errors, settling, strict
from loopwm.inspect.run import Run, draw_windows, load_run
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.interrupt import INTERRUPTED

WINDOWS = 256  # of the replay, that everything is measured on
LENGTHS = (20, 10, 5, 3)  # steps of a window: the first of them that episodes have
DEPTHS = (1, 2, 3, 4, 6, 8, 16, 32)
UNVALUED = " of reward and continuation (in the agent of reward and value)"
AHEAD = (1, 3)  # steps; plans look three ahead


@torch.no_grad()
def measure(run: Run) -> dict[str, Any]:
    """Everything that the picture and the page show. Raises CheckpointError: all episodes are too short."""
    model, cfg = run.model, run.cfg
    data = draw_windows(run.replay, WINDOWS, LENGTHS)
    steps = len(data.action)
    names = [f"{what}, {k} ahead" for k in AHEAD for what in ("latent", "reward")]
    found: dict[str, Any] = {
        "task": cfg.task.id,
        "dynamics": cfg.dynamics.name,
        "seed": cfg.seed,
        "frames": run.frames,
        "windows": data.obs.shape[1],
        "looped": isinstance(model.dynamics, LoopedDynamics),
        "ahead": names,
    }
    every = tuple(range(1, steps + 1))
    if not found["looped"]:
        (row,) = depth_errors(model, data, (None,), every)
        return found | {"depths": [row], "horizon": {cfg.dynamics.name: _curve(row, steps)}}
    trained = cfg.dynamics.mean_loops
    depths = tuple(sorted({*DEPTHS, trained}))
    rows = depth_errors(model, data, (*depths, None), every)
    z, action = model.encode(data.obs[0]), data.action[0]
    shown = {"1 loop": 1, f"{trained} loops, the trained mean": trained, f"{depths[-1]} loops": depths[-1]}
    return found | {
        "mean_loops": trained,
        "halting": cfg.dynamics.halting,
        "mode": cfg.dynamics.mode,
        "settling": settling(model.dynamics, z, action),
        "depths": [{k: v for k, v in row.items() if k in ("depth", "loops", *names)} for row in rows],
        "chosen": chosen_depths(model, z, action),
        "horizon": {label: _curve(rows[depths.index(n)], steps) for label, n in shown.items()},
    }


def _curve(row: dict[str, Any], steps: int) -> list[float]:
    return [row[f"latent, {k} ahead"] for k in range(1, steps + 1)]


def page(found: dict[str, Any]) -> str:
    """The report, as Markdown."""
    lines = [f"# {found['task']}, {found['dynamics']}, seed {found['seed']}, after {found['frames']:,} frames", ""]
    if found["looped"]:
        lines += [f"- {said}" for said in _about_the_loop(found)] + [""]
    lines += ["![what the loop does](inspect.png)", ""]
    lines += [f"Measured on {found['windows']} windows of the run's replay, by the slow model that the agent acts by."]
    lines += ["Share of variance left unexplained, open loop (0: exact, or nothing varies; 1: what the mean gets):", ""]
    lines += ["| loops | " + " | ".join(found["ahead"]) + " |", "|---" * (len(found["ahead"]) + 1) + "|"]
    for row in found["depths"]:
        depth = row["depth"] or (f"adaptive, {row['loops']:.1f} on the mean" if found["looped"] else "none")
        lines.append(f"| {depth} | " + " | ".join(f"{row[name]:.4f}" for name in found["ahead"]) + " |")
    return "\n".join(lines) + "\n"


def _about_the_loop(found: dict[str, Any]) -> list[str]:
    """Sentences on contraction, on what depth buys, and on the depth that predictions choose."""
    rest, trained, name = found["settling"], found["mean_loops"], found["ahead"][0]
    middle = rest["distance"][trained][1]
    bound = f"at most {rest['bound']:.3f} (certified)" if rest["bound"] < 1.0 else "any number (not certified)"
    said = [f"One loop multiplies distances by {bound}; the largest factor seen is {rest['measured']:.3f}."]
    if rest["settled"]:
        said.append(f"After the trained mean of {trained} a state is {middle:.1%} of its size from its rest.")
    else:
        said.append(f"The loop does not come to rest within {SETTLED} loops.")
    row = {one["depth"]: one[name] for one in found["depths"]}
    deepest = max(depth for depth in row if depth)
    said.append(
        f"The latent one step ahead is left unexplained by {row[1]:.4f} after one loop, {row[trained]:.4f} after "
        f"{trained} and {row[deepest]:.4f} after {deepest}."
    )
    counts = found["chosen"]
    mean = sum(n * count for n, count in enumerate(counts, 1)) / sum(counts)
    rule = f"`{found['halting']}`" + UNVALUED * (found["halting"] == "prediction")
    return [*said, f"By {rule} a prediction that may choose takes {mean:.1f} of {len(counts)} loops."]


def write(found: dict[str, Any], folder: Path) -> None:
    """inspect.png, inspect.json and inspect.md. Raises OSError: they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, folder / "inspect.png")
    text = json.dumps(strict(found), indent=1, allow_nan=False) + "\n"
    (folder / "inspect.json").write_text(text, encoding="utf-8")
    (folder / "inspect.md").write_text(page(found), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 something to correct, 130 interrupted."""
    p = argparse.ArgumentParser(prog="loopwm.inspect", description=__doc__.splitlines()[0])
    p.add_argument("run_dir", type=Path, help="what train.py wrote")
    p.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: RUN_DIR/inspect)")
    p.error = lambda message: p.exit(2, f"loopwm.inspect: {message}\n")  # one line, without the usage
    args = p.parse_args(arguments)
    folder = args.out or args.run_dir / "inspect"
    try:
        found = measure(load_run(args.run_dir))
        write(found, folder)
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"loopwm.inspect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    print(page(found).replace("inspect.png", os.fspath(folder / "inspect.png")), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
