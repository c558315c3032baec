"""Parts of one's own: MODULE:CLASS in a config, from training to evaluation, and every mistake in one line."""

import json
import sys

import pytest
import torch
from training_tools import CARTPOLE, SWINGUP, forbid_filming, run, untimed

import evaluate
from agents import load_agent
from agents.export import main as export
from loopwm.build import make_world_model
from loopwm.config import ConfigError, load_config
from loopwm.dynamics import CertifiedHalting, LoopedDynamics

OWN = """
from contextlib import nullcontext

import torch
from loopwm.dynamics import DynamicsOutput, HaltingRule, LoopedDynamics


class GRU(torch.nn.Module):
    def __init__(self, latent_dim, action_dim, hidden_dim, latent_norm=None):
        super().__init__()
        self.state_dim, self.mean_loops, self.max_loops = hidden_dim, 1, 1
        self.start, self.end = torch.nn.Linear(latent_dim, hidden_dim), torch.nn.Linear(hidden_dim, latent_dim)
        self.cell, self.norm = torch.nn.GRUCell(action_dim, hidden_dim), latent_norm

    def forward(self, z, action, depth=None, h0=None):
        before = self.start(z) if h0 is None else h0
        h = self.cell(action, before)
        once = torch.ones(len(z), dtype=torch.int64, device=z.device)
        return DynamicsOutput(self.norm(z + self.end(h)), h, lambda: once, lambda: (h - before).norm(dim=-1).detach())

    def sample_depth(self, batch, generator=None):
        return 1

    def frozen(self):
        return nullcontext()

    def lipschitz_bound(self):
        return float("inf")

    def measured_contraction(self, z, action, loops=None):
        return float("nan")


class Twice(LoopedDynamics):
    pass


class Normed(GRU):
    def __init__(self, *sizes, latent_norm=None):
        super().__init__(*sizes, latent_norm=latent_norm)
        self.batch = torch.nn.BatchNorm1d(3)


class Wide(GRU):
    def __init__(self, *sizes, latent_norm=None, gamma=None, block_dim=None):
        super().__init__(*sizes, latent_norm=latent_norm)
        self.told = (gamma, block_dim)


class Needs(torch.nn.Module):
    def __init__(self, latent_dim, action_dim, hidden_dim, rope):
        super().__init__()


class Tensors(GRU):
    def forward(self, z, action, depth=None, h0=None):
        return z


class Short(GRU):
    def forward(self, z, action, depth=None, h0=None):
        out = super().forward(z, action, depth, h0)
        return DynamicsOutput(out.z_next[:, 1:], out.h, lambda: out.loops, lambda: out.residual)


class Narrow(GRU):
    def __init__(self, *sizes, latent_norm=None):
        super().__init__(*sizes, latent_norm=latent_norm)
        self.state_dim += 1


class AnswersFloats(HaltingRule):
    def __init__(self, tolerance):
        super().__init__()

    def __call__(self, h, previous):
        return torch.ones(len(h))


class AtTolerance(HaltingRule):
    sees_every_loop = True

    def __init__(self, tolerance):
        super().__init__()
        self.tolerance = tolerance

    def begin(self, dynamics, h, z):
        self.loops = 0
        return self

    def __call__(self, h, previous):
        self.loops += 1
        return torch.full((len(h),), self.loops >= self.tolerance, device=h.device)


class NoInterface(torch.nn.Module):
    def __init__(self, *sizes, **words):
        super().__init__()
        self.state_dim = sizes[2]


number = 3
"""

BROKEN = {
    "broken_syntax": "def",
    "broken_import": "import torch\ntorch.nothing_like_this",
    "broken_need": "import not_installed_thing",
    "broken_exit": "import sys\nsys.exit(0)",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN, encoding="utf-8")
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    forbid_filming(monkeypatch)


def test_dynamics_of_ones_own_train_resume_and_act(own, tmp_path, capsys):
    words = [*SWINGUP, "dynamics.name=own_parts:GRU", "eval_every=2000", "checkpoint_every=1000"]
    assert run(tmp_path / "whole", *words, "frames=3000") == 0
    assert run(tmp_path / "parts", *words, "frames=1000") == 0
    assert run(tmp_path / "parts", *words, "frames=3000", "resume=true") == 0
    last = [{k: v for k, v in untimed(tmp_path / name)[-1].items() if k != "frames"} for name in ("whole", "parts")]
    assert last[0] == last[1] and "eval/return" in last[0]
    agent, cfg, _ = load_agent(tmp_path / "whole")
    assert type(agent.slow_model.dynamics).__name__ == "GRU" and cfg.dynamics.name == "own_parts:GRU"
    export([str(tmp_path / "whole"), str(tmp_path / "gru.safetensors")])
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "gru.safetensors"), "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "dmc/cartpole-swingup"


def test_a_loop_of_ones_own_is_asked_for_its_depth(own, tmp_path, capsys):
    words = [*CARTPOLE, "dynamics.name=own_parts:Twice", "dynamics.halting=certified", "agent.plan_samples=8"]
    assert run(tmp_path / "x", *words, "frames=60", "eval_every=1000") == 0
    assert isinstance(load_agent(tmp_path / "x")[0].slow_model.dynamics.halting, CertifiedHalting)
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "x"), "--episodes", "1", "--loops", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loops"] == 3


def test_the_constructor_is_given_the_settings_that_it_names(own):
    words = ["task=dmc/walker-walk", "dynamics.name=own_parts:Wide", "dynamics.gamma=0.75", "dynamics.block_dim=24"]
    assert make_world_model(load_config(words), 24, 6).dynamics.told == (0.75, 24)


def test_what_is_no_loop_has_no_depth_to_choose(own, tmp_path, capsys):
    words = [*CARTPOLE, "dynamics.name=own_parts:GRU", "agent.plan_samples=8", "frames=60", "eval_every=1000"]
    assert run(tmp_path / "x", *words) == 0
    assert evaluate.main([str(tmp_path / "x"), "--episodes", "1", "--loops", "3"]) == 2
    assert "has no loop whose depth could be chosen" in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "x"), "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loops"] is None


def test_a_halting_rule_of_ones_own_takes_the_tolerance(own):
    words = ["task=dmc/walker-walk", "size=small", "dynamics.halting=own_parts:AtTolerance"]
    model = make_world_model(load_config([*words, "dynamics.halt_tolerance=5"]), 24, 6)
    assert model.dynamics(torch.randn(3, 64), torch.zeros(3, 6)).loops.tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("name=own_parts:", "did you mean"),
        ("name=own-parts:GRU", "one's own is MODULE:CLASS"),
        ("name=not_there:GRU", ": No module named 'not_there' (is its folder on PYTHONPATH?)"),
        ("name=own_parts:LSTM", ": own_parts has no LSTM"),
        ("name=own_parts:number", ": is no subclass of torch.nn.modules.module.Module"),
        ("name=own_parts:AtTolerance", ": TypeError: AtTolerance.__init__() takes 2 positional arguments"),
        ("name=os:system", ": os is a module of Python's own"),
        ("name=own_parts:NoInterface", ": lacks mean_loops (see loopwm.dynamics.Dynamics)"),
        ("name=own_parts:Normed", ": has a buffer, batch."),
        ("name=own_parts:Needs", "missing 1 required positional argument: 'rope'"),
        ("name=own_parts:Tensors", ": predicts a Tensor, not a loopwm.dynamics.DynamicsOutput"),
        ("name=own_parts:Short", ": z_next has the shape (2, 7), not (2, 8)"),
        ("name=own_parts:Narrow", ": h has the shape (2, 8), not (2, 9)"),
        ("name=broken_syntax:GRU", ": SyntaxError: "),
        ("name=broken_import:GRU", "nothing_like_this' ("),
        ("name=broken_need:GRU", ": ModuleNotFoundError: No module named 'not_installed_thing' ("),
        ("name=broken_exit:GRU", ": SystemExit: 0 ("),
        ("halting=own_parts:GRU", ": is no subclass of loopwm.dynamics.halting.rule.HaltingRule"),
        ("halting=own_parts:AnswersFloats", "a halting rule answers with a (2,) tensor of bool"),
        ("mode=own_parts:GRU", "did you mean"),  # no registry of classes
    ],
)
def test_parts_that_cannot_be_had_end_in_one_line(own, tmp_path, capsys, word, said):
    assert run(tmp_path / "x", *CARTPOLE, f"dynamics.{word}", "frames=100") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert error.startswith(f"train.py: dynamics.{word.partition('=')[0]}=") and error.count("dynamics.name=") <= 1
    assert not (tmp_path / "x" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("agent.early_weight=0.5", "agent.early_weight: needs a subclass of loopwm.dynamics.LoopedDynamics"),
        ("dynamics.halting=certified", "dynamics.halting=certified: own_parts:GRU takes no such setting"),
        ("dynamics.gradient=implicit", "dynamics.gradient=implicit: own_parts:GRU takes no such setting"),
    ],
)
def test_settings_that_ones_own_does_not_take_are_named(own, tmp_path, capsys, word, said):
    assert run(tmp_path / "x", *CARTPOLE, "dynamics.name=own_parts:GRU", word, "frames=100") == 2
    assert said in capsys.readouterr().err


def test_a_group_cannot_be_ones_own_but_its_name_can(capsys, tmp_path):
    assert run(tmp_path / "x", *CARTPOLE, "dynamics=own_parts:GRU") == 2
    assert "one's own is dynamics.name=own_parts:GRU" in capsys.readouterr().err


def test_a_saved_run_names_the_module_that_is_missing(own, tmp_path, monkeypatch):
    assert run(tmp_path / "x", *CARTPOLE, "dynamics.name=own_parts:GRU", "frames=60", "eval_every=1000") == 0
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_parts")
    with pytest.raises(ConfigError, match="No module named 'own_parts'"):
        load_agent(tmp_path / "x")


def test_rules_are_names_classes_or_rules():
    assert isinstance(LoopedDynamics(8, 2, 8, halting=CertifiedHalting).halting, CertifiedHalting)
    for wrong in (int, lambda h, previous: None, 3):
        with pytest.raises(TypeError, match="halting must be a name, a HaltingRule or a class"):
            LoopedDynamics(8, 2, 8, halting=wrong)
