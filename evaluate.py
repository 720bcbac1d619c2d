"""Stage 4: numbers. Is the value model right, and is the policy better?

    python evaluate.py values --model runs/atlas/gvm --data runs/atlas/data
    python evaluate.py policy --models runs/atlas/sft runs/atlas/dvpo --judge atlas.py:oracle

`values` asks what Tables 4, 5 and 8 ask: does the better answer of a held-out pair get the higher value? Any value
model will do, token-level (a GVM, a PPO critic) or sequence-level (a reward model).
`policy` samples answers to held-out prompts from one or more models and has a judge score them: any Python function
(prompt, response) -> float. Models are compared answer by answer, on the same prompts.
"""
import importlib.util
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, GenerationConfig, HfArgumentParser)
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging


# ---- 1. Arguments ----
@dataclass
class ValuesArgs:
    model: str = HfArg(default="runs/atlas/gvm", help="value model: token-level, or sequence-level (reward model)")
    data: str = HfArg(default="runs/atlas/data", help="data folder, or hub data set with chosen and rejected")
    split: str = HfArg(default="test_pairs", help="which pairs")
    output: str = HfArg(default="", help="file to write the numbers to (JSON); none: print only")
    overwrite: bool = HfArg(default=False, help="replace --output if it exists")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    max_length: int = HfArg(default=1024, help="pairs with a longer side (prompt + response, tokens) are dropped")
    batch_size: int = HfArg(default=64, help="responses per forward pass")
    seed: int = HfArg(default=1, help="seed of tau and of the bootstrap")


@dataclass
class PolicyArgs:
    models: list[str] = HfArg(default_factory=lambda: ["runs/atlas/sft", "runs/atlas/dvpo"], help="policies to compare")
    reference: str = HfArg(default="", help="model that the KL is measured to; default: the first of --models")
    data: str = HfArg(default="runs/atlas/data", help="data folder with test_prompts.jsonl, or hub data set")
    judge: str = HfArg(default="atlas.py:oracle", help="FILE.py:FUNCTION, (prompt, response) -> score")
    output: str = HfArg(default="", help="folder for policy.json and answers.jsonl; none: print only")
    overwrite: bool = HfArg(default=False, help="replace the evaluation that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    samples: int = HfArg(default=4, help="answers per prompt and model")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens)")
    max_response_length: int = HfArg(default=64, help="tokens after which a response is cut")
    batch_size: int = HfArg(default=128, help="answers sampled at a time")
    seed: int = HfArg(default=1, help="seed of the samples and of the bootstrap")


def fail(message):
    """Ends the program with one clear line and exit status 1. For what the user can mend; bugs keep their traceback."""
    raise SystemExit(f"error: {message}")


def parse_args(cls, argv):
    """Command line -> dataclass. `script.py recipe.yaml --lr 1e-5`: the recipe's section that is named like the script
    (sft, train_gvm, ...) gives the settings, the flags after it win. What is unknown ends the program."""
    parser = HfArgumentParser(cls)
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe, section = Path(argv[0]), Path(sys.argv[0]).stem
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None
        if not isinstance(settings, dict) or not isinstance(settings.get(section), dict):
            fail(f"{recipe}: no such recipe, or no section {section!r} in it")
        argv = [word for key, value in settings[section].items() for word in (f"--{key}", str(value))] + argv[1:]
    return cls(**vars(parser.parse_args(argv)))


def check_numbers(args):
    """Ends the program before it touches a file if a count is below 1, or another number negative or not finite."""
    for name, value in vars(args).items():
        least = 0 if type(value) is float or name in ("seed", "warmup_steps", "tau_pairs", "save_steps") else 1
        if type(value) in (int, float) and not least <= value < math.inf:
            fail(f"--{name} {value}: it has to be finite and at least {least}")


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


def read_rows(data, split, fields, bad_rows="error", also=lambda row: None):
    """The rows of data/split.jsonl, each checked by row_problem, then by `also`. Returns a list of dicts, never empty.

    data      a folder (README.md, "Data"), or a hub data set ORG/NAME that has these columns; of a hub data set the
              split "test" is read where a "test_*" file is asked for, else "train"
    bad_rows  "error": the first bad row ends the program, naming file, line and fault; "skip": dropped and counted
    """
    path = Path(data) / f"{split}.jsonl"
    if path.is_file():
        lines = path.read_bytes().split(b"\n")    # not splitlines(): text may hold U+2028, which is no end of line
    elif Path(data).exists() or str(data).count("/") != 1:
        fail(f"{path}: no such file (python atlas.py world, or prepare_data.py, writes data folders)")
    else:
        import datasets
        try:
            lines = datasets.load_dataset(str(data), split="test" if split.startswith("test") else "train")
        except Exception as problem:
            fail(f"{data}: neither a data folder here nor a readable hub data set ({str(problem).splitlines()[0]})")
    rows, skipped = [], 0
    for number, line in enumerate(lines, 1):
        if isinstance(line, bytes) and not line.strip():
            continue
        try:
            row = json.loads(line) if isinstance(line, bytes) else line
            json.dumps(row, ensure_ascii=False).encode()                       # half a character (\\ud800) is no text
            problem = row_problem(row, fields) or also(row)
        except (ValueError, OverflowError, RecursionError) as error:
            problem = f"invalid JSON ({error})"
        if problem and bad_rows == "error":
            fail(f"{path}:{number}: {problem}. Mend the row, or pass --bad_rows skip")
        skipped += bool(problem)
        rows += [] if problem else [row]
    if skipped:
        print(f"{path}: skipped {skipped} bad rows of {skipped + len(rows)}")
    return rows or fail(f"{path}: no usable row")


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt (a string is one user turn; or a list of chat messages), ready for the answer to begin.

    The chat template writes BOS itself where the model wants one: tokenising its text again would double it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def encode_response(tokenizer, response):
    """Token ids y^1..y^T of a response. y^T is EOS: to stop is an action too, and has to be learned."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids + [tokenizer.eos_token_id]


def collate(sequences, pad_id, device):
    """[(prompt ids, response ids)] -> right-padded ids (B, T) long, is_token (B, T) bool, is_response (B, T) bool.

    The masks come from the lengths, never from the ids: where pad and EOS are the same token, a mask made by
    `ids != pad` would hide every EOS from the loss, and the model would never learn to stop.
    """
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), longest), pad_id)                                            # (B, T)
    start, end = torch.tensor([[len(p), len(p) + len(r)] for p, r in sequences]).T[..., None]      # (B, 1) each
    for row, (prompt, response) in enumerate(sequences):
        ids[row, :end[row]] = torch.tensor([*prompt, *response])
    position = torch.arange(longest)                                                               # (T,)
    return ids.to(device), (position < end).to(device), ((start <= position) & (position < end)).to(device)


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


# ---- 4. Models: values, answers, log-probabilities ----
def value_head(model):
    """The linear layer hidden -> 1, whatever the architecture calls it."""
    return getattr(model, "score", None) or model.classifier


def last_token(is_response):
    """True at each row's last response token: (B, T) bool -> (B, T) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def response_scores(q, is_response):
    """One number per response from its token values: Table 8's mean and percentiles, and the last token's value.

    q (B, T) float, is_response (B, T) bool. Returns {aggregate: (B,) float}.
    """
    nan = torch.where(is_response, q.float(), torch.nan)                                           # (B, T)
    scores = {"mean": nan.nanmean(-1), "last": torch.where(last_token(is_response), q.float(), 0.0).sum(-1)}
    return scores | {f"p{k}": nan.nanquantile(k / 100, dim=-1) for k in (1, 5, 10, 90, 95, 99)}


@torch.no_grad()
def score_responses(model, sequences, batch_size, pad_id):
    """{aggregate: (N,) float} of N (prompt ids, response ids). Works for token- and sequence-level models alike.

    The head is applied at every token by hand: a sequence-level class would pick the last token by looking for
    padding, and take the one before EOS where pad and EOS are the same token.
    """
    head = value_head(model)
    order = sorted(range(len(sequences)), key=lambda row: sum(map(len, sequences[row])))           # little padding
    parts = []
    for start in range(0, len(order), batch_size):
        ids, is_token, is_response = collate([sequences[row] for row in order[start:start + batch_size]], pad_id,
                                             model.device)
        hidden = model.base_model(input_ids=ids, attention_mask=is_token).last_hidden_state        # (B, T, hidden)
        parts.append(response_scores(head(hidden).squeeze(-1), is_response))
    back = torch.tensor(order).argsort()
    return {name: torch.cat([part[name].cpu() for part in parts])[back] for name in parts[0]}


@torch.no_grad()
def rollout(policy, tokenizer, prompts, max_response_length, greedy=False):
    """Samples one response to each prompt from pi_theta exactly. prompts: list of id lists. Returns a list of id lists.

    greedy  takes the likeliest token each time instead: ReMax's baseline, never what the policy learns from
    A response ends with EOS, unless it was cut at max_response_length. It stays token ids: decoded and encoded again,
    it could be split into other tokens than the policy chose.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=policy.device)
    is_token = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=policy.device)
    # generate() fills what a GenerationConfig leaves open from the model's own (top_k = 50, a repetition penalty, ...).
    # Then pi_theta is not what is sampled, and the KL estimate goes negative. So the model's own is set aside.
    own, policy.generation_config = policy.generation_config, GenerationConfig(
        do_sample=not greedy, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_response_length,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    try:
        written = policy.generate(input_ids=ids, attention_mask=is_token)[:, width:].tolist()
    finally:
        policy.generation_config = own
    # Up to the first EOS: what stands behind it is padding, also where pad and EOS are the same token.
    return [row[:row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in written]


def token_logp(model, ids, is_token):
    """log pi(a_t | s_t) of every token, at the token's own position: (B, T) float, 0 at position 0."""
    logits = model(input_ids=ids, attention_mask=is_token).logits[:, :-1].float()                  # (B, T-1, V)
    logp = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    return torch.nn.functional.pad(logp, (1, 0))


# ---- 5. Files ----
def load_judge(place):
    """FILE.py:FUNCTION -> the function."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        fail(f"--judge {place}: no file {file!r}; it wants FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(Path(file).stem, module)           # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as problem:                              # whatever the user's file does
        fail(f"--judge {place}: {file} cannot be imported ({type(problem).__name__}: {problem})")
    function = getattr(module, name, None)
    return function if callable(function) else fail(f"--judge {place}: {file} has no function {name!r}")


def judged_score(judge, place, prompt, response):
    """The judge's score of one answer, which has to be a finite number."""
    try:
        score = float(judge(prompt, response))
    except Exception as problem:                              # whatever the user's judge does
        fail(f"--judge {place}: {type(problem).__name__}: {problem} (prompt {prompt!r:.80})")
    return score if math.isfinite(score) else fail(f"--judge {place}: score {score} (prompt {prompt!r:.80})")


def write_json(path, content, overwrite):
    """Writes a JSON file in one piece; an existing one only with --overwrite."""
    path = Path(path)
    if path.exists() and not overwrite:
        fail(f"{path}: exists already. Choose another --output, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def load(auto_class, name, kind=None, **kwargs):
    """auto_class.from_pretrained(name), with one clear line where that cannot work.

    kind  "policy" refuses value and reward models, "value" refuses policies: transformers would load either one with
          a fresh, random head.
    """
    transformers_logging.set_verbosity_error()                # a new head is expected here, not news
    transformers_logging.disable_progress_bar()
    folder = Path(name)
    local = folder.exists() or name.count("/") > 1 or (folder.parent != Path() and folder.parent.is_dir())
    if local and not any(folder.glob("*config.json")):
        fail(f"{name}: no model in this folder (no config.json). Was the stage before this one run?")
    try:
        made_as = (AutoConfig.from_pretrained(name).architectures or ["?"])[0] if kind else "?"
        is_value = made_as.endswith(("ForTokenClassification", "ForSequenceClassification"))
        if kind and is_value != (kind == "value"):
            fail(f"{name}: holds a {made_as}; a {'value' if kind == 'value' else 'language'} model is wanted here")
        if not kind:
            return auto_class.from_pretrained(name, **kwargs)
        model, report = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
    except Exception as problem:                              # transformers, safetensors and the hub have many kinds
        reason = (str(problem).strip() or repr(problem)).splitlines()[0]
        fail(f"{name}: {auto_class.__name__} cannot load it ({reason})")
    new_head = kind == "policy" and auto_class.__name__.endswith(("TokenClassification", "SequenceClassification"))
    missing = [key for key in report["missing_keys"] if not (new_head and key.startswith(("score.", "classifier.")))]
    return fail(f"{name}: the weights of {missing[0]} and {len(missing) - 1} more are missing") if missing else model


# ---- 6. Main ----
def evaluate_values(args):
    """Pair accuracy of a value model by every aggregate of Table 8, each with its 95 % interval."""
    check_numbers(args)
    if args.output and Path(args.output).exists() and not args.overwrite:
        fail(f"{args.output}: exists already. Choose another --output, or pass --overwrite")
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.time()
    tokenizer = load(AutoTokenizer, args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = load(AutoConfig, args.model)
    sequence_level = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    auto_class = AutoModelForSequenceClassification if sequence_level else AutoModelForTokenClassification
    model = load(auto_class, args.model, kind="value", dtype=torch.float32).eval().to(device)
    made = getattr(config, "gvm", {})
    k = made.get("tau_pairs", 0)
    fields = {"prompt": "prompt", "chosen": "text", "rejected": "text"}
    fields |= {"policy_chosen": "text", "policy_rejected": "text"} if k else {}
    rows, pairs, pool = read_rows(args.data, args.split, fields, args.bad_rows), [], {}
    for row in rows:
        sides = [(row["prompt"], (encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row[side])),
                  row.get(f"policy_{side}")) for side in ("chosen", "rejected")]
        if all(sum(map(len, sequence)) <= args.max_length for _, sequence, _ in sides):
            pairs += sides
            for prompt, sequence, policy in sides:
                pool.setdefault(policy, []).append((prompt, sequence))
    if not pairs:
        fail(f"{args.data}: no pair fits into --max_length {args.max_length}")
    rng = random.Random(args.seed)
    sequences = [with_tau(prompt, sequence, pool[policy], k, made.get("max_length", args.max_length), rng)
                 for prompt, sequence, policy in pairs]
    scores = score_responses(model, sequences, args.batch_size, tokenizer.pad_token_id)
    prompts = [json.dumps(prompt) for prompt, _, _ in pairs[0::2]]
    accuracy = {name: bootstrap(wins(score[0::2], score[1::2]), args.seed, prompts) for name, score in scores.items()}
    result = {"model": args.model, "data": args.data, "pairs": len(pairs) // 2,
              "dropped": len(rows) - len(pairs) // 2, "tau_pairs": k, "pair_accuracy": accuracy,
              "seconds": time.time() - started}
    print(f"{args.model} on {result['pairs']} pairs of {args.data} ({result['dropped']} too long)")
    for name, x in accuracy.items():
        print(f"  {name:5} {x['mean']:.3f}   95 % interval {x['low']:.3f} to {x['high']:.3f}")
    if args.output:
        write_json(args.output, result, args.overwrite)
    return result


@torch.no_grad()
def answer(model, reference, tokenizer, prompt_ids, args):
    """Samples one answer to each prompt: [(token ids, KL estimate in nats: log pi - log pi_ref of the answer), ...]."""
    pad_id, answers = tokenizer.pad_token_id, []
    for start in tqdm(range(0, len(prompt_ids), args.batch_size), desc="answers", mininterval=1):
        batch = prompt_ids[start:start + args.batch_size]
        responses = rollout(model, tokenizer, batch, args.max_response_length)
        ids, is_token, is_response = collate(list(zip(batch, responses)), pad_id, model.device)
        log_ratio = token_logp(model, ids, is_token) - token_logp(reference, ids, is_token)        # (B, T)
        answers += zip(responses, torch.where(is_response, log_ratio, 0.0).sum(-1).tolist())
    return answers


def evaluate_policy(args):
    """Scores, win rates, KL to the reference, length and EOS rate of one or more policies on held-out prompts."""
    check_numbers(args)
    names = [Path(model).name for model in args.models]
    if len(set(names)) < len(names):
        fail(f"--models: two models are called the same: {names}")
    output = Path(args.output) if args.output else None
    if output and not args.overwrite and any((output / name).exists() for name in ("policy.json", "answers.jsonl")):
        fail(f"{output}: holds an evaluation. Choose another --output, or pass --overwrite")
    judge, started = load_judge(args.judge), time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = read_rows(args.data, "test_prompts", {"prompt": "prompt"}, args.bad_rows)
    reference = load(AutoModelForCausalLM, args.reference or args.models[0], kind="policy", dtype=torch.float32)
    reference.eval().to(device)
    vocabulary = load(AutoTokenizer, args.reference or args.models[0]).get_vocab()
    result = {"data": args.data, "judge": args.judge, "samples": args.samples, "models": {}, "win_rate": {}}
    scores, lines = {}, []
    for name, path in zip(names, args.models):
        torch.manual_seed(args.seed)
        tokenizer = load(AutoTokenizer, path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.get_vocab() != vocabulary:
            fail(f"{path}: its tokenizer is not that of the reference model, so there is no KL between them")
        model = load(AutoModelForCausalLM, path, kind="policy", dtype=torch.float32).eval().to(device)
        prompts = [(row["prompt"], encode_prompt(tokenizer, row["prompt"])) for row in rows]
        prompts = [(prompt, ids) for prompt, ids in prompts if len(ids) <= args.max_prompt_length] or fail(
            f"{args.data}: no test prompt fits into --max_prompt_length {args.max_prompt_length}")
        answers = answer(model, reference, tokenizer, [ids for _, ids in prompts for _ in range(args.samples)], args)
        asked = [prompt for prompt, _ in prompts for _ in range(args.samples)]
        written = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in answers]
        judged = [judged_score(judge, args.judge, prompt, text) for prompt, text in zip(asked, written)]
        scores[name] = torch.tensor(judged).view(-1, args.samples)                                 # (prompts, samples)
        kl = torch.tensor([kl for _, kl in answers]).view(-1, args.samples).mean(-1)
        length = torch.tensor([float(len(ids)) for ids, _ in answers])
        ended = torch.tensor([float(ids[-1] == tokenizer.eos_token_id) for ids, _ in answers])
        result["models"][name] = {"score": bootstrap(scores[name].mean(-1), args.seed), "kl": bootstrap(kl, args.seed),
                                  "response_length": length.mean().item(), "eos_rate": ended.mean().item(),
                                  "prompts": len(prompts), "dropped": len(rows) - len(prompts)}
        lines += [{"model": name, "prompt": prompt, "response": text, "score": score}
                  for prompt, text, score in zip(asked, written, judged)]
    for a in names:
        result["win_rate"][a] = {b: bootstrap(wins(scores[a], scores[b]).mean(-1), args.seed)
                                 for b in names if b != a and scores[a].shape == scores[b].shape}
    result["seconds"] = time.time() - started
    print(f"{'model':12} {'score':>7} {'95 % interval':>18} {'KL':>7} {'length':>7} {'EOS':>6}   win rate over")
    for name, x in result["models"].items():
        versus = ", ".join(f"{b} {rate['mean']:.3f}" for b, rate in result["win_rate"][name].items())
        print(f"{name:12} {x['score']['mean']:7.3f} {x['score']['low']:8.3f} to {x['score']['high']:.3f} "
              f"{x['kl']['mean']:8.2f} {x['response_length']:7.1f} {x['eos_rate']:6.3f}   {versus}")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (output / "answers.jsonl").write_text(text, encoding="utf-8")
        write_json(output / "policy.json", result, args.overwrite)
    return result


COMMANDS = {"values": (ValuesArgs, evaluate_values), "policy": (PolicyArgs, evaluate_policy)}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        fail(f"the first word must be one of {', '.join(COMMANDS)} (python evaluate.py values --help)")
    arguments, command = COMMANDS[argv[0]]
    command(parse_args(arguments, argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
