"""Bad input ends in one clear line that names the place and the remedy, with no run that looks finished."""
import datetime
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import evaluate
import sft
import train_dvpo
import train_gvm

GOOD = {"prompt": "Is Peru an island?", "response": "No, it is not.", "reward": 0.5, "policy": "expert"}


def fails(call, pattern):
    """The call ends with SystemExit, whose message is one line that starts with "error:" and matches the pattern."""
    with pytest.raises(SystemExit) as stopped:
        call()
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message and re.search(pattern, message), message


@pytest.fixture
def stage(request, sft_args, gvm_args, dvpo_args, again, tmp_path):
    """stage(name, **changes): runs a stage in a fresh output folder and sees to it that no finished run is left."""
    scripts = {"sft": (sft, sft_args), "gvm": (train_gvm, gvm_args), "dvpo": (train_dvpo, dvpo_args)}

    def run(name, **changes):
        script, args = scripts[name]
        try:
            script.main(again(args, **changes))
        finally:
            assert not (tmp_path / "run" / "model.safetensors").exists()

    return run


ROWS = [
    (b'{"prompt": "a"', "invalid JSON"),
    (b"\xff\xfe", "invalid JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b'{"response": "b", "reward": 1}', 'no field "prompt"'),
    (b'{"prompt": "", "response": "b", "reward": 1}', '"prompt" is neither'),
    (b'{"prompt": [{"role": "user"}], "response": "b", "reward": 1}', '"prompt" is neither'),
    (b'{"prompt": "a", "response": "  ", "reward": 1}', '"response" is empty'),
    (b'{"prompt": "a", "response": 7, "reward": 1}', '"response" is empty or not a string'),
    (b'{"prompt": "a", "response": "b", "reward": NaN}', "not a finite number: nan"),
    (b'{"prompt": "a", "response": "b", "reward": "0.5"}', "not a finite number"),
    (b'{"prompt": "a", "response": "b", "reward": true}', "not a finite number"),
    (b'{"prompt": "a", "response": "b"}', 'no field "reward"'),
    (b'{"prompt": "a", "response": "\\ud800", "reward": 1}', "surrogates not allowed"),
    (b'{"prompt": "a", "response": "b", "reward": 1' + b"0" * 400 + b"}", "too large"),
    (b'{"prompt": [{"role": "assistant", "content": "a"}], "response": "b", "reward": 1}', 'ends with "user"'),
]


@pytest.mark.parametrize("line, problem", ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, problem):
    (tmp_path / "scored.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    fields = {"prompt": "prompt", "response": "text", "reward": "number"}
    fails(lambda: train_gvm.read_rows(tmp_path, "scored", fields), rf"scored\.jsonl:3: .*{problem}.*--bad_rows skip")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path, capsys):
    (tmp_path / "scored.jsonl").write_bytes(b"\n".join([json.dumps(GOOD).encode(), *(line for line, _ in ROWS)]))
    fields = {"prompt": "prompt", "response": "text", "reward": "number"}
    assert train_gvm.read_rows(tmp_path, "scored", fields, "skip") == [GOOD]
    assert f"skipped {len(ROWS)} bad rows of {len(ROWS) + 1}" in capsys.readouterr().out


def test_columns_of_a_hub_data_set_that_nobody_asked_for(monkeypatch):
    import datasets
    row = GOOD | {"written": datetime.date(2020, 1, 1), "picture": b"\xff"}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [row])
    assert sft.read_rows("org/name", "sft", {"prompt": "prompt", "response": "text"}) == [row]


def test_a_pair_of_equal_answers_is_a_bad_row(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "x"}])
    fields = {"prompt": "prompt", "chosen": "text", "rejected": "text"}
    fails(lambda: train_gvm.read_rows(tmp_path, "pairs", fields), "pairs.jsonl:1.*the same text")


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path):
    row = GOOD | {"response": "one\u2028two\x85three"}
    (tmp_path / "sft.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert sft.read_rows(tmp_path, "sft", {"prompt": "prompt", "response": "text"}) == [row]


@pytest.mark.parametrize("name, changes, pattern", [
    ("sft", {"data": "nowhere/at/all"}, "nowhere/at/all/sft.jsonl: no such file"),
    ("sft", {"model": "nowhere/at/all"}, "nowhere/at/all: no model in this folder"),
    ("sft", {"model": "tests"}, "tests: no model in this folder"),
    ("sft", {"batch_size": 24}, "--batch_size 24 is not a multiple of"),
    ("sft", {"max_length": 3}, "0 usable rows do not fill one batch.*--max_length 3"),
    ("gvm", {"model": "nowhere/at/all"}, "no model in this folder"),
    ("gvm", {"batch_size": 0}, "--batch_size 0: it has to be at least 1 and less than inf"),
    ("gvm", {"td_lambda": 1.5}, "--gamma 1.0 and --td_lambda 1.5 have to be at most 1"),
    ("dvpo", {"gae_lambda": 1.5}, "--gae_lambda 1.5 has to be at most 1"),
    ("sft", {"lr": float("nan")}, "--lr nan"), ("sft", {"epochs": 0}, "--epochs 0"), ("dvpo", {"steps": 0}, "--steps 0"),
    ("dvpo", {"max_response_length": 0}, "--max_response_length 0"), ("sft", {"max_length": 600}, "more than the context"),
    ("gvm", {"max_length": 5}, "trajectories do not fill one batch"),
    ("gvm", {"gamma": 0.0}, "--gamma"),
    ("dvpo", {"max_prompt_length": 2}, "usable prompts do not fill one batch"),
    ("dvpo", {"mini_batch_size": 3}, "--batch_size 8 must be a multiple of --mini_batch_size 3"),
    ("dvpo", {"max_response_length": 600}, "context of .*512 tokens"),
    ("dvpo", {"gvm": "nowhere/at/all"}, "no model in this folder"),
])
def test_stages_refuse(stage, name, changes, pattern):
    fails(lambda: stage(name, **changes), pattern)


def test_one_row_of_data(stage, tmp_path):
    write_rows(tmp_path / "one" / "scored.jsonl", [GOOD])
    write_rows(tmp_path / "one" / "sft.jsonl", [GOOD])
    fails(lambda: stage("sft", data=str(tmp_path / "one")), "1 usable rows do not fill one batch: lower --batch_size 16")
    fails(lambda: stage("gvm", data=str(tmp_path / "one"), batch_size=1, micro_batch_size=1), "all rewards are equal")


def test_equal_rewards(stage, tmp_path):
    write_rows(tmp_path / "flat" / "scored.jsonl", [GOOD | {"response": f"answer {i}"} for i in range(40)])
    fails(lambda: stage("gvm", data=str(tmp_path / "flat")), "all rewards are equal")


def test_tau_needs_to_know_the_policy(stage, tmp_path):
    write_rows(tmp_path / "anonymous" / "scored.jsonl", [{"prompt": "a", "response": "b", "reward": 1.0}])
    fails(lambda: stage("gvm", data=str(tmp_path / "anonymous"), tau_pairs=1), 'scored.jsonl:1: no field "policy"')


def test_models_in_the_wrong_place(stage, sft_run, gvm_run):
    fails(lambda: stage("dvpo", model=str(gvm_run)), "LlamaForTokenClassification; a language model is wanted")
    fails(lambda: stage("dvpo", gvm=str(sft_run)), "LlamaForCausalLM; a value model is wanted")
    fails(lambda: stage("gvm", model=str(gvm_run)), "a language model is wanted")
    fails(lambda: evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(sft_run)], data=str(sft_run.parent / "data"))), "a value model is wanted")
    fails(lambda: evaluate.evaluate_policy(evaluate.PolicyArgs(models=[str(gvm_run)], data=str(sft_run.parent / "data"),
                                                               judge=str(ROOT / "atlas.py:oracle"))), "a language model")


@pytest.mark.parametrize("change", ["vocabulary", "template"])
def test_a_gvm_with_another_tokenizer(stage, gvm_run, tmp_path, change):
    other = shutil.copytree(gvm_run, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    if change == "vocabulary":
        tokenizer.add_tokens("<new>")
    else:
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(other)
    fails(lambda: stage("dvpo", gvm=str(other)), "tokenizer or chat template is not that of")


def test_an_architecture_without_token_classification(stage, world, tmp_path):
    """OPT has no such class in transformers: the GVM cannot be built from it, and the message says so."""
    config = AutoConfig.for_model("opt", vocab_size=1024, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
                                  num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(tmp_path / "opt")
    fails(lambda: stage("gvm", model=str(tmp_path / "opt")), "AutoModelForTokenClassification cannot load it")


def test_a_finished_run_is_never_overwritten_silently(sft_args, sft_run, again, tmp_path):
    before = (sft_run / "model.safetensors").read_bytes()
    fails(lambda: sft.main(sft_args), "holds another run.*--overwrite")
    assert (sft_run / "model.safetensors").read_bytes() == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("not a run")
    fails(lambda: sft.main(again(sft_args, output=str(tmp_path / "letters"), overwrite=True)), "is not a run folder")
    assert (tmp_path / "letters" / "dear.txt").exists()
    sft.main(again(sft_args, epochs=1))
    sft.main(again(sft_args, epochs=1, overwrite=True))


def test_an_output_that_is_a_link(sft_args, again, tmp_path):
    """To a folder on a larger disk, say: the run goes where the link points, also with --overwrite."""
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    for changes in ({}, {"overwrite": True}, {"overwrite": True}):
        sft.main(again(sft_args, epochs=1, **changes))
        assert (tmp_path / "disk" / "model.safetensors").exists() and (tmp_path / "run").is_symlink()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["disk", "run"]


def test_an_output_that_holds_an_input_is_refused_even_with_overwrite(sft_args, gvm_args, dvpo_args, again, sft_run, world):
    for script, args, output in ((train_gvm, gvm_args, sft_run), (train_dvpo, dvpo_args, Path(dvpo_args.gvm)),
                                 (sft, sft_args, world), (train_dvpo, dvpo_args, world / "data")):
        fails(lambda: script.main(again(args, output=str(output), overwrite=True)), "holds --.*, which this run reads")
    assert (sft_run / "model.safetensors").exists() and (world / "data" / "rl.jsonl").exists()
    fails(lambda: sft.main(again(sft_args, output=str(sft_run / "args.json"))), "is a file")


def test_recipes_and_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sft:\n  lr: 2.0e-5\n  epochs: 3\ntrain_gvm:\n  gamma: 1.0\n")
    args = sft.parse_args(sft.Args, [str(recipe), "--epochs", "5"])
    assert (args.lr, args.epochs, args.batch_size) == (2e-5, 5, sft.Args().batch_size)
    fails(lambda: sft.parse_args(sft.Args, ["--learning_rate", "1"]), "unrecognized arguments: --learning_rate")
    fails(lambda: sft.parse_args(sft.Args, ["--epoch", "5"]), "unrecognized arguments: --epoch")      # and no guess
    fails(lambda: sft.parse_args(sft.Args, ["--epochs", "many"]), "--epochs: invalid int value")
    fails(lambda: sft.parse_args(sft.Args, [str(tmp_path / "none.yaml")]), "no such recipe")
    fails(lambda: train_gvm.parse_args(train_gvm.Args, ["--supervision", "guess"]), "invalid choice")
    recipe.write_text("sft:\n  learning_rate: 1\n")
    fails(lambda: sft.parse_args(sft.Args, [str(recipe)]), "unrecognized arguments: --learning_rate")
    recipe.write_text("train_dvpo:\n  lr: 1\n")
    fails(lambda: sft.parse_args(sft.Args, [str(recipe)]), "no section 'sft'")
    recipe.write_text("- just\n- a list\n")
    fails(lambda: sft.parse_args(sft.Args, [str(recipe)]), "no section 'sft'")


def test_judges(sft_run, world, tmp_path):
    def run(judge, **changes):
        evaluate.evaluate_policy(evaluate.PolicyArgs(models=[str(sft_run)], data=str(world / "data"), judge=judge,
                                                     **changes))

    fails(lambda: run("nowhere.py:oracle"), "no file 'nowhere.py'")
    fails(lambda: run(f"{ROOT / 'atlas.py'}:oracel"), "has no function 'oracel'")
    fails(lambda: run("oracle"), "wants FILE.py:FUNCTION")
    fails(lambda: evaluate.evaluate_policy(evaluate.PolicyArgs(models=["a/x", "b/x"])), "a/x and b/x are both called 'x'")


def test_the_exit_status_of_the_command_line():
    for command in (["sft.py", "--nonsense"], ["evaluate.py", "nonsense"], ["train_gvm.py", "--data", "nowhere/at/all"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert not Path(ROOT, "nowhere").exists()
