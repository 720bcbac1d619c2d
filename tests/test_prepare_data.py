"""Public formats -> the data folder. The rows are hand-written after the formats' descriptions; none is real data."""
import gzip
import hashlib
import json

import pytest
from conftest import fails, read_lines
from transformers import AutoTokenizer

import evaluate
import prepare_data

ULTRAFEEDBACK = [
    {"source": "x", "instruction": "Name a colour.", "models": ["a", "b", "c", "d"], "completions": [
        {"model": "a", "response": "Red.", "overall_score": 8, "fine-grained_score": 4.5},
        {"model": "b", "response": "Blue!", "overall_score": "6.5"},          # a number as text: the known quirk
        {"model": "c", "response": "", "overall_score": 3},
        {"model": "d", "response": "Seven.", "overall_score": "N/A"}]},
    {"source": "x", "instruction": "Name a colour.", "models": ["a"], "completions": [      # the same prompt again
        {"model": "a", "response": "Red.", "overall_score": 2}, {"model": "e", "response": "Green.", "overall_score": 8}]},
    {"instruction": "Say nothing.", "completions": [{"model": "a", "response": " ", "overall_score": 1}]}]
BINARIZED = [{"prompt": "Hi", "prompt_id": "0", "score_chosen": score, "score_rejected": 4.0,
              "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hello {score}"}],
              "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Go away {score}"}]}
             for score in (9.0, 4.0)]
HH = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye 🙂\n\nAssistant: Good bye.",
       "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye 🙂\n\nAssistant: Stay."},
      {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: Other\n\nAssistant: C"},       # prompts differ
      {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant:"},             # empty answer
      {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: B"},           # equal answers
      {"chosen": "\n\nHuman: A\n\nHuman: B\n\nAssistant: C", "rejected": "\n\nHuman: A\n\nHuman: B\n\nAssistant: D"}]
ANNOTATIONS = [{"instruction": "Q", "output_1": "ref", "generator_1": "gpt4", "output_2": "mine", "generator_2": "m", "preference": 1.25}]
SCORED = [{"prompt_id": 3, "policy": "m", "response": "r", "reward": 0.5}]
UNUSABLE, TWO_PROMPTS = "not a usable row of the format ", "chosen and rejected are not two answers to one prompt"
EMPTY = "prompt with an empty message, or that does not end with the user's"


def convert(tmp_path, format, rows, gz=False, **settings):
    """Runs the conversion on the rows with everything in the value part; returns (folder, manifest)."""
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
    source = tmp_path / ("rows.jsonl.gz" if gz else "rows.jsonl")
    source.write_bytes(gzip.compress(text) if gz else text)
    args = {"split": [0.0, 1.0, 0.0, 0.0], "input": str(source), "output": str(tmp_path / "data")} | settings
    prepare_data.main(prepare_data.Args(format=format, **args))
    return tmp_path / "data", json.loads((tmp_path / "data" / "manifest.json").read_text())


@pytest.mark.parametrize("gz", [False, True])
def test_ultrafeedback(tmp_path, gz, capsys):
    folder, manifest = convert(tmp_path, "ultrafeedback", ULTRAFEEDBACK, gz)
    rows = {row["response"]: row for row in read_lines(folder / "scored.jsonl")}
    assert {text: row["reward"] for text, row in rows.items()} == {"Red.": 8.0, "Blue!": 6.5, "Green.": 8.0}
    assert rows["Blue!"] == {"prompt": "Name a colour.", "response": "Blue!", "reward": 6.5, "policy": "b"}
    pairs = {(row["chosen"], row["rejected"], row["policy_chosen"]) for row in read_lines(folder / "pairs.jsonl")}
    assert pairs == {("Red.", "Blue!", "a"), ("Green.", "Blue!", "e")}          # Red and Green tie
    assert manifest["left_out"] == {"answer without a score, which is for SFT only": 1, "answer without text": 2,
                                    "repeated answer": 1, "pair of equal scores": 1}
    source = tmp_path / ("rows.jsonl.gz" if gz else "rows.jsonl")
    assert f"{source}:2: repeated answer\n{source}:3: answer without text\n" in (folder / "left_out.txt").read_text()
    assert "left out, answer without text: 2\n" in capsys.readouterr().out


def test_ultrafeedback_binarized(tmp_path):
    folder, _ = convert(tmp_path, "ultrafeedback_binarized", BINARIZED)
    assert {row["response"]: row["reward"] for row in read_lines(folder / "scored.jsonl")} == {
        "Hello 9.0": 9.0, "Go away 9.0": 4.0, "Hello 4.0": 4.0, "Go away 4.0": 4.0}
    assert all(row["chosen"] == "Hello 9.0" for row in read_lines(folder / "pairs.jsonl"))


def test_the_prompt_is_what_stands_before_the_last_answer(tmp_path):
    """A system message and earlier turns belong to it, on both sides the same, or the row is left out."""
    system, turn = {"role": "system", "content": "Be brief."}, BINARIZED[0]["chosen"]
    more = [turn[0], {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    rows = [BINARIZED[0] | {side: [*before, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
            for before in ([system, turn[0]], more)]
    rows += [rows[0] | {"rejected": rows[1]["rejected"]}, rows[0] | {"chosen": rows[0]["chosen"][:-1]}]
    for format in ("ultrafeedback_binarized", "jsonl"):        # TRL's rows with the prompt inside are such rows, too
        folder, manifest = convert(tmp_path, format, rows, overwrite=True)
        pairs = {json.dumps(row["prompt"]): (row["chosen"], row["rejected"]) for row in read_lines(folder / "pairs.jsonl")}
        assert pairs == {json.dumps(before): ("chosen", "rejected") for before in ([system, turn[0]], more)}
        assert manifest["left_out"] == {TWO_PROMPTS: 2}


def test_answers_as_lists_of_one_message(tmp_path):
    """TRL's explicit form: the prompt is a chat, the answers are lists of one assistant message."""
    row = {"prompt": BINARIZED[0]["chosen"][:1], "chosen": BINARIZED[0]["chosen"][1:], "rejected": BINARIZED[0]["rejected"][1:]}
    folder, _ = convert(tmp_path, "jsonl", [row])
    assert read_lines(folder / "pairs.jsonl") == [{"prompt": "Hi", "chosen": "Hello 9.0", "rejected": "Go away 9.0"}]


def test_prompts_that_the_chat_template_refuses(tmp_path, world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    tokenizer.save_pretrained(tmp_path / "model")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": chat, "response": "a", "reward": 1}, {"prompt": "Hi", "response": "b", "reward": 1}]
    folder, manifest = convert(tmp_path, "jsonl", rows, split=[1.0, 0.0, 0.0, 0.0], tokenizer=str(tmp_path / "model"))
    assert read_lines(folder / "sft.jsonl") == [{"prompt": "Hi", "response": "b"}]
    assert manifest["left_out"] == {"prompt that the chat template refuses": 1}
    assert "rows.jsonl:1: TemplateError('no system')" in (folder / "left_out.txt").read_text()
    _, manifest = convert(tmp_path, "jsonl", rows, split=[1.0, 0.0, 0.0, 0.0], overwrite=True)
    assert not manifest["left_out"]


def test_half_known_answers_and_pairs(tmp_path):
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a", "reward": 5}, {"prompt": "q", "chosen": None, "response": "b", "reward": 1},
            {"prompt": "q", "chosen": "c", "rejected": None}, {"prompt": "q", "chosen": "c", "rejected": "d", "score_chosen": "9", "score_rejected": "N/A"}]
    folder, manifest = convert(tmp_path, "jsonl", rows)
    assert {row["response"]: row["reward"] for row in read_lines(folder / "scored.jsonl")} == {"a": 5.0, "b": 1.0}
    assert {"prompt": "q", "chosen": "c", "rejected": "d", "score_chosen": 9.0} in read_lines(folder / "pairs.jsonl")
    assert manifest["left_out"] == {"answer without a score, which is for SFT only": 1, "pair with an answer without text": 1}


def test_hh(tmp_path):
    folder, manifest = convert(tmp_path, "hh", HH)
    assert read_lines(folder / "pairs.jsonl") == [{
        "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                   {"role": "user", "content": "Bye 🙂"}], "chosen": "Good bye.", "rejected": "Stay."}]
    assert not (folder / "scored.jsonl").exists()                               # people gave no scores
    assert manifest["left_out"] == {TWO_PROMPTS: 1, "pair with an answer without text": 1, "pair of equal answers": 1,
                                    "prompt with two turns of one role in a row": 1}


def test_alpaca_eval(tmp_path):
    verdicts = [ANNOTATIONS[0] | {"instruction": f"Q{x}", "preference": x} for x in (1.25, 0, 1.5, 2.0, 1, 7, -1, None)]
    folder, manifest = convert(tmp_path, "alpaca_eval", verdicts)
    rewards = {row["prompt"]: row["reward"] for row in read_lines(folder / "scored.jsonl")}
    assert rewards == {"Q1.25": 0.25, "Q0": 0.5, "Q1.5": 0.5, "Q2.0": 1.0, "Q1": 0.0}              # 0 is a draw, as 1.5 is
    assert manifest["left_out"] == {"preference that is not 0, nor 1 to 2": 2, UNUSABLE + "alpaca_eval": 1}
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt_id": 3, "prompt": "P"}]))           # one JSON array, not lines
    assert {row["policy"] for row in read_lines(folder / "scored.jsonl")} == {"m"}
    folder, _ = convert(tmp_path, "alpaca_eval", SCORED, prompts=str(prompts), overwrite=True)
    assert read_lines(folder / "scored.jsonl") == [{"prompt": "P", "response": "r", "reward": 0.5, "policy": "m"}]


def test_a_prompt_as_text_and_as_message_is_one_prompt(tmp_path):
    rows = [{"prompt": "Hi", "response": "a", "reward": 1}, {"prompt": [{"role": "user", "content": "Hi"}], "response": "b", "reward": 2}]
    folder, manifest = convert(tmp_path, "jsonl", rows, split=[0.0, 0.5, 0.0, 0.5])
    rows, = [read_lines(folder / name) for name in manifest["files"] if "scored" in name]
    assert [(row["prompt"], row["response"]) for row in rows] == [("Hi", "a"), ("Hi", "b")]


def test_what_cannot_be_used_is_left_out_and_named(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b", "policy_chosen": "x", "policy_rejected": "y"}
    bad = ['{"prompt": \n', "5\n", {"prompt": "", "response": "a"}, {"prompt": [], "response": "a"},
           {"prompt": "half a character \ud83d", "response": "a"}, {"prompt": [{"role": "assistant", "content": "a"}], "response": "a"},
           {"prompt": [{"role": "user", "content": None}], "response": "a"}]
    folder, manifest = convert(tmp_path, "jsonl", [*bad, "\n", good, {"prompt": "p", "response": "half \ud83d"}])
    assert read_lines(folder / "pairs.jsonl") == [good]
    assert manifest["left_out"] == {UNUSABLE + "jsonl": 3, EMPTY: len(bad) - 3, "answer without text": 1}
    named = [line.split(": ")[0] for line in (folder / "left_out.txt").read_text().splitlines()]
    assert named == [f"{tmp_path}/rows.jsonl:{i}" for i in [*range(1, len(bad) + 1), len(bad) + 3]]


def test_jsonl_splits_by_prompt_and_every_stage_can_read_it(tmp_path):
    rows = [{"prompt": f"question {i}", "response": f"answer {j}", "reward": float(j), "policy": "p"}
            for i in range(50) for j in range(3)]
    folder, manifest = convert(tmp_path, "jsonl", rows, split=[0.4, 0.3, 0.2, 0.1])
    prompts = {name: {row["prompt"] for row in read_lines(folder / name)} for name in manifest["files"]}
    assert [len(prompts[f"{name}.jsonl"]) for name in ("sft", "scored", "rl", "test_prompts")] == [20, 15, 10, 5]
    assert len(set.union(*prompts.values())) == 50 and prompts["test_scored.jsonl"] == prompts["test_prompts.jsonl"]
    assert all(row["response"] == "answer 2" for row in read_lines(folder / "sft.jsonl"))      # the best answer
    assert len(evaluate.read_rows(str(folder), "scored", "prompt", "response", "reward", "policy")) == 45
    for name, file in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == file["sha256"]


def test_what_ends_in_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(SCORED[0] | {"prompt": "p"}))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for changes, pattern in (({"split": [1.0, 1.0, 0.0, 0.0]}, "add up to 1"), ({"input": "no/such.jsonl"}, "no such file"),
                             ({"input": str(tmp_path / "empty.jsonl")}, "no usable row$"),
                             ({"format": "hh"}, r"no usable row \(\S+rows.jsonl:1: KeyError\('chosen'\): not a usable row of the format hh"),
                             ({"output": str(tmp_path / "mine")}, "mine: exists"),
                             ({"output": str(tmp_path / "mine"), "overwrite": True}, "replaces data folders only")):
        args = {"input": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out")} | changes
        fails(lambda: prepare_data.main(prepare_data.Args(**args)), pattern)
    (tmp_path / "manifest.json").write_text("{}")
    inside = prepare_data.Args(input=str(tmp_path / "rows.jsonl"), output=str(tmp_path), overwrite=True)
    fails(lambda: prepare_data.main(inside), "holds .*rows.jsonl, which is read here")
    assert (tmp_path / "mine" / "thesis.txt").exists() and not (tmp_path / "out").exists()
