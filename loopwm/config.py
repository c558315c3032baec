"""The typed schema that configs/ fills, and the only door to it.

    load_config(["task=dmc/cartpole-swingup", "seed=3"])  ->  a frozen Config

Hydra composes the groups of configs/ (one yaml for each choice); the dataclasses below hold every default,
type, range and meaning. To add a field, add ONE line to its class: `name: Type = default  # meaning, unit`.
What a person can get wrong raises ConfigError: one line that names the nearest valid key or value.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_type_hints

import yaml

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"

Scalar = bool | int | float | str
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
    """One of a few words."""

    words: tuple[str, ...]

    def complaint(self, value: str) -> str | None:
        """What is wrong with `value`, or None."""
        return None if value in self.words else _not_among(value, self.words)


class Matches(NamedTuple):
    """A text of a certain form; `form` says it in words."""

    regex: str
    form: str

    def complaint(self, value: str) -> str | None:
        """What is wrong with `value`, or None."""
        return None if re.fullmatch(self.regex, value) else f"must be {self.form}"


Count = Annotated[int, Within(1)]  # 1, 2, ...
Whole = Annotated[int, Within(0)]  # 0, 1, 2, ...
Seed = Annotated[int, Within(0, 2**32 - 1)]  # what numpy takes
Threads = Annotated[int, Within(0, 1024)]  # torch dies of very many
Positive = Annotated[float, Within(0, open=True)]  # > 0
NonNegative = Annotated[float, Within(0)]  # >= 0
Fraction = Annotated[float, Within(0, 1, open=True)]  # in (0, 1)
Share = Annotated[float, Within(0, 1)]  # in [0, 1]
Suite = Annotated[str, OneOf(("dmc", "gym"))]
DynamicsName = Annotated[str, OneOf(("looped", "single_pass", "stacked", "wide", "deep_thin"))]
DepthSampler = Annotated[str, OneOf(("fixed", "poisson", "lognormal_poisson", "uniform"))]
LoopMode = Annotated[str, OneOf(("certified", "linear", "soft"))]
LayerOrder = Annotated[str, OneOf(("abab", "aabb"))]
Injection = Annotated[str, OneOf(("zoh", "euler", "additive"))]
# not `gate`, which the agents train none of, nor `random`, a control with a random stream that no run would save
Halting = Annotated[str, OneOf(("residual", "fixed", "second_difference", "certified", "prediction"))]
Solver = Annotated[str, OneOf(("plain", "anderson"))]
Gradient = Annotated[str, OneOf(("unrolled", "implicit"))]
Device = Annotated[str, Matches(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")]


# ---------------------------------------------------------------------------------------------- the schema


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


@dataclass(frozen=True)
class TaskConfig(Section):
    """What is trained on; `task=SUITE/ID` on the command line sets both names."""

    SECTION: ClassVar[str] = "task"
    suite: Suite  # where the task comes from: DeepMind Control or Gymnasium
    id: str  # full name with its suite: dmc/<domain>-<task> or gym/<registered Gymnasium id>
    action_repeat: Whole = 0  # env frames for one agent step; 0: the suite's own default

    def check(self) -> None:
        """The id has its suite's form."""
        forms = {"dmc": r"dmc/\w+(-\w+)+", "gym": r"gym/\S+"}
        if not self.id.startswith(f"{self.suite}/"):
            raise ConfigError(f"task.id={self.id!r}: not of suite {self.suite}; write task=SUITE/ID instead")
        if not re.fullmatch(forms[self.suite], self.id):
            raise ConfigError(f"task={self.id!r}: must be dmc/<domain>-<task> or gym/<Gymnasium id>")


@dataclass(frozen=True)
class EncoderConfig(Section):
    """obs -> latent z."""

    SECTION: ClassVar[str] = "encoder"
    name: Annotated[str, OneOf(("mlp",))] = "mlp"  # which encoder
    latent_dim: Annotated[int, Within(2)] = 64  # Z, width of the latent z, units
    hidden_dim: Count = 128  # width of a hidden layer, units
    layers: Count = 2  # layers from the observation to z, count


@dataclass(frozen=True)
class DynamicsConfig(Section):
    """(z, action) -> next z: the loop, or one of its controls with the same fields."""

    SECTION: ClassVar[str] = "dynamics"
    name: DynamicsName = "looped"  # the loop, or a control to compare it with, whose choice sets mode=linear too
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
    mode: LoopMode = "certified"  # certified: the loop contracts; linear: as published; soft: linear with a penalty
    gamma: Fraction = 0.95  # share of the contraction margin the certified block may use, in (0, 1)
    injection: Injection = "zoh"  # how the prelude enters each loop
    halting: Halting = "residual"  # rule by which a sample stops where no depth is asked for, as with plan_loops=0
    halt_tolerance: Positive = 0.01  # its one number; certified: a distance, prediction: a reward, else relative
    patience: Count = 1  # loops in a row for which the rule must hold, loops
    solver: Solver = "plain"  # what enters the next loop where no depth is asked for
    gradient: Gradient = "unrolled"  # back through every loop, or implicit: of the fixed point (certified mode only)

    def check(self) -> None:
        """min_loops and mean_loops lie within max_loops."""
        for name in ("mean_loops", "min_loops"):
            if getattr(self, name) > self.max_loops:
                most = f"dynamics.max_loops={self.max_loops}"
                raise ConfigError(f"dynamics.{name}={getattr(self, name)}: must be at most {most}")
        for name, value in (("halting", "certified"), ("gradient", "implicit")):
            if getattr(self, name) == value and self.name != "looped":
                raise ConfigError(f"dynamics.{name}={value}: needs dynamics=looped")
        if self.min_loops > self.mean_loops:
            raise ConfigError(
                f"dynamics.min_loops={self.min_loops}: must be at most dynamics.mean_loops={self.mean_loops}"
            )
        for name, value in (("halting", "certified"), ("gradient", "implicit")):
            if getattr(self, name) == value and self.mode != "certified":
                raise ConfigError(f"dynamics.{name}={value}: needs dynamics.mode=certified")
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
    model_batch_size: Count = 64  # how many of them train the world model, count
    model_every: Count = 1  # updates of value and policy for one of the world model, count
    value_loss: Annotated[str, OneOf(("huber", "two_hot"))] = "two_hot"  # a value is a number, or a distribution
    value_loops: Whole = 0  # the value also reads the slow model's state after so many loops, loops; 0: it does not
    policy_every: Count = 2  # updates of the value for one of the policy (TD3's delay), count
    update_ratio: Positive = 1.0  # gradient updates for one agent step, count
    learning_rate: Positive = 1e-3  # Adam's step size, no unit
    clip_norm: Positive = 20.0  # largest norm of a gradient, no unit
    discount: Fraction = 0.99  # worth of the next agent step's return, no unit, in (0, 1)
    n_step: Count = 3  # rewards summed before the value target bootstraps, agent steps
    imagined_steps: Whole = 0  # value and policy also learn on latents imagined 1 .. this many ahead, agent steps
    priority: Share = 0.4  # a transition's priority is its value error to this power; 0: all are drawn alike
    tau: Share = 0.02  # part of the new weights the value and policy targets take per update, in [0, 1]
    model_tau: Share = 0.01  # the same for the slow world model, whose latents are predicted and acted on, in [0, 1]
    early_weight: NonNegative = 0.0  # weight of the model's losses at a random earlier loop, no unit (looped only)
    consistency_weight: NonNegative = 1.0  # weight of the latent consistency loss, no unit
    reward_weight: NonNegative = 0.2  # weight of the reward loss, no unit
    continuation_weight: NonNegative = 0.2  # weight of the continuation loss, no unit
    jacobian_weight: NonNegative = 0.1  # weight of the penalty on the loop's Jacobian in mode soft, no unit
    policy_penalty: NonNegative = 4e-4  # weight of the squared pre-activations of the policy, no unit
    smooth_std: NonNegative = 0.2  # spread of the noise on target actions, action units (discrete: probability)
    smooth_clip: NonNegative = 0.3  # largest noise on target actions, action units
    seed_steps: Whole = 1000  # random actions before learning starts, agent steps
    explore_std: NonNegative = 0.4  # first spread of the exploration noise, action units (discrete: probability)
    explore_std_final: NonNegative = 0.15  # its last spread, action units
    explore_decay_steps: Whole = 15_000  # agent steps from the first to the last spread
    explore_correlation: Share = 0.6  # correlation of the noise from step to step, in [0, 1]
    plan_samples: Whole = 256  # action sequences per planning iteration, count; 0: the policy acts alone
    eval_samples: Whole = 64  # the most of them while evaluating, count
    plan_iterations: Count = 1  # refinements of the plan for one action, count
    plan_horizon: Count = 3  # how far a plan looks ahead, agent steps
    plan_std: Share = 1.0  # first spread of a plan around the policy, action units (discrete: share of uniform draws)
    plan_std_final: Share = 0.15  # its last spread, reached with explore_decay_steps, action units
    plan_loops: Whole = 4  # loops in each prediction while planning; 0: adaptive
    plan_policy_std: NonNegative = 0.2  # spread of the perturbed policy sequences of a plan, action units
    plan_collect: bool = True  # plan while collecting training data too, yes or no; no: the policy collects

    def check(self) -> None:
        """The world model's batch is part of the batch."""
        if self.model_batch_size > self.batch_size:
            most = f"agent.batch_size={self.batch_size}"
            raise ConfigError(f"agent.model_batch_size={self.model_batch_size}: must be at most {most}")


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
    video_every: Whole = 0  # distance between evaluation videos, env frames; 0: one at the end only
    device: Device = "cpu"  # cpu, cuda, cuda:N, or auto: cuda where there is one; a CPU is faster for sizes up to base
    threads: Threads = 0  # torch's threads inside one operation, count; 0: leave torch's own choice

    def check(self) -> None:
        """An earlier loop exists where it is trained."""
        if self.agent.early_weight and (self.dynamics.name != "looped" or self.dynamics.gradient != "unrolled"):
            raise ConfigError("agent.early_weight: needs dynamics=looped and dynamics.gradient=unrolled")


# ---------------------------------------------------------------------------------------------- in and out


def load_config(overrides: Iterable[str]) -> Config:
    """The config of a command line: `KEY=VALUE` words, groups and dotted keys, the last of two wins.

    Raises ConfigError.
    """
    choices, values = _split(overrides)
    tree = _compose(choices)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return _build(Config, tree)


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
    return tree | {"agent": {"priority": 0.0} | planned | agent}


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
    return _build(Config, _as_before(tree))


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


# ---------------------------------------------------------------------------------------------- the inside


def _split(overrides: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Command-line words -> group choices {group: option} and values {dotted key: text}, names checked."""
    choices: dict[str, str] = {}
    values: dict[str, str] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            near = key if key in _keys() or key in groups() else _nearest(key, (*_keys(), *groups()))
            raise ConfigError(f"{word!r} is not KEY=VALUE: did you mean {near}=...?")
        if key == "task":
            choices[key], slash, _ = text.partition("/")
            if choices[key] not in groups()[key]:
                suites = _words(groups()[key])
                raise ConfigError(f"task={text!r}: unknown suite, valid are {suites}; write task=SUITE/ID")
            if slash:
                values["task.id"] = text
        elif key in groups():
            choices[key] = text
            if text not in groups()[key]:
                raise ConfigError(f"{key}={text!r}: {_not_among(text, groups()[key])}")
        elif key.endswith(".name") and text in groups().get(key.removesuffix(".name"), ()):
            choices[key.removesuffix(".name")] = text  # which may set more than the name, as for a control its mode
        elif key in _keys():
            values[key] = text
        else:
            raise _unknown(key)
    return choices, values


_COMPOSING = threading.Lock()  # Hydra keeps what it composes with in a global


def _compose(choices: Mapping[str, str]) -> dict[str, Any]:
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


def _build(cls: type[T], tree: object) -> T:
    """Nested dicts -> a checked section; unknown and missing keys are errors."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{cls.SECTION or 'the config'} must be a mapping of keys to values, not {tree!r}")
    kinds = _kinds(cls)
    for key in tree:
        if key not in kinds:
            raise _unknown(_join(cls.SECTION, str(key)))
    for item in fields(cls):
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in tree:
            raise ConfigError(f"{_join(cls.SECTION, item.name)} is missing")
    return cls(**{key: _build(kinds[key], v) if _is_section(kinds[key]) else v for key, v in tree.items()})


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


def _unknown(key: str) -> ConfigError:
    """The error for a key that does not exist, or that is a section."""
    inside = [known for known in _keys() if known.startswith(f"{key}.")]
    if inside:
        return ConfigError(f"{key} is a section, not a value: set one of {_words(inside)}")
    twins = [known for known in _keys() if _last(known) == _last(key)]  # right name, wrong section
    near = " or ".join(twins) or _nearest(key, (*_keys(), *groups()))
    return ConfigError(f"unknown key {key!r}: did you mean {near}?")


def _not_among(word: str, words: Iterable[str]) -> str:
    words = tuple(words)
    return f"did you mean {_nearest(word, words)}? (valid: {_words(words)})"


def _nearest(key: str, known: Iterable[str]) -> str:
    """The name in `known` most like `key`, by the whole name and by its last part."""

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, key.lower(), name).ratio()
        last = difflib.SequenceMatcher(None, _last(key.lower()), _last(name)).ratio()
        return whole + last

    return max(known, key=likeness)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _words(words: Iterable[str]) -> str:
    return ", ".join(words)


def section_of(cls: type[Section], name: str) -> type[Section] | None:
    """The section that the field ``name`` of a section is; None for a value."""
    kind = _kinds(cls)[name]
    return kind if _is_section(kind) else None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


@cache
def _kinds(cls: type[Section]) -> dict[str, Any]:
    """Field name -> its annotated type."""
    hints = get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in fields(cls)}


@cache
def _keys() -> tuple[str, ...]:
    """All dotted keys that hold a value."""
    return tuple(
        key
        for name, kind in _kinds(Config).items()
        for key in ([f"{name}.{leaf}" for leaf in _kinds(kind)] if _is_section(kind) else [name])
    )


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """The groups of configs/ and their options: one folder a group, one yaml file an option."""
    if not CONFIG_DIR.is_dir():
        raise ConfigError(f"{CONFIG_DIR} is missing: install from a checkout with `pip install -e .`")
    folders = sorted(folder for folder in CONFIG_DIR.iterdir() if folder.is_dir())
    return {folder.name: tuple(sorted(file.stem for file in folder.glob("*.yaml"))) for folder in folders}
