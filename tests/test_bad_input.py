"""Bad input ends in one clear line, with no run that looks finished and nothing overwritten."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, fails, read_lines, script, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sft
import train_gvm

GOOD = {"prompt": "Is Peru an island?", "response": "No, it is not.", "reward": 0.5, "policy": "expert"}
PAIR = {"prompt": "Is Peru an island?", "chosen": "No.", "rejected": "Yes."}
ONLINE, REWARDED = ("dvpo", "ppo", "grpo", "remax"), ("ppo", "grpo", "remax")


@pytest.fixture
def refused(args, tmp_path):
    """refused("sft", pattern, field=value, ...): the script ends with that error, and leaves no model."""
    def run(name, pattern, **changes):
        fails(lambda: script(name).main(args(name, **changes)), pattern)
        assert not (tmp_path / "run" / "model.safetensors").exists()
    return run


# ---- rows ----
@pytest.mark.parametrize("line, problem", [
    ('{"prompt": "a"', "JSONDecodeError"), ("7", "TypeError"), ('["a"]', "not a row"),
    ('{"prompt": "a", "response": 5, "reward": 1}', "TypeError"), ('{"prompt": "a", "response": "b", "reward": "c"}', "ValueError"),
    ('{"prompt": "a", "response": "\\ud83d", "reward": 1}', "UnicodeEncodeError"), ('{"prompt": "a", "response": "b", "reward": 1e999}', "NaN"),
    ('{"response": "b", "reward": 1}', "KeyError.'prompt'"), ('{"prompt": "a", "response": "b"}', "KeyError.'reward'"),
    ('{"prompt": "", "response": "b", "reward": 1}', "empty"), ('{"prompt": [], "response": "b", "reward": 1}', "empty"),
    ('{"prompt": "a", "response": " \\n", "reward": 1}', "empty"), ('{"prompt": "a", "response": null, "reward": 1}', "empty"),
    ('{"prompt": "a", "response": "b", "reward": NaN}', "NaN")])
def test_a_bad_row_is_named_by_file_and_line(line, problem, tmp_path):
    (tmp_path / "scored.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    fails(lambda: sft.read_rows(str(tmp_path), "scored", "prompt", "response", "reward"), rf"scored\.jsonl:2: .*{problem}")


def test_a_good_row_is_left_as_it_is(tmp_path):
    row = GOOD | {"response": "one\u2028two\x85three", "reward": 0.0}          # line separators, to some, and a reward that is false
    (tmp_path / "scored.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert sft.read_rows(str(tmp_path), "scored", "prompt", "response", "reward") == [row]


def test_empty_lines_byte_order_marks_and_rewards_as_text(tmp_path):
    (tmp_path / "scored.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD | {"reward": "0.25"}).encode() + b"\r\n\n" + json.dumps(GOOD).encode() + b"\n\n")
    assert sft.read_rows(str(tmp_path), "scored", "prompt", "response", "reward") == [GOOD | {"reward": 0.25}, GOOD]
    (tmp_path / "scored.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    fails(lambda: sft.read_rows(str(tmp_path), "scored", "prompt"), "cannot be read.*utf-8")


def test_a_hub_data_set(monkeypatch):
    """RL never reads by accident the prompts that the value model learned from; other splits are named."""
    asked, splits = [], {"train": [GOOD], "test": [GOOD], "rl": [PAIR], "train_prefs": [PAIR]}
    monkeypatch.setattr(sft, "load_dataset", lambda name, split: asked.append((name, split)) or list(splits[split]))
    assert sft.read_rows("org/name", "sft", "prompt") == sft.read_rows("org/name", "test_pairs", "prompt") == [GOOD]
    assert sft.read_rows("org/name", "rl", "prompt") == sft.read_rows("org/name:train_prefs", "pairs", "prompt") == [PAIR]
    assert asked == [("org/name", "train"), ("org/name", "test"), ("org/name", "rl"), ("org/name", "train_prefs")]
    del splits["rl"]
    fails(lambda: sft.read_rows("org/name", "rl", "prompt"), r"org/name: cannot be read .*From the hub: --data ORG/NAME:SPLIT")


def test_a_hub_data_set_without_a_test_split_trains(args, monkeypatch, tmp_path):
    for module, name in ((train_gvm, "gvm"), (script("reward_model"), "reward_model")):
        rows = [GOOD | {"reward": n / 9} if name == "gvm" else PAIR | {"chosen": f"{n}"} for n in range(32)]
        monkeypatch.setattr(module, "load_dataset", lambda name, split, rows=rows: {"train": rows}[split])
        module.main(args(name, data="org/name", output=tmp_path / name))
        assert (tmp_path / name / "model.safetensors").exists()


def test_answers_as_lists_of_one_message(tmp_path):
    """TRL's explicit form of preferences. Lists of more messages hold a prompt: prepare_data.py knows what to do."""
    said = [{"role": "assistant", "content": "No."}]
    row = {"prompt": [{"role": "user", "content": "Is Peru an island?"}], "chosen": said, "rejected": [said[0] | {"content": "Yes."}]}
    write_rows(tmp_path / "pairs.jsonl", [row])
    assert sft.read_rows(str(tmp_path), "pairs", "prompt", "chosen", "rejected") == [row | {"chosen": "No.", "rejected": "Yes."}]
    write_rows(tmp_path / "pairs.jsonl", [row | {"chosen": row["prompt"] + said}])
    fails(lambda: sft.read_rows(str(tmp_path), "pairs", "prompt", "chosen"), r"pairs.jsonl:1: .*data/prepare_data.py")


def test_the_template_has_the_last_word_on_a_row(runs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(runs("sft"))
    message = {"role": "user", "content": "x", "tool_calls": None, "name": None}
    write_rows(tmp_path / "rl.jsonl", [{"prompt": [message]}, {"prompt": "x"}])
    tokenizer.chat_template = "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls[0] }}{% endif %}{{ m.content }}{% endfor %}"
    one, other = sft.read_rows(str(tmp_path), "rl", "prompt", tokenizer=tokenizer)
    assert one["prompt_ids"] == other["prompt_ids"]
    write_rows(tmp_path / "rl.jsonl", [{"prompt": "x"}, {"prompt": [{"role": "system", "content": "y"}, message]}])
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}x"
    fails(lambda: sft.read_rows(str(tmp_path), "rl", "prompt", tokenizer=tokenizer), r"rl.jsonl:2: .*no system.*prepare_data.py")



@pytest.mark.parametrize("name", ["gvm", "reward_model", "dpo"])
def test_pairs(name, refused, tmp_path):
    more = {"supervision": "pairs"} if name == "gvm" else {}
    for bad, problem in (({"chosen": "Yes."}, "the same"), ({"rejected": ""}, "empty"), ({"chosen": None}, "empty")):
        write_rows(tmp_path / "data" / "pairs.jsonl", [PAIR, PAIR | bad])
        refused(name, f"pairs.*2.*{problem}", data=tmp_path / "data", **more)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_data_and_too_few_data(name, refused, tmp_path):
    refused(name, r"nowhere/at/all/\w+\.jsonl: no such file", data="nowhere/at/all")
    write_rows(tmp_path / "one" / "pairs.jsonl", [PAIR])
    for file in ("sft", "scored", "rl"):
        write_rows(tmp_path / "one" / f"{file}.jsonl", [GOOD])
    refused(name, "1 .*do not fill --batch_size|2 .*do not fill --batch_size", data=tmp_path / "one")
    refused(name, "0 .*do not fill --batch_size", **{"max_prompt_length" if name in ONLINE else "max_length": 2})


def test_equal_rewards_teach_nothing(refused, tmp_path):
    write_rows(tmp_path / "flat" / "scored.jsonl", [GOOD | {"response": f"answer {i}"} for i in range(40)])
    refused("gvm", "deviation is 0.0: nothing to learn", data=tmp_path / "flat")


def test_tau_needs_to_know_the_policy(refused, tmp_path):
    write_rows(tmp_path / "anonymous" / "scored.jsonl", [{"prompt": "a", "response": "b", "reward": 1.0}] * 20)
    refused("gvm", r"scored\.jsonl:1: .*KeyError.'policy'", data=tmp_path / "anonymous", tau_pairs=1)


# ---- models ----
@pytest.mark.parametrize("name", SCRIPTS)
def test_models_of_another_kind(name, refused, runs, world):
    refused(name, "nowhere/at/all: no such folder", model="nowhere/at/all")
    refused(name, "holds a LlamaForTokenClassification", model=runs("gvm"))
    refused(name, "holds a LlamaForSequenceClassification", model=runs("reward_model"))
    if name == "dvpo":
        refused(name, "holds a LlamaForCausalLM, not a trained", gvm=runs("sft"))
        refused(name, "holds a LlamaForSequenceClassification, not a trained", gvm=runs("reward_model"))
    if name in REWARDED:
        refused(name, "holds a LlamaForCausalLM, not a trained", reward_model=runs("sft"))
        refused(name, "holds a LlamaForTokenClassification, not a trained", reward_model=runs("gvm"))


def test_a_value_model_that_train_gvm_did_not_make(refused, runs, tmp_path):
    """PPO's critic, say: it has the same class."""
    other = shutil.copytree(runs("gvm"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "gvm"}))
    refused("dvpo", "other: not made by train_gvm.py", gvm=other)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("change", ["vocabulary", "template"])
def test_a_value_or_reward_model_with_another_tokenizer(name, change, refused, runs, tmp_path):
    field = "gvm" if name == "dvpo" else "reward_model"
    other = shutil.copytree(runs(field), tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    if change == "vocabulary":
        tokenizer.add_tokens("<new>")
    else:
        tokenizer.chat_template += " "
    tokenizer.save_pretrained(other)
    refused(name, "another tokenizer or chat template", **{field: other})


@pytest.mark.parametrize("name", SCRIPTS)
def test_models_that_are_too_small(name, refused, args, tmp_path):
    refused(name, "too small for rows of", **{"max_response_length" if name in ONLINE else "max_length": 600})
    other = shutil.copytree(args(name).model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([f"<new{i}>" for i in range(30)])     # the embedding was not resized
    tokenizer.save_pretrained(other)
    if name not in ONLINE:                                     # there the other tokenizer is seen first
        refused(name, "other: too small for .*ids", model=other)


def test_a_start_without_a_chat_template(refused, runs, tmp_path):
    other = shutil.copytree(runs("sft"), tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    refused("gvm", "other: has no chat template", model=other)


def test_a_reward_model_that_returns_nan(refused, runs, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(runs("reward_model"))
    torch.nn.init.constant_(model.score.weight, torch.nan)
    other = shutil.copytree(runs("reward_model"), tmp_path / "broken")
    model.save_pretrained(other)
    for name in REWARDED:
        refused(name, "broken gives a score that is not finite", reward_model=other, overwrite=True)


# ---- sizes, flags and folders ----
@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_sizes_that_do_not_divide(name, refused):
    if name == "remax":
        refused(name, "7 rows an update do not divide", batch_size=7)
    elif name in ONLINE:
        refused(name, "--batch_size 8 is not a multiple of --mini_batch_size 6", mini_batch_size=6)
    else:
        refused(name, "20 rows an update do not divide", batch_size=20)


def test_groups(refused):
    refused("grpo", "--group_size 3", group_size=3)
    refused("grpo", "--group_size 1", group_size=1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_overwritten(name, args, runs, tmp_path):
    module, run = script(name), runs(name)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for changes in ({}, {"resume": True}):                     # it is finished
        fails(lambda: module.main(args(name, output=run, **changes)), "is in use")
    given = args(name)
    for field in {"model", "data", "gvm", "reward_model"} & set(vars(given)):
        fails(lambda: module.main(args(name, output=getattr(given, field), overwrite=True)), "is an input of this run")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("not a run")
    fails(lambda: module.main(args(name, output=tmp_path / "letters", overwrite=True)), "is in use")
    assert (tmp_path / "letters" / "dear.txt").exists()
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    if name == "sft":                                          # what is asked for is replaced, whole
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "old.txt").write_text("")
        module.main(args(name, overwrite=True, epochs=1))
        assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 10 and not (tmp_path / "run" / "old.txt").exists()


def test_recipes_and_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sft:\n  lr: 2.0e-5\n  epochs: 3\n  gradient_checkpointing: true\ntrain_gvm:\n  gamma: 1.0\n")
    given = sft.parse_args(sft.Args, [str(recipe), "--epochs", "5"])
    assert (given.lr, given.epochs, given.batch_size, given.gradient_checkpointing) == (2e-5, 5, sft.Args().batch_size, True)
    assert sft.parse_args(sft.Args, []) == sft.Args()
    fails(lambda: sft.parse_args(sft.Args, ["--learning_rate", "1"]), "unrecognized arguments: --learning_rate")
    fails(lambda: sft.parse_args(sft.Args, ["--epoch", "5"]), "unrecognized arguments: --epoch")      # and no guess
    fails(lambda: sft.parse_args(sft.Args, ["--epochs", "many"]), "--epochs: invalid int value")
    fails(lambda: train_gvm.parse_args(train_gvm.Args, ["--supervision", "guess"]), "invalid choice")
    recipe.write_text("sft:\n  learning_rate: 1\n")
    fails(lambda: sft.parse_args(sft.Args, [str(recipe)]), "unrecognized arguments: --learning_rate")


@pytest.mark.parametrize("command", [["sft.py", "--nonsense"], ["train_gvm.py", "--data", "nowhere/at/all"]])
def test_the_command_line_prints_one_line_and_fails(command, runs, tmp_path):
    command += ["--model", str(runs("sft")), "--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
