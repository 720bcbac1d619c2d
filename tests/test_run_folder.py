"""What a run leaves and sends: folders for stock transformers, metrics for a tracker; and what it must not run or keep."""
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import accelerate.tracking
import pytest
import torch
import transformers
import yaml
from accelerate.utils import LoggerType
from conftest import SCRIPTS, read_lines, script
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = {"gvm": "TokenClassification", "reward_model": "SequenceClassification", "ppo/critic": "TokenClassification"}


@pytest.mark.parametrize("name", [*SCRIPTS, "ppo/critic"])
def test_stock_transformers_loads_it(name, runs):
    script_name, _, part = name.partition("/")
    run = runs(script_name) / part
    model = getattr(transformers, f"AutoModelFor{KINDS.get(name, 'CausalLM')}").from_pretrained(run)
    assert model.config.architectures == [f"LlamaFor{KINDS.get(name, 'CausalLM')}"]
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer.chat_template and tokenizer.pad_token_id == 0
    front, text = (run / "README.md").read_text().removeprefix("---\n").split("---\n")
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["dvpo"]} and len(text.strip().splitlines()) == 3
    if model.can_generate():                                   # and answers with it
        ids = torch.tensor([script("sft").encode_prompt(tokenizer, "Is Peru an island?")])
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.fixture
def trackers(monkeypatch):
    """A stand-in for TensorBoard, registered in accelerate itself. Returns those that were started."""
    started = []

    class Fake(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir, **kwargs):
            super().__init__()
            self.folder, self.logged, self.finished = Path(logging_dir), [], False

        def start(self):
            started.append(self)

        def store_init_configuration(self, values):
            assert all(type(value) in (int, float, str, bool) for value in values.values())     # all that TensorBoard takes
            self.config = values

        def log(self, values, step=None):
            self.logged.append((step, dict(values)))

        def finish(self):
            self.finished = True

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    return started


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tracker_gets_what_metrics_jsonl_gets(name, args, trackers, tmp_path):
    given = args(name, log_with="tensorboard", **({"steps": 2} if name in ("dvpo", "ppo", "grpo", "remax") else {"epochs": 1}))
    script(name).main(given)
    (tracker,) = trackers
    assert tracker.folder == tmp_path / "run" and tracker.finished and tracker.config == vars(given)
    written = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert tracker.logged == [(record["step"], record) for record in written] and len(written) > 1


def test_no_tracker_unless_asked(args, trackers):
    script("sft").main(args("sft", epochs=1))
    assert not trackers


# ---- what comes from others is data ----
class Bomb:
    """Unpickled, it makes a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_run(args, runs, tmp_path):
    """Weights come from safetensors only; of a checkpoint torch reads tensors, and nothing else."""
    model = shutil.copytree(runs("sft"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"x": Bomb(tmp_path / "mark")}, model / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        script("gvm").main(args("gvm", model=model))
    for file in ("optimizer.bin", "random_states_0.pkl"):
        given = args("dvpo", output=tmp_path / file, save_steps=1)
        script("dvpo").main(given)
        (tmp_path / file / "model.safetensors").unlink()
        newest = sorted((tmp_path / file / "checkpoints").iterdir())[-1]
        torch.save({"x": Bomb(tmp_path / "mark")}, newest / file)
        try:
            script("dvpo").main(replace(given, resume=True))
        except Exception as refused:
            assert file == "optimizer.bin" and "weights" in str(refused).lower()
    assert not (tmp_path / "mark").exists()


def test_no_program_of_a_model_is_run(runs, tmp_path, monkeypatch):
    model, mark = shutil.copytree(runs("sft"), tmp_path / "model"), tmp_path / "mark"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n")
    for name, changes in (("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
                          ("generation_config.json", {"custom_generate": "evil.py"})):
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | changes))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    loaded = script("sft").load_model(AutoModelForCausalLM, str(model), AutoTokenizer.from_pretrained(model), 64)
    assert type(loaded).__module__.startswith("transformers.") and not mark.exists()


def test_no_key_is_kept(args, tmp_path, monkeypatch, capfd):
    """The command, the settings and the metrics are kept; the environment, where keys live, is not."""
    for variable in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, f"{variable}-5ecre7")
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--output", "x"])
    script("ppo").main(args("ppo", save_steps=1))
    files = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 20 and not any(b"5ecre7" in text for text in (*files, "".join(capfd.readouterr()).encode()))
