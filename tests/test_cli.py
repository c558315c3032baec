"""train.py and evaluate.py as people use them: what is printed and written, and every mistake in one line."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, MultiBinary
from training_tools import CARTPOLE, ROOT, SWINGUP, TINY, forbid_filming, lines, run

import envs
import evaluate
import train
from agents import PlannerAgent, load_agent
from loopwm import config
from loopwm.memory import OutOfMemory, memory_in_words
from loopwm.training import run_dir as run_dir_module
from loopwm.training import trainer as trainer_module
from loopwm.training.checkpoint import CheckpointError, Checkpoints, lock_run

SUMMARY = {
    *("task", "agent", "dynamics", "seed", "frames", "agent_steps", "seconds", "frames_per_second"),
    *(
        "eval_return_mean",
        "eval_return_std",
        "eval_episodes",
        "mean_loops",
        "parameters",
        "versions",
        "commit",
        "finished",
    ),
}
SHORT = [*CARTPOLE, "frames=60", "eval_every=30", "checkpoint_every=30", "log_every=30", "eval_episodes=2"]


@pytest.fixture(autouse=True)
def no_videos(monkeypatch):
    """Filming takes seconds, and needs GL."""
    forbid_filming(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run directory, trained to the end. Not to be written into."""
    run_dir = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_film", lambda self: None)
        assert run(run_dir, *SHORT) == 0
    return run_dir


def complaint(capsys, code: int) -> str:
    """The one line that a failed command left on stderr."""
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n"), captured.err
    assert captured.out == ""
    return captured.err


def evaluation_error(capsys, *arguments) -> str:
    try:
        code = evaluate.main([str(a) for a in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    return complaint(capsys, code)


# ---- train.py -----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_code_is_known_and_its_changes_are_marked(tmp_path, monkeypatch):
    code = tmp_path / "loopwm" / "training" / "run_dir.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    monkeypatch.setattr(run_dir_module, "__file__", str(code))
    assert run_dir_module.commit() is None  # installed without its history
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert run_dir_module.commit() == head
    code.write_text("changed")
    assert run_dir_module.commit() == head + "+"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert run_dir_module.commit() is None


def test_summary_and_metrics(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert summary["task"] == "gym/CartPole-v1" and summary["finished"] is True
    assert summary["frames"] == summary["agent_steps"] == 60 and summary["eval_episodes"] == 2
    assert 1 <= summary["mean_loops"] <= 8 and 0 < summary["frames_per_second"] < 1e6
    parts = {"encoder", "dynamics", "heads", "policy", "value", "novelty", "total"}
    assert set(summary["parameters"]) == parts
    assert summary["parameters"]["total"] == sum(summary["parameters"].values()) / 2
    assert summary["commit"] == run_dir_module.commit()
    assert set(summary["versions"]) >= {"python", "torch", "numpy", "gymnasium", "dm-control"}
    found = lines(finished)
    assert found[-1]["eval/return"] == pytest.approx(summary["eval_return_mean"], abs=1e-3)
    assert all(
        tag.split("/")[0] in ("train", "eval", "loss", "loop", "latent", "time")
        for one in found
        for tag in one
        if tag != "frames"
    )
    assert {p.name for p in finished.iterdir() if not p.name.startswith("events")} == {
        *(".lock", "config.yaml", "metrics.jsonl", "checkpoints", "summary.json")
    }


def test_what_is_printed(tmp_path, capsys):
    assert run(tmp_path / "x", *SHORT) == 0
    out = capsys.readouterr().out
    assert "evaluation " in out and str(tmp_path / "x") in out and f"tensorboard --logdir {tmp_path}" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["task=dmc/cartpole-swingupp"], "'dmc/cartpole-swingup'"),
        (["task=gym/CartPole-v9"], "CartPole-v1"),
        (["task=atari/Pong"], "unknown suite"),
        (["sede=3"], "did you mean seed"),
        (["agent.horzon=3"], "did you mean agent.horizon"),
        (["frames=many"], "frames='many'"),
        (["frames=-5"], "frames"),
        (["dynamics=lopped"], "did you mean looped"),
        (["seed"], "KEY=VALUE"),
        (["num_envs=8", "replay.capacity=20"], "replay.capacity=20: must be at least 24 for num_envs=8"),
        (["replay.capacity=1e12"], "more than the memory holds"),
        (["dynamics.hidden_dim=1e12"], "not enough memory"),
        (["agent.batch_size=1e20"], "must be between 1 and"),
        (["replay.path=/dev/null/x"], "/dev/null/x"),
        (["task=gym/Unsupported-v0"], "MultiBinary"),
    ],
)
def test_a_mistake_is_one_line(words, said, tmp_path, capsys):
    error = complaint(capsys, run(tmp_path / "x", *TINY, *words))
    assert error.startswith("train.py: ") and said in error
    assert not (tmp_path / "x" / "config.yaml").exists(), "a run that never began claims the directory"


def test_a_run_that_never_began_leaves_no_folder_of_its_own_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, "task=gym/CartPole-v9"]) == 2 and not list((tmp_path / "runs").iterdir())
    named = tmp_path / "named"
    named.mkdir()
    assert train.main([*TINY, "task=gym/CartPole-v9", f"run_dir={named}"]) == 2 and named.is_dir()

    def begun(self):
        raise OSError("the disk is full")

    monkeypatch.setattr(trainer_module.Trainer, "run", begun)
    assert train.main([*SHORT]) == 2
    (begun_run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in begun_run.iterdir()} >= {"config.yaml", ".lock"}, "what has begun stays"
    assert "the disk is full" in capsys.readouterr().err


def test_a_file_is_no_run(tmp_path, capsys):
    file = tmp_path / "agent.safetensors"
    file.write_bytes(b"x")
    assert "is a file, and a run is written to a folder" in complaint(capsys, run(file, *TINY, "resume=true"))
    assert file.read_bytes() == b"x"


def test_memory_that_ends_while_training(tmp_path, capsys, monkeypatch):
    """As that for a batch or a plan may: one line, and what the run had is kept."""
    too_much = 2**47  # bytes, more than an address space holds

    update = PlannerAgent.update
    with monkeypatch.context() as patch:  # after the checkpoint at frame 30

        def grown(self, replay):
            return update(self, replay) if self.acted < 40 else torch.empty(too_much, dtype=torch.uint8)

        patch.setattr(PlannerAgent, "update", grown)
        assert run(tmp_path / "x", *SHORT) == 2
    *_, last = capsys.readouterr().err.splitlines()  # after the bar
    assert last.startswith("train.py: not enough memory for these settings") and str(too_much) in last
    assert Checkpoints(tmp_path / "x").frames() == [30]
    assert run(tmp_path / "x", *SHORT, "resume=true") == 0
    with monkeypatch.context() as patch:  # in an evaluation: it is made again
        patch.setattr(
            trainer_module, "rollout", memory_in_words()(lambda *_, **__: torch.empty(too_much, dtype=torch.uint8))
        )
        assert run(tmp_path / "x", *SHORT, "frames=90", "resume=true") == 2
    assert run(tmp_path / "x", *SHORT, "frames=90", "resume=true") == 0
    assert [one["frames"] for one in lines(tmp_path / "x") if "eval/return" in one] == [30, 60, 90]


@pytest.mark.parametrize("error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory.")])
def test_memory_in_words(error):
    with pytest.raises(OutOfMemory, match="not enough memory for these settings"), memory_in_words():
        raise error


def test_another_mistake_stays_what_it_is():
    with pytest.raises(RuntimeError, match="sizes do not match"), memory_in_words():
        raise RuntimeError("sizes do not match")


gymnasium.register("Unsupported-v0", lambda **_: UnsupportedEnv())


class UnsupportedEnv(gymnasium.Env):
    observation_space, action_space = MultiBinary(3), Box(-1, 1, (1,), np.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert "device=cpu" in complaint(capsys, run(tmp_path, *SHORT, "device=cuda"))


def test_gl_backend_that_does_not_load(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise envs.RenderingUnavailable("MUJOCO_GL=egl does not load")

    monkeypatch.setattr(envs, "make_vector_env", fail)
    assert "MUJOCO_GL=egl does not load" in complaint(capsys, run(tmp_path, *SHORT))


def test_a_corrected_command_goes_through(tmp_path, capsys):
    complaint(capsys, run(tmp_path, *SHORT, "task=gym/CartPole-v9"))
    assert run(tmp_path, *SHORT) == 0


def test_directory_in_use(tmp_path, capsys):
    with lock_run(tmp_path):
        assert "in use by another process" in complaint(capsys, run(tmp_path, *SHORT))
        assert "in use by another process" in complaint(capsys, run(tmp_path, *SHORT, "resume=true"))
    assert run(tmp_path, *SHORT) == 0


def test_who_keeps_an_error_keeps_no_folder(tmp_path, monkeypatch):
    """A notebook holds the last exception, and with it what its frames hold: a run, a replay, a log's threads."""
    kept, words = [], [*SHORT, f"run_dir={tmp_path / 'a'}", f"replay.path={tmp_path / 'rows'}"]

    def failing(*_):
        raise trainer_module.Diverged("of this test")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_log", failing)
        for again in ([], ["resume=true"]):
            with pytest.raises(trainer_module.Diverged) as raised:
                train.train(config.load_config([*words, *again]))
            kept.append(raised)
        assert not [thread for thread in threading.enumerate() if "EventLogger" in type(thread).__name__]
    with pytest.raises(CheckpointError, match="add resume=true") as raised:
        train.train(config.load_config(words))
    kept.append(raised)
    assert train.train(config.load_config([*words, "resume=true"]))[0]["finished"]


def test_an_environment_that_cannot_say_where_it_is_keeps_no_checkpoint_from_being_written(
    tmp_path, monkeypatch, capsys
):
    """As where its process was ended by the same SIGTERM."""

    def gone(_):
        raise envs.TaskError("the process of an environment has ended")

    monkeypatch.setattr(envs, "vector_env_state", gone)
    assert run(tmp_path, *SHORT) == 0
    assert Checkpoints(tmp_path).load(60)["env"] == []
    assert "state is not in this checkpoint: the process of" in capsys.readouterr().out


def test_evaluations_repeat_actions_as_training_does(tmp_path, capsys):
    """Of 1000 control steps, by the trainer and by evaluate.py."""
    assert run(tmp_path, *SWINGUP, "frames=100", "eval_every=100") == 0
    assert [line["eval/length"] for line in lines(tmp_path) if "eval/length" in line] == [50.0]
    capsys.readouterr()
    assert evaluate.main([str(tmp_path), "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval_length_mean"] == 50.0


def test_directory_that_holds_a_run(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert "resume=true" in complaint(capsys, run(finished, *SHORT))
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.parametrize(
    "change, key",
    [
        ("seed=4", "seed=0 (now 4)"),
        ("agent.discount=0.9", "agent.discount=0.99 (now 0.9)"),
        ("task=gym/Acrobot-v1", "task.id"),
        ("num_envs=2", "num_envs=1 (now 2)"),
    ],
)
def test_resume_with_other_settings(change, key, finished, capsys):
    before = (finished / "config.yaml").read_text()
    assert key in complaint(capsys, run(finished, *SHORT, change, "resume=true"))
    assert (finished / "config.yaml").read_text() == before


def test_resume_may_change_how_long_and_how_often(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    free = [
        "frames=70",
        "eval_every=40",
        "eval_episodes=1",
        "log_every=10",
        "checkpoint_every=20",
        "threads=1",
    ]
    assert run(tmp_path / "x", *SHORT, *free, "video_every=50", "resume=true") == 0
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["frames"] == 70


def test_resume_of_what_never_saved_starts_anew(tmp_path):
    """Killed before the first checkpoint: the same command with resume=true must not stop at that."""
    assert run(tmp_path / "new", *SHORT, "resume=true") == 0
    assert run(tmp_path / "old", *SHORT) == 0
    shutil.rmtree(tmp_path / "old" / "checkpoints")
    assert run(tmp_path / "old", *SHORT, "resume=true") == 0
    for one, other in zip(lines(tmp_path / "new"), lines(tmp_path / "old"), strict=True):
        assert {k: v for k, v in one.items() if "time/" not in k} == {
            k: v for k, v in other.items() if "time/" not in k
        }


def test_resume_says_that_there_is_nothing_to_resume(finished, tmp_path, capsys):
    assert run(tmp_path / "mistyped", *SHORT, "frames=10", "resume=true") == 0
    assert f"{tmp_path / 'mistyped'} holds no run to resume" in capsys.readouterr().err
    shutil.copytree(finished, tmp_path / "x")
    assert run(tmp_path / "x", *SHORT, "resume=true") == 0
    assert "to resume" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["resume=true"]])
def test_checkpoints_of_unknown_settings_are_not_gone_on_from(words, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    (tmp_path / "x" / "config.yaml").unlink()
    assert "no config.yaml" in complaint(capsys, run(tmp_path / "x", *SHORT, *words))
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_help_lists_every_setting_with_its_default_and_meaning(capsys):
    assert train.main(["--help"]) == 0
    said = capsys.readouterr().out
    for key, default in config.flatten(config.load_config(["task=dmc/x-y"])).items():
        shown = key if key.startswith("task.") and "repeat" not in key else f"{key}={default}"
        assert re.search(rf"^  {re.escape(shown)}\S* +\S", said, re.MULTILINE), key


def test_sizes_that_no_model_has_are_one_line(tmp_path, capsys):
    words = ["dynamics=deep_thin", "dynamics.hidden_dim=1", "dynamics.block_dim=1", "dynamics.mean_loops=8"]
    assert "dynamics=deep_thin: " in complaint(capsys, run(tmp_path, *SHORT, *words))


def test_resume_finds_the_newest_run_of_the_same_settings(tmp_path, monkeypatch):
    """`python train.py` names its directory; so `python train.py resume=true` has to find it."""
    monkeypatch.chdir(tmp_path)
    assert train.main([*SHORT]) == 0
    (first,) = Path("runs").iterdir()
    assert train.main([*SHORT, "frames=70", "resume=true"]) == 0
    assert list(Path("runs").iterdir()) == [first]
    assert json.loads((first / "summary.json").read_text())["frames"] == 70
    assert train.main([*SHORT, "agent.discount=0.9", "resume=true"]) == 0  # another run
    assert len(list(Path("runs").iterdir())) == 2


def test_a_program_trains_as_the_command_line_does(tmp_path):
    """What it returns is the run's; what is wrong is raised, and nothing is left locked."""
    words = [*SHORT, f"run_dir={tmp_path / 'x'}"]
    summary, run_dir = train.train(config.load_config(words))
    assert run_dir == tmp_path / "x" and summary == json.loads((run_dir / "summary.json").read_text())
    assert summary["finished"] and load_agent(run_dir)[2] == summary["frames"]
    with pytest.raises(CheckpointError, match="already holds a run"):
        train.train(config.load_config(words))
    assert train.train(config.load_config([*words, "frames=70", "resume=true"]))[0]["frames"] == 70
    assert run(tmp_path / "y", *SHORT, "frames=70") == 0
    ours, theirs = (load_agent(tmp_path / name)[0].policy.state_dict() for name in "xy")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("text", ["", "task: [", "seed: 1\n", "frames: x\n"])
def test_broken_config_of_a_run(text, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    (tmp_path / "x" / "config.yaml").write_text(text)
    assert "config.yaml" in complaint(capsys, run(tmp_path / "x", *SHORT, "resume=true"))
    assert "config.yaml" in evaluation_error(capsys, tmp_path / "x")


@pytest.mark.parametrize("where", ["/dev/null/run", "/proc/run"])
def test_directory_that_cannot_be_written(where, capsys):
    assert where in complaint(capsys, run(Path(where), *SHORT))


@pytest.mark.parametrize("words", [["agent.seed_steps=5000"], ["frames=1"], ["num_envs=7", "frames=10"]])
def test_too_short_to_learn_still_finishes(words, tmp_path, capsys):
    assert run(tmp_path, *SHORT, *words) == 0
    assert "nothing was learnt: " in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] is True and summary["eval_return_mean"] > 0
    assert summary["mean_loops"] is None and "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert evaluate.main([str(tmp_path), "--episodes", "1"]) == 0


def test_importing_train_is_cheap():
    """A second at the start counts against every short run."""
    late = "imageio", "matplotlib", "dm_control", "mujoco", "hydra", "omegaconf", "pandas", "tensorflow"
    code = f"import sys, train, evaluate; print(sorted(set(sys.modules) & set({late})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done


# ---- evaluate.py --------------------------------------------------------------------------------------


def test_json_output(finished, capsys):
    assert evaluate.main([str(finished), "--episodes", "3", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1 and captured.err == ""
    assert result["eval_episodes"] == len(result["eval_returns"]) == 3 and result["frames"] == 60
    assert result["eval_return_mean"] == pytest.approx(np.mean(result["eval_returns"]))


def test_evaluation_repeats_and_has_its_own_seeds(finished, capsys):
    def returns(*words):
        assert evaluate.main([str(finished), "--episodes", "4", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["eval_returns"]

    assert returns() == returns()
    assert returns("--seed", "1") != returns("--seed", "2")


def test_loops_and_samples(finished, capsys):
    words = [str(finished), "--episodes", "1", "--json", "--samples", "24"]
    for loops in (1, 8, 20, 0):
        assert evaluate.main([*words, "--loops", str(loops)]) == 0
        assert json.loads(capsys.readouterr().out)["loops"] == (loops or "adaptive")
    assert evaluate.main([str(finished), "--episodes", "1", "--samples", "0"]) == 0
    assert "gym/CartPole-v1  return" in capsys.readouterr().out
    assert evaluate.main([*words[:-1], "0"]) == 0
    assert json.loads(capsys.readouterr().out)["loops"] is None  # nothing is predicted


def test_loops_are_refused_where_the_policy_alone_acts(finished, capsys):
    assert "the policy alone acts" in evaluation_error(capsys, finished, "--samples", "0", "--loops", "3")


def test_a_checkpoint_of_something_else(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    foreign, misfit = "is not one of this program", "does not fit its config"
    for state, said in (
        ([1, 2], foreign),
        (torch.zeros(3), foreign),
        ({"agent": {}}, foreign),
        ({"dims": [4, "2", True], "agent": {}}, misfit),
    ):
        torch.save(state, tmp_path / "x" / "checkpoints" / "00000060" / "state.pt")
        assert said in evaluation_error(capsys, tmp_path / "x")


def test_a_task_that_has_changed_its_observations(finished, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "space_dims", lambda venv: (9, 2, True))
    assert "other observations or actions" in evaluation_error(capsys, finished)


def test_an_evaluation_ends_where_the_task_sets_no_limit(tmp_path, capsys, monkeypatch):
    """CliffWalking, whose agent need not arrive: cut at the longest evaluation, in training and after it."""
    for program in (envs, evaluate):
        monkeypatch.setattr(program, "LONGEST_EVALUATION", 30)
    assert run(tmp_path, *SHORT[len(CARTPOLE) :], "task=gym/CliffWalking-v1", "eval_every=40") == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path), "--episodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval_length_mean"] <= 30


def test_an_earlier_checkpoint(finished, capsys):
    def frames(*words):
        assert evaluate.main([str(finished), "--episodes", "1", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["frames"]

    assert frames() == frames("--frames", "60", "--device", "cpu") == 60
    assert frames("--frames", "30") == 30
    assert "no checkpoint at frame 40, but at 30, 60" in evaluation_error(capsys, finished, "--frames", "40")


@pytest.mark.parametrize(
    ("device", "said"), [("cuda:x", "cuda:N"), ("cuda:", "cuda:N"), ("cuda:3", "the last is cuda:0")]
)
def test_a_device_that_is_none_where_there_is_a_gpu(device, said, finished, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert said in evaluation_error(capsys, finished, "--device", device)


def test_a_broken_checkpoint_names_an_earlier_one(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    (tmp_path / "x" / "checkpoints" / "00000060" / "state.pt").write_bytes(b"torn")
    said = evaluation_error(capsys, tmp_path / "x")
    assert "cannot be read" in said and "take frame 30 (evaluate.py --frames), or delete" in said
    (tmp_path / "x" / "checkpoints" / "00000030" / "state.pt").write_bytes(b"torn")
    assert "take frame" not in evaluation_error(capsys, tmp_path / "x", "--frames", "30")


def test_an_environment_with_arguments_and_how_many_checkpoints_it_keeps(tmp_path, monkeypatch, capsys):
    """Trained in a folder that its task names, resumed by the same command, evaluated."""
    monkeypatch.chdir(tmp_path)
    words = [*TINY, *SHORT[len(CARTPOLE) :], "task=gym/Pendulum-v1?max_episode_steps=20&g=5"]
    assert train.main([*words, "checkpoint_every=10", "keep_checkpoints=4"]) == 0
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("gym-Pendulum-v1-max_episode_steps=20-g=5-looped-s0-")
    assert Checkpoints(run_dir).frames() == [30, 40, 50, 60]
    assert train.main([*words, "keep_checkpoints=1", "frames=80", "resume=true"]) == 0
    assert Checkpoints(run_dir).frames() == [80]
    capsys.readouterr()
    torch.set_num_threads(2)
    assert evaluate.main([str(run_dir), "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval_length_mean"] == 20 and torch.get_num_threads() == 1


def test_a_control_has_no_loops_to_choose(tmp_path, capsys):
    assert run(tmp_path, *SHORT, "dynamics=stacked") == 0
    capsys.readouterr()
    assert "dynamics=stacked" in evaluation_error(capsys, tmp_path, "--loops", "8")
    assert evaluate.main([str(tmp_path), "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loops"] is None


def test_evaluation_writes_nothing_into_the_run(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert evaluate.main([str(finished), "--episodes", "1"]) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_evaluation_while_training(finished):
    with lock_run(finished):
        assert evaluate.main([str(finished), "--episodes", "1"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        *(["--episodes", "0"], ["--episodes", "-1"], ["--episodes", "x"], ["--loops", "-1"], ["--loops", "²"]),
        *(["--samples", "-1"], ["--seed", "-1"], ["--unknown"], ["--video"]),
        *(["--frames", "0"], ["--frames", "31"], ["--device", "tpu"], ["--device", "mps"], ["--device", "cpu:7"]),
        *(["--device", "cuda:99"], ["--device", "cuda:x"]),
    ],
)
def test_a_wrong_argument_is_one_line(words, finished, capsys):
    assert evaluation_error(capsys, finished, *words).startswith("evaluate.py: ")


def test_no_argument(capsys):
    assert "run_dir" in evaluation_error(capsys)


def test_not_a_run(tmp_path, capsys):
    assert "is not a run directory" in evaluation_error(capsys, tmp_path)
    assert "is not a run directory" in evaluation_error(capsys, tmp_path / "absent")
    shutil.copy(ROOT / "README.md" if (ROOT / "README.md").exists() else ROOT / "LICENSE", tmp_path / "file")
    assert "is not a run directory" in evaluation_error(capsys, tmp_path / "file")


def test_broken_or_absent_checkpoint(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    path = tmp_path / "x" / "checkpoints" / "00000060" / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    error = evaluation_error(capsys, tmp_path / "x")
    assert "cannot be read" in error and f"delete {path.parent}" in error
    shutil.rmtree(path.parent)  # as it says
    assert evaluate.main([str(tmp_path / "x"), "--episodes", "1"]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "x" / "checkpoints")
    assert "no complete checkpoint" in evaluation_error(capsys, tmp_path / "x")


def test_checkpoint_of_another_agent(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    config = tmp_path / "x" / "config.yaml"
    config.write_text(config.read_text().replace("latent_dim: 8", "latent_dim: 9"))
    assert "does not fit" in evaluation_error(capsys, tmp_path / "x")
    code = run(tmp_path / "x", *SHORT, "encoder.latent_dim=9", "resume=true")
    assert "is of another agent" in complaint(capsys, code)
    assert Checkpoints(tmp_path / "x").frames() == [30, 60]


def test_video_without_gl(finished, tmp_path, capsys, monkeypatch):
    """The numbers come first, then one line on what to install."""
    make = evaluate.make_vector_env

    def no_gl(*args, render=False, **kwargs):
        if render:
            raise envs.RenderingUnavailable("cannot render: get it with `apt-get install libegl1`")
        return make(*args, **kwargs)

    monkeypatch.setattr(evaluate, "make_vector_env", no_gl)
    code = evaluate.main([str(finished), "--episodes", "1", "--json", "--video", str(tmp_path / "out.mp4")])
    captured = capsys.readouterr()
    assert code == 2 and json.loads(captured.out)["eval_episodes"] == 1
    assert captured.err.count("\n") == 1 and "no video" in captured.err and "apt-get install" in captured.err
