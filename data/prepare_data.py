"""Stage 0 for real data: public preference data sets -> the data folder that every stage reads.

    python prepare_data.py --format hh --input harmless.jsonl.gz --output runs/hh/data
    python prepare_data.py --format ultrafeedback --input openbmb/UltraFeedback --output runs/uf/data
    python prepare_data.py --format alpaca_eval --input scored.jsonl.gz --prompts prompts.jsonl.gz --output runs/ae/data

Section 4.2: "The data are split into three disjoint parts: SFT, reward-model training, and RL." Disjoint *by prompt*:
all answers to a prompt fall into the same part, or the value model would be tested on questions it was trained on.

Whatever is dropped (ties, "N/A" scores, empty or repeated answers) is counted, printed and kept in manifest.json.
"""
import gzip
import hashlib
import json
import math
import random
import re
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


# ---- 1. Arguments ----
@dataclass
class Args:
    format: Literal["ultrafeedback", "ultrafeedback_binarized", "hh", "alpaca_eval", "jsonl"] = HfArg(
        default="jsonl", help="what --input holds; jsonl: rows with prompt, and response or chosen and rejected")
    input: str = HfArg(default="", help="file (.json, .jsonl, either with .gz), or hub data set ORG/NAME")
    output: str = HfArg(default="", help="data folder to write")
    overwrite: bool = HfArg(default=False, help="replace the data folder that is there")
    prompts: str = HfArg(default="", help="file with prompt_id and prompt, for rows that only have a prompt_id")
    hub_split: str = HfArg(default="train", help="split of a hub data set")
    split: list[float] = HfArg(default_factory=lambda: [0.4, 0.3, 0.2, 0.1], help="shares of the prompts: SFT, value "
                               "or reward learning, RL, test (paper: RL about 0.2)")
    pairs_per_prompt: int = HfArg(default=4, help="at most so many pairs from the scored answers to one prompt")
    seed: int = HfArg(default=1, help="seed of the split and of the choice of pairs")


@dataclass
class Question:
    """A prompt and all that is known about answers to it."""
    prompt: object                                            # str or chat messages
    answers: dict = field(default_factory=dict)               # response -> (reward or None, policy or None)
    pairs: list = field(default_factory=list)                 # (chosen, rejected) as labelled by people


def fail(message):
    """Ends the program with one clear line and exit status 1. For what the user can mend; bugs keep their traceback."""
    raise SystemExit(f"error: {' '.join(message.splitlines())}")


def parse_args(cls, argv):
    """Command line -> dataclass. `script.py recipe.yaml --lr 1e-5`: the recipe's section that is named like the script
    (sft, train_gvm, ...) gives the settings, the flags after it win. What is unknown ends the program."""
    parser = HfArgumentParser(cls, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            fail(f"{flag} is given twice (several values stand behind one flag)")
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe, section = Path(argv[0]), Path(sys.argv[0]).stem
        try:
            settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None
        except Exception as problem:                          # a broken !!int or !!timestamp is no YAMLError
            fail(f"{recipe}: not a recipe in YAML ({' '.join(str(problem).split())})")
        if not isinstance(settings, dict) or not isinstance(settings.get(section), dict):
            fail(f"{recipe}: no such recipe, or no section {section!r} in it")
        argv = [word for key, value in settings[section].items() for word in (f"--{key}", str(value))] + argv[1:]
    return cls(**vars(parser.parse_args(argv)))


# ---- 2. Reading: one function per format, row -> (prompt, [(response, reward, policy)], [(chosen, rejected)]) ----
def read_raw(source, hub_split):
    """[(place, row), ...] of a JSON or JSON-lines file (also .gz) or of a hub data set. Errors name file and line."""
    path = Path(source)
    if not path.is_file():
        if path.exists() or source.count("/") != 1 or path.suffix:
            fail(f"--input {source!r}: no such file, and not the name of a hub data set (ORG/NAME)")
        import datasets
        try:
            return [(f"{source}:{i}", row) for i, row in enumerate(datasets.load_dataset(source, split=hub_split), 1)]
        except Exception as problem:
            fail(f"{source}: no file here and no readable hub data set ({str(problem).splitlines()[0]})")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as problem:
        fail(f"{path}: cannot be read ({problem})")
    if content.lstrip().startswith(b"["):
        lines = [(f"{path}: element {i}", row) for i, row in enumerate(parse_json(content, path), 1)]
    else:
        lines = [(f"{path}:{i}", parse_json(line, f"{path}:{i}")) for i, line in enumerate(content.split(b"\n"), 1)
                 if line.strip()]
    for place, row in lines:
        if not isinstance(row, dict):
            fail(f"{place}: not a JSON object")
    return lines or fail(f"{path}: empty")


def row_problem(row, fields):
    """What is wrong with a row, in words; None if nothing is. fields: {name: "prompt", "text" or "number"}."""
    if not isinstance(row, dict):
        return "not a JSON object"
    for name, kind in fields.items():
        value = row.get(name)
        text = isinstance(value, str) and bool(value.strip())
        chat = isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) and
                                                         isinstance(m.get("content"), str) for m in value)
        chat = chat and value[-1]["role"] == "user" and value[-1]["content"].strip()
        if value is None:
            return f'no field "{name}"'
        if kind == "number" and not (type(value) in (int, float) and math.isfinite(value)):
            return f'"{name}" is not a finite number: {value!r}'
        if kind == "text" and not text:
            return f'"{name}" is empty or not a string'
        if kind == "prompt" and not (text or chat):
            return f'"{name}" is neither a string nor a list of {{"role", "content"}} messages that ends with "user"'
    same = "chosen" in fields and row["chosen"] == row["rejected"]
    return '"chosen" and "rejected" are the same text' if same else None


def parse_json(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        fail(f"{place}: invalid JSON ({problem})")


def number(value):
    """A score as float; None for "N/A", None, NaN and other text. UltraFeedback has some numbers as strings."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def from_ultrafeedback(row, prompts):
    """openbmb/UltraFeedback: one instruction, up to four completions with an overall_score of 1 to 10."""
    return row["instruction"], [(c["response"], number(c.get("overall_score")), c.get("model"))
                                for c in row["completions"]], []


def from_binarized(row, prompts):
    """HuggingFaceH4/ultrafeedback_binarized: chosen and rejected are chats that end with the answer, with scores."""
    return row["prompt"], [(row[side][-1]["content"], number(row[f"score_{side}"]), None)
                           for side in ("chosen", "rejected")], []


def from_hh(row, prompts):
    """Anthropic HH-RLHF: two transcripts that are the same up to the last answer."""
    sides = []
    for side in ("chosen", "rejected"):
        turns = re.split(r"\n\n(Human|Assistant): ?", row[side])[1:]
        chat = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                for who, text in zip(turns[0::2], turns[1::2])]
        sides.append((chat[:-1], chat[-1]) if len(chat) > 1 and chat[-1]["role"] == "assistant" else ([], None))
    (prompt, chosen), (other, rejected) = sides
    if not prompt or prompt != other or prompt[-1]["role"] != "user" or not all(m["content"] for m in prompt):
        return None, [], []
    return prompt, [], [(chosen["content"], rejected["content"])]


def from_alpaca_eval(row, prompts):
    """AlpacaEval: the official annotations.json (preference 1 to 2; 2: output_2 is better), or scored answers."""
    if "preference" in row:
        preference = number(row["preference"])
        return row["instruction"], [(row["output_2"], None if preference is None else preference - 1,
                                     row.get("generator_2"))], []
    return prompts[row["prompt_id"]], [(row["response"], number(row["reward"]), row.get("policy"))], []


def from_jsonl(row, prompts):
    """The project's own rows: {prompt, response, reward?, policy?} or {prompt, chosen, rejected}."""
    if "chosen" in row:
        return row["prompt"], [], [(row["chosen"], row["rejected"])]
    return row["prompt"], [(row["response"], number(row.get("reward")), row.get("policy"))], []


FORMATS = {"ultrafeedback": from_ultrafeedback, "ultrafeedback_binarized": from_binarized, "hh": from_hh,
           "alpaca_eval": from_alpaca_eval, "jsonl": from_jsonl}


def read_questions(args):
    """([Question, ...], Counter of what was dropped and why). Rows with the same prompt become one question."""
    prompts = {row["prompt_id"]: row["prompt"] for _, row in read_raw(args.prompts, "")} if args.prompts else {}
    questions, counts = {}, Counter()
    for place, row in read_raw(args.input, args.hub_split):
        counts["rows read"] += 1
        try:
            prompt, answers, pairs = FORMATS[args.format](row, prompts)
        except (KeyError, TypeError, IndexError, AttributeError) as problem:
            hint = "pass --prompts" if "prompt_id" in row and "prompt" not in row else "is --format right?"
            fail(f"{place}: not a row of the format {args.format} ({type(problem).__name__}: {problem}); {hint}")
        problem = prompt and row_problem({"prompt": prompt}, {"prompt": "prompt"})
        if problem:
            fail(f"{place}: {problem}")
        if not prompt:
            counts["dropped: prompt empty, or not the same on both sides"] += 1
            continue
        key = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
        counts["rows merged into an earlier row's prompt"] += key in questions
        question = questions.setdefault(key, Question(prompt))
        for response, reward, policy in answers:
            if not isinstance(response, str) or not response.strip():
                counts["dropped: empty answer"] += 1
            elif response in question.answers:
                counts["dropped: repeated answer"] += 1
            else:
                counts["answers without a usable score"] += reward is None
                question.answers[response] = (reward, policy)
        for pair in pairs:
            if not all(isinstance(side, str) and side.strip() for side in pair):
                counts["dropped: pair with an empty answer"] += 1
            elif pair[0] == pair[1]:
                counts["dropped: pair of equal answers"] += 1
            elif pair in question.pairs:
                counts["dropped: repeated pair"] += 1
            else:
                question.pairs.append(pair)
    kept = [question for question in questions.values() if question.answers or question.pairs]
    counts["dropped: prompts left without an answer"] += len(questions) - len(kept)
    return kept, counts


# ---- 3. Writing ----
def scored_rows(question):
    """The scored answers to one question, as rows of scored.jsonl."""
    return [{"prompt": question.prompt, "response": response, "reward": reward} | ({"policy": policy} if policy else {})
            for response, (reward, policy) in question.answers.items() if reward is not None]


def pair_rows(question, most, rng, counts):
    """Rows of pairs.jsonl: the labelled pairs, or random pairs of scored answers. A tie is no preference: counted."""
    rows = [{"prompt": question.prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in question.pairs]
    scored = scored_rows(question)
    couples = [(a, b) for i, a in enumerate(scored) for b in scored[i + 1:]]
    rng.shuffle(couples)
    made = []
    for a, b in couples:
        if len(made) == most:
            break
        if a["reward"] == b["reward"]:
            counts["ties: no pair made"] += 1
            continue
        chosen, rejected = (a, b) if a["reward"] > b["reward"] else (b, a)
        made.append({"prompt": question.prompt, "chosen": chosen["response"], "rejected": rejected["response"],
                     "score_chosen": chosen["reward"], "score_rejected": rejected["reward"]}
                    | ({"policy_chosen": chosen["policy"], "policy_rejected": rejected["policy"]}
                       if "policy" in chosen and "policy" in rejected else {}))
    return rows + made


def best_answer(question):
    """What SFT learns from: the best scored answer, else a preferred one, else any."""
    scored = scored_rows(question)
    if scored:
        return max(scored, key=lambda row: row["reward"])["response"]
    return question.pairs[0][0] if question.pairs else next(iter(question.answers))


def main(args):
    if not args.input or not args.output:
        fail("--input and --output are needed (--help lists all flags)")
    if len(args.split) != 4 or min(args.split) < 0 or abs(sum(args.split) - 1) > 1e-6:
        fail(f"--split {args.split}: four shares that add up to 1 are wanted")
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        fail(f"{output}: exists already. Choose another --output, or pass --overwrite")
    if output.exists() and not (output / "manifest.json").is_file():
        fail(f"{output}: is not a data folder (no manifest.json), so --overwrite will not delete it")
    for source in filter(None, (args.input, args.prompts)):
        if Path(source).resolve().is_relative_to(output.resolve()):
            fail(f"{output}: holds {source}, which is read here. Choose another --output")
    questions, counts = read_questions(args)
    if not questions:
        fail(f"{args.input}: no usable row ({dict(counts)})")
    rng = random.Random(args.seed)
    rng.shuffle(questions)
    ends = [round(sum(args.split[:i + 1]) * len(questions)) for i in range(4)]
    sft, value, rl, test = (questions[start:end] for start, end in zip([0, *ends], ends))
    files = {"sft": [{"prompt": q.prompt, "response": best_answer(q)} for q in sft],
             "scored": [row for q in value for row in scored_rows(q)],
             "pairs": [row for q in value for row in pair_rows(q, args.pairs_per_prompt, rng, counts)],
             "rl": [{"prompt": q.prompt} for q in rl],
             "test_scored": [row for q in test for row in scored_rows(q)],
             "test_pairs": [row for q in test for row in pair_rows(q, args.pairs_per_prompt, rng, counts)],
             "test_prompts": [{"prompt": q.prompt} for q in test]}
    manifest = {"source": f"{args.format}: {args.input}", "seed": args.seed, "split": args.split,
                "prompts": len(questions), "counts": dict(counts), "files": {}}
    building = output.with_name(output.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name, rows in files.items():
        if not rows:
            continue                                          # no scores: no scored.jsonl
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (building / f"{name}.jsonl").write_text(text, encoding="utf-8")
        manifest["files"][f"{name}.jsonl"] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (building / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if output.exists():
        shutil.rmtree(output)
    building.rename(output)
    print(f"{output}: {len(questions)} prompts")
    for name, file in manifest["files"].items():
        print(f"  {name:20}{file['rows']:8} rows")
    for reason, count in counts.items():
        print(f"  {reason}: {count}")


if __name__ == "__main__":
    main(parse_args(Args, sys.argv[1:]))
