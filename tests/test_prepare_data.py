"""Public formats -> the data folder. The rows are hand-written after the formats' descriptions; none is real data."""
import gzip
import hashlib
import json

import pytest
from conftest import read_lines

import prepare_data
import train_gvm

ULTRAFEEDBACK = [
    {"source": "x", "instruction": "Name a colour.", "models": ["a", "b", "c", "d"], "completions": [
        {"model": "a", "response": "Red.", "overall_score": 8, "fine-grained_score": 4.5},
        {"model": "b", "response": "Blue!", "overall_score": "6.5"},          # a number as text: the known quirk
        {"model": "c", "response": "", "overall_score": 3},
        {"model": "d", "response": "Seven.", "overall_score": "N/A"}]},
    {"source": "x", "instruction": "Name a colour.", "models": ["a"], "completions": [      # the same prompt again
        {"model": "a", "response": "Red.", "overall_score": 2}, {"model": "e", "response": "Green.", "overall_score": 8}]},
    {"source": "x", "instruction": "Say nothing.", "models": ["a"], "completions": [
        {"model": "a", "response": " ", "overall_score": 1}]}]
BINARIZED = [{"prompt": "Hi", "prompt_id": "0", "score_chosen": score, "score_rejected": 4.0,
              "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hello {score}"}],
              "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Go away {score}"}]}
             for score in (9.0, 4.0)]
HH = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye 🙂\n\nAssistant: Good bye.",
       "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye 🙂\n\nAssistant: Stay."},
      {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: Other\n\nAssistant: C"},       # prompts differ
      {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant:"},             # empty answer
      {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: B"}]           # equal answers
ANNOTATIONS = [{"instruction": "Q", "output_1": "ref", "generator_1": "gpt4", "output_2": "mine", "generator_2": "m",
                "annotator": "w", "preference": 1.25}]
SCORED = [{"prompt_id": 3, "policy": "m", "response": "r", "reward": 0.5}]


def convert(tmp_path, format, rows, gz=False, **settings):
    """Runs the conversion on the rows with everything in the value part; returns (folder, manifest)."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    source = tmp_path / ("rows.jsonl.gz" if gz else "rows.jsonl")
    source.write_bytes(gzip.compress(text) if gz else text)
    args = {"split": [0.0, 1.0, 0.0, 0.0], "input": str(source), "output": str(tmp_path / "data")} | settings
    prepare_data.main(prepare_data.Args(format=format, **args))
    return tmp_path / "data", json.loads((tmp_path / "data" / "manifest.json").read_text())


@pytest.mark.parametrize("gz", [False, True])
def test_ultrafeedback(tmp_path, gz):
    folder, manifest = convert(tmp_path, "ultrafeedback", ULTRAFEEDBACK, gz)
    rows = {row["response"]: row for row in read_lines(folder / "scored.jsonl")}
    assert {text: row["reward"] for text, row in rows.items()} == {"Red.": 8.0, "Blue!": 6.5, "Green.": 8.0}
    assert rows["Blue!"] == {"prompt": "Name a colour.", "response": "Blue!", "reward": 6.5, "policy": "b"}
    pairs = {(row["chosen"], row["rejected"]) for row in read_lines(folder / "pairs.jsonl")}
    assert pairs == {("Red.", "Blue!"), ("Green.", "Blue!")}                    # Red and Green tie
    assert manifest["counts"] == {
        "rows read": 3, "rows merged into an earlier row's prompt": 1, "answers without a usable score": 1,
        "dropped: empty answer": 2, "dropped: repeated answer": 1, "dropped: prompts left without an answer": 1,
        "ties: no pair made": 1}


def test_ultrafeedback_binarized(tmp_path):
    folder, manifest = convert(tmp_path, "ultrafeedback_binarized", BINARIZED)
    assert {row["response"]: row["reward"] for row in read_lines(folder / "scored.jsonl")} == {
        "Hello 9.0": 9.0, "Go away 9.0": 4.0, "Hello 4.0": 4.0, "Go away 4.0": 4.0}
    assert all(row["chosen"] == "Hello 9.0" for row in read_lines(folder / "pairs.jsonl"))


def test_hh(tmp_path):
    folder, manifest = convert(tmp_path, "hh", HH)
    assert read_lines(folder / "pairs.jsonl") == [{
        "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                   {"role": "user", "content": "Bye 🙂"}], "chosen": "Good bye.", "rejected": "Stay."}]
    assert not (folder / "scored.jsonl").exists()                               # people gave no scores
    counts = manifest["counts"]
    assert counts["dropped: prompt empty, or not the same on both sides"] == 1
    assert counts["dropped: pair with an empty answer"] == 1 == counts["dropped: pair of equal answers"]


def test_alpaca_eval(tmp_path):
    folder, _ = convert(tmp_path, "alpaca_eval", ANNOTATIONS)
    assert read_lines(folder / "scored.jsonl") == [{"prompt": "Q", "response": "mine", "reward": 0.25, "policy": "m"}]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt_id": 3, "prompt": "P"}]))           # one JSON array, not lines
    folder, _ = convert(tmp_path, "alpaca_eval", SCORED, prompts=str(prompts), overwrite=True)
    assert read_lines(folder / "scored.jsonl") == [{"prompt": "P", "response": "r", "reward": 0.5, "policy": "m"}]


def test_jsonl_splits_by_prompt_and_every_stage_can_read_it(tmp_path):
    rows = [{"prompt": f"question {i}", "response": f"answer {j}", "reward": float(j), "policy": "p"}
            for i in range(50) for j in range(3)]
    folder, manifest = convert(tmp_path, "jsonl", rows, split=[0.4, 0.3, 0.2, 0.1])
    prompts = {name: {row["prompt"] for row in read_lines(folder / name)} for name in manifest["files"]}
    assert [len(prompts[f"{name}.jsonl"]) for name in ("sft", "scored", "rl", "test_prompts")] == [20, 15, 10, 5]
    assert len(set.union(*prompts.values())) == 50
    for a, b in (("sft", "scored"), ("scored", "rl"), ("sft", "rl"), ("test_scored", "scored"), ("rl", "test_prompts")):
        assert not prompts[f"{a}.jsonl"] & prompts[f"{b}.jsonl"]
    assert all(row["response"] == "answer 2" for row in read_lines(folder / "sft.jsonl"))      # the best answer
    fields = {"prompt": "prompt", "response": "text", "reward": "number", "policy": "text"}
    assert len(train_gvm.read_rows(folder, "scored", fields)) == 45
    for name, file in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == file["sha256"]


@pytest.mark.parametrize("format, content, pattern", [
    ("hh", b'{"chosen": "x"', r"rows.jsonl:1: invalid JSON"),
    ("hh", b'{"chosen": "x"}\n', r"rows.jsonl:1: not a row of the format hh .*is --format right"),
    ("hh", b"[1]", "not a JSON object"),
    ("hh", b"", "rows.jsonl: empty"),
    ("alpaca_eval", b'{"prompt_id": 1, "response": "r", "reward": 1}', "pass --prompts"),
])
def test_bad_files(tmp_path, format, content, pattern):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=pattern):
        prepare_data.main(prepare_data.Args(format=format, input=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "d")))
    assert not (tmp_path / "d").exists()


def test_bad_arguments(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(SCORED[0] | {"prompt": "p"}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not gzip")
    for changes, pattern in (({"split": [1.0, 1.0, 0.0, 0.0]}, "add up to 1"), ({"input": "no/such.jsonl"}, "no such file"),
                             ({"input": str(broken)}, "cannot be read"), ({"input": ""}, "are needed"),
                             ({"output": str(tmp_path / "mine")}, "exists already"),
                             ({"output": str(tmp_path / "mine"), "overwrite": True}, "will not delete")):
        args = {"input": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out")} | changes
        with pytest.raises(SystemExit, match=pattern):
            prepare_data.main(prepare_data.Args(**args))
    assert (tmp_path / "mine" / "thesis.txt").exists() and not (tmp_path / "out").exists()
