"""Learning curves of results of benchmarks.returns, JSON or CSV, as PNG.

python -m benchmarks.figures docs/results/default_100k.json docs/results/default_100k_seed2.csv --out docs/figures
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import read_returns, up_to
from benchmarks.plots import plt, save_figure
from loopwm.training.run_dir import file_name

COLORS = {
    "looped": "#1b6ca8",
    "single_pass": "#d1495b",
    "stacked": "#edae49",
    "wide": "#66a182",
    "deep_thin": "#7d5ba6",
}
BEFORE = "{}, before"  # the name of a dynamics in results given as ``--before``
COLORS[BEFORE.format("looped")] = "#c98b3f"

ANCHORS = {"mrq": "#777777", "tdmpc2": "#b0b0b0", "dreamerv3": "#d8c9a8"}  # published methods


def published(path: Path | None, task: str) -> dict[str, list[tuple[int, float]]]:
    """(frames, mean return) of published methods on a DMC task, from a csv of task, method, frames, mean."""
    if path is None:
        return {}
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if f"dmc/{row['task']}" == task and row["method"] in ANCHORS:
                curves.setdefault(row["method"], []).append((int(row["frames"]), float(row["mean"])))
    return curves


def read_rows(path: Path) -> list[dict]:
    """Task, dynamics, seed and curve [(env frames, return), ...] of the runs in a JSON or CSV of benchmarks.returns."""
    if path.suffix != ".csv":
        result = json.loads(path.read_text())
        return result["rows"] if result["benchmark"] == "returns" else []
    curves: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for task, dynamics, seed, frames, value in read_returns(path):
        task = task if "/" in task else f"dmc/{task}"  # a CSV leaves the suite of DMC out
        curves.setdefault((task, dynamics, seed), []).append((frames, value))
    return [{"task": task, "dynamics": d, "seed": seed, "curve": c} for (task, d, seed), c in curves.items()]


def count(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds > 1)}"


def together(curves: list[list[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Frames (E,) of the first curve and returns (seeds, E), where every curve has an evaluation within 1 % of its end.

    An evaluation is drawn once: of several of the first curve that are nearest to the same one of another, the first.
    """
    near, x, y, taken = max(points[-1][0] for points in curves) / 100, [], [], set()
    for frames, _ in curves[0]:
        nearest = [min(points, key=lambda point: abs(point[0] - frames)) for points in curves]
        found = tuple(at for at, _ in nearest[1:])
        if all(abs(at - frames) <= near for at in found) and not (found and taken & set(enumerate(found))):
            taken |= set(enumerate(found))
            x.append(frames)
            y.append([value for _, value in nearest])
    return np.array(x), np.array(y).T


def panel(
    axes: plt.Axes, title: str, rows: list[dict], anchors: dict[str, list[tuple[int, float]]], counted: bool = True
) -> None:
    """One task: mean and range over seeds of each dynamics, how many where ``counted``; published means dashed."""
    furthest = 0
    for name, color in COLORS.items():
        curves = [row["curve"] for row in rows if row["dynamics"] == name]
        if not curves:
            continue
        x, y = together(curves)
        label = f"{name} ({count(len(curves))})" if counted else name
        axes.plot(x, y.mean(0), color=color, label=label, marker="." if len(x) < 8 else None)
        axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
        furthest = max(furthest, x[-1])
    for method, points in anchors.items():
        near = [point for point in points if point[0] <= furthest]
        if near:
            axes.plot(*zip(*near, strict=True), "--o", ms=4, color=ANCHORS[method], label=method)
    axes.set(xlabel="env frames", ylabel="evaluation return", title=title, xlim=(0, 1.04 * furthest))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes.grid(alpha=0.25)


def draw(task: str, rows: list[dict], out: Path, anchors: dict[str, list[tuple[int, float]]]) -> Path:
    """One task as a figure of its own."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=130)
    panel(axes, task, rows, anchors)
    axes.legend(fontsize=8, frameon=False)
    return save(figure, out / f"{file_name(task.split('/', 1)[1])}.png")


def draw_grid(by_task: dict[str, list[dict]], path: Path, csv_file: Path | None) -> Path:
    """All tasks as panels of one figure, four in a row."""
    lines = -(-len(by_task) // 4)
    figure, panels = plt.subplots(lines, 4, figsize=(15, 3.2 * lines), dpi=110, squeeze=False)
    for axes, (task, rows) in zip(panels.flat, by_task.items(), strict=False):
        title = f"{task.removeprefix('dmc/')} ({count(len({row['seed'] for row in rows}))})"
        panel(axes, title, rows, published(csv_file, task), counted=False)  # one legend for panels of different seeds
    for axes in panels.flat[len(by_task) :]:
        axes.axis("off")
    for axes in panels[:, 1:].flat:
        axes.set_ylabel("")
    named = {text: line for axes in panels.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0, 0].legend(named.values(), named.keys(), fontsize=8, frameon=False)
    return save(figure, path)


def save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    save_figure(figure, path)
    return path


def film(run_dir: Path, out: Path) -> Path:
    """Four stills of one evaluation episode of a run's newest agent, as PNG."""
    from agents import load_agent
    from envs import make_vector_env
    from loopwm.training.video import film_strip, record_episode

    agent, cfg, _ = load_agent(run_dir)
    images = record_episode(agent, make_vector_env(cfg.task.id, 1, render=True), seed=2**34)
    path = out / f"{file_name(cfg.task.id.split('/', 1)[1])}-stills.png"
    out.mkdir(parents=True, exist_ok=True)
    plt.imsave(path, film_strip(images, 4)[::2, ::2])
    return path


def main(arguments: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("results", type=Path, nargs="*", help="JSON or CSV files of benchmarks.returns")
    p.add_argument("--out", type=Path, default=Path("docs/figures"))
    p.add_argument("--before", type=Path, nargs="*", default=[], help="likewise, of another default: in another colour")
    p.add_argument("--published", type=Path, help="csv of published returns, drawn as dashed lines")
    p.add_argument("--grid", type=Path, metavar="FILE.png", help="all tasks as panels of one figure, and no others")
    p.add_argument("--until", type=int, metavar="FRAMES", help="draw no evaluation after those (default: all)")
    p.add_argument("--film", type=Path, metavar="RUN_DIR", help="also a strip of stills of that run's agent")
    args = p.parse_args(arguments)
    if args.film:
        print(film(args.film, args.out))
    by_task: dict[str, list[dict]] = {}
    for path, name in [*((path, BEFORE) for path in args.before), *((path, "{}") for path in args.results)]:
        for row in read_rows(path):
            curve = row["curve"] if args.until is None else up_to(row["curve"], args.until)
            if curve:
                row = row | {"dynamics": name.format(row["dynamics"]), "curve": curve}
                by_task.setdefault(row["task"], []).append(row)
    if args.grid and by_task:
        print(draw_grid(by_task, args.grid, args.published))
        return
    for task, rows in by_task.items():
        print(draw(task, rows, args.out, published(args.published, task)))


if __name__ == "__main__":
    main(sys.argv[1:])
