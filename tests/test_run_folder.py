"""What a run leaves and sends: a model card that works as it stands, and with --log_with the metrics in a tracker."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate.tracking
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType
from conftest import ROOT, read_lines
from test_bad_input import fails
from test_docs import parse
from test_resume import SCRIPTS, Killed, kill_at
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import atlas
import sft
import train_dvpo
import train_gvm

KINDS = {"gvm": "ForTokenClassification", "reward_model": "ForSequenceClassification"}


# ---- model cards ----
def read_card(folder):
    """README.md of a run folder -> (front matter, {metric: printed value}, Python block, command)."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    front, _, text = text.removeprefix("---\n").partition("---\n")
    numbers = dict(re.findall(r"^\| (.+?) \| ([-\d.e+]+) \|$", text, re.M))
    python, command = re.search(r"```python\n(.*?)```", text, re.S)[1], re.search(r"\n```\n(.+)\n```\n$", text)[1]
    return yaml.safe_load(front), numbers, python, command


def flat(record):
    """The record of train_gvm.py with {"pair_accuracy": {"mean": x, ...}} as "pair_accuracy/mean": x, ..."""
    nested = {name: value for name, value in record.items() if isinstance(value, dict)}
    return {name: value for name, value in record.items() if name not in nested} | {
        f"{name}/{key}": value for name, values in nested.items() for key, value in values.items()}


def loaded(python):
    """What the card's Python block, run as it stands, calls `model`."""
    names = {}
    exec(python, names)
    assert names["tokenizer"].chat_template
    return names["model"]


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo/critic"])
def test_the_card_loads_the_model_and_names_its_numbers(name, request):
    run = request.getfixturevalue(f"{name.partition('/')[0]}_run")
    front, numbers, python, _ = read_card(run / name.partition("/")[2])
    assert front["library_name"] == "transformers" and front["tags"][0] == "dvpo" and "base_model" not in front
    assert type(loaded(python)).__name__ == "Llama" + KINDS.get(name, "ForTokenClassification" if "/" in name else "ForCausalLM")
    assert len([line for line in python.splitlines() if line]) == 3
    last = flat(read_lines(run / "metrics.jsonl")[-1])
    assert numbers and numbers == {metric: f"{last[metric]:.4g}" for metric in numbers}


def test_the_values_can_be_mapped_back(gvm_run, reward_model_run, ppo_run):
    scale = json.loads((gvm_run / "config.json").read_text())["gvm"]
    assert f"`q * {scale['reward_std']:.6g} + {scale['reward_mean']:.6g}`" in (gvm_run / "README.md").read_text()
    scale = json.loads((reward_model_run / "config.json").read_text())["reward_model"]
    assert f"mean is {scale['reward_mean']:.4g}, its standard deviation {scale['reward_std']:.4g} " in (reward_model_run / "README.md").read_text()
    assert f"`v * {scale['reward_std']:.6g} + {scale['reward_mean']:.6g}`" in (ppo_run / "critic" / "README.md").read_text()


def test_the_card_of_what_was_last_written(gvm_args, again, world, tmp_path):
    """Without test pairs there is no evaluation at the end; the last update is logged all the same."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scored.jsonl").write_bytes((world / "data" / "scored.jsonl").read_bytes())
    train_gvm.main(again(gvm_args, data=str(tmp_path / "data"), log_every=4))
    _, numbers, _, _ = read_card(tmp_path / "run")
    assert numbers == {"loss": f"{read_lines(tmp_path / 'run' / 'metrics.jsonl')[-1]['loss']:.4g}"}


def test_the_command_on_the_card_can_be_pasted(sft_args, tmp_path, monkeypatch):
    """As typed, with a space and a quote in the path, from the folder in which it was typed."""
    output = tmp_path / "my run's folder"
    command = [sys.executable, ROOT / "sft.py", "--model", sft_args.model, "--data", sft_args.data, "--output", output.name,
               "--epochs", "1", "--log_every", "7"]
    subprocess.run([str(word) for word in command], cwd=tmp_path, check=True, capture_output=True)
    _, _, python, command = read_card(output)
    words = shlex.split(command)
    assert words[:2] == ["python", str(ROOT / "sft.py")]
    monkeypatch.setattr(sys, "argv", ["test"])
    assert vars(parse(["sft.py", *words[2:]])) == json.loads((output / "args.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert isinstance(loaded(python), LlamaForCausalLM)


def test_the_command_of_several_processes_and_the_base_model_of_the_hub(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["baselines/dpo.py", "--output", "a b"])
    accelerator = Accelerator()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))
    model.config.name_or_path = "meta-llama/Llama-3.2-3B"
    card = train_dvpo.model_card(accelerator, model, Path("a b"), "# T", {})
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "meta-llama/Llama-3.2-3B"
    assert "\npython baselines/dpo.py --output 'a b'\n" in card and "from_pretrained('a b')" in card
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    assert "\naccelerate launch --num_processes 2 --mixed_precision no baselines/dpo.py --output 'a b'\n" in \
        train_dvpo.model_card(accelerator, model, Path("a b"), "# T", {})


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_card_is_told_what_the_run_started_from(name, request, again, monkeypatch):
    """A hub name becomes base_model; here it is a folder, which the hub does not know."""
    script, args, sources = SCRIPTS[name], again(request.getfixturevalue(f"{name}_args")), []
    monkeypatch.setattr(script, "model_card", lambda accelerator, model, *rest: sources.append(model.config.name_or_path) or "")
    script.main(args)
    assert sources == [args.model] * (2 if name == "ppo" else 1)


def test_the_weights_before_a_nan_have_a_card(sft_run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sft_run)
    tokenizer = sft.load(sft.AutoTokenizer, str(sft_run))
    fails(lambda: sft.stop_if_not_finite(Accelerator(), model, tokenizer, tmp_path, float("nan"), "update 3"), "update 3")
    _, _, python, _ = read_card(tmp_path / "checkpoints" / "before_nan")
    assert "| grad_norm | nan |" in (tmp_path / "checkpoints" / "before_nan" / "README.md").read_text()
    assert torch.equal(loaded(python).lm_head.weight, model.lm_head.weight)


def test_the_base_model_of_atlas_has_a_card(tmp_path):
    atlas.write_world(tmp_path / "my world", 3, False)
    front, _, python, command = read_card(tmp_path / "my world" / "base")
    assert front["library_name"] == "transformers" and isinstance(loaded(python), LlamaForCausalLM)
    assert shlex.split(command) == ["python", "atlas.py", "world", "--output", str(tmp_path / "my world"), "--seed", "3"]


# ---- trackers ----
@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for TensorBoard and wandb, registered in accelerate itself. Returns those that were started."""
    started = []

    class Fake(accelerate.tracking.GeneralTracker):
        tracker = None

        def __init__(self, run_name, logging_dir=None, **kwargs):
            super().__init__()
            self.folder, self.logged, self.finished = Path(logging_dir or kwargs["dir"]), [], False

        def start(self):
            assert self.folder.is_dir()                       # a tracker starts when the run folder is there
            started.append(self)

        def store_init_configuration(self, values):
            assert all(type(value) in (int, float, str, bool) for value in values.values())     # all that TensorBoard takes
            self.config = values

        def log(self, values, step=None):
            self.logged.append((step, dict(values)))

        def finish(self):
            self.finished = True

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    for name in ("tensorboard", "wandb"):
        fake = type(name, (Fake,), {"name": name, "requires_logging_directory": name == "tensorboard"})
        monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, fake)
    return started


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tracker_gets_what_metrics_jsonl_gets(name, request, again, trackers, tmp_path):
    args = again(request.getfixturevalue(f"{name}_args"), log_with="wandb" if name == "dpo" else "tensorboard")
    SCRIPTS[name].main(args)
    [tracker] = trackers
    assert tracker.name == args.log_with and tracker.folder == tmp_path / "run" and tracker.finished
    assert tracker.config == json.loads((tmp_path / "run" / "args.json").read_text())
    written = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert tracker.logged == [(record.get("step", record.get("update")), flat(record)) for record in written] and len(written) > 2


def test_no_tracker_unless_asked(sft_args, again, trackers):
    sft.main(again(sft_args))
    assert not trackers


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tracker_that_is_not_installed(name, request, again, tmp_path, monkeypatch):
    """Said first of all, before the model is looked for."""
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    args = again(request.getfixturevalue(f"{name}_args"), log_with="wandb", model="nowhere/at/all")
    fails(lambda: SCRIPTS[name].main(args), "--log_with wandb: not installed here. pip install wandb$")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start(sft_args, again, trackers, tmp_path, monkeypatch):
    """wandb without a login: one clear line, and the same command works as soon as that is mended."""
    def start(self):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(accelerate.tracking.LOGGER_TYPE_TO_CLASS["wandb"], "start", start)
        fails(lambda: sft.main(again(sft_args, log_with="wandb")), "--log_with wandb does not start: No API key.*log in.$")
    sft.main(again(sft_args, log_with="wandb"))
    assert trackers[0].finished and (tmp_path / "run" / "model.safetensors").exists()


def test_a_tracker_that_does_not_start_deletes_nothing(sft_args, sft_run, again, trackers, tmp_path, monkeypatch):
    """The run that was to be replaced is still there, whole."""
    shutil.copytree(sft_run, tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}

    def start(self):
        (self.folder / "wandb").mkdir()
        raise RuntimeError("No API key configured")

    with monkeypatch.context() as patch:
        patch.setattr(accelerate.tracking.LOGGER_TYPE_TO_CLASS["wandb"], "start", start)
        fails(lambda: sft.main(again(sft_args, log_with="wandb", overwrite=True)), "--log_with wandb does not start: No API key")
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    sft.main(again(sft_args, log_with="wandb", overwrite=True, epochs=1))
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and trackers[0].finished


def test_a_run_is_resumed_with_another_tracker(sft_args, again, trackers, tmp_path):
    args = again(sft_args, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(sft, patch, 4)
        with pytest.raises(Killed):
            sft.main(args)
    sft.main(again(args, resume=True, log_with="tensorboard"))
    assert [step for step, _ in trackers[0].logged] == [r["update"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")][1:]
