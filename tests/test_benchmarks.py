"""Official formats, as the tools of MT-Bench, AlpacaEval, Arena-Hard and RewardBench read them (their commits: evaluate.py)."""
import gzip
import json

import pytest
import torch
from conftest import ROOT, read_lines, write_rows

import evaluate

QUESTIONS = ROOT.parent / "shared" / "data" / "mt_bench_questions.jsonl"       # beside the repository, where it is developed


def mt_bench_rows():
    """The real questions where they are at hand; else 80 of the same form."""
    if QUESTIONS.is_file():
        return read_lines(QUESTIONS)
    return [{"question_id": i, "category": list(evaluate.MT_BENCH_TEMPERATURES)[(i - 81) // 10],
             "turns": [f"Is number {i} an island? " * (1 + i % 7), "Say it again, in other words."]} for i in range(81, 161)]


def answers_args(dvpo_run, tmp_path, benchmark, rows, **changes):
    write_rows(tmp_path / "questions.jsonl", rows)
    return evaluate.AnswersArgs(**{"model": str(dvpo_run), "benchmark": benchmark, "questions": str(tmp_path / "questions.jsonl"),
                                   "output": str(tmp_path / "out"), "max_new_tokens": 6, "batch_size": 16} | changes)


def test_mt_bench_all_80_questions(dvpo_run, tmp_path, capsys):
    rows = mt_bench_rows()
    evaluate.evaluate_answers(answers_args(dvpo_run, tmp_path, "mt_bench", rows))
    answers = read_lines(tmp_path / "out" / "dvpo.jsonl")
    assert [answer["question_id"] for answer in answers] == list(range(81, 161))
    for answer, row in zip(answers, rows):
        assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert answer["model_id"] == "dvpo" and isinstance(answer["answer_id"], str) and isinstance(answer["tstamp"], float)
        (choice,) = answer["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2 == len(row["turns"])
        assert all(isinstance(turn, str) for turn in choice["turns"])
    assert len({answer["answer_id"] for answer in answers}) == 80
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dvpo.jsonl"]          # nothing that a *.jsonl reader would take
    # Atlas's context is 512 tokens: some real questions do not fit, and say so.
    long = [turn for answer in answers for turn in answer["choices"][0]["turns"] if turn.startswith("ERROR: the question has")]
    assert bool(long) == QUESTIONS.is_file() and f"80 answers; {len(long)} turns had no room" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists already"):
        evaluate.evaluate_answers(answers_args(dvpo_run, tmp_path, "mt_bench", rows))


def test_both_turns_are_one_conversation_at_the_category_s_temperature(dvpo_run, tmp_path, monkeypatch):
    seen, tokenizer = [], evaluate.AutoTokenizer.from_pretrained(dvpo_run)

    def spy(model, tokenizer, prompts, max_new_tokens, stop, temperature=1.0):
        seen.extend((ids, temperature) for ids in prompts)
        return [evaluate.encode_response(tokenizer, f"Answer {len(ids)}.") for ids in prompts]

    monkeypatch.setattr(evaluate, "generate", spy)
    rows = mt_bench_rows()
    evaluate.evaluate_answers(answers_args(dvpo_run, tmp_path, "mt_bench", rows))
    answers = {answer["question_id"]: answer["choices"][0]["turns"] for answer in read_lines(tmp_path / "out" / "dvpo.jsonl")}
    for row in rows:
        first, second = answers[row["question_id"]]
        temperature = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}.get(row["category"], 0.0)
        conversation = [{"role": "user", "content": row["turns"][0]}, {"role": "assistant", "content": first},
                        {"role": "user", "content": row["turns"][1]}]
        for turn, messages in ((first, conversation[:1]), (second, conversation)):
            if not turn.startswith("ERROR"):
                assert (evaluate.encode_prompt(tokenizer, messages), temperature) in seen
    assert len(seen) > 100


@pytest.mark.parametrize("benchmark, most, temperature", [("mt_bench", 1024, 0.7), ("alpaca_eval", 2048, 0.7), ("arena_hard", 4096, 0.0)])
def test_the_benchmarks_own_settings(dvpo_run, tmp_path, monkeypatch, benchmark, most, temperature):
    asked = []
    monkeypatch.setattr(evaluate, "answer_turn", lambda model, tokenizer, conversations, temperature, most, batch_size:
                        asked.append((temperature, most)) or ["x"] * len(conversations))
    row = {"mt_bench": {"question_id": 81, "category": "writing", "turns": ["q", "r"]}, "alpaca_eval": {"instruction": "q"},
           "arena_hard": {"uid": "1", "category": "c", "prompt": "q"}}[benchmark]
    evaluate.evaluate_answers(answers_args(dvpo_run, tmp_path, benchmark, [row], max_new_tokens=None, bad_rows="skip"))
    assert set(asked) == {(temperature, most)}


def test_alpaca_eval_and_arena_hard_files(dvpo_run, tmp_path):
    rows = [{"instruction": f"Is Malta an island? {i}", "dataset": "koala", "output": "of the baseline", "generator": "gpt4"} for i in range(5)]
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    evaluate.evaluate_answers(answers_args(f"mine={dvpo_run}", tmp_path, "alpaca_eval", rows, questions=str(tmp_path / "list.json.gz")))
    outputs = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert [list(answer) for answer in outputs] == [["instruction", "output", "generator", "dataset"]] * 5
    assert [answer["instruction"] for answer in outputs] == [row["instruction"] for row in rows]
    assert {answer["generator"] for answer in outputs} == {"mine"} and "of the baseline" not in {answer["output"] for answer in outputs}

    rows = [{"uid": f"u{i}", "category": "hard_prompt", "subcategory": "coding", "prompt": f"Is Malta an island? {i}"} for i in range(3)]
    evaluate.evaluate_answers(answers_args(dvpo_run, tmp_path, "arena_hard", rows))
    for answer, row in zip(read_lines(tmp_path / "out" / "dvpo.jsonl"), rows):
        assert set(answer) == {"uid", "ans_id", "model", "messages", "tstamp"} and answer["uid"] == row["uid"]
        user, assistant = answer["messages"]
        assert user == {"role": "user", "content": row["prompt"]}
        assert assistant["role"] == "assistant" and set(assistant["content"]) == {"answer"}    # an object, not a string


def test_a_stop_loses_one_batch_and_changes_nothing(dvpo_run, tmp_path, monkeypatch):
    """Stopped in the third batch and taken up again: the same answers, and no question asked twice."""
    args = answers_args(dvpo_run, tmp_path, "mt_bench", mt_bench_rows(), max_new_tokens=4)
    evaluate.evaluate_answers(evaluate.AnswersArgs(**vars(args) | {"output": str(tmp_path / "whole")}))
    turn, calls = evaluate.answer_turn, []

    def counted(model, tokenizer, conversations, *others):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append([messages[0]["content"] for messages in conversations])
        return turn(model, tokenizer, conversations, *others)

    monkeypatch.setattr(evaluate, "answer_turn", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_answers(args)
    part = tmp_path / "out" / "dvpo.jsonl.part"
    assert len(part.read_text().splitlines()) == 3 and not (tmp_path / "out" / "dvpo.jsonl").exists()
    with pytest.raises(SystemExit, match="another --seed: 1"):
        evaluate.evaluate_answers(evaluate.AnswersArgs(**vars(args) | {"seed": 2}))
    part.write_text(part.read_text() + '[[5, [["cut o')
    calls.insert(0, "past the stop")
    evaluate.evaluate_answers(args)
    asked = [question for batch in calls[1::2] for question in batch]          # first turns: 2 batches, then the rest
    assert len(asked) == len(set(asked)) == 80 and not part.exists()
    whole, resumed = ([answer["choices"] for answer in read_lines(tmp_path / name / "dvpo.jsonl")] for name in ("whole", "out"))
    assert whole == resumed


def test_other_weights_in_the_same_folder_are_another_model(dvpo_run, sft_run, tmp_path, monkeypatch):
    import shutil
    shutil.copytree(dvpo_run, tmp_path / "m")
    args = answers_args(tmp_path / "m", tmp_path, "arena_hard", [{"uid": str(i), "prompt": f"Is it {i}?"} for i in range(4)], batch_size=2)
    turn, calls = evaluate.answer_turn, []

    def stopped(*everything):
        calls.append(1)
        return turn(*everything) if len(calls) < 2 else [][1]

    monkeypatch.setattr(evaluate, "answer_turn", stopped)
    with pytest.raises(IndexError):
        evaluate.evaluate_answers(args)
    shutil.copy(sft_run / "model.safetensors", tmp_path / "m" / "model.safetensors")
    with pytest.raises(SystemExit, match="was begun with another --weights"):
        evaluate.evaluate_answers(args)
    (tmp_path / "out" / "m.jsonl.part").write_text("my notes\nand more\n")
    with pytest.raises(SystemExit, match="is in the way, and was not written here"):
        evaluate.evaluate_answers(args)
    assert (tmp_path / "out" / "m.jsonl.part").read_text() == "my notes\nand more\n"


@pytest.mark.parametrize("changes, message", [
    ({"model": "../escape={run}"}, "has no /"), ({"model": "={run}"}, "no name before the ="), ({"seed": 2 ** 40}, "--seed"),
    ({"output": "{file}"}, "cannot be written"), ({"output": "{taken}"}, "is a folder, and a file of that name")])
def test_bad_settings_of_answers(dvpo_run, tmp_path, changes, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / f"{dvpo_run.name}.json").mkdir(parents=True)
    filled = {name: value.format(run=dvpo_run, file=tmp_path / "file", taken=tmp_path / "taken") if isinstance(value, str) else value
              for name, value in changes.items()}
    with pytest.raises(SystemExit, match=message):
        evaluate.evaluate_answers(answers_args(dvpo_run, tmp_path, "alpaca_eval", [{"instruction": "q"}], **filled))
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_question_with_little_room_gets_what_is_there(dvpo_run, world):
    model, tokenizer = evaluate.load_chat_model(str(dvpo_run))
    model.config.max_position_embeddings = 40
    lengths = {len(evaluate.encode_prompt(tokenizer, "island " * n)): n for n in range(1, 60)}
    texts = [next("island " * n for length, n in lengths.items() if length >= wanted) for wanted in (5, 37, 40, 50)]
    prompts = [len(evaluate.encode_prompt(tokenizer, text)) for text in texts]
    seen, own = [], evaluate.generate

    def spy(model, tokenizer, prompts, room, *others):
        seen.append(([len(ids) for ids in prompts], room))
        return own(model, tokenizer, prompts, room, *others)

    evaluate.generate = spy
    try:
        answers = evaluate.answer_turn(model, tokenizer, [[{"role": "user", "content": text}] for text in texts], 0.0, 10, 4)
    finally:
        evaluate.generate = own
    assert seen == [([prompts[0]], 10), ([prompts[1]], 40 - prompts[1])]
    assert [text.startswith("ERROR: the question has") for text in answers] == [False, False, True, True]
    assert f"{prompts[3]} tokens, the model's context 40" in answers[3]


def test_generate_is_the_model_s_own_distribution(dvpo_run):
    """Temperature 1: frequencies of the first token against the softmax. Temperature 0: its maximum."""
    model, tokenizer = evaluate.load_chat_model(str(dvpo_run))
    model.generation_config.top_k = 1                         # the model's own wish, to be set aside
    prompt = evaluate.encode_prompt(tokenizer, "Is Malta an island?")
    wanted = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    drawn = torch.tensor([ids[0] for ids in evaluate.generate(model, tokenizer, [prompt] * 4000, 1, [tokenizer.eos_token_id])])
    found = torch.bincount(drawn, minlength=len(wanted)) / 4000
    assert (found - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5
    greedy = evaluate.generate(model, tokenizer, [prompt, prompt[:-2]], 1, [tokenizer.eos_token_id], temperature=0.0)
    assert greedy[0] == [wanted.argmax().item()]
    assert model.generation_config.top_k == 1
    after = {i: model(torch.tensor([[i] * 3])).logits[0, -1].argmax().item() for i in range(100)}
    one, other = next((a, b) for a in after for b in after if tokenizer.eos_token_id not in (after[a], after[b]) and after[a] != after[b])
    stop = after[one]
    first, second = evaluate.generate(model, tokenizer, [[one] * 3, [other] * 3], 5, [stop], temperature=0.0)
    assert first == [stop] and len(second) > 1                # any stop id ends a response, while others go on


GOOD = {"question_id": 81, "category": "writing", "turns": ["a", "b"]}


@pytest.mark.parametrize("benchmark, rows, message", [
    ("mt_bench", [GOOD, GOOD], r":2: an earlier question has the same \"question_id\""),
    ("mt_bench", [GOOD | {"refrence": ["x"]}], r':1: unknown field "refrence" \(a question of mt_bench has category'),
    ("mt_bench", [GOOD | {"category": "poetry"}], "'poetry' has no temperature"),
    ("mt_bench", [GOOD | {"turns": ["a", 3]}], "a question is empty or not a string"),
    ("mt_bench", [GOOD | {"turns": ["a"]}], "has 1 turns, not two"),
    ("mt_bench", [{"category": "writing", "turns": ["a"]}], ':1: no field "question_id"'),
    ("mt_bench", [GOOD], "82, 83, 84, 85, 86 (79 in all) are not here"),
    ("alpaca_eval", [{"prompt": "x"}], ':1: no field "instruction"'),
    ("arena_hard", [{"uid": "1", "turns": ["x"]}], ':1: no field "prompt"'),
    ("arena_hard", [{"uid": ["1"], "prompt": "x"}], "not a string or number"),
    ("arena_hard", [[1]], "not a JSON object")])
def test_bad_questions(dvpo_run, tmp_path, benchmark, rows, message):
    args = answers_args(dvpo_run, tmp_path, benchmark, rows)
    with pytest.raises(SystemExit, match=message.replace("(79", r"\(79").replace("all)", r"all\)")):
        evaluate.evaluate_answers(args)
    assert not (tmp_path / "out").exists()


def test_bad_question_files(dvpo_run, tmp_path):
    args = answers_args(dvpo_run, tmp_path, "alpaca_eval", [{"instruction": "a"}, {"nothing": 1}], bad_rows="skip")
    assert len(evaluate.evaluate_answers(args)) == 1
    for content, message in ((b'{"instruction": "a"}\n{"instruct', "bad.jsonl:2: not a file of JSON lines"),
                             (b"\xff\xfe", "bad.jsonl: not a file"), (b'{"instruction": "\\ud800"}', "bad.jsonl:1: not a file"), (b"[1, 2", "bad.jsonl: not a file")):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            evaluate.benchmark_questions(tmp_path / "bad.jsonl", "alpaca_eval", "error")
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"instruction": "a"}\r\n')
    assert evaluate.benchmark_questions(tmp_path / "bom.jsonl", "alpaca_eval", "error")[0][1] == ["a"]
    with pytest.raises(SystemExit, match="--questions .*none.jsonl: no such file"):
        evaluate.benchmark_questions(tmp_path / "none.jsonl", "alpaca_eval", "error")


def test_the_split_of_a_hub_data_set(monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append(split) or [{"prompt": "q"}])
    for split in ("rl", "sft", "test_prompts", "filtered"):
        evaluate.read_rows("some/where", split, {"prompt": "prompt"})
    assert asked == ["train", "train", "test", "filtered"]    # RewardBench's own split keeps its name


# ---- RewardBench ----
OFFICIAL = {   # allenai/reward-bench 05a9005e, constants.py: written down from there, apart from evaluate.py
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                  "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 250,
               "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164}}


def test_rewardbench_weights():
    assert evaluate.REWARDBENCH == OFFICIAL
    assert {section: sum(counts.values()) for section, counts in OFFICIAL.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    generator = torch.Generator().manual_seed(0)
    accuracy = {subset: torch.rand((), generator=generator).item() for counts in OFFICIAL.values() for subset in counts}
    found = evaluate.rewardbench_sections(accuracy)
    # Expanded to one number per prompt, the section's score is the plain mean.
    for section, counts in OFFICIAL.items():
        prompts = [accuracy[subset] for subset, count in counts.items() for _ in range(count)]
        assert found[section] == pytest.approx(sum(prompts) / len(prompts))
    assert evaluate.rewardbench_sections({"math-prm": 1.0, "hep-go": 0.0}) == {"Reasoning": pytest.approx(984 / 1148)}


def test_rewardbench_rows(gvm_run, reward_model_run, world, tmp_path, capsys):
    """Rows of its form: the scores follow from each answer's own score; a tie is wrong."""
    pairs = read_lines(world / "data" / "test_pairs.jsonl")
    subsets = [subset for counts in OFFICIAL.values() for subset in counts]
    rows = [{"prompt": pair["prompt"], "chosen": pair["chosen"], "chosen_model": "a", "rejected": pair["rejected"], "rejected_model": "b",
             "subset": subsets[i % len(subsets)], "id": i} for i, pair in enumerate(pairs)]
    write_rows(tmp_path / "filtered.jsonl", rows)
    args = evaluate.ValuesArgs(models=[str(gvm_run), str(reward_model_run)], data=str(tmp_path), benchmark="rewardbench", aggregate="last")
    result = evaluate.evaluate_values(args)
    said = capsys.readouterr().out
    for name in ("gvm", "reward_model"):
        model, tokenizer, _ = evaluate.load_value_model(str(gvm_run if name == "gvm" else reward_model_run))
        right = {}
        for row in rows:
            score = [evaluate.score_answers(model, [(evaluate.encode_prompt(tokenizer, row["prompt"]),
                                                     evaluate.encode_response(tokenizer, row[side]))], args, tokenizer.pad_token_id)["last"]
                     for side in ("chosen", "rejected")]
            right.setdefault(row["subset"], []).append(float(score[0] > score[1]))
        found = result["models"][name]
        assert {subset: x["mean"] for subset, x in found["subsets"].items()} == pytest.approx(
            {subset: sum(x) / len(x) for subset, x in right.items()})
        for section, counts in OFFICIAL.items():
            wanted = sum(n * sum(right[subset]) / len(right[subset]) for subset, n in counts.items()) / sum(counts.values())
            assert found["sections"]["last"][section] == pytest.approx(wanted)
            assert f"{wanted:.3f}" in said.split("RewardBench section")[1]
    assert "no rows of" not in said
    write_rows(tmp_path / "filtered.jsonl", [rows[0] | {"subset": "hep-cobol"}])
    with pytest.raises(SystemExit, match="filtered.jsonl:1: \"subset\" 'hep-cobol' is none of RewardBench's"):
        evaluate.evaluate_values(args)


def test_a_tie_is_wrong_on_rewardbench_and_half_right_elsewhere(gvm_run, world, tmp_path, capsys):
    """A model whose head is zero gives every answer the same score."""
    model = evaluate.AutoModelForTokenClassification.from_pretrained(gvm_run)
    for parameter in evaluate.value_head(model).parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "zero")
    evaluate.AutoTokenizer.from_pretrained(gvm_run).save_pretrained(tmp_path / "zero")
    rows = [row | {"subset": "hep-go"} for row in read_lines(world / "data" / "test_pairs.jsonl")[:20]]
    write_rows(tmp_path / "filtered.jsonl", rows)
    args = {"models": [str(tmp_path / "zero")], "data": str(tmp_path)}
    assert evaluate.evaluate_values(evaluate.ValuesArgs(**args, benchmark="rewardbench"))["models"]["zero"]["sections"]["mean"] == {"Reasoning": 0.0}
    assert "no rows of alpacaeval-easy, " in capsys.readouterr().out
    plain = evaluate.evaluate_values(evaluate.ValuesArgs(**args, split="filtered"))["models"]["zero"]
    assert plain["pair_accuracy"]["mean"]["mean"] == 0.5
