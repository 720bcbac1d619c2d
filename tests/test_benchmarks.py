"""analysis/answers.py: the official formats, as the tools of MT-Bench, AlpacaEval and Arena-Hard read them."""
import json

import pytest
import torch
from conftest import fails, write_rows

import answers
import evaluate

ROWS = [{"question_id": i, "category": list(answers.TEMPERATURES)[(i - 81) // 10],
         "turns": [f"Is number {i} an island? " * (1 + i % 7 * 7), "Say it again, in other words."]} for i in range(81, 161)]


@pytest.fixture
def answer(runs, tmp_path):
    """answer("mt_bench", rows, field=value, ...): answers the questions, and returns the file's text."""
    def get(benchmark, rows, **changes):
        write_rows(tmp_path / "questions.jsonl", rows)
        args = answers.Args(**{"model": str(runs("dvpo")), "benchmark": benchmark, "output": str(tmp_path / "out"),
                               "questions": str(tmp_path / "questions.jsonl"), "max_new_tokens": 6} | changes)
        answers.main(args)
        (file,) = (tmp_path / "out").iterdir()
        return file.read_text()
    return get


def test_mt_bench_all_80_questions(answer, capsys):
    lines = [json.loads(line) for line in answer("mt_bench", ROWS).splitlines()]
    assert [line["question_id"] for line in lines] == list(range(81, 161)) and len({line["answer_id"] for line in lines}) == 80
    for line in lines:
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "dvpo" and isinstance(line["tstamp"], float)
        (choice,) = line["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2 and all(isinstance(turn, str) for turn in choice["turns"])
    assert "answers are empty" in capsys.readouterr().out     # Atlas's context is 512 tokens
    fails(lambda: answer("mt_bench", ROWS), "dvpo.jsonl: exists")


def test_both_turns_are_one_conversation_at_the_category_s_temperature(answer, runs, monkeypatch):
    seen, tokenizer = [], evaluate.load_tokenizer(str(runs("dvpo")))

    def spy(temperature, prompts, most, stop_ids, greedy):
        seen.extend((prompt, 0.0 if greedy else temperature) for prompt in prompts)
        return [evaluate.encode_response(tokenizer, f"Answer {len(prompt)}.") for prompt in prompts]

    monkeypatch.setattr(answers, "rollout", spy)
    monkeypatch.setattr(answers, "at_temperature", lambda policy, temperature: temperature)
    rows = [row for row in ROWS if len(row["turns"][0]) < 250]
    for row, line in zip(rows, answer("mt_bench", rows).splitlines()):
        first, second = json.loads(line)["choices"][0]["turns"]
        temperature = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}.get(row["category"], 0.0)
        conversation = [{"role": "user", "content": row["turns"][0]}, {"role": "assistant", "content": first},
                        {"role": "user", "content": row["turns"][1]}]
        assert all((evaluate.encode_prompt(tokenizer, messages), temperature) in seen for messages in (conversation[:1], conversation))
    assert len(seen) == 2 * len(rows) > 20


def test_at_temperature(runs):
    """Frequencies of the first token against the softmax of the scaled logits; temperature 0 takes the likeliest."""
    tokenizer = evaluate.load_tokenizer(str(runs("dvpo")))
    policy = evaluate.load_model(evaluate.AutoModelForCausalLM, runs("dvpo"), tokenizer, 64)
    prompt = evaluate.encode_prompt(tokenizer, "Is Malta an island?")
    logits = policy(torch.tensor([prompt])).logits[0, -1]
    drawn = evaluate.rollout(answers.at_temperature(policy, 0.5), [prompt] * 4000, 1, [])
    found = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(logits)) / 4000
    assert (found - (logits / 0.5).softmax(-1)).abs().max() < 4 * (0.25 / 4000) ** 0.5
    question = [[{"role": "user", "content": "Is Malta an island?"}]]
    text = answers.answer_turn(policy, tokenizer, question, 0.0, 1, 1)
    assert text == [tokenizer.decode(logits.argmax(), skip_special_tokens=True).strip()]


def test_alpaca_eval_and_arena_hard_files(answer, runs, tmp_path):
    rows = [{"instruction": f"Is Malta an island? {i}", "dataset": "koala", "output": "of the baseline", "generator": "gpt4"} for i in range(3)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    outputs = json.loads(answer("alpaca_eval", [], model=f"mine={runs('dvpo')}", questions=str(tmp_path / "list.json")))
    assert [list(row) for row in outputs] == [["instruction", "output", "generator", "dataset"]] * 3
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in rows]
    assert {row["generator"] for row in outputs} == {"mine"} and "of the baseline" not in {row["output"] for row in outputs}
    (tmp_path / "out" / "mine.json").unlink()

    rows = [{"uid": f"u{i}", "category": "hard_prompt", "subcategory": "coding", "prompt": f"Is Malta an island? {i}"} for i in range(3)]
    for line, row in zip(answer("arena_hard", rows).splitlines(), rows):
        line = json.loads(line)
        assert set(line) == {"uid", "ans_id", "model", "messages", "tstamp"} and line["uid"] == row["uid"]
        user, assistant = line["messages"]
        assert user == {"role": "user", "content": row["prompt"]}
        assert assistant["role"] == "assistant" and set(assistant["content"]) == {"answer"}    # an object, not a string


GOOD = {"question_id": 81, "category": "writing", "turns": ["a", "b"]}


@pytest.mark.parametrize("benchmark, row, message", [
    ("mt_bench", GOOD | {"category": "poetry"}, "row 2 has an unknown category, 'poetry'"), ("mt_bench", GOOD | {"turns": ["a"]}, "not two turns"),
    ("mt_bench", {"category": "writing", "turns": ["a"]}, "row 2 has no 'question_id'"), ("mt_bench", [1], "row 2 has no 'question_id'")])
def test_bad_questions(answer, tmp_path, benchmark, row, message):
    fails(lambda: answer(benchmark, [GOOD, row]), message)
    (tmp_path / "half.jsonl").write_text('{"instruction": "a"}\n{"instruct')
    fails(lambda: answer("alpaca_eval", [], questions=str(tmp_path / "half.jsonl")), "cannot be read")
    assert not (tmp_path / "out").exists()
