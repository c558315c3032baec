"""benchmarks.stability: its estimates against dense algebra and closed forms, and the whole command, tiny."""

import json
import math

import pytest
import torch
from test_dynamics import DOUBLE, A, D, Z, generator, inputs, loop_for, looped, scramble
from torch.autograd.functional import jacobian

from benchmarks import loop_probes, stability
from benchmarks.loop_probes import (
    ACTIONS,
    DEPTHS,
    STARTS,
    depth_errors,
    hostile_factor,
    hostile_rollout,
    jacobian_factor,
    random_factor,
    random_latents,
    state_radius,
)
from benchmarks.walker_models import hostile, make_model, random_transitions, real_latents, train_model
from loopwm.dynamics import MODES, LatentNorm, LoopedDynamics
from loopwm.dynamics.cell import CERTIFIED

TINY = stability.Effort(60, 10, 10, 10, 4, 20, 2, 50)


# ---- one loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, activation", [(m, a) for m in MODES for a in ("relu", "tanh" if MODES[m].jointly else "silu")]
)
def test_factor_is_the_largest_singular_value_of_the_dense_jacobian(mode, activation):
    dynamics = looped(mode=mode, activation=activation).requires_grad_(False)
    h, e = torch.randn(2, 6, D, generator=generator(), dtype=DOUBLE) * 3.0
    given = jacobian_factor(loop_for(dynamics, e), h, generator(1), most=5000, tolerance=1e-14)
    for i in range(6):
        loop = loop_for(dynamics, e[i : i + 1])
        dense = jacobian(lambda x, loop=loop: loop(x.unsqueeze(0)).squeeze(0), h[i])
        exact = float(torch.linalg.svdvals(dense)[0])
        assert float(given[i]) == pytest.approx(exact, rel=1e-6)
        assert float(given[i]) <= exact * (1 + 1e-12), "an estimate from below"


def test_factor_of_a_map_that_is_not_normal():
    """Eigenvalues all 0.5, singular values up to 10: iterating J alone would find the wrong number."""
    matrix = 0.5 * torch.eye(4, dtype=DOUBLE)
    matrix[0, 3] = 10.0
    exact = float(torch.linalg.svdvals(matrix)[0])
    given = jacobian_factor(lambda h: h @ matrix.t(), torch.zeros(2, 4, dtype=DOUBLE), generator())
    assert given.tolist() == pytest.approx([exact, exact])


@pytest.mark.parametrize("mode", MODES)
def test_hostile_states_are_worse_than_their_start_and_within_the_bound(mode):
    dynamics = looped(mode=mode, latent_norm=LatentNorm(Z)).float()
    z, action = (x.float().clamp(-1, 1) for x in inputs(8))
    first, last = (hostile_factor(dynamics, z, action, generator(), steps) for steps in (1, 80))
    bound = dynamics.lipschitz_bound()
    assert first * 1.001 < last <= bound * (1 + 1e-6)
    assert 0.0 < random_factor(dynamics, z, action, generator()) <= bound * (1 + 1e-6)


# ---- many loops and steps ------------------------------------------------------------------------


def without_block(decay: float = 0.5) -> LoopedDynamics:
    """h' = decay h + (1 - decay) e and nothing else: its fixed point is e, of norm sqrt(D)."""
    dynamics = LoopedDynamics(D, A, D, latent_norm=LatentNorm(D))
    with torch.no_grad():
        dynamics.cell.log_dt.fill_(math.log(-math.log(decay)))
    return dynamics


def test_radius_of_a_loop_whose_fixed_points_are_known():
    dynamics = without_block()
    assert state_radius(dynamics) == pytest.approx(math.sqrt(D), rel=1e-5)
    h = dynamics(torch.randn(3, D, generator=generator()), torch.zeros(3, A), 60).h
    assert h.norm(dim=-1).tolist() == pytest.approx([math.sqrt(D)] * 3, rel=1e-3)
    assert state_radius(looped(scale=3.0, mode="linear")) == math.inf


@pytest.mark.parametrize("mode", CERTIFIED)
@pytest.mark.parametrize("seed", range(4))
def test_no_state_leaves_the_radius(seed, mode):
    dynamics = scramble(LoopedDynamics(D, A, D, mode=mode), 3.0, seed)
    z, action = (10.0 * torch.randn(64, n, generator=generator(seed)) for n in (D, A))
    with torch.no_grad():
        states = dynamics.trajectory(z, action, 200, torch.zeros(64, D))
    assert float(states.norm(dim=-1).max()) <= state_radius(dynamics)


def test_depth_errors_in_closed_form():
    """|h[T] - e| = decay^T |h0 - e|, and for an affine loop the certified distance is exact."""
    dynamics = without_block()
    z, action = torch.randn(5, D, generator=generator()), torch.zeros(5, A)
    given = depth_errors(dynamics, z, action, z)
    with torch.no_grad():
        e = dynamics.double().prelude(z.double(), action.double())
    start = ((z - e).norm(dim=-1) / e.norm(dim=-1)).median()
    expected = [float(start) * 0.5**t for t in DEPTHS[:5]]
    assert given["error"][:5] == pytest.approx(expected, rel=1e-4)
    assert given["certified"][:5] == pytest.approx(expected, rel=1e-4)
    assert given["converged"] and given["sound"] and len(given["prediction"]) == len(DEPTHS)


def test_a_certificate_that_lies_is_found_out(monkeypatch):
    dynamics = without_block()
    z, action = torch.randn(5, D, generator=generator()), torch.zeros(5, A)
    monkeypatch.setattr(LoopedDynamics, "lipschitz_bound", lambda self: 0.4)  # the truth is 0.5
    assert not depth_errors(dynamics, z, action, z)["sound"]


def explosive(mode: str) -> LoopedDynamics:
    """Weights that multiply h by about ten a loop, unless the mode forbids it."""
    return scramble(LoopedDynamics(D, A, D, mode=mode, latent_norm=LatentNorm(D)), 2.0)


def test_rollouts_tell_a_loop_that_explodes_from_one_that_may_not():
    z = torch.randn(3, D, generator=generator())
    for start in STARTS:
        rows = {
            mode: hostile_rollout(explosive(mode), z, A, start, 60, generator()) for mode in ("certified", "linear")
        }
        assert set(rows["linear"]) == set(ACTIONS)
        for kind in ACTIONS:
            certified, linear = rows["certified"][kind], rows["linear"][kind]
            if start == "carried":
                assert not linear["finite"] and linear["finite_steps"] < 30 and not linear["bounded"]
                assert linear["largest_state"] == math.inf
            if start != "no_latent_norm":
                assert certified["finite"] and certified["finite_steps"] == 60 and certified["bounded"]
                assert certified["largest_state"] <= state_radius(explosive("certified"))


def test_hostile_actions_reach_further_than_random_ones():
    dynamics, z = explosive("certified"), torch.randn(4, D, generator=generator())
    rows = hostile_rollout(dynamics, z, A, "fresh", 50, generator())
    means = {kind: sum(size for _, size in row["curve"]) for kind, row in rows.items()}
    assert means["state"] > means["random"]


def test_a_size_that_drifts_is_not_bounded():
    """Without the latent norm z' = z + C h takes a step of the same kind for ever."""
    dynamics = without_block()
    with torch.no_grad():
        dynamics.coda.out.weight.zero_()
        dynamics.coda.out.bias.fill_(1.0)
    z = torch.randn(2, D, generator=generator())
    rows = hostile_rollout(dynamics, z, A, "no_latent_norm", 100, generator())
    assert all(row["finite"] and not row["latent_bounded"] for row in rows.values())
    rows = hostile_rollout(dynamics, z, A, "fresh", 100, generator())
    assert all(row["latent_bounded"] for row in rows.values())


def test_random_latents_count_what_is_finite():
    safe = random_latents(explosive("certified"), 300, A, generator())
    assert safe["finite"] == safe["count"] == 300 and 0.0 < safe["state_over_radius"] <= 1.0
    unsafe = explosive("linear")
    with torch.no_grad():
        unsafe.cell.write.weight.mul_(1e8)
    assert random_latents(unsafe, 300, A, generator())["finite"] < 300


# ---- weights -------------------------------------------------------------------------------------


def test_training_learns_and_hostile_weights_grow():
    replay = random_transitions(300, 0)
    assert int(replay.is_last[: len(replay)].sum()) == 0, "an episode of walker-walk has 500 steps"
    losses = [train_model(replay, "certified", 0, steps)[1] for steps in (10, 40)]
    assert losses[1] < 0.9 * losses[0]
    model = make_model(replay.obs.shape[-1], replay.action.shape[-1], "linear", 0)
    z, action, after = real_latents(model, replay, 16, 0)
    assert z.shape == after.shape and not torch.equal(z, after)
    pushed, steps = hostile(model, z, action, 15)
    before, grown = (m.dynamics(z, action, 8).h.norm(dim=-1).mean() for m in (model, pushed))
    assert steps == 15 and grown > 2.0 * before
    assert not any(p.isnan().any() for p in hostile(model, z, action, 60, rate=10.0)[0].parameters())


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("stability")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stability, "QUICK", TINY)
        patch.setattr(loop_probes, "REFERENCE", 1200)
        words = ["--quick", "--jobs", "1", "--json", str(folder / "x.json"), "--figure", str(folder / "x.png")]
        stability.main(words)
    assert (folder / "x.png").stat().st_size > 10_000

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads((folder / "x.json").read_text(), parse_constant=refuse)


def test_the_command_reports_every_mode_and_both_weights(result):
    cases = [(row["mode"], row["weights"]) for row in result["rows"]]
    assert cases == [(mode, weights) for mode in MODES for weights in ("trained", "hostile")]
    assert all(set(row["rollouts"]) == set(STARTS) for row in result["rows"])
    certified = [row for row in result["rows"] if row["mode"] in CERTIFIED]
    assert all(stability.breaches(row) == [] and stability.factor(row) < 1.0 for row in certified)
    assert "certified (largest factor" in result["verdict"].split("; not so")[0]


def test_the_verdict_follows_the_figures():
    def row(mode, factor, bound, bounded=True, weights="trained"):
        kind = {"largest_state": 1.0, "bounded": bounded, "finite": bounded}
        return {
            "mode": mode, "weights": weights, "seed": 0, "random_factor": 0.1, "hostile_factor": factor, "bound": bound,
            "radius": 2.0, "rollouts": {start: {"state": kind} for start in STARTS},
            "latents": {"count": 2, "finite": 2, "state_over_radius": 0.5}, "depth": {"sound": True, "converged": True},
        }  # fmt: skip

    def verdict(*rows):
        both = [r | {"weights": weights} for r in rows for weights in stability.WEIGHTS]
        return stability.conclude(both, TINY)[1]

    fine, wild = row("certified", 0.8, 0.9), row("linear", 3.0, 4.0, bounded=False)
    assert "is beaten" in verdict(fine, wild)
    assert "is not beaten" in verdict(fine, row("linear", 0.8, 4.0))
    assert "is not beaten" in verdict(row("certified", 0.95, 0.9), wild), "its factor is above its bound"
    assert "is not run" in verdict(fine)
    assert "1 false bounds" not in verdict(fine, wild) and stability.breaches(row("certified", 0.95, 0.9)) == ["factor"]
    assert stability.breaches(fine | {"radius": 0.5}) == ["radius"]
    assert stability.breaches(fine | {"depth": {"sound": False, "converged": True}}) == ["distance"]
