"""Stage 4: evaluation. Is the value model right (values)? Is the policy better (policy)?

    python evaluate.py values --models runs/atlas/gvm --data runs/atlas/data
    python evaluate.py policy --models runs/atlas/sft runs/atlas/dvpo --judge data/atlas.py:oracle

values  Tables 3, 4, 5, 8, 9: does the better answer of a held-out pair get the higher value? For a GVM or
        PPO's critic, with a value for each token, and for a reward model, with one score for the answer.
policy  samples answers to held-out prompts; a Python function, (prompt, response) -> score, judges them.
"""
import json
import math
import random
import runpy
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, logging)
from transformers.hf_argparser import HfArg, HfArgumentParser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- 1. Arguments ----
@dataclass
class ValuesArgs:
    models: list[str] = HfArg(default_factory=lambda: ["runs/atlas/gvm"], help="[NAME=]FOLDER of each model")
    data: str = HfArg(default="runs/atlas/data", help="data folder with test_pairs.jsonl, or hub data set")
    output: str = HfArg(default="", help="JSON file to write; none: print only")
    overwrite: bool = HfArg(default=False, help="replace --output")
    max_length: int = HfArg(default=256, help="pairs with a longer side (tokens) are dropped and counted")
    seed: int = HfArg(default=1, help="seed of tau and of the bootstrap")


@dataclass
class PolicyArgs:
    models: list[str] = HfArg(default_factory=lambda: ["runs/atlas/sft", "runs/atlas/dvpo"], help="FOLDER or "
                              "NAME=FOLDER of the policies to compare; KL is measured to the first")
    data: str = HfArg(default="runs/atlas/data", help="data folder with test_prompts.jsonl, or hub data set")
    judge: str = HfArg(default="data/atlas.py:oracle", help="FILE.py:FUNCTION; empty: no scores")
    output: str = HfArg(default="", help="folder for policy.json and answers.jsonl; none: print only")
    overwrite: bool = HfArg(default=False, help="replace the evaluation in --output")
    samples: int = HfArg(default=4, help="answers per prompt and model")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens)")
    max_response_length: int = HfArg(default=64, help="tokens after which an answer is cut")
    batch_size: int = HfArg(default=128, help="answers sampled at a time")
    seed: int = HfArg(default=1, help="seed of the samples and of the bootstrap")


def named(models):
    """["runs/a/gvm", "large=runs/b/gvm"] -> {"gvm": "runs/a/gvm", "large": "runs/b/gvm"}."""
    pairs = [model.split("=", 1) if "=" in model else (Path(model).resolve().name, model) for model in models]
    if len(dict(pairs)) < len(pairs):
        fail(f"{' '.join(models)}: two have the same name. Name one of them: OTHER=FOLDER")
    return dict(pairs)


def new_file(path, overwrite):
    """A file to be written, looked at before any work: its folder is made, and what is there stays."""
    if path.exists() and not overwrite:
        fail(f"{path}: exists. Choose another --output, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)


# ---- 2. Data: rows, tokens, batches ----
def read_rows(data, split, *fields, tokenizer=None):
    """The rows of data/split.jsonl, or of a hub data set ORG/NAME:SPLIT: dicts that have these fields, and
    with a tokenizer the ids of the prompt, "prompt_ids"."""
    path, (name, _, hub_split) = Path(data, f"{split}.jsonl"), data.partition(":")
    if not path.is_file() and (Path(data).exists() or name.count("/") != 1):
        fail(f"{path}: no such file (data/atlas.py and data/prepare_data.py write data folders)")
    # Without SPLIT: "train" or "test"; but "rl" for RL, whose prompts must not be those of the value model.
    hub_split = hub_split or ("test" if split.startswith("test_") else "rl" if split == "rl" else "train")
    try:
        lines = path.open(encoding="utf-8-sig") if path.is_file() else load_dataset(name, split=hub_split)
        rows = {n: row for n, row in enumerate(lines, 1) if str(row).strip()}  # without empty lines
    except Exception as problem:                              # no such name or split; not UTF-8
        fail(f"{data}: cannot be read ({str(problem):.200}). From the hub: --data ORG/NAME:SPLIT")
    for n, row in rows.items():
        try:
            rows[n] = row = json.loads(row) if isinstance(row, str) else row
            for field in fields:
                x = row[field]
                if field in ("response", "chosen", "rejected"):                # TRL: a list of one message
                    x = row[field] = x[0]["content"] if isinstance(x, list) and len(x) == 1 else x
                    str.encode(x or "")                       # TypeError if this is not text
                if field == "reward":                         # 0.5 or "0.5"
                    x = row[field] = float(x) if math.isfinite(float(x)) else None
                if x in (None, []) or x != x or not str(x).strip():
                    raise ValueError("empty or NaN")
            if tokenizer:
                row["prompt_ids"] = encode_prompt(tokenizer, row["prompt"])
        except Exception as problem:                          # bad JSON, no such field, no such template
            fail(f"{path}:{n}: not a row of {fields}: {problem!r} (data/prepare_data.py drops such rows)")
    return list(rows.values())


def load_tokenizer(name, template=None):
    """The tokenizer of a model, with a pad token, and with this chat template if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as problem:
        fail(f"{name}: no such folder or hub name (did the last stage run?): {str(problem).splitlines()[0]}")
    tokenizer.chat_template = tokenizer.chat_template or template or fail(f"{name}: has no chat template")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or fail(f"{name}: has no EOS token")
    return tokenizer


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: a string (one user turn) or chat messages. The template writes BOS where needed.
    A control token that someone typed ("<|im_end|>") would end the turn: a space in it makes it text."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in messages:
        for token in control_tokens(tokenizer):
            if message["role"] != "assistant":                # whose earlier turns may hold <think>
                message["content"] = message["content"].replace(token, f"{token[0]} {token[1:]}")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False,
                                         enable_thinking=False)
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache
def control_tokens(tokenizer):
    """The special tokens, and others in angle or square brackets that were added and the template writes."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special
            or token.content[0] in "<[" and token.content in str(tokenizer.chat_template)]


@lru_cache
def end_of_answer(tokenizer):
    """Id of the token that the chat template writes after an assistant's message ("<|im_end|>"): often not
    tokenizer.eos_token, which is the fallback where the template writes no control token."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "xylophone"}]
    before, found, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("xylophone")
    ids = tokenizer(after.strip(), add_special_tokens=False).input_ids
    end = ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id
    if end is None or not (found and "question" in before):
        fail("the chat template does not write messages as they are, or nothing says where an answer ends")
    return end


def encode_response(tokenizer, response):
    """Token ids of an answer, ended as the chat template ends it. A control token in its text stays text."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return [*ids, end_of_answer(tokenizer)]


def encode_conversation(config, tokenizer, prompt, response):
    """Token ids of prompt and answer as the reward model read them in training: others' in the whole of their
    chat template, ours up to the end of the answer, after which a template may write a line end."""
    if hasattr(config, "reward_model"):
        return encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{key: x for key, x in message.items() if x is not None} for message in messages]
    messages += [{"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def draw_tau(prompt, sequence, pool, k, max_length, rng):
    """Section 3.2: "trajectories tau randomly sampled from the policy in question", "in unrelated contexts".

    prompt, sequence  the row's own prompt, about which tau must be silent; its (prompt ids, response ids)
    pool              [(prompt, (prompt ids, response ids)), ...] of the same policy
    Returns the ids of up to k question-answer pairs, and their number. It stops at the first pair that would
    make the row longer than max_length tokens: to go on would favour short pairs."""
    tau, pairs, room = [], 0, max_length - len(sequence[0]) - len(sequence[1])
    # More than k are drawn: those about the row's own prompt are skipped.
    for question, (prompt_ids, response_ids) in rng.sample(pool, min(len(pool), 4 * k)):
        if pairs == k or len(tau) + len(prompt_ids) + len(response_ids) > room:
            break
        if question != prompt:
            tau, pairs = [*tau, *prompt_ids, *response_ids], pairs + 1
    return tau, pairs


# ---- 3. values: has the better answer the higher value? (Tables 3, 4, 5, 8, 9) ----
def is_last_token(is_response):
    """True at each row's last response token: (B, L) bool -> (B, L) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def response_scores(q, is_response):
    """One number per answer from its token values: Table 8's mean and percentiles, and the last value.
    q (B, L) float, is_response (B, L) bool. Returns {aggregate: (B,) float}."""
    values = torch.where(is_response, q.float(), torch.nan)                              # (B, L)
    last = torch.where(is_last_token(is_response), q.float(), 0.0).sum(-1)
    scores = {"mean": values.nanmean(-1), "last": last}
    return scores | {f"p{k}": values.nanquantile(k / 100, dim=-1) for k in (1, 5, 10, 90, 95, 99)}


def bellman_backup(q, is_response, gamma, td_lambda):
    """Section 4.3: "we recover a response-level reward by applying a Bellman-style backup". No more is said;
    ours: Q_t = r_t + gamma * Q_{t+1}, from the last token, with G_T = Q_T, to the prompt. G_0 is the reward:
        G_t = gamma * ((1 - lambda) * Q_{t+1} + lambda * G_{t+1})
    In it Q_t has the weight (1 - lambda) * lambda^(t-1) * gamma^t, and Q_T has lambda^(T-1) * gamma^T.
    q (B, L) float, is_response (B, L) bool. Returns (B,) float."""
    t = is_response.cumsum(-1).to(q.dtype)                                               # 1, ..., T
    share = torch.where(is_last_token(is_response), 1.0, 1 - td_lambda)
    return torch.where(is_response, share * td_lambda ** (t - 1) * gamma ** t * q, 0.0).sum(-1)


@torch.no_grad()
def score_answer(model, prompt, response, backup_lambda=0.95):
    """{aggregate: score} of one answer, (prompt ids, response ids). A reward model's one score is "last"."""
    # One row at a time: no padding, in which a reward model's class would look for the end of the answer.
    ids = torch.tensor([[*prompt, *response]], device=model.device)                      # (1, L)
    q = model(input_ids=ids, use_cache=False).logits.squeeze(-1).float().cpu()           # (1, L), or (1,)
    if q.dim() == 1:
        return {"last": q.item()}
    is_response = torch.arange(ids.shape[1])[None] >= len(prompt)                        # (1, L)
    if getattr(model.config, "critic", False):                # V(s_t): not trained after the end
        is_response = is_response & ~is_last_token(is_response)
    gamma = getattr(model.config, "gvm", {}).get("gamma", 1.0)
    scores = response_scores(q, is_response)
    scores["backup"] = bellman_backup(q, is_response, gamma, backup_lambda)
    return {name: score.item() for name, score in scores.items()}


def score_pairs(name, args):
    """Scores both answers of each test pair. Returns the rows that fit, the number of those that do not, and
    {aggregate: (2 * rows,) float}: of chosen, rejected, chosen, rejected, ..."""
    tokenizer, config = load_tokenizer(name), AutoConfig.from_pretrained(name)
    is_reward_model = config.architectures[0].endswith("ForSequenceClassification")
    gvm = {"tau_pairs": 0, "max_length": 0} | getattr(config, "gvm", {})
    policies = ["policy_chosen", "policy_rejected"] * (gvm["tau_pairs"] > 0)
    rows = read_rows(args.data, "test_pairs", "prompt", "chosen", "rejected", *policies, tokenizer=tokenizer)
    kept, answers, pools = [], [], {}
    for row in rows:
        prompt, pair = row["prompt"], []
        for side in ("chosen", "rejected"):
            sequence = row["prompt_ids"], encode_response(tokenizer, row[side])
            if is_reward_model:
                sequence = encode_conversation(config, tokenizer, prompt, row[side]), []
            pair.append((prompt, sequence, row.get(f"policy_{side}")))
        if all(len(prompt_ids) + len(response) <= args.max_length for _, (prompt_ids, response), _ in pair):
            kept.append(row)
            answers += pair
    if not kept:
        fail(f"{args.data}: no pair fits into --max_length {args.max_length}")
    for prompt, sequence, policy in answers:
        pools.setdefault(policy, []).append((prompt, sequence))
    auto_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForTokenClassification
    model = load_model(auto_class, name, tokenizer, args.max_length, trained=True).to(DEVICE)
    scores = []
    for i, (prompt, sequence, policy) in enumerate(tqdm(answers, name)):
        rng = random.Random(f"{args.seed} {i}")
        tau, _ = draw_tau(prompt, sequence, pools[policy], gvm["tau_pairs"], gvm["max_length"], rng)
        scores.append(score_answer(model, [*tau, *sequence[0]], sequence[1]))
    return kept, len(rows) - len(kept), {key: torch.tensor([x[key] for x in scores]) for key in scores[0]}


def bootstrap(values, seed, groups=None, resamples=2000):
    """Mean and 95 % interval of (N,) values by the percentile bootstrap: {"mean", "low", "high"}.
    groups  (N,) one key per value, its prompt: prompts are drawn, for their values are not independent"""
    values = torch.as_tensor(values, dtype=torch.float64)
    groups = range(len(values)) if groups is None else groups
    place = {key: i for i, key in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([place[key] for key in groups])
    total = torch.zeros(len(place), dtype=torch.float64).index_add_(0, index, values)   # (groups,)
    count = torch.bincount(index).double()
    draws = torch.randint(len(place), (resamples, len(place)), generator=torch.Generator().manual_seed(seed))
    means = total[draws].sum(-1) / count[draws].sum(-1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def outcomes(scores):
    """{a: {b: {"win", "tie", "lose": share of pairs, "pairs": their number}}} for all models a, b (Figure 2).
    scores  {model: float tensor}, of answers to the same prompts; NaN: no score, so no pair"""
    def shares(margin):
        margin = margin[~margin.isnan()]                      # (pairs,)
        found = {"win": margin > 0, "tie": margin == 0, "lose": margin < 0}
        return {name: x.sum().item() / max(len(x), 1) for name, x in found.items()} | {"pairs": len(margin)}

    return {a: {b: shares(scores[a] - scores[b]) for b in scores if b != a} for a in scores}


def group_rows(rows):
    """{table: {label: [row number, ...]}}: by quartile of the scores' margin (equal ones stay together), by
    the policies that wrote the answers; as far as the rows have them."""
    tables = {"by_margin": {}, "by_policy": {}}
    for i, row in enumerate(rows):
        for policy in {row.get("policy_chosen"), row.get("policy_rejected")} - {None}:
            tables["by_policy"].setdefault(policy, []).append(i)
    scores = [(row.get("score_chosen"), row.get("score_rejected")) for row in rows]
    if not any(x is None or x != x for pair in scores for x in pair):
        margin = torch.tensor(scores, dtype=torch.double).diff().abs().flatten()         # (rows,)
        edges = margin.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)).unique()
        group = torch.bucketize(margin, edges, right=True)                               # (rows,): 0, 1, 2, 3
        for n, i in enumerate(group.unique(), 1):
            label = f"{n}: {margin[group == i].min():.4g} to {margin[group == i].max():.4g}"
            tables["by_margin"][label] = (group == i).nonzero().flatten().tolist()
    return tables


def value_accuracy(name, args):
    """Everything about one value model: a dict of numbers."""
    rows, dropped, scores = score_pairs(name, args)
    right = {key: ((x[0::2] - x[1::2]).sign() + 1) / 2 for key, x in scores.items()}     # a tie: 1/2

    def accuracy(key, numbers):
        prompts = [json.dumps(rows[i]["prompt"]) for i in numbers]
        return bootstrap(right[key][numbers], args.seed, prompts) | {"pairs": len(numbers)}

    aggregate = "mean" if "mean" in scores else "last"        # of Table 4; of a reward model
    result = {"model": name, "pairs": len(rows), "dropped": dropped, "aggregate": aggregate,
              "pair_accuracy": {key: accuracy(key, list(range(len(rows)))) for key in right}}
    for table, groups in group_rows(rows).items():
        result[table] = {label: accuracy(aggregate, groups[label]) for label in sorted(groups, key=str)}
    return result


def evaluate_values(args):
    """Pair accuracy of value models by every aggregate of Table 8, by margin, by policy."""
    output, started = Path(args.output), time.time()
    if args.output:
        new_file(output, args.overwrite)
    models = {name: value_accuracy(folder, args) for name, folder in named(args.models).items()}
    result = {"data": args.data, "models": models, "seconds": time.time() - started}
    for name, found in models.items():
        print(f"\n{name}: {found['pairs']} pairs, {found['dropped']} longer than --max_length")
        for key in ("pair_accuracy", "by_margin", "by_policy"):
            for label, x in found[key].items():
                print("{:14} {:20} {mean:.3f} ({low:.3f}, {high:.3f}), {pairs} pairs".format(key, label, **x))
    if args.output:
        output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


# ---- 4. policy: is the policy better? ----
@torch.no_grad()
def rollout(policy, prompts, max_response_length, stop_ids, greedy=False):
    """Samples one answer to each prompt from pi_theta exactly: no temperature, no top-k, no top-p.

    prompts   [[token id, ...], ...]
    stop_ids  ids that end an answer; the last token is one of them, unless the answer was cut
    greedy    takes the likeliest token instead: ReMax's baseline, never what the policy learns from
    Returns [[token id, ...], ...]: decoded and encoded again, a text could split into other tokens."""
    width = max(map(len, prompts))                            # padded on the left, to end in the same column
    ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts], device=policy.device)
    is_token = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts], device=policy.device)
    responses, rows, cache = [[] for _ in prompts], list(range(len(prompts))), None
    for _ in range(max_response_length):
        # ids: the whole prompt at first, then the new token only; the rest is in the cache.
        position = (is_token.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]   # 0 at each row's first token
        output = policy(input_ids=ids, attention_mask=is_token, position_ids=position, past_key_values=cache,
                        use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()      # (rows, V)
        ids = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1)
        for row, token in zip(rows, ids.flatten().tolist()):
            responses[row].append(token)
        unfinished = [i for i, row in enumerate(rows) if responses[row][-1] not in stop_ids]
        if not unfinished:
            break
        if len(unfinished) < len(rows):                       # finished rows leave the batch and the cache
            rows, keep = [rows[i] for i in unfinished], torch.tensor(unfinished, device=ids.device)
            ids, is_token = ids[keep], is_token[keep]
            cache.batch_select_indices(keep)
        is_token = torch.nn.functional.pad(is_token, (0, 1), value=1)
    return responses


def token_logp(model, ids, is_response):
    """log pi(a_t | s_t) of the response tokens, each in its own column: (B, L) float, 0 off the mask."""
    assert not is_response[:, 0].any(), "a row begins with its answer: nothing predicts the first token"
    predicts_response = is_response[:, 1:]                                     # the logits at t-1 predict t
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][predicts_response]     # (N, V)
    token = ids[is_response]                                                             # (N,)
    logp = logits.float().log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)         # (N,)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(is_response, logp)


@torch.no_grad()
def log_ratios(policy, reference, prompt, responses):
    """log pi(y|x) - log pi_ref(y|x) in nats of a prompt's N responses (ids): (N,) float. The mean over y ~ pi
    estimates KL(pi, pi_ref)."""
    rows = [torch.tensor([*prompt, *response]) for response in responses]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)                        # (N, L)
    end, position = torch.tensor([[len(row)] for row in rows]), torch.arange(ids.shape[1])
    ids, is_response = ids.to(DEVICE), ((len(prompt) <= position) & (position < end)).to(DEVICE)
    return (token_logp(policy, ids, is_response) - token_logp(reference, ids, is_response)).sum(-1).cpu()


def load_judge(place):
    """FILE.py:FUNCTION -> the function."""
    file, _, name = place.rpartition(":")
    if not (Path(file).is_file() and file.endswith(".py")):
        fail(f"--judge {place}: no such file; wanted: FILE.py:FUNCTION")
    return runpy.run_path(file).get(name) or fail(f"--judge {place}: {file} has no {name!r}")


def evaluate_policy(args):
    """Scores, win rates, KL to the first policy, length, EOS rate of policies on held-out prompts."""
    models, output, started = named(args.models), Path(args.output), time.time()
    for file in ("policy.json", "answers.jsonl") if args.output else ():
        new_file(output / file, args.overwrite)
    judge = load_judge(args.judge) if args.judge else None
    tokenizer, *others = [load_tokenizer(folder) for folder in models.values()]
    for other in others:
        if other.get_vocab() != tokenizer.get_vocab() or other.chat_template != tokenizer.chat_template:
            fail(f"{other.name_or_path}: another tokenizer or chat template than {tokenizer.name_or_path}")
    rows = read_rows(args.data, "test_prompts", "prompt", tokenizer=tokenizer)
    fit = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length]
    asked = [row for row in fit for _ in range(args.samples)] or fail("no prompt fits --max_prompt_length")
    result = {"data": args.data, "judge": args.judge, "samples": args.samples, "models": {}, "win_rate": {}}
    reference, lines, scores = None, [], {}
    for name, folder in models.items():
        length = args.max_prompt_length + args.max_response_length
        policy = load_model(AutoModelForCausalLM, folder, tokenizer, length).to(DEVICE)
        reference, stop_ids, responses = reference or policy, policy.generation_config.eos_token_id, []
        torch.manual_seed(args.seed)
        for start in tqdm(range(0, len(asked), args.batch_size), f"answers of {name}"):
            prompt_ids = [row["prompt_ids"] for row in asked[start:start + args.batch_size]]
            responses += rollout(policy, prompt_ids, args.max_response_length, stop_ids)
        groups = [responses[i:i + args.samples] for i in range(0, len(asked), args.samples)]
        kl = [log_ratios(policy, reference, row["prompt_ids"], x).mean() for row, x in zip(fit, groups)]
        del policy                                            # room for the next
        result["models"][name] = x = {
            "kl": bootstrap(kl, args.seed), "response_length": sum(map(len, responses)) / len(asked),
            "eos_rate": sum(response[-1] in stop_ids for response in responses) / len(asked),
            "prompts": len(fit), "dropped": len(rows) - len(fit)}
        texts = tokenizer.batch_decode(
            [ids[:-1] if ids[-1] in stop_ids else ids for ids in responses], skip_special_tokens=True)
        mine = [{"model": name, "prompt": row["prompt"], "response": x} for row, x in zip(asked, texts)]
        lines += mine
        if judge:
            for line in mine:
                line["score"] = float(judge(line["prompt"], line["response"]))
            scores[name] = torch.tensor([line["score"] for line in mine]).view(-1, args.samples)
            x["score"] = bootstrap(scores[name].mean(-1), args.seed)
    for a in scores:
        won = {b: ((scores[a] - scores[b]).sign() + 1) / 2 for b in scores if b != a}    # a tie: 1/2
        result["win_rate"][a] = {b: bootstrap(x.mean(-1), args.seed) for b, x in won.items()}
    result |= {"outcomes": outcomes(scores), "seconds": time.time() - started}
    for name, x in result["models"].items():
        score = "score {mean:.3f} ({low:.3f} to {high:.3f}), ".format(**x["score"]) if judge else ""
        rates = [f", wins {y['mean']:.3f} over {b}" for b, y in result["win_rate"].get(name, {}).items()]
        print(f"{name}: {score}KL {x['kl']['mean']:.2f}, {x['response_length']:.1f} tokens{''.join(rates)}")
    if args.output:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (output / "answers.jsonl").write_text(text, encoding="utf-8")
        (output / "policy.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def main(argv):
    commands = {"values": (ValuesArgs, evaluate_values), "policy": (PolicyArgs, evaluate_policy)}
    if not argv or argv[0] not in commands:
        fail("the first word has to be values or policy (python evaluate.py values --help)")
    arguments, command = commands[argv[0]]
    command(parse_args(arguments, argv[1:]))


# ---- 5. The same in every script: command line, models ----
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
    return cls(**vars(parser.parse_args(argv)))


def load_model(auto_class, name, tokenizer, length, trained=False, dtype=torch.float32, **settings):
    """from_pretrained: safetensors only, no dropout. trained: with the head that train_gvm.py or reward_model
    made; else a language model, which may get a new one. (transformers would silently start a head anew.)"""
    logging.set_verbosity_error()                             # a new head is expected here, not news
    config = AutoConfig.from_pretrained(name, attention_dropout=0.0, **settings)
    made_as, wanted = (config.architectures or ["?"])[0], auto_class.__name__.removeprefix("AutoModelFor")
    if (not made_as.endswith(wanted)) if trained else ("Classification" in made_as):
        fail(f"{name}: holds a {made_as}, {'not a trained' if trained else 'no start for a'} {wanted}")
    model, report = auto_class.from_pretrained(name, config=config, dtype=dtype, use_safetensors=True,
                                               output_loading_info=True)
    missing = [key for key in report["missing_keys"] if trained or not key.startswith(("score", "classif"))]
    if missing:
        fail(f"{name}: lacks weights, which would start at random: {', '.join(sorted(missing)[:3])} ...")
    for module in model.modules():         # no dropout: else the ratio of a policy to itself is not 1
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in key or isinstance(module, torch.nn.Dropout)):
                setattr(module, key, 0.0)
    if "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        fail(f"{name}: has linear attention, and finished rollouts cannot be taken out of its cache")
    context = getattr(config.get_text_config(), "max_position_embeddings", length)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":    # beyond it a long row would change all others of its batch
        context = rope["original_max_position_embeddings"]
    if length > context or len(tokenizer) > model.get_input_embeddings().num_embeddings:
        fail(f"{name}: too small for rows of {length} tokens (context {context}) or for {len(tokenizer)} ids")
    if model.can_generate():                                  # where answers end: by template, by model
        own = model.generation_config.eos_token_id
        stop_ids = list({end_of_answer(tokenizer), *(own if isinstance(own, list) else [own])} - {None})
        model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
