"""A run that is killed and resumed ends with the weights and the metrics of one that was never interrupted, bit by bit."""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines
from safetensors.torch import load_file
from test_bad_input import fails

import sft
import train_dvpo
import train_gvm
from baselines import dpo, grpo, ppo, remax, reward_model

SCRIPTS = {"sft": sft, "gvm": train_gvm, "dvpo": train_dvpo, "ppo": ppo, "grpo": grpo, "remax": remax, "dpo": dpo,
           "reward_model": reward_model}


class Killed(BaseException):
    pass


def kill_at(script, patch, step):
    """The script dies while it writes the log line of a step: half of the line is on disk."""
    write_lines = script.write_lines

    def dying(path, records):
        if path.name == "metrics.jsonl" and records[0].get("step", records[0].get("update")) >= step:
            with open(path, "a") as file:
                file.write(json.dumps(records[0])[:20])
            raise Killed
        write_lines(path, records)

    patch.setattr(script, "write_lines", dying)


def without_times(folder):
    return [{name: value for name, value in record.items() if not name.startswith("seconds")}
            for record in read_lines(Path(folder) / "metrics.jsonl")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_never_interrupted(name, request, again, tmp_path):
    script, args = SCRIPTS[name], request.getfixturevalue(f"{name}_args")
    args = again(args, save_steps=1, **({"steps": 4} if hasattr(args, "steps") else {"log_every": 1}))
    changes = {"tau_pairs": 1} if name == "gvm" else {}
    if name == "dvpo":                                         # a GVM that asks for tau: drawn anew in every step
        train_gvm.main(again(request.getfixturevalue("gvm_args"), output=str(tmp_path / "gvm"), tau_pairs=1))
        changes = {"gvm": str(tmp_path / "gvm")}
    whole = again(args, output=str(tmp_path / "whole"), save_steps=0, **changes)
    script.main(whole)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(script, patch, 3)
        with pytest.raises(Killed):
            script.main(again(args, **changes))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_1", "step_2"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"seconds": ', '"seconds": 1000'))           # it took long
    script.main(again(args, resume=True, **changes))
    seconds = [record["seconds"] for record in read_lines(metrics)]
    assert seconds == sorted(seconds) and seconds[0] > 1000
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "run")
    if hasattr(args, "steps"):
        assert read_lines(tmp_path / "whole" / "rollouts.jsonl") == read_lines(tmp_path / "run" / "rollouts.jsonl")
    if name == "ppo":
        a, b = (load_file(tmp_path / folder / "critic" / "model.safetensors") for folder in ("whole", "run"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_ppo_survives_a_sigkill(ppo_args, again, tmp_path):
    """From the command line, at whatever moment the signal comes after the second checkpoint."""
    args = again(ppo_args, steps=30, batch_size=16, mini_batch_size=8, micro_batch_size=8)
    ppo.main(again(args, output=str(tmp_path / "whole")))
    flags = [word for name in ("model", "reward_model", "data", "steps", "batch_size", "mini_batch_size", "micro_batch_size",
                               "max_response_length", "sample_every") for word in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, "baselines/ppo.py", *flags, "--output", str(tmp_path / "run"), "--save_steps", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoints" / "step_2").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True)
    for folder in ("", "critic"):
        a, b = (load_file(tmp_path / name / folder / "model.safetensors") for name in ("whole", "run"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "run")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_saves_a_checkpoint_and_ends_the_run(name, request, again, tmp_path):
    """Without --save_steps too; and what is resumed from there is the run that was never stopped."""
    script, args = SCRIPTS[name], request.getfixturevalue(f"{name}_args")
    args = again(args, **({"steps": 4} if hasattr(args, "steps") else {"log_every": 1}))
    script.main(again(args, output=str(tmp_path / "whole")))
    write_lines = script.write_lines

    def signalled(path, records):
        write_lines(path, records)
        if path.name == "metrics.jsonl" and records[0].get("step", records[0].get("update")) == 2:
            script.STOP_SIGNALS.append(time.time())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "STOP_SIGNALS", [])
        patch.setattr(script, "write_lines", signalled)
        fails(lambda: script.main(args), "run: stopped by a signal after step 2. The same command with --resume goes on")
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
    script.main(again(args, resume=True))
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a) and without_times(tmp_path / "whole") == without_times(tmp_path / "run")


@pytest.mark.parametrize("number, ignored", [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_real_signals(dvpo_args, tmp_path, number, ignored):
    """From the command line: one line, exit status 1, a checkpoint. A job that was started to ignore Ctrl-C ignores it."""
    flags = [word for name in ("model", "gvm", "data", "batch_size", "mini_batch_size", "micro_batch_size", "max_response_length")
             for word in (f"--{name}", str(getattr(dvpo_args, name)))]
    command = [sys.executable, "train_dvpo.py", *flags, "--steps", "40", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda:
                               signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if ignored:
        assert process.returncode == 0 and (tmp_path / "run" / "model.safetensors").exists()
        return
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert process.returncode == 1 and "Traceback" not in err and "stopping after this step" in out
    assert f"error: {tmp_path / 'run'}: stopped by a signal after step {checkpoint.name.removeprefix('step_')}." in err


def test_a_later_signal_does_not_wait(monkeypatch):
    monkeypatch.setattr(sft, "STOP_SIGNALS", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sft.heed_signals()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)                    # at once: handed on by a launcher
        assert len(sft.STOP_SIGNALS) == 2
        sft.STOP_SIGNALS[0] -= 3
        fails(lambda: signal.raise_signal(signal.SIGTERM), "stopped in the middle of a step. --resume goes on")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_killed_before_the_first_checkpoint_begins_anew(dvpo_args, dvpo_run, again, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(train_dvpo, patch, 2)
        with pytest.raises(Killed):
            train_dvpo.main(again(dvpo_args))
    train_dvpo.main(again(dvpo_args, resume=True))
    assert without_times(tmp_path / "run") == without_times(dvpo_run)


def test_what_a_user_keeps_in_the_folder_stays(dvpo_args, again, tmp_path):
    """Copies of checkpoints, notes, evaluations: neither deleted nor stumbled over."""
    args = again(dvpo_args, save_steps=1, steps=4)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(train_dvpo, patch, 3)
        with pytest.raises(Killed):
            train_dvpo.main(args)
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step_1", tmp_path / "run" / "checkpoints" / "step_1_good")
    (tmp_path / "run" / "notes.jsonl").write_text('{"step": 9}')
    (tmp_path / "run" / "checkpoints" / "step_²").mkdir()      # a digit to Python, but no number
    train_dvpo.main(again(args, resume=True))
    assert (tmp_path / "run" / "notes.jsonl").read_text() == '{"step": 9}'
    kept = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_1_good", "step_2", "step_3", "step_²"]


def test_resume_wants_as_many_processes(dvpo_args, again, tmp_path):
    args = again(dvpo_args, save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(train_dvpo, patch, 2)
        with pytest.raises(Killed):
            train_dvpo.main(args)
    newest = tmp_path / "run" / "checkpoints" / "step_1"
    shutil.copy(newest / "random_states_0.pkl", newest / "random_states_1.pkl")
    fails(lambda: train_dvpo.main(again(args, resume=True)), "checkpoints are of 2 processes")


def test_half_a_checkpoint_leaves_nothing_behind(dvpo_args, again, tmp_path):
    """Of a run of two processes, say, whose file of random numbers would make the next whole checkpoint one of two."""
    args = again(dvpo_args, save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(train_dvpo, patch, 1)
        with pytest.raises(Killed):
            train_dvpo.main(args)
    half = tmp_path / "run" / "checkpoints" / ".step_1"
    half.mkdir(parents=True)
    (half / "random_states_1.pkl").write_bytes(b"half")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(train_dvpo, patch, 3)
        with pytest.raises(Killed):
            train_dvpo.main(again(args, resume=True))
    assert not list((tmp_path / "run").rglob("random_states_1.pkl"))
    train_dvpo.main(again(args, resume=True))


def test_random_numbers_that_cannot_be_set_are_no_secret(dvpo_args, again, tmp_path):
    """accelerate.load_state goes on with whatever random numbers there are."""
    args = again(dvpo_args, save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(train_dvpo, patch, 2)
        with pytest.raises(Killed):
            train_dvpo.main(args)
    file = tmp_path / "run" / "checkpoints" / "step_1" / "random_states_0.pkl"
    states = torch.load(file, weights_only=False)
    torch.save(states | {"random_state": None}, file)
    fails(lambda: train_dvpo.main(again(args, resume=True)), "step_1: no whole checkpoint.*its random numbers were not taken up")
    torch.save(states, file)
    train_dvpo.main(again(args, resume=True))


def test_resume_refuses_what_is_another_run(sft_args, sft_run, again, tmp_path):
    fails(lambda: sft.main(again(sft_args, output=str(sft_run), resume=True)), "is finished")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(sft, patch, 2)
        with pytest.raises(Killed):
            sft.main(again(sft_args))
    fails(lambda: sft.main(again(sft_args)), "holds another run.*--resume or --overwrite")
    fails(lambda: sft.main(again(sft_args, resume=True, lr=0.5)), r"was started with --lr 0\.003")
    sft.main(again(sft_args, resume=True))
    assert (tmp_path / "run" / "model.safetensors").exists()
