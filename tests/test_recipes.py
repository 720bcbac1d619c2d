"""recipes/: the paper's settings are Appendix C's and fit their scripts; accelerate reads its files; two machines are one run."""
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, SCRIPTS, fails, read_lines
from test_docs import module_of

PAPER = sorted((ROOT / "recipes").glob("paper_*.yaml"))
RL = {"lr": 2e-6, "max_response_length": 1024, "kl_coef": 0.05}
PPO = RL | {"target_kl": 0.1, "ppo_epochs": 4}
# Appendix C, stage by stage. mini_batch_size: "mini-batch size of 2 ... and 2 gradient accumulation steps".
APPENDIX_C = {
    "sft": {"lr": 2e-5, "warmup_steps": 2, "batch_size": 16, "epochs": 3},
    "train_gvm": {"gamma": 1.0, "batch_size": 32, "max_length": 1024, "lr": 2e-6},
    "train_dvpo": PPO | {"batch_size": 8, "mini_batch_size": 4, "micro_batch_size": 2},
    "ppo": PPO | {"critic_lr": 2e-6, "batch_size": 8, "mini_batch_size": 4, "micro_batch_size": 2},
    "grpo": PPO | {"group_size": 5, "batch_size": 8 * 5, "mini_batch_size": 4 * 5},
    "remax": RL | {"batch_size": 8},
    "dpo": {"lr": 2e-6, "batch_size": 8},
    "reward_model": {"lr": 2e-5, "epochs": 2, "batch_size": 4},
}
# What has to be changed on the paper's 8 GPUs: the recipes' own comment.
ON_8 = {"train_dvpo": ("mini_batch_size", 8), "ppo": ("mini_batch_size", 8), "grpo": ("mini_batch_size", 40), "reward_model": ("batch_size", 8)}


def module(section):
    return module_of({"label_rollouts": "data/label_rollouts.py"}.get(section) or next(
        path for path in SCRIPTS.values() if path.endswith(f"{section}.py")))


def parsed(recipe, section, monkeypatch, *flags):
    """The Args of a stage, read from the recipe as the stage reads them."""
    monkeypatch.setattr(sys, "argv", [f"{section}.py"])
    return module(section).parse_args(module(section).Args, [str(recipe), *flags])


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
def test_every_section_is_read_by_its_script_and_is_appendix_c(recipe, monkeypatch):
    sections = yaml.safe_load(recipe.read_text())
    first = "sft" if "base" in recipe.stem else "label_rollouts"
    assert set(sections) == {*APPENDIX_C, first} - ({"sft"} if first != "sft" else set())
    for section, settings in sections.items():
        args = parsed(recipe, section, monkeypatch)
        assert settings and {name: getattr(args, name) for name in settings} == (
            settings | ({"models": [settings["models"]]} if "models" in settings else {}))
        expected = APPENDIX_C.get(section, {})
        assert {name: getattr(args, name) for name in expected} == expected, section
    assert {"advantage", "whiten"} <= set(sections["train_dvpo"]) and "td_lambda" in sections["train_gvm"]    # said, not left to defaults
    for section in ("ppo", "grpo", "remax"):                   # "the same hyperparameter settings", also what Appendix C leaves open
        assert all(sections[section][name] == sections["train_dvpo"][name] for name in ("max_prompt_length", "steps"))
    named = [settings.get("model", settings.get("models")) for settings in sections.values()]
    if first == "sft":                                         # the later stages start from the output of sft.py
        assert [section for section, name in zip(sections, named) if name] == ["sft"]
    else:
        assert len(set(named)) == 1 and None not in named


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
def test_the_sizes_fit_the_processes_that_the_comment_names(recipe, monkeypatch):
    text = recipe.read_text()
    for section in set(yaml.safe_load(text)) - {"label_rollouts"}:
        for processes in (1, 2, 4, 8):
            monkeypatch.setattr(Accelerator, "num_processes", processes)
            args, start = parsed(recipe, section, monkeypatch), module(section).start_accelerator
            if processes == 8 and section in ON_8:
                fails(lambda: start(args, getattr(args, "mini_batch_size", args.batch_size)), "do not divide into 8 processes")
                flag, total = ON_8[section]
                args = parsed(recipe, section, monkeypatch, f"--{flag}", str(total))
                assert re.search(rf"{section}[\w, ]*: --{flag} {total}", text)
            total = getattr(args, "mini_batch_size", args.batch_size)
            accelerator, micro = start(args, total)
            assert micro * accelerator.gradient_accumulation_steps * processes == total


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


ENGINES = {"ddp": ("MULTI_GPU", 8, {}), "multinode": ("MULTI_GPU", 16, {}),
           "zero1": ("DEEPSPEED", 8, {"zero_stage": 1}), "zero2": ("DEEPSPEED", 8, {"zero_stage": 2}),
           "zero3": ("DEEPSPEED", 8, {"zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True})}


@pytest.mark.parametrize("name", sorted(path.stem.removeprefix("accelerate_") for path in (ROOT / "recipes").glob("accelerate_*.yaml")))
def test_accelerate_reads_its_files(name, monkeypatch):
    """Its own loader refuses unknown keys; its own launcher makes of the file what is meant."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    file, (kind, processes, engine) = str(ROOT / "recipes" / f"accelerate_{name}.yaml"), ENGINES[name]
    config = load_config_from_file(file)
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision, config.use_cpu) == (kind, processes, "bf16", False)
    section = config.deepspeed_config
    assert engine.items() <= section.items() and bool(engine) == bool(section)
    assert all(value == "none" for key, value in section.items() if "offload" in key)
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(section)                         # the scripts set these
    args = launch_command_parser().parse_args(["--config_file", file, "--main_process_port", str(free_port()), "train_gvm.py"])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])   # as it does
    environment = prepare_deepspeed_cmd_env(args)[1] if kind == "DEEPSPEED" else prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("ACCELERATE_USE_DEEPSPEED") == ("true" if engine else None)
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == (str(engine["zero_stage"]) if engine else None)


def two_machines(port):
    """The two commands of docs/scaling.md, "Two machines on one computer", as lists of words, on another port."""
    block = (ROOT / "docs" / "scaling.md").read_text().split("## Two machines on one computer")[1].split("```")[1]
    assert block.strip().startswith("export ACCELERATE_USE_CPU=true\nfor RANK in 0 1; do\n")
    words = block[block.index("accelerate launch") + len("accelerate launch"):block.index(" --output")].replace("\\\n", " ").split()
    return [[{"$RANK": rank, "29500": str(port)}.get(word, word) for word in words] for rank in "01"]


def test_two_machines_on_one_computer_are_one_run(args, tmp_path):
    """One process each, on loopback: the losses of one process with the whole batch."""
    given = vars(args("gvm", output=tmp_path / "two"))
    flags = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    launches = [subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", *words, *flags], cwd=ROOT, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, env=os.environ) for words in two_machines(free_port())]
    try:
        module("train_gvm").main(args("gvm", output=tmp_path / "one"))
        said = [process.communicate(timeout=120) for process in launches]
    finally:
        for process in launches:
            process.kill()
    assert [process.returncode for process in launches] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-3, abs=1e-4) and len(one) > 2
    assert [r["grad_norm"] for r in one] == pytest.approx([r["grad_norm"] for r in two], rel=1e-2)


def test_the_memory_table_is_the_formula():
    """docs/scaling.md: GiB per GPU, from bytes per parameter. (Models that learn, frozen models.)"""
    page = (ROOT / "docs" / "scaling.md").read_text()
    learning = {"DDP": lambda n: 16, "ZeRO-1": lambda n: 4 + 12 / n, "ZeRO-2": lambda n: 2 + 14 / n, "ZeRO-3": lambda n: 16 / n}
    models, table = {"GVM": (1, 0), "DVPO": (1, 2), "PPO": (2, 2)}, page[page.index("| GiB per GPU |"):].split("\n\n")[0].splitlines()
    engines = [re.match(r"(\S+?)(?:, (\d+).*)?$", cell.strip()).groups() for cell in table[0].split("|")[2:-1]]
    for line in table[2:]:
        stage, parameters = re.match(r"\| (\w+), \S+ \(([\d.e]+)\)", line).groups()
        for (engine, gpus), cell in zip(engines, line.split("|")[2:-1]):
            n, (learn, frozen) = int(gpus or 1), models[stage]
            size = learn * learning[engine](n) + frozen * (2 / n if engine == "ZeRO-3" else 2)
            assert cell.strip() == f"{float(parameters) * size / 2 ** 30:.0f}", (line, engine, n)
    assert len(table) == 10 and len(engines) == 8
