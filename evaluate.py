"""Stage 4: numbers. Is the value model right, and is the policy better?

    python evaluate.py values --models runs/atlas/gvm --data runs/atlas/data
    python evaluate.py values --models runs/8b/gvm --benchmark rewardbench --data allenai/reward-bench
    python evaluate.py policy --models runs/atlas/sft runs/atlas/dvpo --judge atlas.py:oracle
    python evaluate.py answers --model runs/8b/dvpo --benchmark mt_bench --questions question.jsonl
    python evaluate.py judge --answers runs/8b/eval/answers.jsonl --judge_url https://api.openai.com/v1

`values` asks what Tables 3, 4, 5, 8 and 9 ask: does the better answer of a held-out pair get the higher value? Any
value model will do, token-level (a GVM, a PPO critic) or sequence-level (a reward model).
`policy` samples answers to held-out prompts from one or more models and has a judge score them: any Python function
(prompt, response) -> float. Models are compared answer by answer, on the same prompts.
`answers` answers the questions of MT-Bench, AlpacaEval or Arena-Hard, in the files that the official tools read.
`judge` has a language model score answers by the rubric of Appendix I, and counts wins (Figure 2).
"""
import gzip
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import sys
import threading
import time
import urllib.parse
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import torch
import yaml
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser)
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging


# ---- 1. Arguments ----
@dataclass
class ValuesArgs:
    models: list[str] = HfArg(default_factory=lambda: ["runs/atlas/gvm"], help="FOLDER or NAME=FOLDER of each value "
                              "model: token-level (GVM, critic) or sequence-level (reward model)")
    data: str = HfArg(default="runs/atlas/data", help="data folder, or hub data set with chosen and rejected")
    split: str = HfArg(default="", help="which pairs (default: test_pairs; RewardBench: filtered)")
    benchmark: Literal["none", "rewardbench"] = HfArg(default="none", help="rewardbench: --data has its rows")
    aggregate: str = HfArg(default="mean", help="token values -> score, in the tables by margin, policy and subset "
                           "(mean, last, backup, p1 ... p99); there a reward model is read at its last token")
    backup_lambda: float = HfArg(default=0.95, help="lambda of the aggregate `backup`, from 0 to 1")
    output: str = HfArg(default="", help="file to write the numbers to (JSON); none: print only")
    overwrite: bool = HfArg(default=False, help="replace --output if it exists")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    max_length: int = HfArg(default=1024, help="pairs with a longer side (prompt + response, tokens) are dropped")
    batch_size: int = HfArg(default=64, help="responses per forward pass")
    seed: int = HfArg(default=1, help="seed of tau and of the bootstrap")


@dataclass
class PolicyArgs:
    models: list[str] = HfArg(default_factory=lambda: ["runs/atlas/sft", "runs/atlas/dvpo"],
                              help="FOLDER or NAME=FOLDER of the policies to compare")
    reference: str = HfArg(default="", help="model that the KL is measured to; default: the first of --models")
    data: str = HfArg(default="runs/atlas/data", help="data folder with test_prompts.jsonl, or hub data set")
    judge: str = HfArg(default="atlas.py:oracle", help="FILE.py:FUNCTION, (prompt, response) -> score; empty: none")
    output: str = HfArg(default="", help="folder for policy.json and answers.jsonl; none: print only")
    overwrite: bool = HfArg(default=False, help="replace the evaluation that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    samples: int = HfArg(default=4, help="answers per prompt and model")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens)")
    max_response_length: int = HfArg(default=64, help="tokens after which a response is cut")
    batch_size: int = HfArg(default=128, help="answers sampled at a time")
    seed: int = HfArg(default=1, help="seed of the samples and of the bootstrap")


@dataclass
class AnswersArgs:
    model: str = HfArg(default="runs/atlas/dvpo", help="FOLDER or NAME=FOLDER of the policy; NAME names the file")
    benchmark: Literal["mt_bench", "alpaca_eval", "arena_hard"] = HfArg(default="mt_bench", help="whose questions")
    questions: str = HfArg(default="question.jsonl", help="the benchmark's own question file (.json, .jsonl, .gz)")
    output: str = HfArg(default="runs/atlas/answers", help="folder for NAME.jsonl (AlpacaEval: NAME.json)")
    overwrite: bool = HfArg(default=False, help="replace the answers in --output, instead of going on with them")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad or missing question, or go without")
    max_new_tokens: Optional[int] = HfArg(default=None, help="tokens of an answer at most (default: the benchmark's)")
    batch_size: int = HfArg(default=16, help="questions answered at a time")
    seed: int = HfArg(default=1, help="seed of the samples")


@dataclass
class JudgeArgs:
    answers: list[str] = HfArg(default_factory=lambda: ["runs/atlas/eval/answers.jsonl"], help="answers of `policy`"
                               ", or AlpacaEval's model_outputs.json; NAME=FILE renames a file's one model")
    judge_model: str = HfArg(default="gpt-4o-2024-08-06", help="the paper's judge; or a folder, without --judge_url")
    judge_url: str = HfArg(default="", help="OpenAI-compatible address, such as https://api.openai.com/v1. Its key is "
                           "read from the environment variable OPENAI_API_KEY, from nowhere else")
    output: str = HfArg(default="runs/atlas/judge", help="folder for judge.json, verdicts.jsonl and replies.jsonl")
    overwrite: bool = HfArg(default=False, help="replace judge.json and verdicts.jsonl (never the replies, paid for)")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop if a model lacks an answer, or go without")
    dry_run: bool = HfArg(default=False, help="say how many requests and tokens it would take, and stop")
    concurrency: int = HfArg(default=8, help="requests under way at a time")
    timeout: float = HfArg(default=60.0, help="seconds without a byte after which a request has failed")
    retries: int = HfArg(default=6, help="tries after the first, each after twice the pause, before the run stops")
    max_new_tokens: int = HfArg(default=300, help="tokens of a verdict at most (the rubric asks for 100 words)")
    batch_size: int = HfArg(default=8, help="verdicts at a time, of a judge in a folder")
    seed: int = HfArg(default=1, help="seed of the order of responses and of the bootstrap")


def fail(message):
    """Ends the program with one clear line: for what a user can fix. Bugs keep their traceback."""
    raise SystemExit(f"error: {message}")


def parse_args(cls, argv):
    """`script.py recipe.yaml --lr 1e-5`: the recipe's section named like the script; flags after it win."""
    parser = HfArgumentParser(cls, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    if argv and argv[0].endswith(".yaml"):
        settings = yaml.safe_load(Path(argv[0]).read_text())[Path(sys.argv[0]).stem]
        argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))] + argv[1:]
    return parser.parse_args_into_dataclasses(argv)[0]


def check_numbers(args):
    """Ends the program before it touches a file if a count is below 1, or another number negative or not finite."""
    for name, value in vars(args).items():
        may_be_0 = name in ("seed", "retries", "warmup_steps", "tau_pairs", "save_steps")
        least = 0 if type(value) is float or may_be_0 else 1
        most = 2 ** 32 if name == "seed" else math.inf        # numpy's generators take no larger seed
        if type(value) in (int, float) and not least <= value < most:
            fail(f"--{name} {value}: it has to be at least {least} and less than {most}")


def named(models, flag="--models"):
    """["runs/a/gvm", "large=runs/b/gvm"] -> {"gvm": "runs/a/gvm", "large": "runs/b/gvm"}."""
    names = {}
    for entry in models:
        name, separator, folder = entry.partition("=")
        if not separator or Path(entry).exists():
            path = Path(entry).resolve()
            name, folder = path.stem if path.is_file() else path.name, entry
        if not name:
            fail(f"{flag} {entry}: no name before the =")
        if name in names:
            fail(f"{flag}: {names[name]} and {folder} are both called {name!r}. Name one of them: OTHER={folder}")
        names[name] = folder
    return names


# ---- 2. Data ----
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


def read_rows(data, split, *fields):
    """The rows of data/split.jsonl, or of a hub data set ORG/NAME: dicts that have these fields."""
    path, hub_split = Path(data, f"{split}.jsonl"), "test" if split.startswith("test_") else "train"
    if not path.is_file() and (Path(data).exists() or data.count("/") != 1):
        fail(f"{path}: no such file (data/atlas.py and data/prepare_data.py write data folders)")
    rows = list(path.open(encoding="utf-8") if path.is_file() else load_dataset(data, split=hub_split))
    for i, row in enumerate(rows):
        try:
            rows[i] = json.loads(row) if isinstance(row, str) else row
            values = [rows[i][field] for field in fields]
            if any(x in (None, []) or x != x or not str(x).strip() for x in values):
                raise ValueError("empty or NaN")
        except (ValueError, KeyError, AttributeError) as problem:
            fail(f"{path}:{i + 1}: not a row with {' and '.join(fields)} ({problem!r})")
    return rows


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: a string (one user turn) or chat messages. The template writes BOS where needed.
    A control token that someone typed ("<|im_end|>") would end the turn: a space in it makes it text."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else copy.deepcopy(prompt)
    for message in messages:
        for token in tokenizer.all_special_tokens:
            message["content"] = message["content"].replace(token, f"{token[0]} {token[1:]}")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_response(tokenizer, response):
    """Token ids of an answer, ended as the chat template ends it. A control token in its text stays text."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return [*ids, end_of_answer(tokenizer)]


def collate(sequences, pad_id):
    """[(prompt ids, response ids)] -> right-padded ids (B, L) and lengths (B,) long, is_response (B, L) bool.

    The mask comes from lengths: where pad and EOS are one token, `ids != pad` would hide EOS from the loss,
    and the model would never stop. No attention mask: padding is on the right, where no token sees it.
    """
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), pad_id)
    is_response = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, :lengths[row]] = torch.tensor([*prompt, *response])
        is_response[row, len(prompt):lengths[row]] = True
    return ids, is_response, lengths


def with_tau(prompt, sequence, pool, k, max_length, rng):
    """Section 3.2: "trajectories tau randomly sampled from the policy in question", "in unrelated contexts".

    prompt    the row's own prompt: a pair about it is never drawn (it would show the answer, not the policy's manner)
    sequence  (prompt ids, response ids) of the row
    pool      [(prompt, (prompt ids, response ids)), ...] of the same policy
    Returns the sequence with k question-answer pairs in front of its prompt, each tokenised just as a row is.
    Pairs that would not fit into max_length tokens are left out, whole.
    """
    others = [pair for question, pair in pool if question != prompt] if k else []
    if len(others) < k:
        fail(f"tau: {k} pairs of the same policy are needed, {len(others)} rows have another prompt: lower --tau_pairs")
    own, tau = len(sequence[0]) + len(sequence[1]), []
    for question, answer in rng.sample(others, k):
        if own + len(tau) + len(question) + len(answer) <= max_length:
            tau += [*question, *answer]
    return [*tau, *sequence[0]], sequence[1]


# ---- 3. Statistics ----
def bootstrap(values, seed, groups=None, resamples=2000):
    """Mean and 95 % interval of (N,) values by the percentile bootstrap: {"mean", "low", "high"}.

    groups  (N,) one key per value, its prompt: values of one prompt are not independent, so prompts are drawn
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    number = {key: i for i, key in enumerate(dict.fromkeys(groups if groups is not None else range(len(values))))}
    index = torch.tensor([number[key] for key in (groups if groups is not None else range(len(values)))])
    total = torch.zeros(len(number), dtype=torch.float64).index_add_(0, index, values)             # (groups,)
    count = torch.bincount(index).double()
    draws = torch.randint(len(number), (resamples, len(number)), generator=torch.Generator().manual_seed(seed))
    means = total[draws].sum(-1) / count[draws].sum(-1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def wins(a, b):
    """1 where a's answer scores higher, 1/2 for a tie, 0 where b's does; any equal shapes."""
    return (a > b).double() + 0.5 * (a == b).double()


def outcomes(scores):
    """{a: {b: {"win", "tie", "lose": share of pairs, "pairs": their number}}} for every two models (Figure 2).

    scores  {model: (N,) float}, the i-th of each answering the same prompt; NaN: no score, the pair does not count
    """
    table = {a: {} for a in scores}
    for a, b in ((a, b) for a in scores for b in scores if a != b):
        known = ~(scores[a].isnan() | scores[b].isnan())
        x, y = scores[a][known], scores[b][known]
        table[a][b] = {"win": (x > y).sum().item() / max(len(x), 1), "tie": (x == y).sum().item() / max(len(x), 1),
                       "lose": (x < y).sum().item() / max(len(x), 1), "pairs": len(x)}
    return table


# RewardBench: how many prompts a subset counts for (reward-bench, constants.py). math-prm has 447 rows, and counts for
# 984, as much as the six subsets of code together.
REWARDBENCH = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                  "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984} | {f"hep-{code}": 164 for code in ("cpp", "go", "java", "js", "python", "rust")},
}


def rewardbench_sections(accuracy):
    """{subset: accuracy} -> {section: accuracy}, Table 3: the mean over its subsets, weighted by their prompts.

    As the official tool does it (rewardbench/utils.py, calculate_scores_per_section): subsets that are absent do not
    count; a section without any is left out here.
    """
    sections = {}
    for section, counts in REWARDBENCH.items():
        there = {subset: count for subset, count in counts.items() if subset in accuracy}
        if there:
            sections[section] = sum(accuracy[subset] * n for subset, n in there.items()) / sum(there.values())
    return sections


# ---- 4. Models: values, answers, log-probabilities ----
def value_head(model):
    """The linear layer hidden -> 1, whatever the architecture calls it."""
    return getattr(model, "score", None) or model.classifier


def last_token(is_response):
    """True at each row's last response token: (B, T) bool -> (B, T) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def response_scores(q, is_response):
    """One number per answer from its token values: Table 8's mean and percentiles, and the last value.
    q (B, L) float, is_response (B, L) bool. Returns {aggregate: (B,) float}."""
    values = torch.where(is_response, q.float(), torch.nan)                              # (B, L)
    last = torch.where(is_last_token(is_response), q.float(), 0.0).sum(-1)
    scores = {"mean": values.nanmean(-1), "last": last}
    return scores | {f"p{k}": values.nanquantile(k / 100, dim=-1) for k in (1, 5, 10, 90, 95, 99)}


@torch.no_grad()
def lambda_return(q, reward, is_value, gamma, td_lambda):
    """G_t = r_t + gamma * ((1 - lambda) * Q(tau, s_{t+1}, a_{t+1}) + lambda * G_{t+1}); 0 past the last
    token.

    lambda = 0 is the one-step target of section 3.2, lambda = 1 the Monte Carlo return gamma^(T-t) * r(x, y);
    in
    between: Sutton and Barto (2018), chapter 12.                             # DEVIATION 1: lambda
    q, reward (B, L) float; is_value (B, L) bool, contiguous in each row. Returns (B, L), 0 off the mask.
    """
    target = torch.zeros_like(q)
    q_next = g_next = torch.zeros_like(q[:, 0])                                          # (B,)
    for t in reversed(range(q.shape[1])):
        g = reward[:, t] + gamma * ((1 - td_lambda) * q_next + td_lambda * g_next)
        # NaN * 0 is NaN: select with where, never multiply by a mask.
        g_next = torch.where(is_value[:, t], g, 0.0)
        q_next = torch.where(is_value[:, t], q[:, t], 0.0)
        target[:, t] = g_next
    return target


def value_positions(is_response):
    """The response tokens and the last prompt token: (B, L) bool -> (B, L) bool. There the model has seen s_1
    = x and no action; with r = 0 and the target of all other positions it learns gamma * V(s_1), the baseline
    that
    train_dvpo.py --advantage gae needs.                                              # DEVIATION 3: V(s_1)"""
    return is_response | torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def bellman_backup(q, is_response, gamma, td_lambda):
    """One reward per response by backing its token values up to the state before it, s_1 (section 4.3). (B,) float.

    Section 4.3: "we recover a response-level reward by applying a Bellman-style backup"; it says no more. This is the
    Bellman equation Q_t = r_t + gamma * Q_{t+1} (section 3.2), applied from the last token back to the prompt, with the
    value of the last token in the place of the reward that nobody tells us: G_T = Q_T,
        G_t = gamma * ((1 - lambda) * Q_{t+1} + lambda * G_{t+1}),  read at the last prompt token.
    With gamma = 1: lambda = 1 is Q_T (`last`), the reward that appendix B recovers for the only token that has one,
    Q_T - gamma * 0. lambda = 0 is Q_1: the sum of appendix B's rewards, Q_t - gamma * Q_{t+1}, telescopes to it. In
    between it is a mean of all values whose weights fall by lambda a token: with 0.95, an answer of 1,000 tokens is
    judged by its first 50. (The GVM rows of the paper's Table 4 are the row "Mean Value" of Table 8: `mean`.)
    """
    reward = torch.where(last_token(is_response), q, 0.0)
    target = lambda_return(q, reward, value_positions(is_response), gamma, td_lambda)              # (B, T)
    return torch.where(value_positions(is_response) & ~is_response, target, 0.0).sum(-1)


@torch.no_grad()
def score_answers(model, sequences, args, pad_id):
    """{aggregate: (N,) float} of N (prompt ids, response ids). Works for token- and sequence-level models alike.

    The head is applied at every token by hand: a sequence-level class would pick the last token by looking for
    padding, and take the one before EOS where pad and EOS are the same token.
    """
    head, gamma = value_head(model), getattr(model.config, "gvm", {}).get("gamma", 1.0)
    keys = [(tuple(prompt), tuple(response)) for prompt, response in sequences]
    unique = sorted(set(keys), key=lambda key: (len(key[0]) + len(key[1]), key))       # once each; little padding
    parts = []
    for start in tqdm(range(0, len(unique), args.batch_size), desc="values", mininterval=1, leave=False):
        ids, is_token, is_response = collate(unique[start:start + args.batch_size], pad_id, model.device)
        hidden = model.base_model(input_ids=ids, attention_mask=is_token, use_cache=False).last_hidden_state
        q = head(hidden).squeeze(-1).float()                                                       # (B, T)
        if getattr(model.config, "critic", False):            # PPO's critic: V(s_t), before the token; what it says
            is_response = is_response & ~last_token(is_response)         # after EOS it never learned
        parts.append(response_scores(q, is_response)
                     | {"backup": bellman_backup(q, is_response, gamma, args.backup_lambda)})
    row_of = {key: row for row, key in enumerate(unique)}
    back = torch.tensor([row_of[key] for key in keys])
    return {name: torch.cat([part[name].cpu() for part in parts])[back] for name in parts[0]}


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, stop, temperature=1.0):
    """One response to each prompt, lists of ids: sampled from the model, no top-k, no top-p, no repetition penalty.

    stop         ids that end a response; it contains the one that did
    temperature  0: the likeliest token each time
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    is_token = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=model.device)
    # generate() fills what a GenerationConfig leaves open from the model's own (top_k = 50, a repetition penalty, ...).
    own, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    try:
        written = model.generate(input_ids=ids, attention_mask=is_token)[:, width:].tolist()
    except RuntimeError as problem:
        if "probability tensor" not in str(problem):
            raise
        fail(f"{model.config.name_or_path}: gives probabilities that are no numbers. Its training has failed")
    finally:
        model.generation_config = own
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in written]
    return [row[:end] for row, end in zip(written, ends)]


LOGITS_AT_ONCE = 2 ** 26                                      # numbers in float32: 256 MiB


def token_logp(model, ids, is_response):
    """log pi(a_t | s_t) of the response tokens, each in its own column: (B, L) float, 0 off the mask."""
    assert not is_response[:, 0].any(), "a row begins with its answer: nothing predicts the first token"
    predicts_response = is_response[:, 1:]                                     # the logits at t-1 predict t
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][predicts_response]     # (N, V)
    token = ids[is_response]                                                             # (N,)
    logp = logits.float().log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)         # (N,)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(is_response, logp)


class TokenLogp(torch.nn.Module):
    """A policy as a function from tokens to log-probabilities: this is the call that DDP, ZeRO and FSDP have to see."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.config = policy, policy.config
        self._no_split_modules = policy._no_split_modules     # the layers that FSDP divides one by one
        with torch.no_grad():
            ids = torch.tensor([[0, 1]], device=policy.device)
            hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits, own = policy.get_output_embeddings()(hidden), policy(input_ids=ids, use_cache=False).logits
            if not torch.allclose(logits, own, atol=1e-2, equal_nan=True):
                fail(f"{policy.config.name_or_path}: its logits are not what its output layer gives (scaled or capped, "
                     f"as in Gemma 2), which token_logp takes them for")

    def forward(self, ids, is_response):
        return token_logp(self.policy, ids, is_response)


# ---- 5. Files ----
def json_rows(path, flag):
    """[(number, row), ...] of a file of JSON lines, or of one JSON list; gzipped or not."""
    path = Path(path)
    if not path.is_file():
        fail(f"{flag} {path}: no such file")
    number = 0
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            rows = list(enumerate(json.loads(text), 1))
        else:
            rows = []
            for number, line in enumerate(text.split("\n"), 1):
                rows += [(number, json.loads(line))] if line.strip() else []
        for number, row in rows:
            json.dumps(row, ensure_ascii=False).encode()                       # half a character (\ud800) is no text
        return rows
    except (EOFError, ValueError, RecursionError, gzip.BadGzipFile, zlib.error) as problem:
        fail(f"{path}{f':{number}' if number else ''}: not a file of JSON lines, nor a JSON list ({problem})")
    except OSError as problem:
        fail(f"{flag} {path}: cannot be read ({problem})")


def kept_lines(content):
    """The lines of a log (bytes). A last line without an end counts if it is whole; if not, its writer was stopped."""
    *lines, rest = content.split(b"\n")
    try:
        json.loads(rest)
        return [*lines, rest]
    except ValueError:
        return lines


def open_log(path):
    """Opens a file that grows line by line, for this process alone: two would do, and pay, everything twice. Returns
    (file, its lines)."""
    import fcntl
    file = open(path, "a+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)      # the lock ends with the process, however it ends
    except OSError:
        fail(f"{path}: another process is writing it. Wait for it, or choose another --output")
    file.seek(0)
    content = file.read()
    lines = kept_lines(content)
    if content and not content.endswith(b"\n"):                # what is appended must begin a new line
        rest = content.rpartition(b"\n")[2]
        file.write(b"\n") if rest in lines[-1:] else file.truncate(len(content) - len(rest))
    return file, lines


def append(file, record):
    """One more line, on the disk at once."""
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()


def load_judge(place):
    """FILE.py:FUNCTION -> the function."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        fail(f"--judge {place}: no file {file!r}; it wants FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None:
        fail(f"--judge {place}: {file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(Path(file).stem, module)           # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:                # whatever the user's file does
        fail(f"--judge {place}: {file} cannot be imported ({type(problem).__name__}: {' '.join(str(problem).split())})")
    function = getattr(module, name, None)
    return function if callable(function) else fail(f"--judge {place}: {file} has no function {name!r}")


def judged_score(judge, place, prompt, response):
    """The judge's score of one answer, which has to be a finite number."""
    try:
        score = float(judge(prompt, response))
    except (Exception, SystemExit) as problem:                # whatever the user's judge does
        fail(f"--judge {place}: {type(problem).__name__}: {' '.join(str(problem).split())} (prompt {prompt!r:.80})")
    return score if math.isfinite(score) else fail(f"--judge {place}: score {score} (prompt {prompt!r:.80})")


def new_output(path, overwrite):
    """A file to be written at the end, looked at before any work is done: its path, with its folder made."""
    path = Path(path)
    try:
        if path.is_dir():
            fail(f"{path}: is a folder, and a file of that name is to be written. Choose another --output")
        if path.exists() and not overwrite:
            fail(f"{path}: exists already. Choose another --output, or pass --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as problem:
        fail(f"{path}: cannot be written ({problem}). Choose another --output")
    return path


def write_file(path, text):
    """Writes a file in one piece."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load(auto_class, name, kind=None, **kwargs):
    """auto_class.from_pretrained(name), with one clear line where that cannot work.

    kind  "policy" refuses value and reward models, "value" refuses policies: transformers would load either one with
          a fresh, random head.
    """
    transformers_logging.set_verbosity_error()                # a new head is expected here, not news
    transformers_logging.disable_progress_bar()
    folder = Path(name)
    local = os.path.exists(name) or name.count("/") > 1 or (folder.parent != Path() and os.path.isdir(folder.parent))
    if local and not (os.path.isdir(name) and any(folder.glob("*config.json"))):
        fail(f"{name}: no model in this folder (no config.json). Was the stage before this one run?")
    safe = {"trust_remote_code": False}                       # no program that comes with a model is run
    try:
        made_as = (AutoConfig.from_pretrained(name, **safe).architectures or ["?"])[0] if kind else "?"
        is_value = made_as.endswith(("ForTokenClassification", "ForSequenceClassification"))
        if kind and is_value != (kind == "value"):
            fail(f"{name}: holds a {made_as}; a {'value' if kind == 'value' else 'language'} model is wanted here")
        if not kind:
            found = auto_class.from_pretrained(name, **safe, **kwargs)
            if auto_class is AutoTokenizer and found("a") and not found.eos_token:
                raise ValueError("no eos_token: a model could not be taught to stop")
            return found
        safe["use_safetensors"] = True                        # nor a pickle, which is one too
        model, report = auto_class.from_pretrained(name, output_loading_info=True, **safe, **kwargs)
    except Exception as problem:                              # transformers, safetensors and the hub have many kinds
        reason = (str(problem).strip() or repr(problem)).splitlines()[0]
        pickled = ". Weights in .bin are programs too: save them as safetensors" * (local and any(folder.glob("*.bin")))
        fail(f"{name}: {auto_class.__name__} cannot load it ({reason}){pickled}")
    new_head = kind == "policy" and auto_class.__name__.endswith(("TokenClassification", "SequenceClassification"))
    missing = [key for key in report["missing_keys"] if not (new_head and key.startswith(("score.", "classifier.")))]
    missing += [key for key in report["unexpected_keys"] if re.match(rf"{model.base_model_prefix}\..*weight$", key)]
    return fail(f"{name}: the weights of {missing[0]} and {len(missing) - 1} more do not fit its config.json: "
                f"missing, or more than it wants") if missing else model


def load_tokenizer(name, template=None):
    """The tokenizer of a model, with a pad token, and with this chat template if it has none."""
    if not Path(name).is_dir() and name.count("/") != 1:
        fail(f"{name}: no such folder. Has the stage before this one been run?")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = tokenizer.chat_template or template or fail(f"{name}: has no chat template")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def context_length(model):
    """How many tokens the model can read and write together."""
    return getattr(model.config, "max_position_embeddings", math.inf)


# ---- 6. values: does the better answer get the higher value? (Tables 3, 4, 5, 8, 9) ----
def load_value_model(folder):
    """(model, tokenizer, sequence-level or not). A sequence-level model is a reward model."""
    tokenizer = load_tokenizer(folder)
    made_as = (load(AutoConfig, folder).architectures or [""])[0]
    sequence_level = made_as.endswith("ForSequenceClassification")
    auto_class = AutoModelForSequenceClassification if sequence_level else AutoModelForTokenClassification
    model = load(auto_class, folder, kind="value", dtype=torch.float32).eval()
    if model.config.num_labels != 1:
        fail(f"{folder}: has {model.config.num_labels} outputs per token; a value model has one")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, sequence_level


def score_pairs(folder, rows, args):
    """Scores both answers of every row that fits. Returns the rows kept, {aggregate: (chosen, rejected)}, the name of
    the aggregate to look at, and tau_pairs."""
    model, tokenizer, sequence_level = load_value_model(folder)
    trained = getattr(model.config, "gvm", {})
    k, sequences, kept, pool = trained.get("tau_pairs", 0), [], [], {}
    longest = min(args.max_length, context_length(model))
    for row in rows:
        sides = [(encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row[side]))
                 for side in ("chosen", "rejected")]
        if any(sum(map(len, sequence)) > longest for sequence in sides):
            continue
        for side, sequence in zip(("chosen", "rejected"), sides):
            if k and row.get(f"policy_{side}") is None:
                fail(f"{args.data}: {folder} reads {k} answers of the same policy first, and the rows have no "
                     f'"policy_{side}"')
            pool.setdefault(row.get(f"policy_{side}"), []).append((row["prompt"], sequence))
            sequences.append((row["prompt"], sequence, row.get(f"policy_{side}")))
        kept.append(row)
    if not kept:
        fail(f"{args.data}: no pair fits into {longest} tokens (--max_length, or the context of {folder})")
    rng = random.Random(args.seed)
    sequences = [with_tau(prompt, sequence, pool[policy], k, trained.get("max_length", longest), rng)
                 for prompt, sequence, policy in sequences]
    scores = score_answers(model, sequences, args, tokenizer.pad_token_id)
    if not all(score.isfinite().all() for score in scores.values()):
        fail(f"{folder}: gives values that are not finite numbers. Its training has failed")
    if args.aggregate not in scores:
        fail(f"--aggregate {args.aggregate}: there are {', '.join(scores)}")
    aggregate = "last" if sequence_level else args.aggregate
    return kept, {name: (x[0::2], x[1::2]) for name, x in scores.items()}, aggregate, k


def has_scores(row):
    return row.get("score_chosen") is not None and row.get("score_rejected") is not None


def margin_groups(rows):
    """Rows cut at the quartiles of |score_chosen - score_rejected|: {label: [row number, ...]}; {} without scores.

    Equal margins stay together, in the group above: with many of them the groups are of unequal size, and fewer.
    """
    if not all(map(has_scores, rows)):
        return {}
    margin = torch.tensor([abs(row["score_chosen"] - row["score_rejected"]) for row in rows], dtype=torch.float64)
    edges = margin.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).unique()
    group = torch.bucketize(margin, edges[1:-1], right=True)                   # (rows,): 0, 1, ...
    return {f"{i + 1}: {margin[group == i].min():.4g} to {margin[group == i].max():.4g}":
            (group == i).nonzero().flatten().tolist() for i in group.unique().tolist()}


def policy_groups(rows):
    """Rows by behaviour policy: the pairs in which it wrote one of the answers. {policy: [row number, ...]}."""
    groups = {}
    for number, row in enumerate(rows):
        for policy in {row.get("policy_chosen"), row.get("policy_rejected")} - {None}:
            groups.setdefault(policy, []).append(number)
    return dict(sorted(groups.items()))


def value_accuracy(folder, rows, args):
    """Everything about one value model: a dict of numbers."""
    kept, scores, aggregate, k = score_pairs(folder, rows, args)
    prompts = [json.dumps(row["prompt"]) for row in kept]
    rewardbench = args.benchmark == "rewardbench"
    # RewardBench counts a tie as wrong; elsewhere it is half right.
    right = {name: (chosen > rejected).double() if rewardbench else wins(chosen, rejected)
             for name, (chosen, rejected) in scores.items()}

    def accuracy(name, numbers):
        return bootstrap(right[name][numbers], args.seed, [prompts[i] for i in numbers]) | {"pairs": len(numbers)}

    everything = list(range(len(kept)))
    result = {"model": folder, "pairs": len(kept), "dropped": len(rows) - len(kept), "tau_pairs": k,
              "aggregate": aggregate, "pair_accuracy": {name: accuracy(name, everything) for name in right}}
    for title, groups in (("by_margin", margin_groups(kept)), ("by_policy", policy_groups(kept))):
        result[title] = {label: accuracy(aggregate, numbers) for label, numbers in groups.items()}
    if rewardbench:
        subsets = [subset for counts in REWARDBENCH.values() for subset in counts]
        groups = {subset: [i for i, row in enumerate(kept) if row["subset"] == subset] for subset in subsets}
        groups = {subset: numbers for subset, numbers in groups.items() if numbers}
        result["subsets"] = {subset: accuracy(aggregate, numbers) for subset, numbers in groups.items()}
        result["sections"] = {name: rewardbench_sections({subset: right[name][numbers].mean().item()
                                                          for subset, numbers in groups.items()}) for name in right}
    return result


def print_table(title, columns):
    """columns: {model: {row: {"mean", "low", "high"} or number}}."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    wide = max(map(len, [title, *rows]))
    print(f"\n{title:{wide}}" + "".join(f"  {name:>22}" for name in columns))
    for row in rows:
        cells = [column.get(row) for column in columns.values()]
        cells = ["" if x is None else f"{x:.3f}" if isinstance(x, float) else
                 f"{x['mean']:.3f} ({x['low']:.3f} to {x['high']:.3f})" for x in cells]
        print(f"{row:{wide}}" + "".join(f"  {cell:>22}" for cell in cells))


def evaluate_values(args):
    """Pair accuracy of value models by every aggregate of Table 8, by margin, by policy, by subset of RewardBench."""
    check_numbers(args)
    models, started = named(args.models), time.time()
    if args.output:
        new_output(args.output, args.overwrite)
    if args.backup_lambda > 1:
        fail(f"--backup_lambda {args.backup_lambda}: it has to be from 0 to 1")
    rewardbench = args.benchmark == "rewardbench"
    fields = {"prompt": "prompt", "chosen": "text", "rejected": "text"} | ({"subset": "text"} if rewardbench else {})
    subsets = {subset for counts in REWARDBENCH.values() for subset in counts}

    def also(row):
        if rewardbench and row["subset"] not in subsets:
            return f'"subset" {row["subset"]!r} is none of RewardBench\'s'
        optional = {"score_chosen": "number", "score_rejected": "number", "policy_chosen": "text",
                    "policy_rejected": "text"}
        problem = row_problem(row, {name: kind for name, kind in optional.items() if row.get(name) is not None})
        if not problem and has_scores(row) and not math.isfinite(row["score_chosen"] - row["score_rejected"]):
            problem = "its margin is not finite"
        return problem

    split = args.split or ("filtered" if rewardbench else "test_pairs")
    rows = read_rows(args.data, split, fields, args.bad_rows, also)
    result = {"data": args.data, "benchmark": args.benchmark, "models": {}}
    for name, folder in models.items():
        result["models"][name] = x = value_accuracy(folder, rows, args)
        print(f"{name}: {x['pairs']} pairs of {args.data}, {x['dropped']} too long; tables by {x['aggregate']}")
    result["seconds"] = time.time() - started
    found = result["models"]
    print_table("pair accuracy (95 % interval)", {name: x["pair_accuracy"] for name, x in found.items()})
    for title, key in (("by margin of the true scores", "by_margin"), ("pairs with an answer of", "by_policy"),
                       ("RewardBench subset", "subsets")):
        if any(x.get(key) for x in found.values()):
            print_table(title, {name: x.get(key, {}) for name, x in found.items()})
    absent = subsets - {row.get("subset") for row in rows} if rewardbench else ()
    if absent:
        print(f"\nno rows of {', '.join(sorted(absent))}: the sections are of the others")
    if rewardbench:
        print_table("RewardBench section", {name: x["sections"][x["aggregate"]] for name, x in found.items()})
    if args.output:
        write_file(Path(args.output), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


# ---- 7. policy: is the policy better? ----
@torch.no_grad()
def answer(model, reference, tokenizer, prompt_ids, args):
    """Samples one answer to each prompt: [(token ids, KL estimate in nats: log pi - log pi_ref of the answer), ...]."""
    pad_id, answers = tokenizer.pad_token_id, []
    for start in tqdm(range(0, len(prompt_ids), args.batch_size), desc="answers", mininterval=1):
        batch = prompt_ids[start:start + args.batch_size]
        responses = generate(model, tokenizer, batch, args.max_response_length, [tokenizer.eos_token_id])
        ids, _, is_response = collate(list(zip(batch, responses)), pad_id, model.device)
        log_ratio = TokenLogp(model)(ids, is_response) - TokenLogp(reference)(ids, is_response)
        answers += zip(responses, torch.where(is_response, log_ratio, 0.0).sum(-1).tolist())
    return answers


def evaluate_policy(args):
    """Scores, win rates, KL to the reference, length and EOS rate of one or more policies on held-out prompts."""
    check_numbers(args)
    models = named(args.models)
    output = Path(args.output) if args.output else None
    for name in ("policy.json", "answers.jsonl") if output else ():
        new_output(output / name, args.overwrite)
    judge, started = load_judge(args.judge) if args.judge else None, time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = args.reference or next(iter(models.values()))
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    vocabulary = load_tokenizer(first).get_vocab()
    for name, tokenizer in tokenizers.items():
        if tokenizer.get_vocab() != vocabulary:
            fail(f"{models[name]}: its tokenizer is not that of {first}, so there is no KL between them")
    rows = read_rows(args.data, "test_prompts", {"prompt": "prompt"}, args.bad_rows)
    # The same prompts for every model, also where chat templates differ in length.
    asked = [row["prompt"] for row in rows if all(len(encode_prompt(tokenizer, row["prompt"])) <= args.max_prompt_length
                                                  for tokenizer in tokenizers.values())]
    if not asked:
        fail(f"{args.data}: no test prompt fits into --max_prompt_length {args.max_prompt_length}")
    reference = load(AutoModelForCausalLM, first, kind="policy", dtype=torch.float32).eval().to(device)
    result = {"data": args.data, "judge": args.judge, "samples": args.samples, "models": {}, "win_rate": {}}
    lines = {}                                                                 # {model: its rows of answers.jsonl}
    for name, path in models.items():
        torch.manual_seed(args.seed)
        tokenizer = tokenizers[name]
        model = load(AutoModelForCausalLM, path, kind="policy", dtype=torch.float32).eval().to(device)
        if args.max_prompt_length + args.max_response_length > min(context_length(model), context_length(reference)):
            fail(f"--max_prompt_length + --max_response_length is more than the context of {path} or {first}, "
                 f"{min(context_length(model), context_length(reference))} tokens")
        prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in asked for _ in range(args.samples)]
        answers = answer(model, reference, tokenizer, prompt_ids, args)
        del model                                             # room for the next
        kl = torch.tensor([kl for _, kl in answers]).view(-1, args.samples).mean(-1)               # (prompts,)
        length = torch.tensor([float(len(ids)) for ids, _ in answers])
        ended = torch.tensor([float(ids[-1] == tokenizer.eos_token_id) for ids, _ in answers])
        result["models"][name] = {"kl": bootstrap(kl, args.seed), "response_length": length.mean().item(),
                                  "eos_rate": ended.mean().item(), "prompts": len(asked),
                                  "dropped": len(rows) - len(asked)}
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in answers]
        lines[name] = [{"model": name, "prompt": asked[i // args.samples], "response": text}
                       for i, text in enumerate(texts)]
        if output:                                            # before a judge of the user's can fail
            write_file(output / "answers.jsonl", json_lines(line for said in lines.values() for line in said))
    scores = {}
    for name, said in lines.items() if judge else ():
        for line in said:
            line["score"] = judged_score(judge, args.judge, line["prompt"], line["response"])
        scores[name] = torch.tensor([line["score"] for line in said]).view(-1, args.samples)       # (prompts, samples)
        result["models"][name]["score"] = bootstrap(scores[name].mean(-1), args.seed)
    for a in scores:
        result["win_rate"][a] = {b: bootstrap(wins(scores[a], scores[b]).mean(-1), args.seed)
                                 for b in scores if b != a}
    if judge:
        result["outcomes"] = outcomes({name: x.flatten() for name, x in scores.items()})
    result["seconds"] = time.time() - started
    print(f"{'model':12} {'score':>7} {'95 % interval':>18} {'KL':>7} {'length':>7} {'EOS':>6}   win rate over")
    for name, x in result["models"].items():
        score, versus = x.get("score"), result["win_rate"].get(name, {}).items()
        score = f"{score['mean']:7.3f} {score['low']:8.3f} to {score['high']:.3f}" if score else f"{'':25}"
        print(f"{name:12} {score} {x['kl']['mean']:8.2f} {x['response_length']:7.1f} {x['eos_rate']:6.3f}   "
              + ", ".join(f"{b} {rate['mean']:.3f}" for b, rate in versus))
    if output:
        write_file(output / "answers.jsonl", json_lines(line for said in lines.values() for line in said))
        write_file(output / "policy.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


# ---- 8. answers: MT-Bench, AlpacaEval, Arena-Hard (Tables 1, 2, 10) ----
# Read from the official tools: FastChat 0e6d3e4b (llm_judge), alpaca_eval cd543a14, arena-hard-auto 196f6b82.
BENCHMARKS = {
    "mt_bench": {"id": "question_id", "fields": {"question_id", "category", "turns", "reference"},
                 "optional": {"reference"}, "max_new_tokens": 1024},
    # AlpacaEval leaves the settings to the model. These are the most frequent of its models_configs.
    "alpaca_eval": {"id": "instruction", "fields": {"instruction", "dataset", "output", "generator"},
                    "optional": {"dataset", "output", "generator"}, "max_new_tokens": 2048, "temperature": 0.7},
    "arena_hard": {"id": "uid", "fields": {"uid", "category", "subcategory", "cluster", "prompt"},
                   "optional": {"category", "subcategory", "cluster"}, "max_new_tokens": 4096, "temperature": 0.0},
}
MT_BENCH_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                         "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
MT_BENCH_IDS = range(81, 161)


def question_problem(benchmark, row):
    """What is wrong with a row of a question file, in words; None if nothing is."""
    settings = BENCHMARKS[benchmark]
    if not isinstance(row, dict):
        return "not a JSON object"
    for fields, problem in ((settings["fields"] - settings["optional"] - set(row), "no field"),
                            (set(row) - settings["fields"], "unknown field")):
        if fields:
            return f'{problem} "{min(fields)}" (a question of {benchmark} has {", ".join(sorted(settings["fields"]))})'
    if not isinstance(row[settings["id"]], (str, int)):
        return f'"{settings["id"]}" is not a string or number'
    if not isinstance(row.get("category", ""), str):
        return '"category" is not a string'
    turns = row["turns"] if benchmark == "mt_bench" else [row.get("prompt") or row.get("instruction")]
    if not (isinstance(turns, list) and all(isinstance(turn, str) and turn.strip() for turn in turns)):
        return "a question is empty or not a string"
    if benchmark == "mt_bench" and len(turns) != 2:
        return f"has {len(turns)} turns, not two"
    if benchmark == "mt_bench" and row["category"] not in MT_BENCH_TEMPERATURES:
        return f'"category" {row["category"]!r} has no temperature (there are {", ".join(MT_BENCH_TEMPERATURES)})'
    return None


def benchmark_questions(path, benchmark, bad_rows):
    """[(row, [turn, ...], temperature), ...] of a benchmark's own question file."""
    found, settings = {}, BENCHMARKS[benchmark]
    for number, row in json_rows(path, "--questions"):
        problem = question_problem(benchmark, row)
        if not problem and row[settings["id"]] in found:
            problem = f'an earlier question has the same "{settings["id"]}"'
        if problem and bad_rows == "error":
            fail(f"{path}:{number}: {problem}. Mend the row, or pass --bad_rows skip")
        if problem:
            print(f"{path}:{number}: skipped, {problem}")
            continue
        turns = row["turns"] if benchmark == "mt_bench" else [row.get("prompt") or row["instruction"]]
        temperature = settings.get("temperature", MT_BENCH_TEMPERATURES.get(row.get("category")))
        found[row[settings["id"]]] = row, turns, temperature
    absent = [str(i) for i in MT_BENCH_IDS if i not in found] if benchmark == "mt_bench" else []
    if absent and bad_rows == "error":
        fail(f"{path}: MT-Bench has questions 81 to 160; {', '.join(absent[:5])} ({len(absent)} in all) are not here: "
             f"the official judge refuses such answers. Complete it, or pass --bad_rows skip")
    return list(found.values()) or fail(f"{path}: no usable question")


def official(benchmark, name, row, turns, written_at):
    """An answer as the official tool wants it. turns: [text, ...]."""
    if benchmark == "mt_bench":
        return {"question_id": row["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
                "choices": [{"index": 0, "turns": turns}], "tstamp": written_at}
    if benchmark == "alpaca_eval":
        return {"instruction": row["instruction"], "output": turns[0], "generator": name} | (
            {"dataset": row["dataset"]} if "dataset" in row else {})
    return {"uid": row["uid"], "ans_id": uuid.uuid4().hex, "model": name,
            "messages": [{"role": "user", "content": row["prompt"]},
                         {"role": "assistant", "content": {"answer": turns[0]}}], "tstamp": written_at}


def load_chat_model(folder):
    """A policy that writes answers, and its tokenizer: bfloat16 on a GPU, as benchmarks are run."""
    tokenizer = load_tokenizer(folder)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return load(AutoModelForCausalLM, folder, kind="policy", dtype=dtype).eval().to(device), tokenizer


def weights_stamp(folder):
    """What tells other weights in the same folder: names, sizes and times of its files. [] for a model of the hub."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def answer_turn(model, tokenizer, conversations, temperature, most, batch_size):
    """The next assistant turn of each conversation (a list of chat messages): a list of texts.

    A question that leaves no room in the context is answered by an "ERROR" that says so: it stays in the file, where
    it can be seen and counts as a bad answer. (FastChat's own tool writes "ERROR" too.)
    """
    context = context_length(model)
    stop = model.generation_config.eos_token_id               # a chat model may have several, <|eot_id|> and more
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    prompts, texts = [encode_prompt(tokenizer, messages) for messages in conversations], {}
    roomy = [i for i, ids in enumerate(prompts) if len(ids) + most <= context]
    batches = [roomy[start:start + batch_size] for start in range(0, len(roomy), batch_size)]
    batches += [[i] for i in range(len(prompts)) if i not in roomy]           # alone: each gets what room it has
    for batch in batches:
        room = min(most, context - max(len(prompts[i]) for i in batch))
        if room < 1:
            texts[batch[0]] = f"ERROR: the question has {len(prompts[batch[0]])} tokens, the model's context {context}"
            continue
        written = generate(model, tokenizer, [prompts[i] for i in batch], room, sorted(stop), temperature)
        for i, ids in zip(batch, written):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return [texts[i] for i in range(len(prompts))]


def evaluate_answers(args):
    """Answers a benchmark's questions. NAME.jsonl.part grows batch by batch; the finished file takes its place."""
    check_numbers(args)
    (name, folder), = named([args.model], "--model").items()
    if Path(name).name != name:
        fail(f"--model {name}={folder}: the name is that of a file, so it has no /")
    questions = benchmark_questions(args.questions, args.benchmark, args.bad_rows)
    final = new_output(Path(args.output) / (f"{name}.json" if args.benchmark == "alpaca_eval" else f"{name}.jsonl"),
                       args.overwrite)
    part = new_output(final.with_name(final.name + ".part"), True)             # not *.jsonl: official tools read those
    most = args.max_new_tokens or BENCHMARKS[args.benchmark]["max_new_tokens"]
    asked = hashlib.sha256(json.dumps([row for row, _, _ in questions]).encode()).hexdigest()
    settings = {"model": folder, "weights": weights_stamp(folder), "benchmark": args.benchmark, "questions": asked,
                "max_new_tokens": most, "batch_size": args.batch_size, "seed": args.seed}
    model, tokenizer = load_chat_model(folder)
    log, lines = open_log(part)
    done = {}
    if len(lines) > 1 and not args.overwrite:
        try:
            begun = json.loads(lines[0])
            differ = [key for key, value in settings.items() if begun[key] != value]
            done = {number: texts for line in lines[1:] for number, texts in json.loads(line)}
        except (ValueError, LookupError, TypeError):
            fail(f"{part}: is in the way, and was not written here. Move it, or pass --overwrite")
        if differ:
            fail(f"{part}: was begun with another --{differ[0]}: {begun[differ[0]]}. Go on with that, or pass "
                 f"--overwrite to begin anew")
        print(f"{part}: {len(done)} of {len(questions)} questions are answered already")
    else:
        log.truncate(0)
        append(log, settings)
    # Batches of one temperature, and of one number of turns; the longest questions first, so that memory runs out at
    # once or never. A batch has a seed of its own: a run that was stopped writes what it would have written.
    kinds = [(temperature, len(turns)) for _, turns, temperature in questions]
    batches = []
    for i in sorted(range(len(questions)), key=lambda i: (kinds[i], -len(questions[i][1][0]), i)):
        if not batches or batches[-1][0] != kinds[i] or len(batches[-1][1]) == args.batch_size:
            batches.append((kinds[i], []))
        batches[-1][1].append(i)
    for batch_number, ((temperature, turns), batch) in enumerate(tqdm(batches, desc=args.benchmark)):
        if batch[0] in done:
            continue
        torch.manual_seed(args.seed * 100_003 + batch_number)
        conversations = [[] for _ in batch]
        for turn in range(turns):
            for i, messages in zip(batch, conversations):
                messages.append({"role": "user", "content": questions[i][1][turn]})
            texts = answer_turn(model, tokenizer, conversations, temperature, most, args.batch_size)
            for messages, text in zip(conversations, texts):
                messages.append({"role": "assistant", "content": text})
        for i, messages in zip(batch, conversations):
            done[i] = [message["content"] for message in messages[1::2]], time.time()
        append(log, [[i, done[i]] for i in batch])            # a batch is one line: it is there, or it is not
    records = [official(args.benchmark, name, row, *done[i]) for i, (row, _, _) in enumerate(questions)]
    text = json.dumps(records, indent=2) if args.benchmark == "alpaca_eval" else "\n".join(map(json.dumps, records))
    write_file(final, text + "\n")
    part.unlink()
    log.close()
    errors = sum(text.startswith("ERROR: the question has") for texts, _ in done.values() for text in texts)
    print(f"{final}: {len(records)} answers; {errors} turns had no room in the model's context")
    return records


# ---- 9. judge: a language model scores the answers (Figure 2, Appendix I) ----
RUBRIC = """Review the user's question and the corresponding response using the additive 5-point scoring system \
described below. Points are accumulated based on the satisfaction of each criterion:
- Add 1 point if the response is relevant and provides some information related to the user's inquiry, even if it is \
incomplete or contains some irrelevant content.
- Add another point if the response addresses a substantial portion of the user's question, but does not completely \
resolve the query or provide a direct answer.
- Award a third point if the response answers the basic elements of the user's question in a useful way, regardless of \
whether it seems to have been written by an AI Assistant or if it has elements typically found in blogs or search \
results.
- Grant a fourth point if the response is clearly written from an AI Assistant's perspective, addressing the user's \
question directly and comprehensively, and is well-organized and helpful, even if there is slight room for improvement \
in clarity, conciseness or focus.
- Bestow a fifth point for a response that is impeccably tailored to the user's question by an AI Assistant, without \
extraneous information, reflecting expert knowledge, and demonstrating a high-quality, engaging, and insightful answer.
After examining the user's instruction and the response, please first give the total score. Then provide a brief \
explanation of your total score, up to 100 words. Output with the following format: Score: <total score> Evaluation \
evidence: <your brief explanation here>
Remember to assess from the AI Assistant perspective, utilizing web search knowledge as necessary. To evaluate the \
response in alignment with this additive scoring model, we'll systematically attribute points based on the outlined \
criteria."""


def judge_messages(prompt, response):
    """Appendix I: the rubric as system prompt, one question and one response as user prompt. (Misprints are mended.)"""
    if not isinstance(prompt, str):                           # chat messages
        prompt = "\n".join(message["content"] if len(prompt) == 1 else f"{message['role']}: {message['content']}"
                           for message in prompt)
    return [{"role": "system", "content": RUBRIC},
            {"role": "user", "content": f"<Question>: {prompt}\n<response>: {response}"}]


def parse_verdict(text):
    """"Score: 4 Evaluation evidence: ..." -> 4; None for anything else. A verdict is read or counted, never guessed.

    Whole points from 0 to 5, in the format asked for. "Score: 4/5" and asterisks around the words pass; a second score
    that differs, a fraction, a range, or words before the score do not.
    """
    text = text.replace("*", "").strip()
    verdict = re.match(r"Score:\s*([0-5])(?:\s*/\s*5)?[\s.,;]*Evaluation evidence:", text)
    scores = {float(score) for score in re.findall(r"Score:\s*(\d+(?:\.\d+)?)", text)}
    return int(verdict[1]) if verdict and len(scores) == 1 else None


def read_answers(files, bad_rows):
    """{model: {(prompt as JSON, number of the answer): response}}: the same keys, in the same order, for all."""
    models, source = {}, {}
    for name, file in named(files, "--answers").items():
        mine = {}
        for number, row in json_rows(file, "--answers"):
            if isinstance(row, dict) and "instruction" in row:                 # AlpacaEval's model_outputs.json
                row = {"model": row.get("generator"), "prompt": row["instruction"], "response": row.get("output")}
            problem = row_problem(row, {"model": "text", "prompt": "prompt"})
            if problem or not isinstance(row.get("response"), str):
                fail(f"{file}:{number}: " + (problem or 'no field "response" that is a text'))
            mine.setdefault(row["model"], {}).setdefault(json.dumps(row["prompt"]), []).append(row["response"])
        if f"{name}={file}" in files:
            if len(mine) > 1:
                fail(f"--answers {name}={file}: holds the answers of {len(mine)} models, which cannot all be {name!r}")
            mine = {name: answers for answers in mine.values()}
        for model, answers in mine.items():
            if model in models:
                fail(f"--answers: {source[model]} and {file} both have a model {model!r}. Name one: OTHER={file}")
            models[model] = {(prompt, n): text for prompt, texts in answers.items() for n, text in enumerate(texts)}
            source[model] = file
    every = dict.fromkeys(key for answers in models.values() for key in answers)
    shared = [key for key in every if all(key in answers for answers in models.values())]
    for model, answers in models.items():
        absent = [prompt for prompt, n in every if (prompt, n) not in answers]
        if absent and bad_rows == "error":
            fail(f"{source[model]}: {model} lacks {len(absent)} answers that another model has, the first to "
                 f"{absent[0]:.80}. Complete it, or pass --bad_rows skip: the {len(shared)} that all have are compared")
    if not shared:
        fail(f"--answers {' '.join(files)}: no prompt that all models have answered")
    return {model: {key: answers[key] for key in shared} for model, answers in models.items()}


def hide(text, key):
    """A server's text without the key, which some servers repeat. (A word of less than 8 letters is no key.)"""
    return text.replace(key, "***") if len(key) >= 8 else text


def message_text(message):
    """The text of a reply's message. A refusal, or nothing, is an answer too: one that no score can be read from."""
    content = message.get("content")
    if isinstance(content, list):                             # in parts
        content = "".join(part.get("text") or "" for part in content)
    return str(content or message.get("refusal") or "").encode(errors="replace").decode()


def ask(args, key, messages, stopped):
    """One chat completion from --judge_url: {"text", "prompt_tokens", "completion_tokens"}. Raises RuntimeError.

    A reply that is late, dropped, malformed or refused for now (408, 409, 425, 429, 5xx) is asked for again, each time
    after twice the pause, or after what Retry-After says. What will not get better (a wrong key, model or address) ends
    it at once.
    stopped  threading.Event, set when the run has failed elsewhere
    """
    import requests                                           # here: nothing else needs it

    def bearer(request):                                      # as auth=, for a header would give way to a .netrc file
        request.headers["Authorization"] = f"Bearer {key}"
        return request

    problem = "stopped"
    for attempt in range(args.retries + 1):
        if stopped.is_set():
            break
        pause = min(60.0, 2.0 ** attempt) * random.uniform(0.5, 1.0)
        try:
            reply = requests.post(args.judge_url + "/chat/completions", auth=bearer, timeout=args.timeout,
                                  allow_redirects=False, json={"model": args.judge_model, "messages": messages,
                                                               "temperature": 0, "max_tokens": args.max_new_tokens})
            problem = f"HTTP {reply.status_code}: {' '.join(hide(reply.text, key).split())[:300]}"
            if reply.status_code == 400 and "content_filter" in reply.text:    # this answer, not this judge
                return {"text": ""}
            if reply.status_code == 200:
                content = reply.json()
                text = hide(message_text(content["choices"][0]["message"]), key)
                usage = content["usage"] if isinstance(content.get("usage"), dict) else {}
                return {"text": text} | {name: usage[name] for name in ("prompt_tokens", "completion_tokens")
                                         if type(usage.get(name)) is int}
            if reply.status_code not in (408, 409, 425, 429) and reply.status_code < 500:
                break
            if reply.headers.get("Retry-After", "").isdigit():
                pause = min(600.0, float(reply.headers["Retry-After"]))
        except (ValueError, LookupError, TypeError, AttributeError):
            problem += " (not a chat completion)"
        except requests.RequestException as error:
            problem = hide(f"{type(error).__name__}: {error}", key)
        stopped.wait(pause if attempt < args.retries else 0)
    raise RuntimeError(problem)


def ask_address(args, key, jobs, record):
    """Asks --judge_url all jobs, --concurrency at a time. record(job, reply) is called as replies come in."""
    stopped, lock, problems = threading.Event(), threading.Lock(), []

    def work(job):
        try:
            reply = ask(args, key, job[1], stopped)
            with lock:                                        # kept at once: an interrupted run must not pay twice
                record(job, reply)
        except RuntimeError as problem:
            problems.append(problem)
            stopped.set()

    pool = ThreadPoolExecutor(args.concurrency)
    try:
        for future in tqdm(as_completed([pool.submit(work, job) for job in jobs]), total=len(jobs), desc="judge"):
            future.result()
            if problems:
                break
    finally:                                                  # Ctrl-C too: what is under way ends, and is kept
        stopped.set()
        pool.shutdown(cancel_futures=True)
    if problems:
        fail(f"{args.judge_url}: the judge gives no answer ({problems[0]}). What it has answered is kept: the same "
             f"command goes on from there")


def ask_folder(args, jobs, record):
    """The same with a model in a folder, greedily. A prompt beyond its context gets an "ERROR", which is no verdict."""
    model, tokenizer = load_chat_model(args.judge_model)
    jobs = sorted(jobs, key=lambda job: len(job[1][1]["content"]))             # little padding
    try:
        encode_prompt(tokenizer, jobs[0][1])
    except SystemExit:                                        # a chat template without system prompts: in front, then
        jobs = [(identity, [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}])
                for identity, (system, user) in jobs]
    for start in tqdm(range(0, len(jobs), args.batch_size), desc="judge"):
        batch = jobs[start:start + args.batch_size]
        texts = answer_turn(model, tokenizer, [messages for _, messages in batch], 0.0, args.max_new_tokens,
                            args.batch_size)
        for job, text in zip(batch, texts):
            record(job, {"text": text})


def judge_key(args):
    """The key for --judge_url, after a look at everything that can be wrong before any work; "" for a folder."""
    key, args.judge_url = os.environ.get("OPENAI_API_KEY", "").strip(), args.judge_url.rstrip("/")
    if not 0 < args.timeout <= 86400:
        fail(f"--timeout {args.timeout}: seconds, more than 0 and at most a day")
    if not args.judge_url:
        return "" if Path(args.judge_model).is_dir() else fail(
            f"--judge_model {args.judge_model}: no such folder. For a model behind an address, pass --judge_url")
    try:
        url = urllib.parse.urlsplit(args.judge_url)
        is_address = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        fail(f"--judge_url {args.judge_url}: not an address such as https://api.openai.com/v1")
    if url.username or url.password or url.query or url.fragment or (len(key) >= 8 and key in args.judge_url):
        fail("--judge_url: a key does not belong in the address, which is logged. Put it into OPENAI_API_KEY")
    if not re.fullmatch(r"[!-~]+", key):
        fail("--judge_url needs a key in the environment variable OPENAI_API_KEY (a server that wants none: any word)")
    return key


def judge_summary(verdicts, seed):
    """What judge.json says of the models. verdicts: rows of verdicts.jsonl, those of each model in the same order."""
    summary, scores = {"models": {}}, {}
    for model in dict.fromkeys(line["model"] for line in verdicts):
        said = [line for line in verdicts if line["model"] == model]
        prompts = [json.dumps(line["prompt"]) for line in said if line["score"] is not None]
        points = [float(line["score"]) for line in said if line["score"] is not None]
        scores[model] = torch.tensor([math.nan if line["score"] is None else line["score"] for line in said]).double()
        summary["models"][model] = {"answers": len(said), "unreadable": len(said) - len(points),
                                    "score": bootstrap(points, seed, prompts) if points else None,
                                    "points": {str(n): points.count(n) for n in range(6)}}
    summary["outcomes"] = outcomes(scores)                    # a win rate counts a tie half: win + tie / 2
    summary["unjudged"] = sum(x["unreadable"] for x in summary["models"].values())
    return summary


def evaluate_judge(args):
    """Scores of Appendix I, and the wins that follow. Every reply is kept in replies.jsonl: it is paid for once."""
    check_numbers(args)
    key = judge_key(args)
    models, output = read_answers(args.answers, args.bad_rows), Path(args.output)
    for name in () if args.dry_run else ("judge.json", "verdicts.jsonl"):
        new_output(output / name, args.overwrite)

    # One request per answer: Appendix I shows the judge one response at a time. "The sequence of responses was
    # randomized": which model's answer to a question is sent first is drawn per question, and recorded.
    sent_as, needed, stamp = {}, {}, [] if args.judge_url else weights_stamp(args.judge_model)
    for number, which in enumerate(next(iter(models.values()))):
        order = random.Random(f"{args.seed} {number}").sample(sorted(models), len(models))
        for position, model in enumerate(order, 1):
            messages = judge_messages(json.loads(which[0]), models[model][which])
            asked = [args.judge_model, args.judge_url, stamp, args.max_new_tokens, messages]
            identity = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
            sent_as[model, which] = position, identity
            needed[identity] = messages                       # equal answers are judged once
    replies, kept, log = {}, output / "replies.jsonl", None
    if args.dry_run:
        lines = kept_lines(kept.read_bytes()) if kept.is_file() else []
    else:
        log, lines = open_log(new_output(kept, True))
    for number, line in enumerate(lines, 1):
        try:
            reply = json.loads(line)
            replies[reply["request"]] = reply | {"text": str(reply["text"])}
        except (ValueError, LookupError, TypeError):
            fail(f"{kept}:{number}: not a reply that was kept here. Delete the line: that request is sent again")
    jobs = [(identity, messages) for identity, messages in needed.items() if identity not in replies]
    characters = sum(len(message["content"]) for _, messages in jobs for message in messages)
    print(f"{len(sent_as)} answers of {len(models)} models; {len(needed) - len(jobs)} verdicts are there; {len(jobs)} "
          f"requests to make: about {characters // 4:,} tokens in (4 characters each), at most "
          f"{len(jobs) * args.max_new_tokens:,} out")
    if args.dry_run:
        return None

    def record(job, reply):
        replies[job[0]] = {"request": job[0], "judge": args.judge_model} | reply
        append(log, replies[job[0]])

    if args.judge_url:
        ask_address(args, key, jobs, record)
    elif jobs:
        ask_folder(args, jobs, record)

    verdicts = [{"model": model, "prompt": json.loads(which[0]), "response": answers[which],
                 "position": sent_as[model, which][0],
                 "score": parse_verdict(replies[sent_as[model, which][1]]["text"]),
                 "verdict": replies[sent_as[model, which][1]]["text"]}
                for model, answers in models.items() for which in answers]
    used = {name: sum(x for identity in needed if type(x := replies[identity].get(name)) is int)
            for name in ("prompt_tokens", "completion_tokens")}
    result = {"answers": args.answers, "judge_model": args.judge_model, "judge_url": args.judge_url,
              "tokens": used} | judge_summary(verdicts, args.seed)
    print(f"{'model':12} {'score':>6} {'95 % interval':>16} {'unreadable':>11}   wins / ties / losses over")
    for model, x in result["models"].items():
        score = x["score"]
        score = f"{score['mean']:6.2f} {score['low']:8.2f} to {score['high']:.2f}" if score else f"{'none':>6} {'':16}"
        print(f"{model:12} {score} {x['unreadable']:11}   " + ", ".join(
            f"{b} {it['win']:.0%} / {it['tie']:.0%} / {it['lose']:.0%}" for b, it in result["outcomes"][model].items()
            if it["pairs"]))
    write_file(output / "verdicts.jsonl", json_lines(verdicts))
    write_file(output / "judge.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    log.close()
    return result


# ---- 10. Main ----
COMMANDS = {"values": (ValuesArgs, evaluate_values), "policy": (PolicyArgs, evaluate_policy),
            "answers": (AnswersArgs, evaluate_answers), "judge": (JudgeArgs, evaluate_judge)}


def main(argv):
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not argv or argv[0] not in COMMANDS:
        fail(f"the first word must be one of {', '.join(COMMANDS)} (python evaluate.py values --help)")
    arguments, command = COMMANDS[argv[0]]
    torch.backends.cuda.enable_cudnn_sdp(False)               # it prepares a plan for every new length of a row
    try:
        command(parse_args(arguments, argv[1:]))
    except KeyboardInterrupt:
        fail("stopped. The same command goes on (answers, judge) or begins again (values, policy)")


if __name__ == "__main__":
    main(sys.argv[1:])
