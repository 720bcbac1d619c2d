"""Answers to the questions of MT-Bench, AlpacaEval or Arena-Hard, in the files that their judges read.

    python analysis/answers.py --model runs/8b/dvpo --benchmark mt_bench --questions question.jsonl

Tables 1, 2 and 10. The formats are those of FastChat 0e6d3e4b (llm_judge), alpaca_eval cd543a14 and
arena-hard-auto 196f6b82, whose own tools then judge the answers.
"""
import json
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import (DEVICE, encode_prompt, fail, load_model, load_tokenizer, named, new_file,  # noqa: E402
                      parse_args, rollout)

MAX_NEW_TOKENS = {"mt_bench": 1024, "alpaca_eval": 2048, "arena_hard": 4096}
FIELDS = {"mt_bench": ("question_id", "category", "turns"), "alpaca_eval": ("instruction",),
          "arena_hard": ("uid", "prompt")}
# By MT-Bench's category. AlpacaEval leaves the temperature to the model: most of its models_configs say 0.7.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0, "stem": 0.1, "humanities": 0.1, "alpaca_eval": 0.7, "arena_hard": 0.0}


@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/dvpo", help="FOLDER or NAME=FOLDER of the policy")
    benchmark: Literal["mt_bench", "alpaca_eval", "arena_hard"] = HfArg(default="mt_bench", help="which one")
    questions: str = HfArg(default="question.jsonl", help="the benchmark's question file: .jsonl or .json")
    output: str = HfArg(default="runs/atlas/answers", help="folder for NAME.jsonl (AlpacaEval: NAME.json)")
    overwrite: bool = HfArg(default=False, help="replace the answers in --output")
    max_new_tokens: int = HfArg(default=0, help="tokens of an answer at most; 0: the benchmark's own number")
    batch_size: int = HfArg(default=16, help="questions answered at a time")
    seed: int = HfArg(default=1, help="seed of the samples")


def read_json(path, *fields):
    """The rows of a file of JSON lines, or of one JSON list: dicts that have these fields."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, lines))
    except (OSError, ValueError) as problem:
        fail(f"{path}: cannot be read as JSON lines or as a JSON list ({problem})")
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if not isinstance(row, dict) or row.get(field) in (None, "", [])]
        if missing:
            fail(f"{path}: row {number} has no {missing[0]!r}")
    return rows


def read_questions(path, benchmark):
    """[(row, [turn, ...], temperature), ...] of a benchmark's own question file."""
    questions = []
    for number, row in enumerate(read_json(path, *FIELDS[benchmark]), 1):
        kind = row["category"] if benchmark == "mt_bench" else benchmark
        turns = row["turns"] if benchmark == "mt_bench" else [row[FIELDS[benchmark][-1]]]
        if kind not in TEMPERATURES or len(turns) != (2 if benchmark == "mt_bench" else 1):
            fail(f"{path}: row {number} has an unknown category, {kind!r}, or not two turns")
        questions.append((row, turns, TEMPERATURES[kind]))
    return questions


def at_temperature(policy, temperature):
    """All that rollout needs of a policy, with softmax(logits / temperature) in place of softmax(logits)."""
    def scaled(**inputs):
        output = policy(**inputs)
        output.logits = output.logits / temperature
        return output

    scaled.device, scaled.generation_config = policy.device, policy.generation_config
    return scaled


def answer_turn(policy, tokenizer, conversations, temperature, most, batch_size):
    """The next assistant turn of each conversation (a list of chat messages): a list of texts. A conversation
    that leaves no room for `most` tokens in the model's context gets an empty one, for the judge to see."""
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))         # little padding
    order = [i for i in order if len(prompts[i]) + most <= context]
    if len(order) < len(prompts):
        print(f"{len(prompts) - len(order)} answers are empty: no room for {most} tokens in the context")
    policy, stop_ids = at_temperature(policy, temperature or 1.0), policy.generation_config.eos_token_id
    texts = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), f"temperature {temperature}"):
        batch = order[start:start + batch_size]
        responses = rollout(policy, [prompts[i] for i in batch], most, stop_ids, greedy=temperature == 0)
        for i, text in zip(batch, tokenizer.batch_decode(responses, skip_special_tokens=True)):
            texts[i] = text.strip()
    return texts


def official(benchmark, name, row, turns):
    """An answer as the official tool wants it. turns: [text, ...]."""
    if benchmark == "mt_bench":
        return {"question_id": row["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
                "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}
    if benchmark == "alpaca_eval":
        dataset = {"dataset": row["dataset"]} if "dataset" in row else {}
        return {"instruction": row["instruction"], "output": turns[0], "generator": name} | dataset
    messages = [{"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": {"answer": turns[0]}}]
    return {"uid": row["uid"], "ans_id": uuid.uuid4().hex, "model": name, "messages": messages,
            "tstamp": time.time()}


def main(args):
    (name, folder), = named([args.model]).items()
    file = Path(args.output, f"{name}.json" if args.benchmark == "alpaca_eval" else f"{name}.jsonl")
    questions = read_questions(args.questions, args.benchmark)
    new_file(file, args.overwrite)
    tokenizer, most = load_tokenizer(folder), args.max_new_tokens or MAX_NEW_TOKENS[args.benchmark]
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    policy = load_model(AutoModelForCausalLM, folder, tokenizer, most, dtype=dtype).to(DEVICE)
    torch.manual_seed(args.seed)
    conversations = [[] for _ in questions]
    for temperature in sorted({temperature for _, _, temperature in questions}):
        numbers = [i for i, question in enumerate(questions) if question[2] == temperature]
        for turn in range(max(len(questions[i][1]) for i in numbers)):
            for i in numbers:
                conversations[i].append({"role": "user", "content": questions[i][1][turn]})
            texts = answer_turn(policy, tokenizer, [conversations[i] for i in numbers], temperature, most,
                                args.batch_size)
            for i, text in zip(numbers, texts):
                conversations[i].append({"role": "assistant", "content": text})
    records = [official(args.benchmark, name, row, [message["content"] for message in messages[1::2]])
               for (row, _, _), messages in zip(questions, conversations)]
    text = "\n".join(map(json.dumps, records)) if file.suffix == ".jsonl" else json.dumps(records, indent=2)
    file.write_text(text + "\n")
    print(f"{file}: {len(records)} answers")


if __name__ == "__main__":
    main(parse_args(Args, sys.argv[1:]))
