"""One change of the default at a time, by paired seeds: what each buys per frame, and what it costs per second.

python -m benchmarks.ablations --task dmc/walker-walk --change slow_targets no_policy_delay
python -m benchmarks.ablations --set-change slow="agent.tau=0.005 agent.model_tau=0.005"
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.harness import curve, interval, parser, refusing, report, train_all, training_run

# Name -> the words that change it. What was screened by hand with one or two seeds, so that anyone can settle it.
CHANGES: dict[str, tuple[str, ...]] = {
    "slow_targets": ("agent.tau=0.01",),
    "longer_returns": ("agent.n_step=5",),
    "one_step_returns": ("agent.n_step=1",),
    "no_policy_delay": ("agent.policy_every=1",),
    "fast": ("agent=fast",),
    "few_updates_for_all": ("agent.update_ratio=0.5",),
    "fewer_model_updates": ("agent.model_every=4",),
    "more_value_updates": ("agent.update_ratio=2", "agent.model_every=2"),
    "no_priority": ("agent.priority=0",),
    "imagined_values": ("agent.imagined_steps=2",),
    "value_reads_loop": ("agent.value_loops=4",),
    "huber_value": ("agent.value_loss=huber",),
    "resets": ("agent.reset_every=20000",),
    "silu": ("agent.activation=silu",),
    "wide_loop": ("dynamics.hidden_dim=128", "dynamics.block_dim=256"),
    "wide_values": ("agent.value_dim=224",),
    "large_batch": ("agent.batch_size=256",),
    "small_penalty": ("agent.policy_penalty=1e-4",),
    "large_penalty": ("agent.policy_penalty=4e-3",),
    "value_gradient": (
        "agent.policy_horizon=0",
        "agent.policy_std=0",
        "agent.policy_penalty_kept=1",
        "agent.policy_step_error=0",
    ),
    "gradient_at_once": ("agent.policy_switch_steps=0",),
    "constant_penalty": ("agent.policy_penalty_kept=1",),
    "any_step_error": ("agent.policy_step_error=0",),
    "white_noise": ("agent.explore_std=0.2", "agent.explore_std_final=0.2", "agent.explore_correlation=0"),
    "fading_noise": ("agent.explore_std_final=0.05",),
    "policy_collects": ("agent.plan_collect=false",),
    "no_novelty": ("agent.novelty_spread=0",),
    "policy_alone": ("agent.plan_samples=0",),
    "fewer_plans": ("agent.plan_samples=64",),
    "more_plans": ("agent.plan_iterations=3",),
    "observations_read": ("agent.observation_weight=0.1",),
    "wide_latent": ("encoder.latent_dim=128",),
    "fixed_depth": ("dynamics.depth_sampler=fixed",),
    "two_loops": ("dynamics.mean_loops=2", "agent.plan_loops=2"),
    "uncertified": ("dynamics.mode=linear",),
    "deep_prelude": ("dynamics.prelude_layers=2",),
}
TASKS = ("dmc/cartpole-swingup", "dmc/walker-walk", "dmc/cheetah-run")


def late_return(run_dir: Path) -> float:
    """Mean evaluation over the second half of a run: single evaluations of one run differ too much to compare."""
    points = curve(run_dir)
    return float(np.mean([value for _, value in points[len(points) // 2 :]]))


def paired(mine: list[float], base: list[float]) -> dict[str, float]:
    """Mean difference over paired seeds and its 95 % Student interval (a bootstrap of three pairs is overconfident)."""
    test = stats.ttest_rel(mine, base)
    bounds = test.confidence_interval(0.95)
    value = float(np.mean(mine) - np.mean(base))
    return {"value": round(value, 3), "low": round(float(bounds.low), 3), "high": round(float(bounds.high), 3)}


def own_changes(p: ArgumentParser, words: list[str], unchanged: str) -> dict[str, tuple[str, ...]]:
    """NAME=WORDS -> {NAME: the words}; ends with one line where a name has none, or is taken."""
    pairs = (word.partition("=") for word in words)
    own = {name: tuple(settings.split()) for name, _, settings in pairs}
    if bad := [name for name, settings in own.items() if not settings or name in CHANGES or name == unchanged]:
        p.error(f'--set-change {bad[0]!r}: needs NAME="KEY=VALUE ...", and a name that is not taken')
    return own


@refusing
def main(arguments: list[str]) -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--task", nargs="+", default=list(TASKS))
    p.add_argument("--frames", type=int, default=50_000)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--change", nargs="*", default=None, choices=CHANGES, metavar="NAME", help=", ".join(CHANGES))
    p.add_argument("--set-change", nargs="*", default=[], metavar='NAME="KEY=VALUE ..."', help="a change of your own")
    args = p.parse_args(arguments)
    own = own_changes(p, args.set_change, "default")
    names = args.change if args.change is not None else ([] if own else list(CHANGES))
    changes = {"default": ()} | {name: CHANGES[name] for name in names} | own
    seeds = range(2 if args.quick else args.seeds)
    if len(seeds) < 2:
        p.error("--seeds: a paired comparison needs at least two")
    frames = min(args.frames, 20_000) if args.quick else args.frames

    runs = {
        (task, name, seed): training_run(args.runs, task, "looped", seed, frames, words)
        for task in args.task
        for seed in seeds
        for name, words in changes.items()
    }
    train_all(dict(runs.values()), args.jobs)

    rows, headline, verdicts = [], {}, []
    for task in args.task:
        for name, words in changes.items():
            dirs = [runs[task, name, seed][0] for seed in seeds]
            late = [late_return(d) for d in dirs]
            speed = [np.median([v for _, v in curve(d, "time/frames_per_second")]) for d in dirs]
            rows.append({"task": task, "change": name, "words": words, "late_return": late, "frames_per_second": speed})
            if name == "default":  # the first of the changes
                base, headline[f"{task} default"] = late, interval(late)
                continue
            gain = headline[f"{task} {name} - default"] = paired(late, base)
            if gain["low"] > 0 or gain["high"] < 0:
                verdicts.append(f"{name} {gain['value']:+.0f} on {task}")
    found = "; ".join(verdicts) or "no change differs from the default beyond its 95 % interval"
    verdict = (
        f"Return over the second half, {len(seeds)} paired seeds, intervals not corrected for their number: {found}."
    )
    report("ablations", args, seeds, rows, headline, verdict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
