"""python -m loopwm.inspect: its figures on models whose answers are known, and every mistake in one line."""

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_tools import SWINGUP, forbid_filming, run

from agents import load_agent
from agents.export import main as export
from loopwm.dynamics import LoopedDynamics
from loopwm.inspect.__main__ import main, measure, write
from loopwm.inspect.measure import QUANTILES, SETTLED, SHOWN, depth_errors, settling, unexplained
from loopwm.inspect.run import Windows, draw_windows, load_run
from loopwm.training.checkpoint import CheckpointError
from loopwm.training.replay import Replay

WORDS = [*SWINGUP, "frames=1200", "eval_every=1200", "checkpoint_every=1200", "dynamics.mean_loops=3"]
FILES = {"inspect.png", "inspect.json", "inspect.md"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run directory, trained to the end. Not to be written into."""
    run_dir = tmp_path_factory.mktemp("inspect") / "run"
    with pytest.MonkeyPatch.context() as patch:
        forbid_filming(patch)
        assert run(run_dir, *WORDS) == 0
    return run_dir


def report(folder: Path) -> dict:
    """The JSON of a report whose three files are all there."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "inspect.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "inspect.json").read_text())


def test_report_of_a_looped_run(finished, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main([str(finished), "--out", str(tmp_path)]) == 0
    found, said = report(tmp_path), capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert found["task"] == "dmc/cartpole-swingup" and found["frames"] == 1200 and found["mean_loops"] == 3
    assert [row["depth"] for row in found["depths"]] == [1, 2, 3, 4, 6, 8, 16, 32, None]
    assert sum(found["chosen"]) == found["windows"] > 0
    assert 0.0 < found["settling"]["measured"] <= found["settling"]["bound"] < 1.0 and found["settling"]["settled"]
    assert len(found["horizon"]) == 3 and all(len(curve) == 20 for curve in found["horizon"].values())
    row = found["depths"][2]
    assert found["horizon"]["3 loops, the trained mean"][0] == row["latent, 1 ahead"] > 0.0
    assert f"| 3 | {row['latent, 1 ahead']:.4f} |" in said and f"{found['settling']['bound']:.3f}" in said
    assert (tmp_path / "inspect.md").read_text() == said.replace(str(tmp_path) + "/", "")


def test_the_model_is_the_one_the_agent_acts_by(finished):
    ours, theirs = load_run(finished).model.state_dict(), load_agent(finished)[0].slow_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_report_of_a_control_beside_the_run(tmp_path, monkeypatch, capsys):
    forbid_filming(monkeypatch)
    assert run(tmp_path / "x", *WORDS[:-1], "dynamics=stacked") == 0
    capsys.readouterr()
    assert main([str(tmp_path / "x")]) == 0
    found = report(tmp_path / "x" / "inspect")
    assert not found["looped"] and list(found["horizon"]) == ["stacked"] and "settling" not in found
    assert "| none |" in capsys.readouterr().out


@pytest.mark.parametrize("order, shares", [(2.0, [1.0, 0.6, 0.0]), (math.inf, [1.0, 0.75, 0.0])])
def test_settling_is_measured_in_the_norm_of_the_certificate(order, shares):
    """States of a grid that end at (3, 4), by way of (0, 0) and (3, 1): in which norm says how far that is."""
    way = torch.tensor([[0.0, 0.0], [3.0, 1.0], [3.0, 4.0]])
    dynamics = SimpleNamespace(mean_loops=4, frozen=nullcontext, cell=SimpleNamespace(norm_order=order))
    dynamics.trajectory = lambda z, action, loops: way[torch.arange(loops + 1).clamp_max(2)].view(-1, 1, 1, 1, 2)
    dynamics.lipschitz_bound = dynamics.measured_contraction = lambda *_: 0.9
    found = settling(dynamics, torch.zeros(1, 2), torch.zeros(1, 2))
    assert [share for _, share, _ in found["distance"][:3]] == pytest.approx(shares) and found["settled"]


def test_settling_stays_below_the_certificate():
    torch.manual_seed(0)
    dynamics, z, action = LoopedDynamics(8, 2, 16), torch.randn(64, 8), torch.randn(64, 2)
    found = settling(dynamics, z, action)
    distance = np.array(found["distance"])  # (SHOWN + 1, 3)
    assert distance.shape == (SHOWN + 1, len(QUANTILES)) and found["settled"]
    states = dynamics.trajectory(z, action, SETTLED)
    worst = (states[: SHOWN + 1] - states[-1]).norm(dim=-1).max(1).values.detach().numpy()  # (SHOWN + 1,)
    assert (worst <= worst[0] * found["bound"] ** np.arange(SHOWN + 1) + 1e-5).all()
    share = ((states[1] - states[-1]).norm(dim=-1) / states[-1].norm(dim=-1)).detach()
    assert distance[1] == pytest.approx(torch.quantile(share, torch.tensor(QUANTILES)).numpy(), rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["bounded", "overflows"])
def test_a_loop_that_does_not_settle_is_said_to(scale, finished, tmp_path, capsys):
    loaded = load_run(finished)
    cell = LoopedDynamics(8, 1, 8, mode="linear", block_dim=16, latent_norm=loaded.model.encoder.norm).cell
    with torch.no_grad():
        for weight in cell.parameters():
            weight.normal_(std=scale)
    loaded.model.dynamics.cell = cell
    found = measure(loaded)
    assert not found["settling"]["settled"] and not found["settling"]["bound"] < 1.0
    write(found, tmp_path)
    report(tmp_path)
    text = (tmp_path / "inspect.md").read_text()
    assert "does not come to rest" in text and "not certified" in text


def test_unexplained_variance():
    truth = torch.randn(100, 3)
    assert unexplained(truth, truth) == 0.0
    assert unexplained(truth.mean(0).expand_as(truth), truth) == pytest.approx(1.0)
    assert unexplained(torch.ones(5), torch.ones(5)) == 0.0
    assert unexplained(torch.zeros(5), torch.ones(5)) == math.inf
    assert math.isnan(unexplained(torch.full((5,), math.nan), truth[:5, 0]))
    assert math.isnan(unexplained(torch.full((5,), math.nan), torch.ones(5)))  # not an exact prediction


def test_depth_errors_ask_for_the_depth_they_name(finished):
    loaded = load_run(finished)
    data = draw_windows(loaded.replay, 16, (5,))
    rows = depth_errors(loaded.model, data, (2, None), (1, 5))
    z = loaded.model.encode(data.obs)
    imagined = loaded.model.rollout(z[0], data.action, 2)
    chosen = loaded.model.rollout(z[0], data.action).loops
    assert rows[0]["loops"] == 2.0 and rows[1]["loops"] == pytest.approx(float(chosen.double().mean()))
    assert rows[0]["latent, 5 ahead"] == pytest.approx(unexplained(imagined.z[5], z[5]))
    reward = loaded.model.predict(imagined.h)[0]
    assert rows[0]["reward, 5 ahead"] == pytest.approx(unexplained(reward[4], data.reward[4]))


def test_windows_lie_within_an_episode():
    replay = Replay(100, 1, 1, 1)
    for step in range(40):  # episodes of seven transitions and their last observation
        one = np.array([step % 8 == 7])
        replay.add(np.full((1, 1), step), np.full((1, 1), step), np.full(1, step), np.zeros(1, bool), one)
    data = draw_windows(replay, 50, (20, 5))
    assert isinstance(data, Windows) and data.obs.shape[0] == 6 and data.action.shape[0] == 5
    start = data.obs[0, :, 0]
    assert torch.equal(data.obs[:, :, 0] - start, torch.arange(6.0)[:, None].expand(-1, len(start)))
    assert ((start % 8) <= 2).all() and torch.equal(data.reward, data.action[:, :, 0])
    with pytest.raises(CheckpointError, match="no episode of 9 steps"):
        draw_windows(replay, 50, (20, 9))


# ---- mistakes -----------------------------------------------------------------------------------------


def complaint(capsys, *arguments: str | Path) -> str:
    """The one line of a command that failed."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured
    return captured.err


def test_not_a_run(finished, tmp_path, capsys):
    assert "not a run directory" in complaint(capsys, tmp_path)
    exported = tmp_path / "agent.safetensors"
    assert export([str(finished), str(exported)]) == 0
    capsys.readouterr()
    assert "not a run directory" in complaint(capsys, exported)
    assert "the following arguments are required" in complaint(capsys)


def test_broken_or_foreign_checkpoint(finished, tmp_path, capsys):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("  latent_dim: 8", "  latent_dim: 9"))
    assert "does not fit its config" in complaint(capsys, copy)
    (copy / "config.yaml").write_text(text)
    (copy / "checkpoints" / "00001200" / "state.pt").write_bytes(b"torn")
    assert "cannot be read" in complaint(capsys, copy)
    shutil.rmtree(copy / "checkpoints")
    assert "no complete checkpoint" in complaint(capsys, copy)


def saved(run_dir: Path, change) -> None:
    """Rewrite the newest checkpoint's state by ``change``."""
    path = run_dir / "checkpoints" / "00001200" / "state.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["agent"]["targets"]["model"][3:4].fill_(math.nan), "diverged"),
        (lambda state: state.pop("dims"), "does not fit its config"),
        (lambda state: state.update(dims=[1, 2]), "does not fit its config"),
        (lambda state: state.update(agent=[]), "does not fit its config"),
    ],
    ids=["no numbers", "no sizes", "two sizes", "no agent"],
)
def test_a_checkpoint_that_says_something_else(change, said, finished, tmp_path, capsys):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    saved(copy, change)
    assert said in complaint(capsys, copy)


def test_a_replay_without_anything(finished):
    with pytest.raises(CheckpointError, match="nothing yet"):
        draw_windows(Replay(100, 1, 1, 1), 5, (3,))


def test_a_trained_depth_beyond_the_picture(tmp_path, monkeypatch, capsys):
    forbid_filming(monkeypatch)
    assert run(tmp_path / "x", *WORDS[:-1], "dynamics.mean_loops=40", "dynamics.max_loops=64") == 0
    capsys.readouterr()
    assert main([str(tmp_path / "x")]) == 0
    assert len(report(tmp_path / "x" / "inspect")["settling"]["distance"]) == 41


def test_a_checkpoint_without_its_replay(finished, tmp_path, capsys):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints" / "replay")
    assert "cannot be read" in complaint(capsys, copy)


def test_a_folder_that_cannot_be_written(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in complaint(capsys, finished, "--out", tmp_path / "file" / "x")
