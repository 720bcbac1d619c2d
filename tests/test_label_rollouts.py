"""label_rollouts.py: what it writes is what the reward model says of what the policies wrote, and train_gvm.py learns from it."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines, write_rows
from test_bad_input import fails
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import label_rollouts
import prepare_data
import sft
import train_gvm

# A chat template that is not the policies', with words behind the answer.
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %} (the end){% endif %}{{ '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def args(world, sft_run, dvpo_run, reward_model_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    rows = read_lines(world / "data" / "scored.jsonl")
    write_rows(folder / "data" / "scored.jsonl", [row for row in rows if row["prompt"] in {r["prompt"] for r in rows[:60]}])
    return label_rollouts.Args(models=[f"sft={sft_run}", f"dvpo={dvpo_run}"], reward_model=str(reward_model_run), data=str(folder / "data"),
                               output=str(folder / "out"), samples=2, test_share=0.25, batch_size=7)


@pytest.fixture(scope="module")
def labels(args):
    label_rollouts.main(args)
    return Path(args.output)


@pytest.fixture
def foreign(reward_model_run, tmp_path):
    """foreign(**config): a reward model of others, with a head, a chat template and a token order of its own."""
    def make(**changes):
        folder = tmp_path / "foreign"
        tokenizer = AutoTokenizer.from_pretrained(reward_model_run)
        tokenizer.chat_template = TEMPLATE
        torch.manual_seed(5)
        config = AutoConfig.from_pretrained(reward_model_run, **changes)
        del config.reward_model
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def by_hand(folder, ids):
    """The reward model's logit for one sequence alone, no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in ids]


def test_rows_manifest_and_split(args, labels):
    scored, held_out = (read_lines(labels / f"{name}.jsonl") for name in ("scored", "test_scored"))
    prompts = {row["prompt"] for row in read_lines(Path(args.data) / "scored.jsonl")}
    assert all(set(row) == {"prompt", "response", "reward", "policy"} for row in scored + held_out)
    assert {row["policy"] for row in scored} == {row["policy"] for row in held_out} == {"sft", "dvpo"}
    assert not {row["prompt"] for row in scored} & {row["prompt"] for row in held_out}
    assert {row["prompt"] for row in scored + held_out} <= prompts
    assert len({row["prompt"] for row in held_out}) <= round(len(prompts) / 4)
    assert {file.name for file in labels.iterdir()} == {"scored.jsonl", "test_scored.jsonl", "manifest.json"}
    assert not labels.with_name("out.part").exists()
    manifest = json.loads((labels / "manifest.json").read_text())
    for name, file in manifest["files"].items():
        content = (labels / name).read_bytes()
        assert file == {"rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}
    # Every answer is a row or is counted.
    counts = manifest["counts"]
    assert counts["answers of sft"] + counts["answers of dvpo"] == len(scored) + len(held_out)
    answers = len(scored) + len(held_out) + sum(n for reason, n in counts.items() if reason in ("dropped: empty answer", "dropped: cut at --max_response_length"))
    assert answers == 2 * 2 * len(prompts) == 2 * 2 * manifest["prompts"]


def test_rewards_are_those_of_our_reward_model_at_eos(args, labels):
    """baselines/reward_model.py was trained on [prompt | response | EOS]."""
    rows, tokenizer = read_lines(labels / "scored.jsonl"), AutoTokenizer.from_pretrained(args.reward_model)
    ids = [tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False)
           + tokenizer(row["response"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for row in rows]
    assert [row["reward"] for row in rows] == pytest.approx(by_hand(args.reward_model, ids), abs=1e-5)
    assert len({row["reward"] for row in rows}) > 3


def test_ours_is_read_at_eos_also_where_the_template_goes_on(reward_model_run):
    """sft.py's template writes a line end behind EOS, which our reward models have never seen."""
    tokenizer, ours = AutoTokenizer.from_pretrained(reward_model_run), AutoConfig.from_pretrained(reward_model_run)
    tokenizer.chat_template = sft.PLAIN_TEMPLATE
    theirs = AutoConfig.from_pretrained(reward_model_run)
    del theirs.reward_model
    read = {name: label_rollouts.encode_conversation(config, tokenizer, "Is it?", "No.") for name, config in (("ours", ours), ("theirs", theirs))}
    assert read["ours"][-1] == tokenizer.eos_token_id != read["theirs"][-1]


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_rewards_are_those_of_a_foreign_reward_model(args, foreign, tmp_path, pad_token_id):
    """Its own chat template, to the last word; batches with its own pad token, or no batches."""
    folder = foreign(pad_token_id=pad_token_id)
    label_rollouts.main(replace(args, reward_model=str(folder), output=str(tmp_path / "out")))
    rows, tokenizer = read_lines(tmp_path / "out" / "scored.jsonl"), AutoTokenizer.from_pretrained(folder)
    texts = [f"user: {row['prompt']}\nassistant: {row['response']} (the end)\n" for row in rows]
    expected = by_hand(folder, [tokenizer(text, add_special_tokens=False).input_ids for text in texts])
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5) and len(set(expected)) > 3


def test_the_value_model_learns_from_them(labels, sft_run, tmp_path):
    train_gvm.main(train_gvm.Args(model=str(sft_run), data=str(labels), output=str(tmp_path / "gvm"), tau_pairs=1, epochs=1, batch_size=8,
                                  micro_batch_size=8, log_every=1))
    assert (tmp_path / "gvm" / "model.safetensors").exists()
    assert all(0 < record["loss"] < 10 for record in read_lines(tmp_path / "gvm" / "metrics.jsonl"))
    # The baselines' reward model learns from pairs of the same scores.
    prepare_data.main(prepare_data.Args(input=str(labels / "scored.jsonl"), output=str(tmp_path / "pairs"), split=[0, 0.9, 0, 0.1]))
    reward = {(row["prompt"], row["response"]): row["reward"] for row in read_lines(labels / "scored.jsonl")}
    pairs = read_lines(tmp_path / "pairs" / "pairs.jsonl")
    assert pairs and all(reward[pair["prompt"], pair["chosen"]] > reward[pair["prompt"], pair["rejected"]] for pair in pairs)


@pytest.mark.parametrize("stopped_at", [1, 12, 30])
def test_a_stopped_run_goes_on_and_ends_the_same(args, labels, tmp_path, monkeypatch, stopped_at):
    """Stopped among the answers of the first, of the second policy, among the scores; in the middle of a line."""
    again, written, append = replace(args, output=str(tmp_path / "out")), [], label_rollouts.append

    def dies(log, record):
        if len(written) == stopped_at:
            log.write(json.dumps(record).encode()[:9])
            log.close()
            raise KeyboardInterrupt
        written.append(record)
        append(log, record)

    monkeypatch.setattr(label_rollouts, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        label_rollouts.main(again)
    assert not (tmp_path / "out").exists() and len(written) == stopped_at
    more = []
    monkeypatch.setattr(label_rollouts, "append", lambda log, record: (more.append(record), append(log, record)))
    label_rollouts.main(again)
    assert not {tuple(record[:3]) for record in written} & {tuple(record[:3]) for record in more}     # nothing was done twice
    for name in ("scored.jsonl", "test_scored.jsonl", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (labels / name).read_bytes()


def test_two_processes_write_what_one_writes(args, labels, tmp_path):
    done = subprocess.run(list(map(str, [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0, "--mixed_precision", "no",
        "--dynamo_backend", "no", "label_rollouts.py", "--models", *args.models, "--reward_model", args.reward_model,
        "--data", args.data, "--output", tmp_path / "out", "--samples", 2, "--test_share", 0.25, "--batch_size", 7])),
        cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and ", 2 processes: 0 of " in done.stdout, done.stderr[-2000:]
    batches = -(-2 * json.loads((labels / "manifest.json").read_text())["prompts"] // 7)
    assert f" {-(-batches // 2)}/{-(-batches // 2)} " in done.stderr           # the first process's bar: half of them
    assert [row | {"reward": 0} for row in read_lines(tmp_path / "out" / "scored.jsonl")] == [
        row | {"reward": 0} for row in read_lines(labels / "scored.jsonl")]
    assert [row["reward"] for row in read_lines(tmp_path / "out" / "scored.jsonl")] == pytest.approx(
        [row["reward"] for row in read_lines(labels / "scored.jsonl")], abs=1e-5)


def test_other_settings_do_not_go_on(args, tmp_path, monkeypatch):
    again = replace(args, output=str(tmp_path / "out"))
    monkeypatch.setattr(label_rollouts, "write_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        label_rollouts.main(again)
    monkeypatch.undo()
    fails(lambda: label_rollouts.main(replace(again, seed=2)), r"out.part: was begun with other seed: 1. .*--overwrite")
    log = tmp_path / "out.part" / "answers_0.log"
    log.write_bytes(b'{"another": "file"}\n' + log.read_bytes())
    fails(lambda: label_rollouts.main(again), r"answers_0.log:1: was not written here")
    label_rollouts.main(replace(again, seed=2, overwrite=True))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 2


def test_an_output_is_replaced_only_on_request(args, labels, tmp_path):
    shutil.copytree(labels, tmp_path / "out")
    again = replace(args, output=str(tmp_path / "out"), samples=1)
    fails(lambda: label_rollouts.main(again), "out: exists already.*--overwrite")
    label_rollouts.main(replace(again, overwrite=True))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 1
    (tmp_path / "out" / "manifest.json").unlink()
    fails(lambda: label_rollouts.main(replace(again, overwrite=True)), "no manifest.json")
    assert (tmp_path / "out" / "scored.jsonl").exists()
    shutil.copy(labels / "manifest.json", tmp_path / "out")
    fails(lambda: label_rollouts.main(replace(again, overwrite=True, data=again.output)), "out: holds .*, which is read here")


def test_bad_input_ends_in_one_line(args, foreign, sft_run, gvm_run, tmp_path, capsys):
    def run(pattern, after_answers=False, **changes):
        fails(lambda: label_rollouts.main(replace(args, **{"output": str(tmp_path / "bad")} | changes)), pattern)
        assert not (tmp_path / "bad").exists()
        answers = (tmp_path / "bad.part").exists() and (tmp_path / "bad.part" / "answers_0.log").stat().st_size
        shutil.rmtree(tmp_path / "bad.part", ignore_errors=True)
        assert bool(answers) == after_answers                 # said before any work, where it can be known

    run("--test_share 1.0: it has to be less than 1", test_share=1.0)
    run("--samples 0", samples=0)
    run("both called 'a'", models=[f"a={sft_run}", f"a={gvm_run}"])
    run("a language model is wanted here", models=[str(gvm_run)])
    run("rl.jsonl: no such file", split="rl")
    run("no prompt fits into --max_prompt_length 2", max_prompt_length=2)
    run("more than the context of .*, 512 tokens", max_response_length=500)
    run("no answer to learn from.*cut at.*A larger --max_response_length", True, max_response_length=1)
    run("LlamaForCausalLM with .* labels; a reward model for AutoModelForSequenceClassification", reward_model=str(sft_run))
    run("LlamaForTokenClassification with 1 labels", reward_model=str(gvm_run))
    run("no model in this folder", reward_model=str(tmp_path / "nowhere"))
    folder = foreign(num_labels=2)
    run("LlamaForSequenceClassification with 2 labels", reward_model=str(folder))
    folder = foreign(max_position_embeddings=4)               # every conversation is longer than it can read
    run("no answer to learn from.*longer than the reward model's context", True, reward_model=str(folder))
    folder = foreign()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('system prompts are not for me') }}"
    tokenizer.save_pretrained(folder)
    run("its chat template does not take .*system prompts are not for me", reward_model=str(folder))
    (folder / "chat_template.jinja").unlink()
    run("the tokenizer has no chat template", reward_model=str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaRewardModel"]}))      # as UltraRM-13b's
    run("LlamaRewardModel with 1 labels", reward_model=str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(args.reward_model)
    model.score.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(args.reward_model).save_pretrained(tmp_path / "nan")
    run("nan: gives nan to ", True, reward_model=str(tmp_path / "nan"))
