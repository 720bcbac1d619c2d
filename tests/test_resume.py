"""A run that is killed and resumed ends with the weights and the metrics of one that was never stopped, bit by bit.

What a kill leaves is made by hand: older checkpoints, logs that go on beyond them, half a line, half a checkpoint. With
make test-resume, and once in make test-all, real kills at random moments.
"""
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, SCRIPTS, equal, fails, read_lines, script, weights, without_seconds

import train_gvm


def same(a, b):
    parts = [path.parent.relative_to(a) for path in a.rglob("model.safetensors") if "checkpoints" not in path.parts]
    assert parts and all(equal(weights(a / part), weights(b / part)) for part in parts)        # PPO: policy and critic
    assert without_seconds(a) == without_seconds(b)
    if (a / "rollouts.jsonl").exists():
        assert read_lines(a / "rollouts.jsonl") == read_lines(b / "rollouts.jsonl")


def killed(whole, run):
    """A copy of a finished run as if it had been killed before its newest checkpoint was renamed."""
    shutil.copytree(whole, run)
    for final in [path for path in run.rglob("model.safetensors") if "checkpoints" not in path.parts]:
        final.unlink()
    older, newest = sorted(path.name for path in (run / "checkpoints").iterdir())              # two are kept
    (run / "checkpoints" / newest).rename(run / "checkpoints" / "unfinished")
    (run / "checkpoints" / "unfinished" / "optimizer.bin").write_bytes(b"half")
    for log in run.glob("*.jsonl"):
        log.write_text(log.read_text() + '{"step": 3, "lo')
    return int(older.removeprefix("step_"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_never_stopped(name, args, tmp_path):
    changes = {"steps": 7, "save_steps": 2} if name in ("dvpo", "ppo", "grpo", "remax") else {"epochs": 2, "save_steps": 6}
    if name == "dvpo":                                         # a GVM that asks for tau: drawn anew in every step
        train_gvm.main(args("gvm", output=tmp_path / "gvm", tau_pairs=1))
        changes |= {"gvm": tmp_path / "gvm"}
    given = args(name, output=tmp_path / "whole", **changes)
    script(name).main(given)
    without = args(name, output=tmp_path / "without", **changes | {"save_steps": 0})
    script(name).main(without)
    same(tmp_path / "without", tmp_path / "whole")             # a checkpoint changes nothing
    step = killed(tmp_path / "whole", tmp_path / "run")
    assert 0 < step < len(read_lines(tmp_path / "whole" / "metrics.jsonl")) - 1
    resumed = replace(given, output=str(tmp_path / "run"), resume=True)
    script(name).main(resumed)
    fails(lambda: script(name).main(resumed), "in use")        # it is finished
    same(tmp_path / "whole", tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()) and len(kept) == 2


def test_killed_before_the_first_checkpoint_begins_anew(args, runs, tmp_path):
    shutil.copytree(runs("dvpo"), tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    script("dvpo").main(args("dvpo", resume=True))
    same(runs("dvpo"), tmp_path / "run")


def test_a_step_depends_on_seed_and_step_alone(args, runs, tmp_path):
    """Fewer steps are the first steps of more."""
    script("dvpo").main(args("dvpo", steps=2))
    assert read_lines(tmp_path / "run" / "rollouts.jsonl") == [row for row in read_lines(runs("dvpo") / "rollouts.jsonl") if row["step"] < 3]


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(int(os.environ.get("KILLS", 1))))
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_any_moment(name, number, args, tmp_path):
    """SIGKILL at a random moment of a run, or just after a checkpoint, or the final files, begin to be written."""
    rng, run = random.Random(f"{name} {number}"), tmp_path / "run"
    sizes = {"steps": 12} if name in ("dvpo", "ppo", "grpo", "remax") else {"epochs": 2}
    given = args(name, save_steps=rng.choice([1, 2]), output=tmp_path / "whole", **sizes)
    script(name).main(given)
    flags = vars(replace(given, output=str(run))).items()
    command = [sys.executable, SCRIPTS[name], *(word for flag, x in flags for word in (f"--{flag}", str(x)))]
    begins, most = rng.choice([("args.json", 4), ("README.md", 0.05), (f"checkpoints/step_{2 * rng.randint(1, 3):08d}", 0.3)])
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run / begins).exists():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, most))
    process.kill()
    process.wait()
    finished = any(run.glob("*.safetensors"))
    done = subprocess.run([*command, "--resume", "true"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == finished == ("is in use" in done.stderr), done.stderr
    same(tmp_path / "whole", run)
