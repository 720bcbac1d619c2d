"""What comes from others is data: no pickle and no program in a model folder or a checkpoint is run. And no key is kept."""
import contextlib
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bad_input import fails
from test_resume import SCRIPTS, Killed, kill_at
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
import train_dvpo


class Bomb:
    """Unpickled, it makes a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def write_bomb(file, mark, kind):
    """As torch.save writes it, or as a plain pickle, which torch.load reads too."""
    if kind == "torch":
        torch.save({"state": Bomb(mark), "torch_manual_seed": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(mark)))


def test_the_bomb_goes_off(tmp_path):
    for kind in ("torch", "pickle"):
        write_bomb(tmp_path / "file", tmp_path / kind, kind)
        with contextlib.suppress(RuntimeError):               # of torch, after the bomb went off
            torch.load(tmp_path / "file", weights_only=False)
        assert (tmp_path / kind).exists()


@pytest.fixture(scope="module")
def killed(sft_args, dvpo_args, tmp_path_factory):
    """{script name: Args of a run that was killed after its second checkpoint}"""
    runs = {}
    for script, args in ((sft, sft_args), (train_dvpo, dvpo_args)):
        runs[script.__name__] = replace(args, output=str(tmp_path_factory.mktemp("killed") / "run"), save_steps=1,
                                        **({"log_every": 1} if script is sft else {}))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(script, patch, 3)
            with pytest.raises(Killed):
                script.main(runs[script.__name__])
    return runs


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"])
@pytest.mark.parametrize("script, kind", [(sft, "torch"), (sft, "pickle"), (train_dvpo, "torch")])
def test_no_pickle_in_a_checkpoint_is_run(script, name, kind, killed, tmp_path):
    args = killed[script.__name__]
    output = shutil.copytree(args.output, tmp_path / "run")
    newest = output / "checkpoints" / "step_2"
    if name == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    write_bomb(newest / name, tmp_path / "mark", kind)
    fails(lambda: script.main(replace(args, output=str(output), resume=True)), "step_2: no whole checkpoint of this run.*Remove it")
    assert not (tmp_path / "mark").exists()
    shutil.rmtree(newest)                                     # the remedy that is named
    script.main(replace(args, output=str(output), resume=True))
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["scheduler.bin", "sampler.bin", "scaler.pt", "dl_state_dict.bin", "model.pkl", "optimizer_1.bin"])
def test_files_that_belong_to_no_checkpoint_are_not_read(name, killed, tmp_path):
    args = killed["sft"]
    output = shutil.copytree(args.output, tmp_path / "run")
    write_bomb(output / "checkpoints" / "step_2" / name, tmp_path / "mark", "torch")
    sft.main(replace(args, output=str(output), resume=True))
    assert (output / "model.safetensors").exists() and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "pytorch_model-00001-of-00001.bin"])
def test_weights_in_a_pickle_are_refused(name, kind, sft_run, tmp_path):
    model = shutil.copytree(sft_run, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    write_bomb(model / name, tmp_path / "mark", kind)
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}))
    fails(lambda: sft.load(AutoModelForCausalLM, str(model), kind="policy"), "cannot load it.*as safetensors")
    assert not (tmp_path / "mark").exists()


def test_honest_weights_in_a_pickle_are_refused_too(sft_run, tmp_path):
    model = shutil.copytree(sft_run, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(AutoModelForCausalLM.from_pretrained(sft_run).state_dict(), model / "pytorch_model.bin")
    fails(lambda: sft.load(AutoModelForCausalLM, str(model), kind="policy"), "cannot load it.*as safetensors")


@pytest.mark.parametrize("known", [True, False])
def test_no_program_of_a_model_is_run(known, sft_run, tmp_path, monkeypatch):
    """Neither unasked, nor after a question at the terminal that somebody, or `yes`, answers."""
    model, mark = shutil.copytree(sft_run, tmp_path / "model"), tmp_path / "mark"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM "
                                   "as Model, LlamaTokenizerFast as Tokenizer\n")
    for name, changes in (("config.json", {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}),
                          ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}),
                          ("generation_config.json", {"custom_generate": "evil.py"})):
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps(content if known else content | {"model_type": "evil", "tokenizer_class": "Tokenizer"}))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    for auto_class, kind in ((AutoTokenizer, None), (AutoModelForCausalLM, "policy")):
        try:
            assert type(sft.load(auto_class, str(model), kind=kind)).__module__.startswith("transformers.") and known
        except SystemExit as stopped:
            assert str(stopped).startswith(f"error: {model}: ") and not known
    assert not mark.exists()


@pytest.mark.parametrize("name", ["sft", "gvm", "dvpo", "ppo"])
def test_no_key_is_kept(name, request, again, monkeypatch, tmp_path, capfd):
    """The command, the settings and the metrics are kept; the environment, where keys live, is not."""
    keys = {"HF_TOKEN": "hf_1n7he5ecre7", "WANDB_API_KEY": "wandb5ecre7", "OPENAI_API_KEY": "sk-5ecre7", "AWS_SECRET_ACCESS_KEY": "aws5ecre7"}
    for variable, key in keys.items():
        monkeypatch.setenv(variable, key)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", "x"])
    args = again(request.getfixturevalue(f"{name}_args"), save_steps=1)
    SCRIPTS[name].main(args)
    files = [file for file in Path(args.output).rglob("*") if file.is_file()]
    assert len(files) > 8 and any("checkpoints" in file.parts for file in files)
    for text in (*(file.read_bytes() for file in files), "".join(capfd.readouterr()).encode()):
        assert not any(key.encode() in text for key in keys.values()) and b"5ecre7" not in text
