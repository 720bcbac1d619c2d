"""Two processes under DDP, ZeRO-1, -2 and -3 make the updates that one process makes. All on CPU.

`make test` runs DDP with every script and ZeRO-3 with some; `make test-all` the whole table. Of the online methods the
rollouts are replaced by the same ones everywhere, after the real ones were sampled (launch_cpu.py).
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, make_args, read_lines, script, weights, without_seconds
from launch_cpu import same_rollouts

ONLINE = {"steps": 3, "batch_size": 8, "micro_batch_size": 2, "max_response_length": 12}
PPO = ONLINE | {"mini_batch_size": 8}                          # one: each process shuffles its own rows
OFFLINE = {"epochs": 1, "batch_size": 16, "micro_batch_size": 4}
RUNS = {"dvpo": PPO, "ppo": PPO, "grpo": PPO | {"group_size": 4}, "remax": ONLINE}
ENGINES = ["ddp", "zero1", "zero2", "zero3"]
SHORT = {"ddp": list(SCRIPTS), "zero1": [], "zero2": [], "zero3": ["gvm", "dvpo", "ppo"]}      # what `make test` runs


def config(engine, folder, bf16=False):
    """The accelerate configuration of an engine, as in recipes/ but for two CPU processes, as a file."""
    head = "num_processes: 2\nnum_machines: 1\nmain_process_port: 0\n"         # 0: any free one
    if engine == "ddp":
        text = f"distributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: '{'bf16' if bf16 else 'no'}'\n"
    elif engine == "fsdp":
        text = "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}\n"
    else:
        (folder / "ds.json").write_text(json.dumps({           # tiny weights would not be divided at the own threshold
            "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0,
                                  "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
            "bf16": {"enabled": bf16}, "fp16": {"enabled": False}}))
        text = f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {folder / 'ds.json'}}}\n"
    (folder / f"{engine}.yaml").write_text(head + text)
    return folder / f"{engine}.yaml"


def launch(engine, jobs, folder, bf16=False):
    """Runs scripts, one after the other, in two processes under an engine. jobs: [(name, Args), ...]"""
    words = []
    for name, given in jobs:
        words += ["--", SCRIPTS[name], *[word for field, value in vars(given).items() for word in (f"--{field}", value)]]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config(engine, folder, bf16), "tests/launch_cpu.py", *words[1:]]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {
        "ACCELERATE_USE_CPU": "true" if engine == "ddp" else "false", "SAME_ROLLOUTS": "1"})
    kind = {"ddp": "MULTI_CPU", "fsdp": "FSDP"}.get(engine, "DEEPSPEED")
    assert "processes: 2" in done.stdout and f"engine: {kind}" in done.stdout, done.stderr[-3000:]
    return done


@pytest.fixture
def run_two(args, tmp_path):
    """run_two("zero3", "ppo", field=value, ...) -> the folder of a run in two processes."""
    def run(engine, name, bf16=False, **changes):
        given = args(name, **RUNS.get(name, OFFLINE) | {"output": tmp_path / "two"} | changes)
        done = launch(engine, [(name, given)], tmp_path, bf16)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / "two"
    return run


@pytest.fixture(scope="module")
def together(world, runs, tmp_path_factory):
    """together("ddp", "sft") -> (the folder of a run in two processes, stderr): all scripts in one launch, to save time."""
    made = {}

    def get(engine, name):
        group = SHORT[engine] if name in SHORT[engine] else [other for other in SCRIPTS if other not in SHORT[engine]]
        if (engine, *group) not in made:
            folder = tmp_path_factory.mktemp(engine)
            jobs = [(other, make_args(world, runs, other, folder / other, RUNS.get(other, OFFLINE))) for other in group]
            made[engine, *group] = folder, launch(engine, jobs, folder).stderr
        folder, stderr = made[engine, *group]
        return folder / name, stderr
    return get


@pytest.fixture
def run_one(args, tmp_path, monkeypatch):
    """run_one("ddp", "ppo", field=value, ...) -> the folder of a run in this process."""
    def run(engine, name, **changes):
        if name == "ppo" and engine != "ddp":                  # as in launch_cpu.py
            monkeypatch.setattr(script(name), "MAX_GRAD_NORM", 1000.0)
        if hasattr(script(name), "rollout"):
            monkeypatch.setattr(script(name), "rollout", same_rollouts(script(name).rollout))
        script(name).main(args(name, **RUNS.get(name, OFFLINE) | {"output": tmp_path / "one"} | changes))
        return tmp_path / "one"
    return run


def assert_same(one, two, ignore=()):
    for a, b in zip(without_seconds(one), without_seconds(two), strict=True):
        for name in set(a) - set(ignore):
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), (name, a, b)
    for part in {path.parent.relative_to(one) for path in one.rglob("model.safetensors")}:
        first, second = weights(one / part), weights(two / part)
        assert first.keys() == second.keys() and max((first[key] - second[key]).abs().max() for key in first) < 1e-4
    if (one / "rollouts.jsonl").exists():
        first, second = (sorted((row["step"], row["prompt"], row["response"]) for row in read_lines(run / "rollouts.jsonl")) for run in (one, two))
        assert first == second


def ignored(name, engine):
    """At first nothing is learned, and rounding decides whether an answer is better; DeepSpeed knows one norm of PPO's two models."""
    return {"dpo": ["accuracy"], "reward_model": ["accuracy"]}.get(name, ["grad_norm", "critic_grad_norm"] if name == "ppo" and engine != "ddp" else [])


@pytest.mark.parametrize("name, engine", [pytest.param(name, engine, marks=() if name in SHORT[engine] else pytest.mark.distributed)
                                          for name in SCRIPTS for engine in ENGINES])
def test_two_processes_make_the_updates_of_one(name, engine, run_one, together):
    """Losses, KL, gradient norms, held-out accuracies, final weights."""
    two, stderr = together(engine, name)
    assert (two / "model.safetensors").exists(), stderr[-3000:]
    assert_same(run_one(engine, name), two, ignored(name, engine))


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name, changes", [
    ("dvpo", {"target_kl": 1e-4, "ppo_epochs": 3}), ("dvpo", {"gradient_checkpointing": True}), ("ppo", {"gradient_checkpointing": True}),
    ("gvm", {"gradient_checkpointing": True, "tau_pairs": 1})])
def test_options_under_every_engine(name, changes, engine, run_one, run_two):
    """Epochs that are skipped (target KL), layers that run twice."""
    one = run_one(engine, name, **changes)
    if "target_kl" in changes:
        assert {record["updates"] for record in read_lines(one / "metrics.jsonl")} == {2}                # of three
    assert_same(one, run_two(engine, name, **changes), [*ignored(name, engine), "tau_pairs"])           # of process 0's rows


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gvm", "dvpo", "ppo"])
def test_resume_under_every_engine(name, engine, args, run_two, tmp_path):
    """From the checkpoint in the middle of a run to the very weights and metrics of the run that went through."""
    changes = {"save_steps": 4} if name == "gvm" else {"save_steps": 1}
    through = run_two(engine, name, **changes).rename(tmp_path / "through")
    shutil.copytree(through, tmp_path / "two")
    for path in [*(tmp_path / "two").glob("*.safetensors"), *(tmp_path / "two").glob("critic/*.safetensors")]:
        path.unlink()
    shutil.rmtree(sorted((tmp_path / "two" / "checkpoints").iterdir())[-1])
    two = run_two(engine, name, resume=True, **changes)
    assert without_seconds(two) == without_seconds(through)
    first, second = weights(through), weights(two)
    assert all((first[key] == second[key]).all() for key in first)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gvm", "dvpo", "ppo", "dpo"])
def test_bf16_under_every_engine(name, engine, run_one, run_two):
    """The updates stay near those of float32."""
    for a, b in zip(read_lines(run_one(engine, name) / "metrics.jsonl"), read_lines(run_two(engine, name, bf16=True) / "metrics.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.03)


@pytest.mark.distributed
def test_fsdp_is_refused(args, tmp_path):
    done = launch("fsdp", [("gvm", args("gvm"))], tmp_path)
    assert done.returncode != 0 and "this is FSDP: use DDP or ZeRO" in done.stderr
