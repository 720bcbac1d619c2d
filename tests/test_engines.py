"""Two processes under DDP, ZeRO-1, -2, -3 and FSDP2 make the updates that one process makes. All on CPU.

`make test` runs DDP with every script, ZeRO-3 and FSDP2 with some; `make test-distributed` the whole table. Of the
online methods the rollouts are replaced by the same ones everywhere, after the real ones were sampled (launch_cpu.py).
"""
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, read_lines
from test_training import weights

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
if os.environ.get("ENGINES") == "all" and not DEEPSPEED:
    raise RuntimeError("ENGINES=all: deepspeed is not installed (pip install -r tests/engines_requirements.txt)")
ONLINE = ["--steps", 4, "--batch_size", 8, "--micro_batch_size", 2, "--max_response_length", 12]
OFFLINE = ["--epochs", 1, "--batch_size", 16, "--micro_batch_size", 4, "--log_every", 2]
# PPO clips policy and critic apart, DeepSpeed both together: no clipping, to compare the rest.
RUNS = {"sft.py": ("sft_args", OFFLINE), "train_gvm.py": ("gvm_args", [*OFFLINE, "--eval_every", 5]),
        "baselines/reward_model.py": ("reward_model_args", [*OFFLINE, "--eval_every", 5]),
        "baselines/dpo.py": ("dpo_args", OFFLINE), "train_dvpo.py": ("dvpo_args", [*ONLINE, "--mini_batch_size", 8]),
        "baselines/ppo.py": ("ppo_args", [*ONLINE, "--mini_batch_size", 8, "--max_grad_norm", 1000]),
        "baselines/grpo.py": ("grpo_args", [*ONLINE, "--mini_batch_size", 8, "--group_size", 4]),
        "baselines/remax.py": ("remax_args", ONLINE)}
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
# As in recipes/, but for two CPU processes. Tiny weights would not be divided by ZeRO-3 at its own threshold.
FSDP2 = """distributed_type: FSDP
mixed_precision: "no"
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_reshard_after_forward: true,
  fsdp_state_dict_type: FULL_STATE_DICT, fsdp_cpu_ram_efficient_loading: false}
"""


def config(engine, folder, bf16=False):
    """The accelerate configuration of an engine, as a file."""
    head = "num_processes: 2\nnum_machines: 1\nmain_process_port: 0\n"      # 0: any free one
    if engine.startswith("zero"):
        (folder / "ds.json").write_text(json.dumps({
            "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0,
                                  "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
            "bf16": {"enabled": bf16}, "fp16": {"enabled": False}}))
        text = f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {folder / 'ds.json'}}}\n"
    else:
        text = FSDP2 if engine == "fsdp2" else 'distributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: "no"\n'
        text = text.replace('"no"', "bf16") if bf16 else text
    (folder / f"{engine}.yaml").write_text(head + text)
    return folder / f"{engine}.yaml"


def launch(engine, script, flags, folder, bf16=False):
    """Runs a script in one process, or in two under an engine. Returns what it printed."""
    command = ["tests/launch_cpu.py", script, *flags]
    if engine != "one":
        command = ["-m", "accelerate.commands.launch", "--config_file", config(engine, folder, bf16), *command]
    cpu = "true" if engine in ("one", "ddp") else "false"
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"ACCELERATE_USE_CPU": cpu, "SAME_ROLLOUTS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    kind = {"one": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    assert f"processes: {1 if engine == 'one' else 2}" in done.stdout and f"engine: {kind}" in done.stdout
    return done.stdout


def flags_of(script, request, output, *more):
    args, given = request.getfixturevalue(RUNS[script][0]), RUNS[script][1]
    inputs = [x for name in ("model", "gvm", "reward_model", "data") if hasattr(args, name) for x in (f"--{name}", getattr(args, name))]
    return [*inputs, *given, "--output", output, *more]


def assert_same(one, two, ignore=()):
    for a, b in zip(read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl"), strict=True):
        for name in a:
            tie = name == "accuracy" and a["loss"] == pytest.approx(math.log(2), abs=1e-5)    # nothing learned: rounding decides
            if isinstance(a[name], (int, float)) and not name.startswith("seconds") and name not in ignore and not tie:
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (name, a, b)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5


@pytest.fixture(scope="module")
def one_process(request, tmp_path_factory):
    """The runs of one process, made when first asked for: one_process(script, more flags) -> folder."""
    made = {}

    def get(script, *more):
        if (script, more) not in made:
            folder = tmp_path_factory.mktemp("one")
            launch("one", script, flags_of(script, request, folder / "run", *more), folder)
            made[script, more] = folder / "run"
        return made[script, more]
    return get


def engines(short):
    """Parameters (script, engine): those of `short` always, the others only in make test-distributed."""
    for script in RUNS:
        for engine in ENGINES:
            marks = [] if (script, engine) in short else [pytest.mark.distributed]
            if engine.startswith("zero"):
                marks.append(pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed"))
            yield pytest.param(script, engine, marks=marks)


SHORT = {(script, "ddp") for script in RUNS} | {("train_gvm.py", "zero3"), ("train_dvpo.py", "zero3"), ("train_gvm.py", "fsdp2"),
                                                ("train_dvpo.py", "fsdp2"), ("baselines/ppo.py", "zero3")}


@pytest.mark.parametrize("script, engine", list(engines(SHORT)))
def test_two_processes_make_the_updates_of_one(script, engine, request, one_process, tmp_path):
    """Losses, KL, gradient norms, held-out accuracies, final weights: within 1e-5."""
    launch(engine, script, flags_of(script, request, tmp_path / "two"), tmp_path)
    recipe = "" if engine == "ddp" else f"--config_file recipes/accelerate_{engine}.yaml "
    assert f"accelerate launch {recipe}--num_processes 2 --mixed_precision no " in (tmp_path / "two" / "README.md").read_text()
    deepspeed_ppo = script == "baselines/ppo.py" and engine.startswith("zero")       # knows the norm of both models only
    assert_same(one_process(script), tmp_path / "two", ("grad_norm", "critic_grad_norm") if deepspeed_ppo else ())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("script, more", [
    ("train_dvpo.py", ("--target_kl", "1e-4", "--ppo_epochs", "3")), ("train_dvpo.py", ("--gradient_checkpointing", "true")),
    ("train_dvpo.py", ("--truncated", "mask")), ("baselines/ppo.py", ("--gradient_checkpointing", "true")),
    ("train_dvpo.py", ("--rollout", "continuous")),
    ("train_gvm.py", ("--gradient_checkpointing", "true", "--tau_pairs", "1"))])
def test_options_under_every_engine(script, more, engine, request, one_process, tmp_path):
    """An update that is not made (target KL), layers that run twice, rows without a token to learn from."""
    if engine.startswith("zero") and not DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    launch(engine, script, flags_of(script, request, tmp_path / "two", *more), tmp_path)
    one = one_process(script, *more)
    if "--target_kl" in more:
        assert {record["updates"] for record in read_lines(one / "metrics.jsonl")} == {1}              # of three
    deepspeed_ppo = script == "baselines/ppo.py" and engine.startswith("zero")
    assert_same(one, tmp_path / "two", ("grad_norm", "critic_grad_norm") if deepspeed_ppo else ())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("script", ["train_gvm.py", "train_dvpo.py", "baselines/ppo.py"])
def test_resume_under_every_engine(script, engine, request, tmp_path):
    """From the checkpoint in the middle of a run to the very weights and metrics of the run that went through."""
    if engine.startswith("zero") and not DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    flags = flags_of(script, request, tmp_path / "run", "--save_steps", 2)
    launch(engine, script, flags, tmp_path)
    through = tmp_path / "through"
    shutil.copytree(tmp_path / "run", through)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda folder: int(folder.name[5:]))
    for gone in [*checkpoints[1:], *(tmp_path / "run" / "critic").glob("*")]:
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    for gone in (tmp_path / "run").glob("*.safetensors"):
        gone.unlink()
    assert f"from step {checkpoints[0].name[5:]} on" in launch(engine, script, [*flags, "--resume"], tmp_path)
    first, second = weights(through), weights(tmp_path / "run")
    assert all((first[name] == second[name]).all() for name in first)
    for a, b in zip(read_lines(through / "metrics.jsonl"), read_lines(tmp_path / "run" / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("seconds")} == {k: v for k, v in b.items() if not k.startswith("seconds")}


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("script, more", [("train_gvm.py", ()), ("baselines/ppo.py", ()), ("baselines/dpo.py", ()), ("train_dvpo.py", ()),
                                          ("train_dvpo.py", ("--frozen_dtype", "float32"))])
def test_bf16_under_every_engine(script, more, engine, request, one_process, tmp_path):
    """The updates stay near those of float32; frozen models are in bfloat16, or as they are told to be."""
    if engine.startswith("zero") and not DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    launch(engine, script, flags_of(script, request, tmp_path / "two", *more), tmp_path, bf16=True)
    for a, b in zip(read_lines(one_process(script) / "metrics.jsonl"), read_lines(tmp_path / "two" / "metrics.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.02)
        if "reward_chosen" in a and a["update"] == 2:          # the policy begins as its reference, in its precision
            assert max(abs(b["reward_chosen"]), abs(b["reward_rejected"])) < 5e-3
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "two").values())
