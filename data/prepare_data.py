"""Stage 0 for real data: public preference data sets -> the data folder that every stage reads.

    python data/prepare_data.py --format hh --input harmless.jsonl.gz --output runs/hh/data
    python data/prepare_data.py --format ultrafeedback --input openbmb/UltraFeedback --output runs/uf/data

Section 4.2: "The data are split into three disjoint parts: SFT, reward-model training, and RL." Disjoint *by
prompt*: all answers to a prompt fall into one part, or the value model would be tested on questions that it
was trained on. A prompt as a string and the same as a single user message is one prompt.

Data are cleaned here, and nowhere else. What cannot be used (bad JSON, a row of another format, a prompt or
an answer without text, two turns of one role in a row, repeated answers, ties; with --tokenizer, a prompt
that the model's chat template refuses) is left out and counted; left_out.txt names each row.
"""
import gzip
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import load_dataset
from jinja2 import TemplateError
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from atlas import write_files  # noqa: E402
from evaluate import encode_prompt, fail, load_tokenizer, parse_args  # noqa: E402


# ---- 1. Arguments ----
@dataclass
class Args:
    format: Literal["ultrafeedback", "ultrafeedback_binarized", "hh", "alpaca_eval", "jsonl"] = HfArg(
        default="jsonl", help="of --input; jsonl: rows with prompt, and response or chosen and rejected")
    input: str = HfArg(default="", help="file (.json, .jsonl, either with .gz), or hub data set ORG/NAME")
    output: str = HfArg(default="", help="data folder to write")
    overwrite: bool = HfArg(default=False, help="replace the data folder that is there")
    tokenizer: str = HfArg(default="", help="model whose chat template has to accept the prompts")
    prompts: str = HfArg(default="", help="file of prompt_id and prompt, for rows that only have a prompt_id")
    hub_split: str = HfArg(default="train", help="split of a hub data set")
    split: list[float] = HfArg(default_factory=lambda: [0.4, 0.3, 0.2, 0.1], help="shares of the prompts: "
                               "SFT, value or reward learning, RL, test (paper: RL about 0.2)")
    pairs_per_prompt: int = HfArg(default=4, help="most pairs made of the scored answers to one prompt")
    seed: int = HfArg(default=1, help="seed of the split and of the choice of pairs")


@dataclass
class Question:
    """A prompt and all that is known about answers to it."""
    prompt: object                                            # str or chat messages
    answers: dict = field(default_factory=dict)               # {response: {"reward", "policy": or None}}
    pairs: dict = field(default_factory=dict)                 # {(chosen, rejected): the row's other fields}


class LeftOut(Exception):
    """Why a row is left out, in words of ours."""


# ---- 2. Formats: row -> (prompt, [(response, reward, policy)], [{"chosen", "rejected", ...}]) ----
def split_chats(chosen, rejected):
    """(prompt, chosen answer, rejected answer) of two chats that are the same up to the last message."""
    if chosen[:-1] != rejected[:-1] or not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise LeftOut("chosen and rejected are not two answers to one prompt")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def from_ultrafeedback(row, prompts):
    """openbmb/UltraFeedback: one instruction, up to four completions with an overall_score of 1 to 10."""
    return row["instruction"], [(c["response"], c.get("overall_score"), c.get("model"))
                                for c in row["completions"]], []


def from_binarized(row, prompts):
    """HuggingFaceH4/ultrafeedback_binarized: chosen and rejected are chats that end with the answer. What
    stands before it is the prompt: also a system message or earlier turns, which the field prompt lacks."""
    prompt, chosen, rejected = split_chats(row["chosen"], row["rejected"])
    return prompt, [(chosen, row["score_chosen"], None), (rejected, row["score_rejected"], None)], []


def from_hh(row, prompts):
    """Anthropic HH-RLHF: two transcripts that are the same up to the last answer."""
    chats = {}
    for side in ("chosen", "rejected"):
        turns = re.split(r"\n\n(Human|Assistant): ?", row[side])[1:]
        chats[side] = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                       for who, text in zip(turns[0::2], turns[1::2])]
    prompt, chosen, rejected = split_chats(**chats)
    return prompt, [], [{"chosen": chosen, "rejected": rejected}]


def from_alpaca_eval(row, prompts):
    """AlpacaEval: scored answers, or annotations.json: preference 1 to 2 (output_2 is better), 0: a draw."""
    if "preference" in row:
        preference = 1.5 if row["preference"] == 0 else row["preference"]
        if not 1 <= preference <= 2:
            raise LeftOut("preference that is not 0, nor 1 to 2")
        return row["instruction"], [(row["output_2"], preference - 1, row.get("generator_2"))], []
    return prompts[row["prompt_id"]], [(row["response"], row["reward"], row.get("policy"))], []


def from_jsonl(row, prompts):
    """The project's own rows: {prompt, response, reward?, policy?} or {prompt, chosen, rejected, ...}; and
    TRL's, whose answers are lists of messages: the answer alone, or with the prompt before it."""
    if row.get("chosen") is not None or row.get("response") is None:
        pair, before = {"chosen": row["chosen"], "rejected": row["rejected"]}, []
        for kind, clean in (("score_", number), ("policy_", str)):
            found = {f"{kind}{side}": row.get(f"{kind}{side}") for side in ("chosen", "rejected")}
            pair |= {key: clean(x) for key, x in found.items() if x is not None and clean(x) is not None}
        if isinstance(row["chosen"], list):
            before, pair["chosen"], pair["rejected"] = split_chats(row["chosen"], row["rejected"])
        return before or row["prompt"], [], [pair]
    return row["prompt"], [(row["response"], row.get("reward"), row.get("policy"))], []


FORMATS = {"ultrafeedback": from_ultrafeedback, "ultrafeedback_binarized": from_binarized, "hh": from_hh,
           "alpaca_eval": from_alpaca_eval, "jsonl": from_jsonl}


# ---- 3. Reading and cleaning ----
def read_raw(source, hub_split):
    """[(place, row or line of JSON), ...] of a file (also .gz) or of a hub data set."""
    path = Path(source)
    if not path.is_file():
        if path.exists() or source.count("/") != 1 or path.suffix in (".json", ".jsonl", ".gz"):
            fail(f"--input {source!r}: no such file, and not the name of a hub data set (ORG/NAME)")
        return [(f"{source}:{i}", row) for i, row in enumerate(load_dataset(source, split=hub_split), 1)]
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    rows = json.loads(content) if content.lstrip().startswith(b"[") else content.splitlines()
    return [(f"{path}:{i}", row) for i, row in enumerate(rows, 1) if row]


def is_text(x):
    """Is it a string with something in it, that can be written? Half a surrogate pair cannot."""
    return isinstance(x, str) and bool(x.strip()) and x.encode(errors="replace").decode() == x


def clean_prompt(prompt):
    """A string, or messages of a role and a content that end with the user's. A single one is a string."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    if messages[-1]["role"] != "user" or not all(is_text(message["content"]) for message in messages):
        raise LeftOut("prompt with an empty message, or that does not end with the user's")
    if any(one["role"] == other["role"] for one, other in zip(messages, messages[1:])):
        raise LeftOut("prompt with two turns of one role in a row")
    return messages[0]["content"] if len(messages) == 1 else messages


def number(x):
    """A score as float; None for "N/A", None, NaN. UltraFeedback has some numbers as strings."""
    try:
        return float(x) if math.isfinite(float(x)) else None
    except (TypeError, ValueError, OverflowError):
        return None


def read_questions(args):
    """([Question, ...], [(reason, place), ...] of what is left out). Rows of one prompt are one question."""
    prompts, tokenizer = {}, load_tokenizer(args.tokenizer) if args.tokenizer else None
    for _, row in read_raw(args.prompts, "") if args.prompts else ():
        row = json.loads(row) if isinstance(row, bytes) else row
        prompts[row["prompt_id"]] = row["prompt"]
    questions, left_out = {}, []
    for place, row in read_raw(args.input, args.hub_split):
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            prompt, answers, pairs = FORMATS[args.format](row, prompts)
            prompt = clean_prompt(prompt)
            if tokenizer:
                encode_prompt(tokenizer, prompt)
        except Exception as problem:                          # whatever a row of another format leads to
            reason = (str(problem) if isinstance(problem, LeftOut) else
                      "prompt that the chat template refuses" if isinstance(problem, TemplateError) else
                      f"not a usable row of the format {args.format}")
            left_out.append((reason, f"{place}: {problem!r}"))
            continue
        question = questions.setdefault(json.dumps(prompt), Question(prompt))
        for response, reward, policy in answers:
            known = {"reward": number(reward), "policy": policy}
            if not is_text(response):
                left_out.append(("answer without text", place))
            elif question.answers.get(response, known)["reward"] is None and known["reward"] is not None:
                question.answers[response] = known            # the same answer came before, without a score
            elif question.answers.setdefault(response, known) is not known:
                left_out.append(("repeated answer", place))
            elif known["reward"] is None:
                left_out.append(("answer without a score, which is for SFT only", place))
        for pair in pairs:
            chosen, rejected = pair.pop("chosen"), pair.pop("rejected")
            if not (is_text(chosen) and is_text(rejected)):
                left_out.append(("pair with an answer without text", place))
            elif chosen == rejected:
                left_out.append(("pair of equal answers", place))
            elif question.pairs.setdefault((chosen, rejected), pair) is not pair:
                left_out.append(("repeated pair", place))
    return [question for question in questions.values() if question.answers or question.pairs], left_out


# ---- 4. Writing ----
def scored_rows(question):
    """The scored answers to one question, as rows of scored.jsonl."""
    rows = [{"prompt": question.prompt, "response": response} | known
            for response, known in question.answers.items() if known["reward"] is not None]
    return [{key: x for key, x in row.items() if x is not None} for row in rows]


def pair_rows(question, most, rng, left_out):
    """Rows of pairs.jsonl: the labelled pairs, and random pairs of scored answers. A tie is no preference."""
    rows = [{"prompt": question.prompt, "chosen": chosen, "rejected": rejected} | more
            for (chosen, rejected), more in question.pairs.items()]
    scored = scored_rows(question)
    couples = [(a, b) for i, a in enumerate(scored) for b in scored[i + 1:]]
    unequal = [(a, b) for a, b in couples if a["reward"] != b["reward"]]
    left_out += [("pair of equal scores", f"{question.prompt!r:.80}")] * (len(couples) - len(unequal))
    for a, b in rng.sample(unequal, min(most, len(unequal))):
        good, bad = (a, b) if a["reward"] > b["reward"] else (b, a)
        row = {"prompt": question.prompt, "chosen": good["response"], "rejected": bad["response"],
               "score_chosen": good["reward"], "score_rejected": bad["reward"]}
        if "policy" in good and "policy" in bad:
            row |= {"policy_chosen": good["policy"], "policy_rejected": bad["policy"]}
        rows.append(row)
    return rows


def best_answer(question):
    """What SFT learns from: the best scored answer, else a preferred one, else any."""
    scored = scored_rows(question)
    if scored:
        return max(scored, key=lambda row: row["reward"])["response"]
    return next(iter(question.pairs))[0] if question.pairs else next(iter(question.answers))


def check_output(output, overwrite, *inputs):
    """Only a data folder is replaced, on request, and never what is read."""
    if output.exists() and not (overwrite and (output / "manifest.json").is_file()):
        fail(f"{output}: exists. Choose another --output; --overwrite replaces data folders only")
    for source in inputs:
        if Path(source).resolve().is_relative_to(output.resolve()):
            fail(f"{output}: holds {source}, which is read here. Choose another --output")


def write_folder(output, files, manifest):
    """The data folder, built beside its place and then renamed. Files without rows are not written."""
    building = output.with_name(output.name + ".unfinished")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    write_files(building, {name: rows for name, rows in files.items() if rows}, manifest)
    shutil.rmtree(output, ignore_errors=True)
    building.rename(output)
    for name, file in manifest["files"].items():
        print(f"{output / name}: {file['rows']} rows")
    for reason, count in manifest["left_out"].items():
        print(f"  left out, {reason}: {count}")


def main(args):
    output = Path(args.output)
    if len(args.split) != 4 or min(args.split) < 0 or abs(sum(args.split) - 1) > 1e-6:
        fail(f"--split {args.split}: has to be four shares that add up to 1")
    check_output(output, args.overwrite, *filter(None, [args.input, args.prompts]))
    questions, left_out = read_questions(args)
    if not questions:
        first = "".join(f" ({place}: {reason})" for reason, place in left_out[:1])
        fail(f"{args.input}: no usable row{first}")
    rng, n = random.Random(args.seed), len(questions)
    rng.shuffle(questions)
    ends = [round(sum(args.split[:i]) * n) for i in range(5)]
    sft, value, rl, test = (questions[start:end] for start, end in zip(ends, ends[1:]))
    files = {"sft": [{"prompt": q.prompt, "response": best_answer(q)} for q in sft],
             "scored": [row for q in value for row in scored_rows(q)],
             "pairs": [row for q in value for row in pair_rows(q, args.pairs_per_prompt, rng, left_out)],
             "rl": [{"prompt": q.prompt} for q in rl],
             "test_scored": [row for q in test for row in scored_rows(q)],
             "test_pairs": [row for q in test for row in pair_rows(q, args.pairs_per_prompt, rng, left_out)],
             "test_prompts": [{"prompt": q.prompt} for q in test]}
    write_folder(output, files, {
        "source": f"{args.format}: {args.input}", "seed": args.seed, "split": args.split, "prompts": n,
        "left_out": Counter(reason for reason, _ in left_out)})
    (output / "left_out.txt").write_text("".join(f"{place}: {reason}\n" for reason, place in left_out))


if __name__ == "__main__":
    main(parse_args(Args, sys.argv[1:]))
