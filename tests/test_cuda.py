"""On a GPU everything computes what it does on a CPU, stays there, and comes back. Skipped where there is none."""

import copy

import numpy as np
import pytest
import torch
from test_agents import HORIZON, KINDS, N, config, filled_replay, observations
from test_dynamics import A, D, generator, scramble
from torch import Tensor, nn
from training_tools import CARTPOLE, SWINGUP, run, untimed

import evaluate
from agents import load_agent, make_agent
from agents.planner import PlannerAgent
from benchmarks.grid_tasks import Sandpile
from benchmarks.lab import Recipe, load, predict_errors, train
from loopwm.dynamics import BLOCKS, DYNAMICS, GRADIENTS, HALTING, SOLVERS, LoopedDynamics
from loopwm.dynamics.cell import MODES

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LATENTS = {"mlp": (8,), "conv": (8, 5, 5), "rank": (8, 5, 5), "transformer": (4, 8)}
B = 6


def outcome(dynamics: nn.Module, z: Tensor, action: Tensor, depth) -> dict[str, Tensor]:
    """Prediction, state, loops, residual, and every gradient of both, on the CPU."""
    out = dynamics(z, action, depth)
    found = {"z": out.z_next, "h": out.h, "loops": out.loops, "residual": out.residual}
    if depth is not None:
        (out.z_next.square().sum() + out.h.square().sum()).backward()
        found |= {name: p.grad for name, p in dynamics.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in found.items()}


def agree(dynamics: nn.Module, latent: tuple[int, ...], depth) -> None:
    """The outcome on the device is that on the CPU."""
    scramble(dynamics, 0.3).double()
    z, action = torch.randn(B, *latent, generator=generator(1)).double(), torch.randn(B, A, generator=generator(2))
    there = copy.deepcopy(dynamics).to(DEVICE)
    here = outcome(dynamics, z, action.double(), depth)
    away = outcome(there, z.to(DEVICE), action.double().to(DEVICE), depth)
    assert here.keys() == away.keys()
    for name, value in here.items():
        torch.testing.assert_close(away[name], value, atol=1e-8, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("depth", [3, torch.tensor([1, 4, 2, 2, 5, 1]), None], ids=["int", "mixed", "adaptive"])
@pytest.mark.parametrize("block, mode", [(b, m) for b in LATENTS for m in MODES if m not in BLOCKS[b].lacks])
def test_every_block_and_mode(block, mode, depth):
    torch.manual_seed(0)
    agree(LoopedDynamics(8, A, D, block=block, block_dim=8, mode=mode), LATENTS[block], depth)


@pytest.mark.parametrize("mode", ["lipsdp", "linear"])
def test_a_skip(mode):
    torch.manual_seed(0)
    agree(LoopedDynamics(8, A, D, mode=mode, skip=True), LATENTS["mlp"], 3)


@pytest.mark.parametrize("name", [name for name in DYNAMICS if name != "looped"])
def test_every_control(name):
    torch.manual_seed(0)
    agree(DYNAMICS[name](8, A, D), (8,), 3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("halting", [name for name in HALTING if name != "random"])  # it draws on the device
def test_every_halting_rule_and_solver(halting, solver):
    torch.manual_seed(0)
    dynamics = LoopedDynamics(8, A, D, halting=halting, solver=solver, halt_tolerance=0.1)
    if halting == "prediction":
        dynamics.halting.read_off(lambda z, h: h[:, :3])
    agree(dynamics, (8,), None)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_gradient(gradient):
    torch.manual_seed(0)
    dynamics = LoopedDynamics(8, A, D, gradient=gradient, max_loops=100, halt_tolerance=1e-10)
    agree(dynamics, (8,), dynamics.sample_depth(B, generator()))


def tensors_of(agent: PlannerAgent):
    for name in ("world_model", "slow_model", "value", "value_target", "policy", "policy_target"):
        module = getattr(agent, name)
        yield from (*module.parameters(), *module.buffers())


@pytest.mark.parametrize(
    "settings", [{"value_loss": "two_hot"}, {"value_loss": "huber"}, {"value_loops": 2, "imagined_steps": 1}, HORIZON]
)
@KINDS
def test_an_agent_acts_learns_and_comes_back(discrete, settings, tmp_path):
    agent = make_agent(config(priority=0.4, plan_collect=True, **settings), 5, 3, discrete, torch.device(DEVICE))
    replay = filled_replay(discrete)
    for _ in range(4):
        action = agent.act(observations(), explore=True, first=np.zeros(N, bool))
        metrics = agent.update(replay)
    assert action.shape == ((N,) if discrete else (N, 3))
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert all(np.isfinite(value) for value in agent.diagnostics(replay).values())
    assert {x.device.type for x in tensors_of(agent)} == {DEVICE}
    saved = tmp_path / "agent.pt"
    torch.save(agent.state_dict(), saved)
    here = make_agent(config(priority=0.4, plan_collect=True, **settings), 5, 3, discrete, torch.device("cpu"))
    here.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
    a, b = (x.evaluator().act(observations(), explore=False, first=np.zeros(N, bool)) for x in (agent, here))
    assert a.shape == b.shape  # their plans have noise of their own
    obs = torch.as_tensor(observations())
    torch.testing.assert_close(here.encode(obs), agent.encode(obs.to(DEVICE)).cpu(), atol=1e-5, rtol=1e-4)
    here.update(replay)


@pytest.mark.parametrize("case", [SWINGUP, CARTPOLE], ids=["swingup", "cartpole"])
def test_two_halves_equal_the_whole(case, tmp_path):
    half, whole = (("frames=1000", "checkpoint_every=1000"), ("frames=2000", "checkpoint_every=1000"))
    anywhere = [*case, "eval_every=1000", "log_every=500", "agent.plan_samples=16"]
    words = [*anywhere, f"device={DEVICE}"]
    assert run(tmp_path / "a", *words, *whole) == 0
    assert run(tmp_path / "b", *words, *half) == 0
    assert run(tmp_path / "b", *words, *whole, "resume=true") == 0
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert evaluate.main([str(tmp_path / "a"), "--episodes", "1"]) == 0
    assert next(load_agent(tmp_path / "a")[0].world_model.parameters()).device.type == "cpu"
    assert run(tmp_path / "a", *anywhere, "device=cpu", "frames=3000", "resume=true") == 0


def test_the_laboratory_trains_there_and_is_read_here(tmp_path):
    task, recipe = Sandpile(), Recipe("looped", steps=48, hidden=8, loops=4)
    train(task, recipe, tmp_path, DEVICE)
    model = load(task, recipe, tmp_path)
    data = task.examples(8, task.trained, 3)
    here, away = predict_errors(task, model, data, 8), predict_errors(task, model.to(DEVICE), data, 8)
    assert torch.equal(here[0], away[0]) and torch.equal(here[1], away[1])
