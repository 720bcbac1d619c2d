"""What label_rollouts.py writes is what the reward model says of what the policies wrote, however often it was stopped."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails, read_lines, write_rows
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import label_rollouts
import sft

# A chat template that is not the policies', with words after the answer.
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %} (the end){% endif %}{{ '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def args(world, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    rows = read_lines(world / "data" / "scored.jsonl")
    write_rows(folder / "data" / "scored.jsonl", [row for row in rows if row["prompt"] in {r["prompt"] for r in rows[:60]}])
    return label_rollouts.Args(models=[f"sft={runs('sft')}", f"dvpo={runs('dvpo')}"], reward_model=str(runs("reward_model")),
                               data=str(folder / "data"), output=str(folder / "out"), samples=2, test_share=0.25, batch_size=7)


@pytest.fixture(scope="module")
def labels(args):
    label_rollouts.main(args)
    return Path(args.output)


@pytest.fixture
def foreign(runs, tmp_path):
    """foreign(**config): a reward model of others, with a head and a chat template of its own."""
    def make(**changes):
        tokenizer = AutoTokenizer.from_pretrained(runs("reward_model"))
        tokenizer.chat_template = TEMPLATE
        config = AutoConfig.from_pretrained(runs("reward_model"), **changes)
        del config.reward_model
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(tmp_path / "foreign")
        tokenizer.save_pretrained(tmp_path / "foreign")
        return tmp_path / "foreign"

    return make


def by_hand(folder, texts):
    """The reward model's logit for each text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item() for text in texts]


def test_rows_manifest_and_split(args, labels):
    scored, held_out = (read_lines(labels / f"{name}.jsonl") for name in ("scored", "test_scored"))
    prompts = {row["prompt"] for row in read_lines(Path(args.data) / "scored.jsonl")}
    assert all(set(row) == {"prompt", "response", "reward", "policy"} for row in scored + held_out)
    assert {row["policy"] for row in scored} == {row["policy"] for row in held_out} == {"sft", "dvpo"}
    assert not {row["prompt"] for row in scored} & {row["prompt"] for row in held_out}
    assert {row["prompt"] for row in scored + held_out} <= prompts and len({row["prompt"] for row in held_out}) <= round(len(prompts) / 4)
    assert {file.name for file in labels.iterdir()} == {"scored.jsonl", "test_scored.jsonl", "manifest.json"}
    manifest = json.loads((labels / "manifest.json").read_text())                # every answer is a row, or is counted:
    assert len(scored) + len(held_out) + sum(manifest["left_out"].values()) == 2 * 2 * len(prompts) == 2 * 2 * manifest["prompts"]


def test_rewards_are_those_of_our_reward_model_at_the_end_of_the_answer(args, labels):
    rows = read_lines(labels / "scored.jsonl")
    expected = by_hand(args.reward_model, [f"<|user|>{row['prompt']}<|assistant|>{row['response']}<|end|>" for row in rows])
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5) and len(set(expected)) > 3


def test_ours_is_read_at_the_end_of_the_answer_also_where_the_template_goes_on(runs):
    """sft.py's template writes a line end after EOS, which our reward models have never seen."""
    tokenizer, configs = AutoTokenizer.from_pretrained(runs("sft")), [AutoConfig.from_pretrained(runs(name)) for name in ("reward_model", "sft")]
    tokenizer.chat_template = sft.PLAIN_TEMPLATE
    ours, theirs = (label_rollouts.encode_conversation(config, tokenizer, "Is it?", "No.") for config in configs)
    assert ours[-1] == tokenizer.eos_token_id != theirs[-1]


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_rewards_are_those_of_a_foreign_reward_model(args, foreign, tmp_path, pad_token_id):
    """Its own chat template, to the last word."""
    folder = foreign(pad_token_id=pad_token_id)
    label_rollouts.main(replace(args, reward_model=str(folder), output=str(tmp_path / "out")))
    rows = read_lines(tmp_path / "out" / "scored.jsonl")
    expected = by_hand(folder, [f"user: {row['prompt']}\nassistant: {row['response']} (the end)\n" for row in rows])
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5) and len(set(expected)) > 3


@pytest.mark.parametrize("batches", [0, 3, 20])
def test_a_stopped_run_goes_on_and_ends_the_same(args, labels, tmp_path, monkeypatch, batches):
    """Stopped among the answers of the first or the second policy; with a line that is half written."""
    again, made, answer_batch = replace(args, output=str(tmp_path / "out")), [], label_rollouts.answer_batch

    def dies(*inputs):
        if len(made) == batches:
            raise KeyboardInterrupt
        made.append(1)
        return answer_batch(*inputs)

    monkeypatch.setattr(label_rollouts, "answer_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        label_rollouts.main(again)
    with open(tmp_path / "out.answers" / "0.jsonl", "a") as log:
        log.write('\n["sft", 99, [["Yes')
    fails(lambda: label_rollouts.main(replace(again, seed=2)), "was begun with another seed")
    more = []
    monkeypatch.setattr(label_rollouts, "answer_batch", lambda *inputs: more.append(1) or answer_batch(*inputs))
    label_rollouts.main(again)
    manifest = json.loads((labels / "manifest.json").read_text())
    assert len(made) + len(more) == 2 * -(-2 * manifest["prompts"] // 7)       # nothing was done twice
    for name in ("scored.jsonl", "test_scored.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (labels / name).read_bytes()


def test_two_processes_write_what_one_writes(args, labels, tmp_path):
    done = subprocess.run(list(map(str, [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0,
        "--mixed_precision", "no", "--dynamo_backend", "no", "data/label_rollouts.py", "--models", *args.models, "--reward_model",
        args.reward_model, "--data", args.data, "--output", tmp_path / "out", "--samples", 2, "--test_share", 0.25, "--batch_size", 7])),
        cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and " 2 processes: 0 of " in done.stdout, done.stderr[-2000:]
    for name in ("scored.jsonl", "test_scored.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (labels / name).read_bytes()


def test_bad_input_ends_in_one_line(args, foreign, runs, tmp_path):
    def run(pattern, **changes):
        fails(lambda: label_rollouts.main(replace(args, **{"output": str(tmp_path / "bad")} | changes)), pattern)
        assert not (tmp_path / "bad").exists()

    run("no prompt fits into --max_prompt_length 2", max_prompt_length=2)
    run("holds a LlamaForTokenClassification, not a trained SequenceClassification", reward_model=str(runs("gvm")))
    run("holds a LlamaForTokenClassification, no start for a CausalLM", models=[str(runs("gvm"))])
    run("no answer to learn from .*answer cut at --max_response_length", max_response_length=1, overwrite=True)
    run("has 2 labels, not one", reward_model=str(foreign(num_labels=2)))
    run("longer than the reward model's context", reward_model=str(foreign(max_position_embeddings=4)), overwrite=True)
    fails(lambda: label_rollouts.main(replace(args, output=str(Path(args.data).parent))), "exists. Choose another --output")
