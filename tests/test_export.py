"""An agent as one small file: acts as the run it came from, and a foreign file ends in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from training_tools import ROOT, SWINGUP, forbid_filming, run

import evaluate
from agents import export, load_agent, make_agent
from agents.export import read_exported, save_exported
from envs import make_vector_env
from loopwm.config import load_config, to_dict
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.rollout import rollout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run"
    with pytest.MonkeyPatch.context() as patch:
        forbid_filming(patch)
        assert run(path, *SWINGUP, "frames=800", "agent.plan_samples=16") == 0
    return path


@pytest.fixture(scope="module")
def file(run_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "agent.safetensors"
    assert export.main([str(run_dir), str(path)]) == 0
    return path


def test_an_exported_agent_is_of_one_frame(file):
    frames = load_agent(file)[2]
    assert load_agent(file, frames=frames)[2] == frames
    with pytest.raises(CheckpointError, match=f"no agent at frame {frames + 1}, but at {frames}"):
        load_agent(file, frames=frames + 1)


def test_an_exported_agent_acts_as_its_run_does(run_dir, file):
    (one, cfg, frames), (other, cfg_again, frames_again) = load_agent(run_dir), load_agent(file)
    assert cfg.run_dir and (dataclasses.replace(cfg, run_dir=""), frames) == (cfg_again, frames_again)
    assert one.budget == other.budget  # the spread of plans depends on how much it has explored
    obs = np.random.default_rng(0).normal(size=(3, one.obs_dim)).astype(np.float32)
    np.testing.assert_array_equal(one.evaluator().act(obs), other.evaluator().act(obs))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("loss", ["huber", "two_hot"])
def test_every_kind_of_agent_comes_back(discrete, loss, tmp_path):
    cfg = load_config(["task=dmc/x-y", f"agent.value_loss={loss}"])
    agent = make_agent(cfg, 24, 6, discrete)
    for part in (agent.slow_model, agent.policy, agent.value):  # a fresh one would be like it without being restored
        for parameter in part.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    agent.value.rescale(0.25)
    path = save_exported(tmp_path / "deep" / "x.safetensors", agent, cfg, 7)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it where they may read a file"
    assert path.stat().st_size < 1e6, "the default agent is meant to be small enough to ship"
    again, _, frames = load_agent(path)
    assert frames == 7 and again.discrete == discrete
    for part in ("slow_model", "policy", "value"):
        ours, theirs = getattr(agent, part).state_dict(), getattr(again, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_agents_that_are_shipped_act(path):
    agent, cfg, frames = load_agent(path)
    assert path.stem == cfg.task.id.removeprefix("dmc/") and frames == 100_000 and path.stat().st_size < 1e6
    result = rollout(agent, make_vector_env(cfg.task.id, 1), 1, seed=5)
    assert result.returns[0] > 500, "it was trained, and has forgotten"


def test_it_is_a_program_that_says_one_line(run_dir, tmp_path):
    words = [sys.executable, "-m", "agents.export", str(run_dir), str(tmp_path / "x.safetensors")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1


def test_it_is_evaluated_like_a_run(file, capsys):
    assert evaluate.main([str(file), "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "dmc/cartpole-swingup"


def says(arguments, capsys, main=evaluate.main) -> str:
    assert main([str(word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_foreign_and_broken_files_end_in_one_line(file, tmp_path, capsys):
    torn, foreign, other = (tmp_path / f"{name}.safetensors" for name in ("torn", "foreign", "other"))
    torn.write_bytes(file.read_bytes()[:500])
    save_file({"x": torch.zeros(2)}, foreign)
    tensors, said, cfg = read_exported(file)
    save_file(tensors | {"model.extra": torch.zeros(2)}, other, {k: json.dumps(v) for k, v in said.items()})
    for path in (torn, foreign, tmp_path / "none.safetensors"):
        assert "is not an agent that" in says([path], capsys)
    assert "does not fit" in says([other], capsys)
    for odd in ({"dims": [3, 1]}, {"frames": None}, {"acted": "x"}, {"dims": [3, -1, False]}, {"format": "loopwm-9"}):
        save_file(tensors, other, {k: json.dumps(v) for k, v in (said | odd).items()})
        assert "is not an agent that" in says([other], capsys)
    broken = to_dict(cfg) | {"frames": -1}
    save_file(tensors, other, {k: json.dumps(v) for k, v in (said | {"config": broken}).items()})
    assert "frames=-1" in says([other], capsys)


def test_what_cannot_be_exported_ends_in_one_line(run_dir, tmp_path, capsys):
    assert "ends in .safetensors" in says([run_dir, tmp_path / "x.pt"], capsys, export.main)
    assert "not a run directory" in says([tmp_path, tmp_path / "x.safetensors"], capsys, export.main)
    with pytest.raises(OSError, match="x.safetensors"):
        save_exported(Path("/proc/x.safetensors"), *load_agent(run_dir))
    with pytest.raises(CheckpointError, match="not an agent"):
        load_agent(tmp_path / "none.safetensors")
