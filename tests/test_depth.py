"""Depth: where every halting rule stops, what leaves the batch, how the fixed point is reached and differentiated."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loopwm.dynamics import (
    GRADIENTS,
    HALTING,
    SOLVERS,
    AndersonSolver,
    CertifiedHalting,
    DropForecast,
    FixedHalting,
    GateHalting,
    HaltingRule,
    ImplicitGradient,
    LoopedDynamics,
    PatientHalting,
    PlainSolver,
    PredictionHalting,
    RandomHalting,
    ResidualHalting,
    SecondDifferenceHalting,
    gate_loss,
)
from loopwm.dynamics.adaptive import LoopResult, loop_adaptive
from loopwm.dynamics.base import relative_step, sample_norm
from loopwm.dynamics.cell import CERTIFIED, LoopCell
from loopwm.dynamics.depth import DepthSchedule, earlier_loops, sample_depths
from loopwm.dynamics.gradients import adjoint_iterations, solve_adjoint
from loopwm.dynamics.halting.gate import remaining_drop

Z, A, D = 7, 3, 8
DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def looped(seed: int = 0, scale: float = 1.0, **kw) -> LoopedDynamics:
    """Random values everywhere, so that no zero initial weight hides a term."""
    dynamics, stream = LoopedDynamics(Z, A, D, **kw), generator(seed)
    with torch.no_grad():
        for name, p in dynamics.named_parameters():
            noise = torch.randn(p.shape, generator=stream) * scale
            p.add_(0.3 * noise) if "log_" in name else p.copy_(noise)
    return dynamics.double()


def inputs(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(batch, Z, seed=seed), randn(batch, A, seed=seed + 50)


class Affine:
    """x -> fixed + rate (x - fixed), rate (B,): x[t] = fixed + rate^t (x[0] - fixed). Counts the rows it was given."""

    waiting = 0.0

    def __init__(self, fixed: torch.Tensor, rate: torch.Tensor, rows: list | None = None):
        self.fixed, self.rate, self.rows = fixed, rate, [] if rows is None else rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[0])
        return self.fixed + self.rate.view(-1, *[1] * (x.ndim - 1)) * (x - self.fixed)

    def select(self, index: torch.Tensor) -> "Affine":
        selected = Affine(self.fixed[index], self.rate[index], self.rows)
        selected.waiting = self.waiting
        return selected


@pytest.mark.parametrize("solver", ["plain", "anderson"])
@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("name", ["residual", "second_difference", "random", "gate"])
def test_rows_that_wait_for_others_to_leave_change_nothing(name, patience, solver):
    """Loops, states and the states before are those of rows that leave at once, but fewer sizes of batches are met."""
    torch.manual_seed(1)
    stream, found = torch.Generator().manual_seed(0), []
    fixed, start = (torch.randn(40, 6, dtype=DOUBLE, generator=stream) for _ in range(2))
    rate = torch.rand(40, dtype=DOUBLE, generator=stream) * 0.9
    gate = GateHalting(6, 0.8).double()
    torch.nn.init.normal_(gate.gate.layers[-1].weight, generator=stream)
    for waiting in (0.0, 0.3, 0.9):
        loop = Affine(fixed, rate)
        loop.waiting = waiting
        rules = {
            "residual": ResidualHalting(0.01),
            "second_difference": SecondDifferenceHalting(0.01),
            "random": RandomHalting(torch.arange(1, 30)),
            "gate": gate,
        }
        rule = PatientHalting(rules[name], patience).begin(None, start, start)
        out = loop_adaptive(loop, start, rule, SOLVERS[solver]().begin(2.0), 2, 25)
        found.append((out.h, out.previous(), out.loops(), loop.rows))
    (h, previous, loops, rows), *others = found
    various = loops.unique().numel() > 3  # Anderson's mixing solves these maps at once
    assert sum(rows) == int(loops.sum()) and (various or solver == "anderson")
    for waited, before, same, more in others:
        assert torch.equal(loops, same)
        assert not various or (len(set(more)) <= len(set(rows)) and sum(more) >= sum(rows))
        torch.testing.assert_close((waited, before), (h, previous))
    assert not various or len(set(others[-1][-1])) < len(set(rows))


RATES = torch.tensor([0.2, 0.5, 0.8, 0.9, 0.3], dtype=DOUBLE)
SIZES = torch.tensor([1.0, 1e-3, 10.0, 1.0, 100.0], dtype=DOUBLE)
SHAPES = [(6,), (4, 6), (2, 3, 3)]  # (D,), (G, D), (C, S, S)


def case(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, Affine]:
    """(start, its distance from the fixed point, the map), five samples of different rates and distances."""
    fixed, away = randn(5, *shape, seed=1), randn(5, *shape, seed=2)
    away = away / sample_norm(away).view(-1, *[1] * len(shape)) * SIZES.view(-1, *[1] * len(shape))
    return fixed + away, away, Affine(fixed, RATES)


def run(rule: HaltingRule, shape=(6,), low: int = 1, high: int = 200, solver=None, rho: float = 0.9) -> LoopResult:
    start, _, loop = case(shape)
    dynamics = SimpleNamespace(lipschitz_bound=lambda: rho, cell=SimpleNamespace(norm_order=2.0))
    solver = solver or PlainSolver()
    return loop_adaptive(loop, start, rule.begin(dynamics, start, start), solver.begin(), low, high)


def first(holds, low: int = 1, high: int = 200) -> int:
    """The first loop t in [low, high] at which holds(t), or high."""
    return next((t for t in range(low, high) if holds(t)), high)


# ---- where each rule stops -----------------------------------------------------------------------


def closed_form(name: str, shape: tuple[int, ...], tolerance: float) -> list[int]:
    """The loop at which a rule must stop each sample of ``case``, from x[t] = c + r^t d."""
    start, away, loop = case(shape)
    found = []
    for c, d, r in zip(loop.fixed, away, RATES.tolist(), strict=True):

        def state(t, c=c, d=d, r=r):
            return float((c + r**t * d).norm())

        def step(t, d=d, r=r):  # |x[t] - x[t - 1]|
            return r ** (t - 1) * (1 - r) * float(d.norm())

        holds = {
            "residual": lambda t: step(t) / state(t - 1) < tolerance,
            "second_difference": lambda t, r=r: t > 1 and step(t - 1) * (1 - r) / state(t - 1) < tolerance,
            "certified": lambda t: step(t) * 0.9 / (1 - 0.9) < tolerance,
            "prediction": lambda t, d=d, r=r: (
                r ** (t - 1) * (1 - r) * float(readout(d[None], d[None]).abs().max()) < tolerance
            ),
        }
        found.append(first(holds[name]))
    return found


def readout(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """(n, ...) -> (n, 2), linear in h."""
    flat = h.flatten(1)
    return torch.stack([flat.sum(1), flat[:, 0] - 2 * flat[:, 1]], 1)


RULES = {
    "residual": ResidualHalting,
    "second_difference": SecondDifferenceHalting,
    "certified": CertifiedHalting,
    "prediction": lambda tolerance: PredictionHalting(tolerance, readout),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
@pytest.mark.parametrize("name", RULES)
def test_rules_stop_at_the_closed_form_loop(name, tolerance, shape):
    expected = closed_form(name, shape, tolerance)
    assert len(set(expected)) >= 4, "the case must mix depths"
    result = run(RULES[name](tolerance), shape)
    assert result.loops().tolist() == expected
    start, away, loop = case(shape)
    for t, state in ((result.loops(), result.h), (result.loops() - 1, result.previous())):
        torch.testing.assert_close(state, loop.fixed + (RATES**t).view(-1, *[1] * len(shape)) * away)


@pytest.mark.parametrize("name", RULES)
def test_floor_and_cap_hold_for_every_rule(name):
    free = closed_form(name, (6,), 1e-2)
    result = run(RULES[name](1e-2), low=4, high=9)
    assert result.loops().tolist() == [min(max(t, 4), 9) for t in free]
    assert min(free) < 4 and max(free) > 9


def test_certified_halting_means_what_it_says():
    """No sample is farther from its fixed point than the distance, and with its own rate the bound is reached."""
    result = run(CertifiedHalting(1e-4))
    assert (sample_norm(result.h - case((6,))[2].fixed) < 1e-4).all()


def test_nothing_is_certain_about_an_expansion():
    for rho in (1.0, 1.7, math.inf):
        assert run(CertifiedHalting(1e9), rho=rho, high=12).loops().tolist() == [12] * 5


@pytest.mark.parametrize("loops", [1, 3, 200])
def test_fixed_halting(loops):
    assert run(FixedHalting(loops)).loops().tolist() == [loops] * 5
    assert run(FixedHalting(loops), low=2, high=7).loops().tolist() == [min(max(loops, 2), 7)] * 5


def test_random_halting_has_the_same_depths_and_ignores_the_sample():
    depths = torch.tensor([3, 9, 1, 4, 1])
    rule, seen = RandomHalting(depths), set()
    for _ in range(60):
        loops = run(rule).loops().tolist()
        assert sorted(loops) == [1, 1, 3, 4, 9]
        seen.add(tuple(loops))
    assert len(seen) > 30
    again = RandomHalting(depths)
    assert run(again).loops().tolist() == run(RandomHalting(depths)).loops().tolist()
    assert run(RandomHalting(depths, seed=1)).loops().tolist() != run(RandomHalting(depths)).loops().tolist()


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_random_halting_is_unbiased_in_batches_of_any_size(batch):
    rule = RandomHalting(torch.tensor([1, 2, 3, 10]))
    drawn = torch.cat(
        [rule.begin(None, torch.zeros(batch, 1), torch.zeros(batch, 1)).loops for _ in range(6000 // batch)]
    )
    share = torch.bincount(drawn, minlength=11)[[1, 2, 3, 10]] / len(drawn)
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.03, rtol=0)


class Pattern(HaltingRule):
    """Holds for sample i at the loops in table[i]; remembers which samples are left."""

    sees_every_loop = True

    def __init__(self, table: list[set[int]]):
        super().__init__()
        self.table = table

    def begin(self, dynamics, h, z):
        self.t, self.left = 0, torch.arange(len(self.table))
        return self

    def forward(self, h, previous):
        self.t += 1
        assert len(self.left) == h.shape[0]
        return torch.tensor([self.t in self.table[i] for i in self.left.tolist()])

    def keep(self, index):
        self.left = self.left[index]


PATTERN = [{1, 2, 3}, {2, 4, 5}, {1, 3, 5, 7}, {1, 3, 4, 6, 7, 8}, set(range(1, 20))]


@pytest.mark.parametrize(
    "patience,low,expected",
    [(1, 1, [1, 2, 1, 1, 1]), (2, 1, [2, 5, 12, 4, 2]), (3, 1, [3, 12, 12, 8, 3]), (2, 4, [12, 5, 12, 4, 4])],
)
def test_patience_counts_loops_in_a_row(patience, low, expected):
    """A loop that misses starts the count anew; loops before the floor count towards it."""
    assert run(PatientHalting(Pattern(PATTERN), patience), low=low, high=12).loops().tolist() == expected


def test_patience_by_name_waits_for_the_residual():
    """Steps only shrink here, so the rule holds from its first time on."""
    patient = PatientHalting(ResidualHalting(1e-3), 3)
    assert run(patient).loops().tolist() == [t + 2 for t in closed_form("residual", (6,), 1e-3)]
    assert isinstance(LoopedDynamics(Z, A, D, patience=3).halting, PatientHalting)


def gate_of_the_residual(threshold: float, size: int = 6) -> GateHalting:
    """A gate set by hand: its forecast is the relative step itself."""
    rule = GateHalting(size, threshold).double()
    with torch.no_grad():
        for p in rule.parameters():
            p.zero_()
        rule.gate.layers[0].weight[0, -2], rule.gate.layers[0].weight[1, -2] = 1.0, -1.0
        rule.gate.layers[2].weight[0, 0], rule.gate.layers[2].weight[0, 1] = 1.0, -1.0
    return rule


def test_gate_stops_where_its_forecast_passes_the_threshold():
    assert run(gate_of_the_residual(1e-3)).loops().tolist() == closed_form("residual", (6,), 1e-3)
    rule = gate_of_the_residual(1e-3)
    with torch.no_grad():  # forecast 1 / t
        rule.gate.layers[0].weight.zero_()
        rule.gate.layers[0].weight[0, -1], rule.gate.layers[2].weight[0, 0] = 1.0, -1.0
    rule.threshold = 1 / 6.5
    assert run(rule).loops().tolist() == [7] * 5
    assert run(GateHalting(6, 0.99).double(), high=8).loops().tolist() == [8] * 5, "untrained, it stops nothing"


def test_finished_rows_cost_nothing_more():
    start, _, loop = case((6,))
    rule = SecondDifferenceHalting(1e-2)
    loops = loop_adaptive(loop, start, rule.begin(None, start, start), PlainSolver(), 1, 50).loops()
    assert loop.rows == DepthSchedule(loops).active


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("name", HALTING)
def test_compacted_batch_equals_each_sample_alone(name, patience, solver):
    """By every rule's name, through the whole dynamics, to float64 rounding."""
    kw = {"max_loops": 40, "halt_tolerance": 0.03, "depth_sampler": "uniform", "solver": solver}
    dynamics = looped(scale=0.5, halting=name, patience=patience, **kw)
    for rule in dynamics.modules():
        if isinstance(rule, PredictionHalting):  # what it reads is in units of z, whose rows leave with those of h
            rule.read_off(lambda z, h: readout(z, h) * z.norm(dim=1, keepdim=True))
        if isinstance(rule, GateHalting):
            rule.load_state_dict(gate_of_the_residual(1.0, D).state_dict())
    z, action = inputs(9)
    z = z * torch.logspace(-1, 2, 9, dtype=DOUBLE).unsqueeze(1)
    out = dynamics(z, action)
    assert 1 <= int(out.loops.min()) <= int(out.loops.max()) <= 40
    if name != "fixed":
        assert out.loops.unique().numel() > 1, "the case must mix depths"
    if solver == "plain":
        states = dynamics.trajectory(z, action, 40)[out.loops, torch.arange(9)]
        torch.testing.assert_close(out.h, states, rtol=1e-12, atol=1e-13)
    if name == "random":
        return
    for i in range(9):
        alone = dynamics(z[i : i + 1], action[i : i + 1])
        assert int(alone.loops) == int(out.loops[i])
        for field in ("z_next", "h", "residual"):
            torch.testing.assert_close(getattr(out, field)[i], getattr(alone, field)[0], rtol=1e-9, atol=1e-10)


def test_default_rule_is_the_residual_and_passes_its_tolerance():
    rule = LoopedDynamics(Z, A, D, halt_tolerance=0.07).halting
    assert type(rule) is ResidualHalting and rule.tolerance == 0.07
    for name, known in HALTING.items():
        assert type(LoopedDynamics(Z, A, D, halting=name).halting) is known
        assert (
            list(LoopedDynamics(Z, A, D, halting=name).state_dict())[:3]
            == list(LoopedDynamics(Z, A, D).state_dict())[:3]
        )
    assert LoopedDynamics(Z, A, D, 5, halting="fixed").halting.loops == 5


def test_rules_can_be_swapped_on_a_trained_model():
    dynamics = looped(halting="gate")
    for rule in (ResidualHalting(0.1), GateHalting(D).double(), FixedHalting(3)):
        dynamics.halting = rule
        dynamics(*inputs(3))
    assert dynamics(*inputs(3)).loops.tolist() == [3] * 3


def test_a_readout_module_does_not_become_part_of_the_dynamics():
    """Or its weights would be trained, and saved, twice."""
    dynamics = looped(halting=PredictionHalting(0.1, nn.Bilinear(Z, D, 2).double()))
    assert not any("halting" in key for key in dynamics.state_dict())
    assert dynamics(*inputs(3)).loops.shape == (3,)


@pytest.mark.parametrize("name", HALTING)
def test_empty_batch_by_every_rule(name):
    dynamics = looped(halting=name)
    if name == "prediction":
        dynamics.halting.read_off(readout)
    assert dynamics(*inputs(0)).loops.shape == (0,)


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: ResidualHalting(0.0), "tolerance must be positive"),
        (lambda: ResidualHalting(math.nan), "tolerance must be positive"),
        (lambda: SecondDifferenceHalting(-1.0), "tolerance must be positive"),
        (lambda: CertifiedHalting(0.0), "distance must be positive"),
        (lambda: PredictionHalting(0.0), "tolerance must be positive"),
        (lambda: GateHalting(3, 0.0), "threshold must be positive"),
        (lambda: FixedHalting(0), "loops must be an integer of at least 1, got 0"),
        (lambda: PatientHalting(FixedHalting(1), 0), "patience must be an integer of at least 1, got 0"),
        (lambda: LoopedDynamics(Z, A, D, patience=0), "patience must be an integer of at least 1, got 0"),
        (lambda: RandomHalting(torch.tensor([1, 0])), "at least 1"),
        (lambda: RandomHalting(torch.tensor([1.0])), "at least 1"),
        (lambda: RandomHalting(torch.tensor([], dtype=torch.int64)), "at least 1"),
        (lambda: LoopedDynamics(Z, A, D, halting="never"), "unknown halting 'never'; choose from residual, fixed"),
        (lambda: LoopedDynamics(Z, A, D, solver="broyden"), "unknown solver 'broyden'; choose from plain, anderson"),
        (lambda: LoopedDynamics(Z, A, D, gradient="none"), "unknown gradient 'none'; choose from unrolled, implicit"),
        (lambda: LoopedDynamics(Z, A, D, depth_sampler="zipf"), "unknown depth sampler 'zipf'; choose from poisson"),
        (lambda: LoopedDynamics(Z, A, D, mode="linear", halting="certified"), "halting 'certified' needs mode"),
        (lambda: LoopedDynamics(Z, A, D, mode="linear", gradient="implicit"), "gradient 'implicit' needs mode"),
        (lambda: looped(halting="prediction")(*inputs(2)), "needs a read-out"),
        (lambda: looped(halting=GateHalting(D + 1).double())(*inputs(2)), f"states of width {D + 1}, got {D}"),
        (lambda: looped()(*inputs(2), h0=randn(3, D)), r"state's shape \(2, 8\), got \(3, 8\)"),
        (lambda: looped().trajectory(*inputs(2), 0), "at least 1"),
        (lambda: AndersonSolver(memory=0), "memory >= 1"),
        (lambda: AndersonSolver(ridge=0.0), "ridge > 0"),
        (lambda: ImplicitGradient(0.0), "in \\(0, 1\\)"),
    ],
)
def test_impossible_choices_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---- the certificate that a rule reads -----------------------------------------------------------


def test_certified_halting_follows_the_weights():
    """No input and no block: h[t] = Abar^t h0, and the bound is Abar of the moment."""
    dynamics = LoopedDynamics(D, A, D, max_loops=200, halting="certified", halt_tolerance=1e-3).double()
    with torch.no_grad():
        dynamics.cell.input_gain.zero_()
    h0 = nn.functional.normalize(randn(3, D), dim=-1)
    for decay in (0.5, 0.9, 0.3):
        dynamics.cell.log_dt.data.fill_(math.log(-math.log(decay)))  # .data hides the change from version counters
        expected = math.ceil(math.log(1e-3) / math.log(decay))
        assert dynamics(h0, torch.zeros(3, A, dtype=DOUBLE)).loops.tolist() == [expected] * 3


def test_bound_is_computed_once_per_change_of_the_weights(monkeypatch):
    calls, dynamics = [], looped(halting="certified")
    original = LoopCell.lipschitz_bound
    monkeypatch.setattr(LoopCell, "lipschitz_bound", lambda self: calls.append(1) or original(self))
    for _ in range(3):
        dynamics(*inputs(4))
        copy.deepcopy(dynamics)(*inputs(4))
    assert len(calls) == 1, "unchanged weights, and a copy of them, need no new singular values"
    optimizer = torch.optim.SGD(dynamics.parameters(), lr=0.1)
    dynamics(*inputs(4), 3).z_next.sum().backward()
    optimizer.step()
    changes = [dynamics.lipschitz_bound, lambda: dynamics.cell.write.parametrizations.weight.original.data.mul_(0.5)]
    for change in (*changes, dynamics.float, dynamics.double):
        change()
        assert dynamics.lipschitz_bound() == original(dynamics.cell)
    assert len(calls) == 5 and dynamics.lipschitz_bound() < 1.0


# ---- the learned gate ----------------------------------------------------------------------------


def test_remaining_drop_by_hand():
    losses = torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0], [0.5, 4.0], [0.7, 5.0]])
    expected = torch.tensor([[2.5, 0.0], [0.5, 0.0], [1.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(remaining_drop(losses), expected)


def test_gate_loss_by_hand():
    """An untrained gate forecasts 1: its loss is 1 over the mean drop, its bias gets (1 - mean) / mean."""
    gate, states = DropForecast(6).double(), randn(6, 2, 6)
    losses = torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0], [0.5, 4.0], [0.7, 5.0]], dtype=DOUBLE)
    loss = gate_loss(gate, states, losses)
    mean = (2.5 + 0.5 + 1.5) / 8  # the last loop is left out
    assert loss.item() == pytest.approx(1 / mean)
    loss.backward()
    assert float(gate.layers[2].bias.grad) == pytest.approx((1 - mean) / mean)


def test_gate_loss_asks_the_gate_of_every_loop_what_is_still_to_come():
    """With weights that see all of it: state, step and the loop's number, one loop after the other."""
    torch.manual_seed(0)
    gate, states, losses = DropForecast(6).double(), randn(6, 4, 6), randn(5, 4, seed=3)
    for layer in (gate.layers[0], gate.layers[2]):
        torch.nn.init.normal_(layer.weight)
    drop = remaining_drop(losses)
    forecasts = [gate(states[t], states[t - 1], t) for t in range(1, 5)]
    terms = [f.exp() - drop[t] * f for t, f in enumerate(forecasts)]
    expected = torch.stack(terms).mean() / drop[:4].mean()
    torch.testing.assert_close(gate_loss(gate, states, losses), expected)


def test_gate_loss_trains_the_gate_and_nothing_else():
    dynamics = looped(halting="gate")
    z, action = inputs(5)
    states = dynamics.trajectory(z, action, 6)
    losses = (dynamics.coda(z, states[1:]) - randn(5, Z, seed=9)).square().mean(-1)
    assert losses.requires_grad
    gate_loss(dynamics.halting.gate, states, losses).backward()
    touched = {name for name, p in dynamics.named_parameters() if p.grad is not None}
    assert touched and all(name.startswith("halting.gate") for name in touched)


def test_a_trained_gate_stops_where_little_is_left_to_gain():
    """Loss = squared distance to the fixed point, samples of different rates: the gate must tell them apart."""
    torch.manual_seed(0)
    shape, steps, threshold = (6,), 30, 0.02
    rate = torch.rand(32, generator=generator(), dtype=DOUBLE) * 0.7 + 0.2
    fixed, away = randn(32, *shape, seed=1), nn.functional.normalize(randn(32, *shape, seed=2), dim=-1) * 3
    loop = Affine(fixed, rate)
    states = [fixed + away]
    for _ in range(steps):
        states.append(loop(states[-1]))
    states = torch.stack(states)
    losses = (states[1:] - fixed).square().sum(-1)  # (T, B)
    rule = GateHalting(6, threshold).double()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        gate_loss(rule.gate, states, losses).backward()
        optimizer.step()
    loops = loop_adaptive(loop, states[0], rule.begin(None, states[0], states[0]), PlainSolver(), 1, steps).loops()
    wanted = (remaining_drop(losses) < threshold).int().argmax(0) + 1
    assert torch.corrcoef(torch.stack([loops, wanted]).double())[0, 1] > 0.95
    assert float((loops - wanted).abs().double().mean()) < 1.5 < float(wanted.double().std())


@pytest.mark.parametrize("block, shape", [("conv", (D, 3, 5)), ("rank", (D, 3, 5)), ("transformer", (3, D))])
def test_a_gate_reads_grids_and_tokens_wherever_their_places_are(block, shape):
    """By name: the same weights for any number of places, and no matter in which order they stand."""
    mode = "linear" if block == "transformer" else "certified"
    rule = LoopedDynamics(Z, A, D, block=block, block_dim=4 * D, halting="gate", mode=mode).halting.double()
    nn.init.normal_(rule.gate.layers[-1].weight, generator=generator())
    h, before = randn(4, *shape), randn(4, *shape, seed=1)
    forecast, places = rule.gate(h, before, 2), [i for i in (1, 2, 3)[: len(shape)] if h.shape[i] != D]
    assert forecast.std() > 0.01 and tuple(places) == rule.gate.places
    torch.testing.assert_close(rule.gate(h.flip(places), before.flip(places), 2), forecast)
    torch.testing.assert_close(rule.gate(torch.cat([h, h], places[0]), torch.cat([before] * 2, places[0]), 2), forecast)
    assert not torch.allclose(rule.gate(h.roll(1, places[0]), before, 2), forecast), "the step is that of each place"


def test_gate_refuses_states_of_another_width():
    tokens, grid = DropForecast(6, places=(1,)), DropForecast(6, places=(2, 3))
    wrong = [
        (DropForecast(6), (2, 5)),
        (DropForecast(6), (2, 2, 3)),
        (tokens, (2, 6, 3)),
        (tokens, (2, 6)),
        (grid, (2, 6)),
    ]
    for gate, shape in wrong:
        with pytest.raises(ValueError, match=f"states of width 6, got {'x'.join(map(str, shape[1:]))}"):
            gate(torch.zeros(shape), torch.ones(shape), 1)


def test_gate_loss_refuses_what_does_not_fit():
    gate = DropForecast(6)
    for states, losses in (((3, 4, 6), (3, 4)), ((4, 5, 6), (3, 4)), ((2, 4, 6), (1, 4)), ((3, 4, 6), (2,))):
        with pytest.raises(ValueError, match="losses"):
            gate_loss(gate, torch.zeros(states), torch.zeros(losses))


# ---- samplers, and the prediction at an earlier loop ---------------------------------------------


def test_lognormal_poisson():
    depths = sample_depths("lognormal_poisson", 40_000, 8, 1, 200, generator()).double()
    assert float(depths.mean()) == pytest.approx(8.0, abs=0.08)
    variance = 7 + 49 * (math.exp(0.25) - 1)  # of the Poisson, and of its rate
    assert float(depths.var()) == pytest.approx(variance, rel=0.05)
    assert float(depths.median()) < 8.0
    clipped = sample_depths("lognormal_poisson", 4000, 8, 3, 12, generator())
    assert int(clipped.min()) == 3 and int(clipped.max()) == 12
    assert set(sample_depths("lognormal_poisson", 100, 1, 1, 9, generator()).tolist()) == {1}


def test_earlier_loops_are_uniform():
    loops = torch.tensor([1, 2, 3, 6]).repeat(8000)
    early = earlier_loops(loops, generator()).view(8000, 4)
    assert early[:, 0].unique().tolist() == early[:, 1].unique().tolist() == [1]
    for column, top in ((2, 2), (3, 5)):
        share = torch.bincount(early[:, column], minlength=top + 1)[1:] / 8000
        torch.testing.assert_close(share, torch.full((top,), 1 / top), atol=0.02, rtol=0)
    assert torch.equal(earlier_loops(loops, generator()), earlier_loops(loops, generator()))


DEPTHS = [3, 1, 11, 4, 1, 3]
EARLY = [1, 1, 6, 4, 1, 2]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(
    "depth", [torch.tensor(DEPTHS), DepthSchedule(torch.tensor([11] * 6)), 11], ids=["tensor", "schedule", "int"]
)
def test_an_earlier_prediction_is_that_of_a_shorter_pass(depth, activation):
    """Values, residuals, and gradients of a loss on both predictions of one pass."""
    dynamics, early = looped(scale=0.7, activation=activation), torch.tensor(EARLY)
    z, action = (x.requires_grad_() for x in inputs(6))
    weights = randn(2, 6, Z + D, seed=4)

    def gradients(out, at):
        pairs = zip((out, at), weights, strict=True)
        loss = sum((torch.cat([o.z_next, o.h], 1).tanh() * w).sum() for o, w in pairs)
        return torch.autograd.grad(loss, [z, action, *dynamics.parameters()], retain_graph=True)

    out = dynamics(z, action, depth)
    at = out.at(early)
    expected = dynamics(z, action, early)
    for field in ("z_next", "h", "residual", "loops"):
        torch.testing.assert_close(getattr(at, field), getattr(expected, field))
    separate = gradients(dynamics(z, action, depth), expected)
    for given, wanted in zip(gradients(out, at), separate, strict=True):
        torch.testing.assert_close(given, wanted)
    alone = [dynamics(z, action, depth).at(early).h, expected.h]  # and a loss on the earlier one alone
    torch.testing.assert_close(*(torch.autograd.grad(h.square().sum(), z, retain_graph=True)[0] for h in alone))


def test_an_earlier_prediction_applies_no_block(monkeypatch):
    dynamics = looped()
    out = dynamics(*inputs(6), 5)
    monkeypatch.setattr(LoopCell, "prepare", None)
    assert out.early(generator()).z_next.shape == (6, Z)


def test_earlier_predictions_are_refused_where_they_were_not_kept():
    dynamics, ones = looped(), torch.ones(6, dtype=torch.int64)
    with torch.no_grad():
        kept = dynamics(*inputs(6), 5)
    for out in (kept, dynamics(*inputs(6)), looped(gradient="implicit")(*inputs(6), 5)):
        with pytest.raises(ValueError, match="asked-for depth"):
            out.at(ones)
    out = dynamics(*inputs(6), torch.tensor(DEPTHS))
    for loops in (ones * 0, ones * 2, ones[:4]):
        with pytest.raises(ValueError, match="from 1 to its own"):
            out.at(loops)


# ---- warm start ----------------------------------------------------------------------------------


def test_warm_start_needs_fewer_loops_on_a_slow_input_and_reaches_the_same_point():
    dynamics = looped(scale=0.7, max_loops=400, halting=CertifiedHalting(1e-6))
    z, action = inputs(16)
    drift, h0, cold_loops, warm_loops = randn(16, Z, seed=8) * 1e-4, None, [], []
    for k in range(8):
        cold, warm = dynamics(z + k * drift, action), dynamics(z + k * drift, action, h0=h0)
        assert (sample_norm(cold.h - warm.h) < 2e-6).all()
        h0 = warm.h
        cold_loops.append(cold.loops.double().mean())
        warm_loops.append(warm.loops.double().mean())
    assert torch.equal(cold_loops[0], warm_loops[0])
    assert sum(warm_loops[1:]) < 0.75 * sum(cold_loops[1:])


@pytest.mark.parametrize("depth", [4, torch.tensor([4, 2, 1]), None], ids=str)
def test_warm_start_begins_where_it_is_told(depth):
    dynamics = looped()
    z, action = inputs(3)
    start = randn(3, D, seed=3).requires_grad_()
    out = dynamics(z, action, depth, h0=start)
    states = dynamics.trajectory(z, action, 8, h0=start)
    torch.testing.assert_close(states[0], start)
    torch.testing.assert_close(out.h, states[out.loops, torch.arange(3)])
    assert torch.autograd.grad(out.h.sum(), start)[0].any()


# ---- solvers -------------------------------------------------------------------------------------


def evaluations(loop, x: torch.Tensor, solver, goal: float, most: int = 3000) -> torch.Tensor:
    """(B,) evaluations until |f(x) - x| < goal |x|, by the adaptive loop itself."""
    return loop_adaptive(loop, x, ResidualHalting(goal), solver.begin(), 1, most).loops()


class Linear:
    """x -> x W + b with W of a known spectrum; ``slope`` < 1 bends it by a leaky ReLU."""

    waiting = 0.0

    def __init__(self, weight: torch.Tensor, offset: torch.Tensor, slope: float = 1.0):
        self.weight, self.offset, self.slope = weight, offset, slope

    def __call__(self, x):
        y = x @ self.weight + self.offset
        return torch.where(y > 0, y, self.slope * y)

    def select(self, index):
        return Linear(self.weight, self.offset[index], self.slope)


def linear(seed: int, slope: float = 1.0, norm: float = 0.95, size: int = 12, rows: int = 6) -> Linear:
    q = torch.linalg.qr(randn(size, size, seed=seed))[0]
    p = torch.linalg.qr(randn(size, size, seed=seed + 500))[0]
    weight = q @ torch.diag(torch.linspace(0.05, norm, size, dtype=DOUBLE)) @ p
    return Linear(weight, randn(rows, size, seed=seed + 900), slope)


@pytest.mark.parametrize("slope", [1.0, 0.3])
def test_anderson_needs_fewer_evaluations_to_the_same_residual(slope):
    symmetric = linear(0)
    symmetric.weight, symmetric.slope = symmetric.weight @ symmetric.weight.T, slope  # spectrum up to 0.9
    x = torch.zeros(6, 12, dtype=DOUBLE)
    plain, fast = (evaluations(symmetric, x, solver, 1e-9) for solver in (PlainSolver(), AndersonSolver()))
    assert (fast < plain).all() and float(fast.double().mean()) < 0.5 * float(plain.double().mean())
    ends = [
        loop_adaptive(symmetric, x, ResidualHalting(1e-12), s.begin(), 1, 3000).h
        for s in (PlainSolver(), AndersonSolver())
    ]
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("memory", [2, 5, 10])
@pytest.mark.parametrize("size", [2, 4])
def test_anderson_falls_back_safely(size, memory):
    """On folded isometries times 0.95 the mixture alone circles for ever: the safeguard must beat plain loops."""
    for seed in range(3):
        q, offset = torch.linalg.qr(randn(size, size, seed=seed))[0], randn(6, size, seed=seed + 9)
        loop, x = Linear(0.95 * q, offset, slope=-1.0), randn(6, size, seed=seed) * 100
        plain, fast = (evaluations(loop, x, solver, 1e-8, 500) for solver in (PlainSolver(), AndersonSolver(memory)))
        assert (fast <= plain).all() and int(plain.max()) < 500
        assert float(fast.double().mean()) < 0.7 * float(plain.double().mean())


@pytest.mark.parametrize("slope", [1.0, 0.0, -1.0])
def test_a_failed_evaluation_is_followed_by_a_plain_step(slope):
    """The best residual never rises, and falls by rho in the evaluation after one that failed."""
    failures = 0
    for seed in range(3):
        q = torch.linalg.qr(randn(4, 4, seed=seed))[0]
        loop, run, x = Linear(0.95 * q, randn(6, 4, seed=seed + 9), slope), AndersonSolver(5).begin(), randn(6, 4) * 100
        best, failed = torch.full((6,), math.inf, dtype=DOUBLE), torch.zeros(6, dtype=torch.bool)
        for _ in range(40):
            fx = loop(x)
            size = sample_norm(fx - x)
            assert (size[failed] <= 0.95 * best[failed] + 1e-12).all()
            failed, best = (size >= best) & (best > 1e-9), torch.minimum(size, best)
            failures += int(failed.sum())
            x = run(x, fx)
    assert failures > 0 or slope >= 0


def test_anderson_never_evaluates_one_state_twice_where_nothing_contracts():
    """A rule that looks at changes would take a state that is evaluated again for one that has settled."""
    for seed in range(4):
        q = torch.linalg.qr(randn(4, 4, seed=seed))[0]
        loop, run, x = Linear(1.02 * q, randn(6, 4, seed=seed + 9), slope=-1.0), AndersonSolver(3).begin(), randn(6, 4)
        seen = []
        for _ in range(60):
            assert all((x != one).any(1).all() for one in seen)
            seen.append(x)
            x = run(x, loop(x))


def test_anderson_survives_states_that_are_not_finite():
    """A mixture that overflows is forgotten; its neighbours go on."""
    loop, run, x = linear(0), AndersonSolver().begin(), torch.zeros(6, 12, dtype=DOUBLE)
    for t in range(300):
        if t == 7:
            x = x.clone()
            x[2] = math.inf
        fx = loop(x)
        x = run(x, fx)
    torch.testing.assert_close(loop(x), x)


def test_anderson_certifies_the_same_distance():
    """The state that comes out is the block's own output, so Banach's bound holds for it as for plain loops."""
    kw = {"halting": CertifiedHalting(1e-8), "max_loops": 2000, "scale": 2.0}
    plain, fast = looped(**kw), looped(solver="anderson", **kw)
    z, action = inputs(8)
    fixed = plain.trajectory(z, action, 1500)[-1]
    outs = [dynamics(z, action) for dynamics in (plain, fast)]
    for out in outs:
        assert (sample_norm(out.h - fixed) < 1e-8).all() and int(out.loops.max()) < 2000
    assert (outs[1].loops <= outs[0].loops).all() and outs[1].loops.sum() < 0.7 * outs[0].loops.sum()
    assert torch.equal(plain(z, action, 5).h, fast(z, action, 5).h), "an asked-for depth is plain loops"


def test_gradients_pass_through_anderson():
    """At the fixed point they are those of the plain loop."""
    kw = {"halting": CertifiedHalting(1e-11), "max_loops": 2000, "scale": 0.5, "gamma": 0.6}
    z, action = inputs(5)
    grads = []
    for solver in SOLVERS:
        dynamics = looped(solver=solver, **kw)
        grads.append(torch.autograd.grad(dynamics(z, action).z_next.square().sum(), list(dynamics.cell.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# ---- implicit gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("depth", [None, 900, torch.tensor([900, 700, 800, 900, 650])], ids=str)
@pytest.mark.parametrize("mode, skip", [*((mode, False) for mode in CERTIFIED), ("lipsdp", True)])
def test_implicit_gradient_equals_the_unrolled_one(mode, skip, depth, activation, solver):
    kw = {"mode": mode, "skip": skip, "scale": 0.7, "gamma": 0.8, "activation": activation, "max_loops": 900}
    kw["halting"] = CertifiedHalting(1e-13)
    results = []
    for name in GRADIENTS:
        dynamics = looped(gradient=name, solver=solver, **kw)
        if name == "implicit":
            dynamics.gradient = ImplicitGradient(1e-12)
        z, action = (x.requires_grad_() for x in inputs(5))
        out = dynamics(z, action, depth if name == "implicit" else 900)
        loss = (torch.cat([out.z_next, out.h], 1).tanh() * randn(5, Z + D, seed=6)).sum()
        wanted = [z, action, *dynamics.prelude.parameters(), *dynamics.cell.parameters(), *dynamics.coda.parameters()]
        results.append([out.z_next.detach(), *torch.autograd.grad(loss, wanted)])
    for a, b in zip(*results, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=str)
def test_adjoint_is_within_its_certified_distance_in_the_iterations_foretold(shape, tolerance, solver):
    loop = linear(3)
    exact = torch.linalg.inv(torch.eye(12, dtype=DOUBLE) - loop.weight.T)
    before = randn(6, *shape, seed=1).requires_grad_()
    after = loop(before.view(6, 12)).view(6, *shape)
    grad = randn(6, *shape, seed=2) * torch.tensor([1, 1e-6, 1e6, 0, 1, 1], dtype=DOUBLE).view(-1, *[1] * len(shape))
    u, iterations = solve_adjoint(after, before, grad, 0.95, tolerance, SOLVERS[solver]())
    error = sample_norm(u.view(6, 12) - grad.view(6, 12) @ exact)
    assert (error <= tolerance * sample_norm(grad)).all()
    assert iterations <= adjoint_iterations(0.95, tolerance)
    alone = torch.cat([
        solve_adjoint(
            Linear(loop.weight, loop.offset[i : i + 1])(x := before.detach()[i : i + 1].view(1, 12).requires_grad_()),
            x, grad[i : i + 1].view(1, 12), 0.95, tolerance, SOLVERS[solver](),
        )[0] for i in range(6)
    ])  # fmt: skip
    torch.testing.assert_close(u.view(6, 12), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_not_iterated_to_the_end(bad):
    """Its row stays without one, and the others are what they are without it."""
    _, _, loop = case((6,))
    before = randn(5, 6, seed=4).requires_grad_()
    grad = randn(5, 6, seed=5)
    expected, most = solve_adjoint(loop(before), before, grad, 0.95, 1e-6, PlainSolver())
    spoilt = grad.clone()
    spoilt[2, 1] = bad
    found, iterations = solve_adjoint(loop(before), before, spoilt, 0.95, 1e-6, PlainSolver())
    assert iterations <= most and not found[2].isfinite().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(found[others], expected[others])


def test_adjoint_iterations_by_hand():
    """rho^(n + 1) / (1 - rho) <= tolerance: for 1/2, 2^-n <= tolerance."""
    assert [adjoint_iterations(0.5, 2.0**-n) for n in (1, 3, 10)] == [1, 3, 10]
    assert adjoint_iterations(0.0, 0.1) == 1
    for rho in (0.3, 0.9, 0.99):
        n = adjoint_iterations(rho, 1e-5)
        assert rho ** (n + 1) / (1 - rho) <= 1e-5 * (1 + 1e-9) < rho**n / (1 - rho)


def test_adjoint_ends_at_rounding_in_float32():
    """Where the certificate asks for more than float32 can show."""
    dynamics = looped(gradient="implicit", scale=2.0, max_loops=300, halt_tolerance=1e-6).float()
    dynamics.gradient = ImplicitGradient(1e-8)
    z, action = (x.float() for x in inputs(5))
    loop = dynamics.cell.prepare(dynamics.prelude(z, action).detach())
    before = dynamics(z, action).h.detach().requires_grad_()
    _, iterations = solve_adjoint(loop(before), before, torch.ones(5, D), 0.999, 1e-8, PlainSolver())
    assert iterations < 600 < adjoint_iterations(0.999, 1e-8)


def test_implicit_gradients_train_at_the_fixed_point_and_hold_no_graph():
    dynamics = looped(gradient="implicit", max_loops=64, halt_tolerance=1e-3)
    assert dynamics.sample_depth(6) is None
    out = dynamics(*inputs(6))
    names, node = [], out.h.grad_fn
    while node is not None and len(names) < 50:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert len(names) < 9 < int(out.loops.max()), "one application of the block, whatever the loops"
    with torch.no_grad():
        assert not dynamics(*inputs(6)).h.requires_grad
    torch.testing.assert_close(dynamics(*inputs(6)).h, looped(max_loops=64, halt_tolerance=1e-3)(*inputs(6)).h)


def test_norms_are_over_all_but_the_batch():
    h, previous = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    expected = (h - previous).flatten(1).norm(dim=1) / previous.flatten(1).norm(dim=1)
    torch.testing.assert_close(relative_step(h, previous), expected)
