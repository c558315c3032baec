"""The config: every mistake is one line that names the fix; what is built is frozen and survives a file."""

import ast
import dataclasses
import inspect
import io
import tokenize
from pathlib import Path
from typing import get_args

import pytest
import yaml

from benchmarks.ablations import CHANGES
from loopwm import config as config_module
from loopwm import dynamics
from loopwm.config import (
    Config,
    ConfigError,
    DynamicsConfig,
    EncoderConfig,
    PlannerConfig,
    ReplayConfig,
    TaskConfig,
    flatten,
    load_config,
    parse_config,
    read_config,
    save_config,
    to_dict,
)
from loopwm.training.run_dir import changed_settings
from loopwm.words import CONFIG_DIR

GROUP_OPTIONS = [(file.parent.name, file.stem) for file in sorted(CONFIG_DIR.glob("*/*.yaml"))]

MISTAKES = [
    # the words on the command line, and what the one line of error must contain
    (["sed=1"], "seed"),
    (["dynamics.mean_lops=4"], "dynamics.mean_loops"),
    (["agent.lerning_rate=1e-3"], "agent.learning_rate"),
    (["replay.size=5"], "replay."),
    (["mean_loops=4"], "dynamics.mean_loops"),
    (["hidden_dim=4"], "encoder.hidden_dim or dynamics.hidden_dim"),
    (["--seed=1"], "mean seed"),
    (["+seed=1"], "mean seed"),
    (["dynamic=looped"], "mean dynamics"),
    (["replay=5"], "replay.capacity"),
    (["dynamics.mean_loops.x=5"], "dynamics.mean_loops"),
    (["dynamics=loopd"], "mean looped"),
    (["dynamics=../task/dmc"], "valid: deep_thin, looped, single_pass, stacked, wide"),
    (["dynamics="], "valid: deep_thin, looped"),
    (["agent=planer"], "mean planner"),
    (["size=lrge"], "mean large"),
    (["dynamics.name=widee"], "mean wide"),
    (["dynamics=wide", "dynamics.halting=certified"], "dynamics.halting=certified: needs dynamics=looped"),
    (["dynamics=wide", "dynamics.mode=certified", "dynamics.halting=certified"], "certified: needs dynamics=looped"),
    (["dynamics=stacked", "dynamics.gradient=implicit"], "dynamics.gradient=implicit: needs dynamics=looped"),
    (["dynamics.halting=random"], "valid: residual"),
    (["dynamics.depth_sampler=poison"], "mean poisson"),
    (["dynamics.mode=certifed"], "mean certified"),
    (["dynamics.injection=zho"], "mean zoh"),
    (["dynamics.halting=residul"], "mean residual"),
    (["dynamics.halting=certified", "dynamics.mode=linear"], "dynamics.halting=certified: needs dynamics.mode=cert"),
    (["dynamics.skip=true"], "dynamics.skip=true: needs dynamics.mode=lipsdp"),
    (["dynamics.mode=lipsdp", "dynamics.activation=silu"], "dynamics.activation=silu: dynamics.mode=lipsdp needs relu"),
    (["encoder=grid", "dynamics.block_dim=50"], "dynamics.block_dim=50: dynamics.block=rank needs a multiple of"),
    (["encoder=grid", "size=small"], "needs a multiple of dynamics.hidden_dim=64"),
    (["dynamics.block=conv"], "encoder=mlp, dynamics.block=conv: needs encoder=grid"),
    (["encoder=grid", "dynamics.block=mlp"], "dynamics.block=mlp: needs dynamics.block=conv or rank"),
    (["encoder.side=8"], "encoder.side: needs encoder=grid"),
    (["encoder=grid", "agent.value_loops=1"], "agent.value_loops: needs encoder=mlp"),
    (["dynamics.gradient=implicit", "dynamics.order=aabb"], "needs dynamics.order=abab"),
    (["dynamics.gradient=implicit", "dynamics.mode=linear"], "dynamics.gradient=implicit: needs"),
    (["agent.batch_size=32"], "agent.model_batch_size=64: must be at most agent.batch_size=32"),
    (["threads=1000000000000"], "threads"),
    (["dynamics=wide", "agent.early_weight=1"], "agent.early_weight: needs dynamics=looped"),
    (["dynamics.gradient=implicit", "agent.early_weight=1"], "agent.early_weight: needs"),
    (["seed=abc"], "seed='abc': must be a whole number"),
    (["seed="], "whole number"),
    (["seed=true"], "whole number"),
    (["seed=-1"], "seed=-1"),
    (["frames=1.5"], "frames='1.5': must be a whole number"),
    (["frames=1e999"], "whole number"),
    (["frames=nan"], "whole number"),
    (["resume=maybe"], "true or false"),
    (["resume=1"], "true or false"),
    (["agent.learning_rate=fast"], "agent.learning_rate='fast': must be a number"),
    (["agent.learning_rate=nan"], "must be a number"),
    (["agent.learning_rate=inf"], "must be a number"),
    (["device=gpu"], "auto, cpu, cuda or cuda:N"),
    (["frames=0"], "at least 1"),
    (["frames=-5"], "at least 1"),
    (["num_envs=0"], "at least 1"),
    (["eval_every=0"], "at least 1"),
    (["video_every=-1"], "at least 0"),
    (["agent.batch_size=0"], "at least 1"),
    (["agent.learning_rate=0"], "above 0"),
    (["agent.discount=1"], "between 0 and 1"),
    (["agent.tau=1.1"], "between 0 and 1"),
    (["dynamics.gamma=1"], "between 0 and 1"),
    (["dynamics.gamma=0"], "between 0 and 1"),
    (["dynamics.halt_tolerance=-0.1"], "above 0"),
    (["replay.capacity=0"], "at least 1"),
    (["dynamics.mean_loops=9"], "at most dynamics.max_loops=8"),
    (["dynamics.min_loops=9"], "at most dynamics.max_loops=8"),
    (["dynamics.max_loops=3"], "dynamics.mean_loops=4"),
    (["seed"], "seed=..."),
    (["sede"], "seed=..."),
    ([""], "KEY=VALUE"),
    (["=1"], "unknown key"),
    (["two\nlines=1"], "unknown key"),
    (["task=mujoco/Hopper-v5"], "dmc, gym"),
    (["task=cartpole-swingup"], "dmc, gym"),
    (["dmc/cartpole-swingup"], "did you mean task=dmc/cartpole-swingup?"),
    (["gym/Hopper-v5?reset_noise_scale=0"], "did you mean task=gym/Hopper-v5?reset_noise_scale=0?"),
    (["task=gym/Hopper-v5?x=a b"], "[?argument=value&...]"),
    (["-m", "seed=0,1"], "KEY=VALUE words"),
    (["seed=0,1"], "seed"),
    (["task="], "dmc, gym"),
    (["task=dmc/"], "dmc/<domain>-<task>"),
    (["task=dmc/cartpole"], "dmc/<domain>-<task>"),
    (["task=gym/"], "gym/<Gymnasium id>"),
    (["task.id=gym/Hopper-v5"], "task=SUITE/ID"),
    (["task.suite=dm"], "mean dmc"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_that_names_the_fix(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(words)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_defaults_are_those_of_the_dataclasses() -> None:
    cfg = load_config([])
    assert cfg == Config(task=TaskConfig(suite="dmc", id="dmc/cartpole-swingup"))
    assert load_config(["size=base"]) == cfg


@pytest.mark.parametrize(("group", "option"), GROUP_OPTIONS)
def test_every_group_option_builds(group: str, option: str) -> None:
    """With every value of its file in place; some say something of other sections, under the name of theirs."""
    said = yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text())
    if not said.keys() & {"encoder", "dynamics", "agent"}:
        said = {group: said} if group != "size" else said
    cfg = to_dict(load_config([f"{group}={option}"]))
    assert {section: cfg[section] | values for section, values in said.items()} == {name: cfg[name] for name in said}


def test_a_config_from_before_priorities_is_read_as_what_its_run_did(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config([]), path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "priority" not in line))
    assert read_config(path).agent.priority == 0.0
    save_config(load_config([]), path)
    assert read_config(path).agent.priority == load_config([]).agent.priority > 0.0


def test_a_config_from_before_novelty_has_none(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config([]), path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "novelty" not in line))
    assert read_config(path).agent.novelty_spread == 0.0 < load_config([]).agent.novelty_spread


def test_a_config_from_before_the_gradient_switched_has_it_at_once(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config([]), path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "policy_switch" not in line))
    agent = read_config(path).agent
    assert agent.policy_switch_steps == 0 < load_config([]).agent.policy_switch_steps
    assert agent.policy_horizon == load_config([]).agent.policy_horizon > 0


def test_a_config_from_before_discrete_actions_had_a_share_of_their_own_has_the_spread_for_it(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    for spread, share in ((0.1, 0.1), (0.2, 0.2), (1.5, 1.0)):
        save_config(load_config([f"agent.smooth_std={spread}"]), path)
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "smooth_share" not in line))
        assert read_config(path).agent.smooth_share == share
    assert load_config([]).agent.smooth_share == 0.0


def test_a_config_from_before_values_could_be_numbers_has_distributions(tmp_path) -> None:
    tree = to_dict(load_config(["task=gym/CartPole-v1"]))
    assert parse_config(tree).agent.value_loss == "auto"
    del tree["agent"]["value_loss"]
    assert parse_config(tree).agent.value_loss == "two_hot"


def test_what_is_of_discrete_actions_alone_does_not_make_another_run_of_a_task_without_any() -> None:
    for task, changed in (("dmc/walker-walk", []), ("gym/CartPole-v1", ["value_loss", "smooth_share"])):
        new = load_config([f"task={task}"])
        tree = to_dict(new)
        del tree["agent"]["value_loss"], tree["agent"]["smooth_share"]
        found = [line.split("=")[0] for line in changed_settings(parse_config(tree), new)]
        assert found == [f"agent.{name}" for name in changed]
    assert changed_settings(load_config(["agent.value_loss=huber"]), load_config([]))
    other = changed_settings(load_config(["task=gym/CartPole-v1"]), load_config([]))
    assert [line.split("=")[0] for line in other] == ["task.suite", "task.id"]  # and nothing that nobody changed


def test_a_dict_from_before_is_read_as_a_file_from_before_is() -> None:
    tree = to_dict(load_config(["agent.plan_samples=200", "agent.eval_samples=10"]))
    assert parse_config(tree) == load_config(["agent.plan_samples=200", "agent.eval_samples=10"])
    del tree["agent"]["eval_samples"], tree["agent"]["priority"]
    assert (parse_config(tree).agent.eval_samples, parse_config(tree).agent.priority) == (200, 0.0)


def test_a_config_from_before_evaluations_had_a_budget_of_their_own_keeps_its_own(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config(["agent.plan_samples=200"]), path)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "eval_samples" not in line))
    assert read_config(path).agent.eval_samples == 200


def test_the_fast_agent_is_the_planner_with_fewer_updates_of_the_model() -> None:
    fast, default = load_config(["agent=fast"]).agent, load_config([]).agent
    assert fast.name == default.name == "planner" and fast.model_every > default.model_every


def test_a_config_from_before_the_gradient_through_the_model_climbs_the_value(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config([]), path)
    lines = path.read_text().splitlines(True)
    path.write_text("".join(x for x in lines if not x.strip().startswith("policy_") or "policy_dim" in x))
    at_once = load_config([*CHANGES["value_gradient"], "agent.policy_switch_steps=0"])
    assert read_config(path).agent == at_once.agent != load_config([]).agent


@pytest.mark.parametrize(
    ("word", "suite", "task_id"),
    [
        ("task=dmc/walker-walk", "dmc", "dmc/walker-walk"),
        ("task=dmc/ball_in_cup-catch", "dmc", "dmc/ball_in_cup-catch"),
        ("task=dmc/finger-turn-easy", "dmc", "dmc/finger-turn-easy"),
        ("task=gym/CartPole-v1", "gym", "gym/CartPole-v1"),
        ("task=gym/ALE/Pong-v5", "gym", "gym/ALE/Pong-v5"),
    ],
)
def test_task_names_any_environment(word: str, suite: str, task_id: str) -> None:
    task = load_config([word]).task
    assert (task.suite, task.id) == (suite, task_id)


def test_values_of_the_command_line_get_their_types() -> None:
    words = ["task=dmc/cartpole-swingup", "agent=planner", "dynamics=looped", "seed=3", "frames=1e5"]
    words += ["run_dir=runs/x", "resume=true", "num_envs=2", "eval_every=5_000", "dynamics.mean_loops=4.0"]
    cfg = load_config([*words, "agent.horizon=5", "agent.learning_rate=1e-3"])
    assert (cfg.seed, cfg.frames, cfg.run_dir, cfg.resume, cfg.num_envs) == (3, 100_000, "runs/x", True, 2)
    assert (cfg.eval_every, cfg.dynamics.mean_loops, cfg.agent.learning_rate) == (5000, 4, 1e-3)
    assert all(type(value) is int for value in (cfg.frames, cfg.dynamics.mean_loops, cfg.agent.horizon))


@pytest.mark.parametrize("text", ["a b", "a=b", "${HOME}", "{x: 1}", "[1]", "'q'", "true", "12", ""])
def test_text_is_taken_as_it_is(text: str, tmp_path: Path) -> None:
    cfg = load_config([f"run_dir={text}"])
    assert cfg.run_dir == text
    save_config(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == cfg


def test_a_value_wins_over_a_group_and_the_last_word_wins() -> None:
    cfg = load_config(["dynamics.hidden_dim=7", "size=large", "seed=1", "size=small", "seed=2"])
    assert (cfg.dynamics.hidden_dim, cfg.encoder.latent_dim, cfg.seed) == (7, 64, 2)


def test_frozen() -> None:
    cfg = load_config([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 1
    for section in (cfg.task, cfg.encoder, cfg.dynamics, cfg.agent, cfg.replay):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, "x")


@pytest.mark.parametrize(
    "make",
    [
        lambda: DynamicsConfig(mean_loops=9),
        lambda: DynamicsConfig(gamma=1.0),
        lambda: PlannerConfig(batch_size=0),
        lambda: EncoderConfig(layers="two"),
        lambda: ReplayConfig(capacity=True),
        lambda: dataclasses.replace(load_config([]), frames=0),
        lambda: Config(task="dmc/cartpole-swingup"),
    ],
)
def test_made_in_code_it_is_checked_too(make) -> None:
    with pytest.raises(ConfigError):
        make()


def test_saved_and_read_back_it_is_equal(tmp_path: Path) -> None:
    cfg = load_config(
        ["task=gym/CartPole-v1", "dynamics=wide", "size=large", "agent.learning_rate=1e-05", "resume=true"]
    )
    path = tmp_path / "new" / "config.yaml"
    save_config(cfg, path)
    assert read_config(path) == cfg
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]  # the draft is gone
    assert yaml.safe_load(path.read_text()) == to_dict(cfg)


def test_a_saved_config_may_lack_fields_that_were_added_later(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("task: {suite: dmc, id: dmc/walker-walk}\nframes: 1e5\n")
    assert read_config(path).agent == PlannerConfig()
    assert read_config(path).frames == 100_000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree.update(sed=1), "seed"),
        (lambda tree: tree["dynamics"].update(mean_lops=1), "dynamics.mean_loops"),
        (lambda tree: tree.update({3: 1}), "unknown key"),
        (lambda tree: tree.update(seed="abc"), "whole number"),
        (lambda tree: tree.update(seed=None), "whole number"),
        (lambda tree: tree.update(seed=[1]), "whole number"),
        (lambda tree: tree.update(resume=1), "true or false"),
        (lambda tree: tree.update(run_dir=3), "text"),
        (lambda tree: tree["agent"].update(learning_rate=True), "number"),
        (lambda tree: tree["dynamics"].update(mean_loops=9), "dynamics.max_loops"),
        (lambda tree: tree["dynamics"].update(name="loopd"), "looped"),
        (lambda tree: tree.update(dynamics="looped"), "dynamics must be a mapping"),
        (lambda tree: tree["task"].pop("id"), "task.id is missing"),
        (lambda tree: tree.pop("task"), "task is missing"),
        (lambda tree: tree.clear(), "task is missing"),
    ],
)
def test_a_broken_saved_config_is_one_line(change, expected: str, tmp_path: Path) -> None:
    tree = to_dict(load_config([]))
    change(tree)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    _assert_unreadable(path, expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed: [1", "not valid yaml at line"),
        (b"", "mapping"),
        (b"- 1", "mapping"),
        (b"seed: 2026-13-45", "not valid yaml"),
        (b"seed: !!python/object/apply:os.getcwd []", "not valid yaml"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    _assert_unreadable(path, expected)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    _assert_unreadable(tmp_path / "config.yaml", "No such file")


def _assert_unreadable(path: Path, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path)) and len(message.splitlines()) == 1


def test_a_group_chosen_by_its_name_is_the_group():
    for control in ("single_pass", "stacked", "wide", "deep_thin"):
        one, other = load_config([f"dynamics={control}"]), load_config([f"dynamics.name={control}"])
        assert one == other and one.dynamics.mode == "linear"
    assert load_config(["dynamics.name=wide", "dynamics.mode=certified"]).dynamics.mode == "certified"


def test_a_name_beside_the_choice_of_its_group():
    """It is that of the option, or one of the two is wrong: the option sets more than the name."""
    for words in (["agent=fast", "agent.name=planner"], ["agent.name=planner", "agent=fast"]):
        assert load_config(words).agent.model_every == load_config(["agent=fast"]).agent.model_every == 4
    for words in (["dynamics=looped", "dynamics.name=stacked"], ["dynamics.name=looped", "dynamics=single_pass"]):
        with pytest.raises(ConfigError, match="choose one of them, by dynamics=NAME"):
            load_config(words)


def test_the_words_of_the_loop_are_its_registries():
    """Settings may not import torch, so these are spelt out twice."""
    offered = {
        config_module.LoopMode: dynamics.MODES,
        config_module.DynamicsName: dynamics.DYNAMICS,
        config_module.DepthSampler: dynamics.DEPTH_SAMPLERS,
        config_module.LayerOrder: dynamics.ORDERS,
        config_module.Solver: dynamics.SOLVERS,
        config_module.Gradient: dynamics.GRADIENTS,
    }
    for setting, registry in offered.items():
        assert set(get_args(setting)[1].words) == set(registry)
    assert {name for name, mode in dynamics.MODES.items() if mode.certified} == set(config_module.CERTIFIED)
    assert load_config(["dynamics.mode=lipsdp", "dynamics.halting=certified"]).dynamics.mode == "lipsdp"


def test_flatten_gives_scalars_by_dotted_keys() -> None:
    cfg = load_config(["dynamics.mean_loops=3"])
    flat = flatten(cfg)
    assert flat["dynamics.mean_loops"] == 3 and flat["seed"] == 0 and flat["task.id"] == "dmc/cartpole-swingup"
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert load_config([f"{key}={value}" for key, value in flat.items()]) == cfg


def test_loading_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    load_config(["seed=1"])
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_every_field_says_what_it_means() -> None:
    source = inspect.getsource(config_module)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    code_lines = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)}
    seen = 0
    for cls in ast.walk(ast.parse(source)):
        if not (isinstance(cls, ast.ClassDef) and any(ast.unparse(base) == "Section" for base in cls.bases)):
            continue
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                above = node.lineno - 1  # a comment on a line of its own counts for the field under it
                text = comments.get(node.end_lineno) or (above not in code_lines and comments.get(above)) or ""
                assert len(text) > 5, f"{cls.name}.{ast.unparse(node.target)} has no comment"
                seen += 1
    sections = (TaskConfig, EncoderConfig, DynamicsConfig, PlannerConfig, ReplayConfig, Config)
    assert seen == sum(len(dataclasses.fields(section)) for section in sections)
