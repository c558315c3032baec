"""The benchmark of deferred decoding: what each way asks of a rollout, and the command from end to end."""

import json

import numpy as np
import pytest
import torch

from benchmarks import deferred_decoding as benchmark
from benchmarks import lab
from benchmarks.vector_tasks import Control


@pytest.fixture
def batch():
    model = benchmark.make_model(5, 2, "certified", seed=0)
    draw = torch.Generator().manual_seed(0)
    obs, actions, after = (torch.randn(shape, generator=draw) for shape in ((7, 5), (3, 7, 2), (3, 7, 5)))
    return model, obs, actions, after


def loss(batch, **asked) -> float:
    model, obs, actions, after = batch
    return float(benchmark.way_loss(model, benchmark.Way(**asked), obs, actions, after, 2).detach())


def test_ways_ask_for_all_observations_the_last_or_the_latents_too(batch):
    model, obs, actions, after = batch
    with torch.no_grad():
        z = model.rollout(model.encode(obs), actions, 2).z[1:]
        decoded, target = model.decoder.loss(z, after), model.encode(after)
    assert loss(batch) == pytest.approx(float(decoded[-1].mean()))
    assert loss(batch, every=True) == pytest.approx(float(decoded.mean()))
    latent = float((z - target)[:-1].square().mean())
    assert loss(batch, latent=3.0) == pytest.approx(loss(batch) + 3.0 * latent, rel=1e-5)
    drift = float((z - target).mean(0).square().mean())
    assert loss(batch, every=True, drift=2.0) == pytest.approx(loss(batch, every=True) + 2.0 * drift, rel=1e-5)


def test_a_path_longer_than_that_of_what_was_seen_costs_something(batch):
    model, obs, actions, after = batch
    after = obs + 0.1 * after  # so that latents hardly move
    with torch.no_grad():
        start = model.encode(obs).unsqueeze(0)
        ends = model.rollout(start[0], actions, 2).z[1:], model.encode(after)
        taken, real = (torch.cat([start, z]).diff(dim=0).norm(dim=-1) for z in ends)  # (K, B) lengths
    beyond = float((taken.sum(0) - len(taken) * real.mean()).clamp_min(0.0).mean())
    assert beyond > 0.0
    near = model, obs, actions, after
    assert loss(near, path=5.0) == pytest.approx(loss(near) + 5.0 * beyond, rel=1e-5)


def test_no_gradient_reaches_the_targets(batch):
    model, obs, actions, after = batch
    after = after.requires_grad_()
    benchmark.way_loss(model, benchmark.Way(latent=1.0, drift=1.0), obs, actions, after, 2).backward()
    assert not after.grad[:-1].any()  # the last is what is decoded
    assert after.grad[-1].any()


def test_the_verdict_counts_seeds():
    def row(way: str, seed: int, error: float) -> dict:
        return {"way": way, "seed": seed, "seconds": 1.0, "error": {"1 step": error}}

    errors = dict.fromkeys(benchmark.WAYS, (0.5, 0.5)) | {"deferred": (0.4, 0.7)}
    rows = [row(way, seed, error) for way, both in errors.items() for seed, error in enumerate(both)]
    headline, sentence = benchmark.verdict(rows)
    assert "deferred: +10% at 1 step (lower on 1 of 2 seeds)" in sentence
    assert "last: +0% at 1 step (lower on 0 of 2 seeds)" in sentence
    assert headline["deferred: error, 1 step"]["value"] == 0.55


def test_the_command_trains_every_way_and_keeps_what_it_has_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(Control, "collected", {lab.TRAINING: 120, lab.VALIDATION: 80, lab.TEST: 120})
    words = ["--quick", "--steps", "2", "--jobs", "1", "--runs", str(tmp_path), "--json", str(tmp_path / "x.json")]
    benchmark.main(words)
    result = json.loads((tmp_path / "x.json").read_text())
    assert [row["way"] for row in result["rows"]] == list(benchmark.WAYS)
    assert all(np.isfinite(list(row["error"].values())).all() for row in result["rows"])
    assert set(result["rows"][0]["error"]) == {"1 step", "5 steps", "20 steps", "50 steps"}
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_2_100.json")}
    assert len(kept) == len(benchmark.WAYS)
    benchmark.main(words)  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == result["rows"]
