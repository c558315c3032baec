"""The typed schema that configs/ fills, and the only door to it.

    load_config(["task=dmc/cartpole-swingup", "seed=3"])  ->  a frozen Config

Hydra composes the groups of configs/ (one yaml for each choice); the dataclasses below hold every default,
type, range and meaning. To add a field, add ONE line to its class: `name: Type = default  # meaning, unit`.
What a person can get wrong raises ConfigError: one line that names the nearest valid key or value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml

from loopwm.schema import ConfigError, Matches, OneOf, Section, Within, build, leaves
from loopwm.words import compose_groups, split, unknown

Scalar = bool | int | float | str

# ------------------------------------------------------------------------------------------ what a value may be

# Far below int64, so that products of two are within it: what is beyond the memory ends in words (loopwm/memory.py).
MOST = 10**12
# (Two rules each, for their messages: "at least 1" of what is too small.)
Count = Annotated[int, Within(1), Within(1, MOST)]  # 1, 2, ...
Whole = Annotated[int, Within(0), Within(0, MOST)]  # 0, 1, 2, ...
Several = Annotated[int, Within(2), Within(2, MOST)]  # 2, 3, ...
Seed = Annotated[int, Within(0, 2**32 - 1)]  # what numpy takes
Threads = Annotated[int, Within(0, 1024)]  # torch dies of very many
Positive = Annotated[float, Within(0, open=True)]  # > 0
NonNegative = Annotated[float, Within(0)]  # >= 0
Fraction = Annotated[float, Within(0, 1, open=True)]  # in (0, 1)
Share = Annotated[float, Within(0, 1)]  # in [0, 1]
Suite = Annotated[str, OneOf(("dmc", "gym"))]
CONTROLS = ("single_pass", "stacked", "wide", "deep_thin")  # what iterates nothing
DynamicsName = Annotated[str, OneOf(("looped", *CONTROLS), open=True)]
DepthSampler = Annotated[str, OneOf(("fixed", "poisson", "lognormal_poisson", "uniform"))]
LoopMode = Annotated[str, OneOf(("certified", "lipsdp", "linear", "soft"))]
CERTIFIED = ("certified", "lipsdp")  # modes whose loop contracts
Block = Annotated[str, OneOf(("mlp", "conv", "rank"))]
GRID_BLOCKS = ("conv", "rank")
LayerOrder = Annotated[str, OneOf(("abab", "aabb"))]
Injection = Annotated[str, OneOf(("zoh", "euler", "additive"))]
LoopActivation = Annotated[str, OneOf(("relu", "tanh", "silu"))]
# not `gate`, which the agents train none of, nor `random`, a control with a random stream that no run would save
Halting = Annotated[str, OneOf(("residual", "fixed", "second_difference", "certified", "prediction"), open=True)]
ValueLoss = Annotated[str, OneOf(("auto", "huber", "two_hot"))]
Solver = Annotated[str, OneOf(("plain", "anderson"))]
Gradient = Annotated[str, OneOf(("unrolled", "implicit"))]
DEVICES = Matches(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")
Device = Annotated[str, DEVICES]


# ---------------------------------------------------------------------------------------------- the schema


@dataclass(frozen=True)
class TaskConfig(Section):
    """What is trained on; `task=SUITE/ID` on the command line sets both names."""

    SECTION: ClassVar[str] = "task"
    suite: Suite  # where the task comes from: DeepMind Control or Gymnasium
    id: str  # full name with its suite: dmc/<domain>-<task> or gym/<Gymnasium id>[?argument=value&...]
    action_repeat: Whole = 0  # env frames for one agent step; 0: the suite's own default

    def check(self) -> None:
        """The id has its suite's form."""
        forms = {"dmc": r"dmc/\w+(-\w+)+", "gym": r"gym/\S+"}
        if not self.id.startswith(f"{self.suite}/"):
            raise ConfigError(f"task.id={self.id!r}: not of suite {self.suite}; write task=SUITE/ID instead")
        if not re.fullmatch(forms[self.suite], self.id):
            known = "dmc/<domain>-<task> or gym/<Gymnasium id>[?argument=value&...]"
            raise ConfigError(f"task={self.id!r}: must be {known}")


@dataclass(frozen=True)
class EncoderConfig(Section):
    """obs -> latent z."""

    SECTION: ClassVar[str] = "encoder"
    name: Annotated[str, OneOf(("mlp", "grid"))] = "mlp"  # which encoder: of vectors, or of square grids cell by cell
    latent_dim: Several = 64  # Z, width of the latent z (of a grid in each cell), units
    hidden_dim: Count = 128  # width of a hidden layer, units
    layers: Count = 2  # layers from the observation to z, count
    side: Whole = 0  # S of a grid of S by S cells, count; 0: one number a cell


@dataclass(frozen=True)
class DynamicsConfig(Section):
    """(z, action) -> next z: the loop, or one of its controls with the same fields."""

    SECTION: ClassVar[str] = "dynamics"
    name: DynamicsName = "looped"  # the loop, a control (dynamics=NAME sets mode=linear too), or one's own MODULE:CLASS
    block: Block = "mlp"  # what is looped: mlp for vectors; conv, rank for grids (which encoder=grid chooses)
    hidden_dim: Count = 64  # D, width of the loop state h, units
    block_dim: Count = 128  # inner width of the block, units
    prelude_layers: Count = 1  # layers from (z, action) to the injected input, count
    block_layers: Count = 1  # layers in the shared block, count
    order: LayerOrder = "abab"  # loops apply the whole block in turn (abab), or each layer to its end (aabb)
    coda_layers: Count = 1  # layers from h to the step of z, count
    mean_loops: Count = 4  # mean depth of one prediction while training, loops
    max_loops: Count = 8  # most loops in one prediction, drawn in training or adaptive, loops
    min_loops: Count = 1  # fewest loops before a sample may stop when acting, loops
    depth_sampler: DepthSampler = "poisson"  # how training draws the depth
    mode: LoopMode = "certified"  # certified, lipsdp: the loop contracts; linear: its linear path; soft: by a penalty
    gamma: Fraction = 0.95  # share of the contraction margin the certified block may use, in (0, 1)
    injection: Injection = "zoh"  # how the prelude enters each loop
    activation: LoopActivation = "relu"  # of the block (rank has none); loops of relu alone run fused
    skip: bool = False  # a matrix on the loop state beside the block; not in mode certified
    halting: Halting = "residual"  # what stops a sample where no depth is asked for (plan_loops=0), or MODULE:CLASS
    halt_tolerance: Positive = 0.01  # its one number; certified: a distance, prediction: a return, else relative
    patience: Count = 1  # loops in a row for which the rule must hold, loops
    solver: Solver = "plain"  # what enters the next loop where no depth is asked for
    gradient: Gradient = "unrolled"  # back through every loop, or implicit: of the fixed point (certified modes only)

    def check(self) -> None:
        """min_loops and mean_loops lie within max_loops."""
        for name in ("mean_loops", "min_loops"):
            if getattr(self, name) > self.max_loops:
                most = f"dynamics.max_loops={self.max_loops}"
                raise ConfigError(f"dynamics.{name}={getattr(self, name)}: must be at most {most}")
        if self.min_loops > self.mean_loops:
            raise ConfigError(
                f"dynamics.min_loops={self.min_loops}: must be at most dynamics.mean_loops={self.mean_loops}"
            )
        for name, value in (("halting", "certified"), ("gradient", "implicit")):
            if getattr(self, name) == value and (self.name in CONTROLS or self.mode not in CERTIFIED):
                needed = "dynamics=looped" if self.name in CONTROLS else f"dynamics.mode={' or '.join(CERTIFIED)}"
                raise ConfigError(f"dynamics.{name}={value}: needs {needed}")
        if self.block == "rank" and self.block_dim % self.hidden_dim:
            needed = f"dynamics.block=rank needs a multiple of dynamics.hidden_dim={self.hidden_dim}"
            raise ConfigError(f"dynamics.block_dim={self.block_dim}: {needed}")
        if self.mode == "lipsdp" and self.activation == "silu":
            raise ConfigError("dynamics.activation=silu: dynamics.mode=lipsdp needs relu or tanh")
        if self.skip and self.mode == "certified":
            raise ConfigError("dynamics.skip=true: needs dynamics.mode=lipsdp, linear or soft")
        if self.gradient == "implicit" and self.order == "aabb":
            raise ConfigError("dynamics.order=aabb: dynamics.gradient=implicit needs dynamics.order=abab")


@dataclass(frozen=True)
class PlannerConfig(Section):
    """The planner agent: world model, policy prior, value ensemble, and planning at acting time."""

    SECTION: ClassVar[str] = "agent"
    name: Annotated[str, OneOf(("planner",))] = "planner"  # which agent
    policy_dim: Count = 128  # width of a hidden layer of the policy, units
    value_dim: Count = 128  # width of a hidden layer of a value network, units
    head_dim: Count = 64  # width of the hidden layer of the reward head, units; the continuation head has half
    activation: Annotated[str, OneOf(("relu", "silu"))] = "relu"  # of encoder, heads, policy and values
    horizon: Count = 3  # H, how far the model is unrolled in training, agent steps
    batch_size: Count = 128  # B, subsequences in one update of value and policy, count
    model_batch_size: Count = 64  # how many train the world model, and the policy by policy_horizon, count
    model_every: Count = 1  # updates of value and policy for one of the world model, count
    value_loss: ValueLoss = "auto"  # huber: a number; two_hot: a distribution; auto: huber for discrete actions alone
    value_loops: Whole = 0  # the value also reads the slow model's state after so many loops, loops; 0: it does not
    policy_every: Count = 2  # updates of the value for one of the policy (TD3's delay), count
    update_ratio: Positive = 1.0  # gradient updates for one agent step, count
    reset_every: Whole = 0  # distance between fresh starts of the networks, agent steps; 0: never
    reset_updates: Whole = 8000  # updates made at once from the replay after one, while nothing else happens, count
    learning_rate: Positive = 1e-3  # Adam's step size, no unit
    encoder_rate: Share = 1.0  # the encoder's part of that step, in [0, 1]
    clip_norm: Positive = 20.0  # largest norm of a gradient, no unit
    discount: Fraction = 0.99  # worth of the next agent step's return, no unit, in (0, 1)
    n_step: Count = 3  # rewards summed before the value target bootstraps, agent steps
    return_floor: Share = 0.0  # 1: no real value's target is below what its episode earned; less: that, lowered; 0: off
    imagined_steps: Whole = 0  # value (policy too, with no horizon) learns on latents imagined so far, agent steps
    priority: Share = 0.4  # a transition's priority is its value error to this power; 0: all are drawn alike
    tau: Share = 0.02  # part of the new weights the value and policy targets take per update, in [0, 1]
    model_tau: Share = 0.01  # the same for the slow world model, whose latents are predicted and acted on, in [0, 1]
    early_weight: NonNegative = 0.0  # weight of the model's losses at a random earlier loop, no unit (looped only)
    consistency_weight: NonNegative = 1.0  # weight of the latent consistency loss, no unit
    reward_weight: NonNegative = 0.2  # weight of the reward loss, no unit
    continuation_weight: NonNegative = 0.2  # weight of the continuation loss, no unit
    observation_weight: NonNegative = 0.0  # weight of the loss of the observation read off imagined latents, no unit
    jacobian_weight: NonNegative = 0.1  # weight of the penalty on the loop's Jacobian in mode soft, no unit
    policy_horizon: Whole = 3  # imagined steps that the policy's gradient goes through, agent steps; 0: the value's
    policy_std: NonNegative = 0.2  # noise on actions the policy learns by, action units (discrete: probability)
    policy_penalty: NonNegative = 4e-4  # weight of the squared pre-activations of the policy, no unit
    policy_penalty_kept: Share = 0.05  # part of it that is left after explore_decay_steps, in [0, 1]
    policy_switch_steps: Whole = 15_000  # before it the value's gradient alone, as with policy_horizon=0, agent steps
    policy_step_error: NonNegative = 0.3  # so too while a model's step errs by more than this share of it; 0: never
    smooth_std: NonNegative = 0.2  # spread of the noise on target actions, action units (discrete: smooth_share)
    smooth_clip: NonNegative = 0.3  # largest noise on target actions, action units
    smooth_share: Share = 0.0  # part of discrete target actions that random ones replace, in [0, 1]
    seed_steps: Whole = 1000  # random actions before learning starts, agent steps
    explore_std: NonNegative = 0.4  # first spread of the exploration noise, action units (discrete: probability)
    explore_std_final: NonNegative = 0.15  # its last spread, action units
    explore_decay_steps: Whole = 15_000  # agent steps from the first to the last spread
    explore_correlation: Share = 0.6  # correlation of the noise from step to step, in [0, 1]
    plan_samples: Whole = 256  # action sequences of a plan's first iteration, count; 0: the policy acts alone
    eval_samples: Whole = 64  # the most of them while evaluating, count
    plan_exhaustive: bool = False  # score all sequences of discrete actions instead, if no more than those, yes or no
    plan_iterations: Count = 1  # times a plan is fitted, count; after the first with a quarter of the samples
    plan_horizon: Count = 3  # how far a plan looks ahead, agent steps
    plan_std: Share = 1.0  # first spread of a plan around the policy, action units (discrete: share of uniform draws)
    plan_std_final: Share = 0.15  # its last spread, reached with explore_decay_steps, action units
    plan_correlation: Share = 0.0  # of the noise of drawn sequences from step to step, in [0, 1] (discrete: none)
    plan_loops: Whole = 4  # loops in each prediction while planning; 0: adaptive
    plan_policy_std: NonNegative = 0.2  # spread of the perturbed policy sequences of a plan, action units
    novelty_spread: NonNegative = 0.005  # of a plan's scores: so alike, exploring seeks new latents, return; 0: never
    novelty_hold: Count = 20  # for how long the action is held by which it seeks them, agent steps
    plan_collect: bool = True  # plan while collecting training data too, yes or no; no: the policy collects

    def check(self) -> None:
        """The world model's batch is part of the batch."""
        if self.model_batch_size > self.batch_size:
            most = f"agent.batch_size={self.batch_size}"
            raise ConfigError(f"agent.model_batch_size={self.model_batch_size}: must be at most {most}")

    def loss_of_values(self, discrete: bool) -> str:
        """``value_loss``, with ``auto`` as what it is for discrete actions or continuous ones."""
        return self.value_loss if self.value_loss != "auto" else "huber" if discrete else "two_hot"


@dataclass(frozen=True)
class ReplayConfig(Section):
    """Where experience is kept."""

    SECTION: ClassVar[str] = "replay"
    capacity: Count = 1_000_000  # most transitions kept, transitions; the oldest go first
    path: str = ""  # folder for memory-mapped data; empty: kept in memory


@dataclass(frozen=True)
class Config(Section):
    """Everything one run needs."""

    task: TaskConfig  # what is trained on
    encoder: EncoderConfig = field(default_factory=EncoderConfig)  # obs -> z
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)  # (z, action) -> next z
    agent: PlannerConfig = field(default_factory=PlannerConfig)  # who acts and learns
    replay: ReplayConfig = field(default_factory=ReplayConfig)  # where experience is kept
    seed: Seed = 0  # seed of everything random, 0 to 2^32 - 1
    frames: Count = 100_000  # length of the run, env frames (action repeat counted)
    num_envs: Count = 1  # N, environments stepped side by side, count
    workers: bool = False  # step each environment in its own process, yes or no
    run_dir: str = ""  # where the run is written; empty: runs/<task>-<dynamics>-s<seed>-<timestamp>
    resume: bool = False  # go on from run_dir's last checkpoint, yes or no
    eval_every: Count = 5000  # distance between evaluations, env frames
    eval_episodes: Count = 5  # episodes in one evaluation, count
    log_every: Count = 1000  # distance between log lines, env frames
    checkpoint_every: Count = 5000  # distance between checkpoints, env frames
    keep_checkpoints: Count = 2  # newest checkpoints kept, count; training can go on from the last two of them
    video_every: Whole = 0  # distance between evaluation videos, env frames; 0: one at the end only
    device: Device = "cpu"  # cpu, cuda, cuda:N, or auto: cuda where there is one; a CPU is faster for sizes up to base
    threads: Threads = 1  # torch's threads inside one operation, count; 0: torch's own choice, for size=large

    def check(self) -> None:
        """An earlier loop exists where it is trained; grids have a block for grids."""
        if self.agent.early_weight and (self.dynamics.name in CONTROLS or self.dynamics.gradient != "unrolled"):
            raise ConfigError("agent.early_weight: needs dynamics=looped and dynamics.gradient=unrolled")
        if (self.encoder.name == "grid") != (self.dynamics.block in GRID_BLOCKS):
            needed = "encoder=grid" if self.encoder.name == "mlp" else "dynamics.block=conv or rank"
            raise ConfigError(f"encoder={self.encoder.name}, dynamics.block={self.dynamics.block}: needs {needed}")
        if self.encoder.side and self.encoder.name != "grid":
            raise ConfigError("encoder.side: needs encoder=grid")
        if self.encoder.name == "grid" and self.agent.value_loops:
            raise ConfigError("agent.value_loops: needs encoder=mlp")


# ---------------------------------------------------------------------------------------------- in and out


def load_config(overrides: Iterable[str]) -> Config:
    """The config of a command line: `KEY=VALUE` words, groups and dotted keys, the last of two wins.

    Raises ConfigError.
    """
    choices, values = split(overrides, _keys())
    tree = compose_groups(choices)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return _built(tree)


def save_config(cfg: Config, path: str | os.PathLike[str]) -> None:
    """Write `cfg` as plain yaml, atomically; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(draft, path)


def _as_before(tree: object) -> object:
    """What a file says, with what its run did by fields that were not there yet, where their default is another."""
    if not isinstance(tree, dict) or not isinstance(tree.get("agent"), dict):
        return tree
    agent = tree["agent"]
    planned = {"eval_samples": agent["plan_samples"]} if "plan_samples" in agent else {}
    value_alone = {"policy_horizon": 0, "policy_std": 0.0, "policy_penalty_kept": 1.0, "policy_step_error": 0.0}
    value_alone |= {"policy_switch_steps": 0}  # nor later: what a file names of it was at once
    smoothed = agent.get("smooth_std", 0.2)  # the share too, and as one whatever was above it
    smoothed = min(smoothed, 1.0) if isinstance(smoothed, (int, float)) else 0.2
    always = {"priority": 0.0, "novelty_spread": 0.0, "value_loss": "two_hot", "smooth_share": smoothed}
    return tree | {"agent": always | value_alone | planned | agent}


def read_config(path: str | os.PathLike[str]) -> Config:
    """The config that save_config wrote. Fields the file lacks are as they were before they existed.

    That is their default, but for those of ``_as_before``. Raises ConfigError.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not utf-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}: not valid yaml" + (f" at line {mark.line + 1}" if mark else "")) from None
    try:
        return parse_config(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(tree: object) -> Config:
    """The config of nested dicts, as ``to_dict`` gives them, of now or of before: see ``read_config``.

    Raises ConfigError.
    """
    return _built(_as_before(tree))


def to_dict(cfg: Section) -> dict[str, Any]:
    """`cfg` as nested plain dicts."""
    return asdict(cfg)


def flatten(cfg: Section) -> dict[str, Scalar]:
    """`cfg` as one dict of dotted keys, such as TensorBoard's hparams want it."""
    flat: dict[str, Scalar] = {}
    for key, value in to_dict(cfg).items():
        leaves = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key}.{name}".rstrip("."): leaf for name, leaf in leaves}
    return flat


def _built(tree: object) -> Config:
    return build(Config, tree, lambda key: unknown(key, _keys()))


@cache
def _keys() -> tuple[str, ...]:
    """All dotted keys that hold a value."""
    return tuple(key for key, _, _ in leaves(Config))
