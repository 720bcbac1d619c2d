"""Stage 2: pretrain the global value model (GVM), Q_phi(tau, s, a), offline, by temporal differences.

    python train_gvm.py                                               # Atlas, on a laptop
    accelerate launch train_gvm.py --supervision pairs --tau_pairs 1  # from preferences, policy-conditioned

Section 3.2, Eq. (1): the GVM learns the return-to-go of every prefix of an answer in fixed preference data.
It is a language model with one number per token, not a vocabulary: a stock AutoModelForTokenClassification.

Alignment. A prompt of two tokens (tau in front of it, if there is one), an answer of T = 3 tokens (with END),
padding to the batch's width L. Everything about a token stands in its column; B rows make tensors (B, L).

    ids             x1    x2     y1     y2     END    pad
    is_response     .     .      1      1      1      .     written by the behaviour policy
    is_value        .     1      1      1      1      .     where a value is learned
    q               .     gV(s1) Q1     Q2     Q3     .     read *at* a_t: s_t = [x, y^{<t}] and a_t are seen
    reward          .     0      0      0      r      .     r(x, y) at the last token, 0 before (section 3.1)

gV(s1): gamma * V(s_1), before any action. Q and V are those of the policies that wrote the data. The released
code reads one column earlier, V(s_t), where the action is not seen yet. DEVIATION n: docs/deviations.md.

Worked example, gamma = 1, r = 1, and at the moment q = V(s1), Q1, Q2, Q3 = 0, 0.5, 0.2, 0.6:
    --td_lambda 0      target = Q_{t+1}, and r at the end      = 0.5,  0.2,  0.6, 1     Eq. (1) to the letter
    --td_lambda 0.5    target = (Q_{t+1} + target_{t+1}) / 2   = 0.5,  0.5,  0.8, 1
    --td_lambda 1      target = r                              = 1,    1,    1,   1     Monte Carlo
    loss of --td_lambda 0: (0.5^2 + 0.3^2 + 0.4^2 + 0.4^2) / 4 = 0.165

Read sections 3 to 5 first: the method. Sections 2 (data) and 6 (engines, run folder) are shared helpers.
"""
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # waiting threads sleep instead of spinning
import torch
import yaml
from accelerate import Accelerator, PartialState
from datasets import load_dataset
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForTokenClassification, AutoTokenizer, GenerationConfig,
                          get_scheduler, logging)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

MAX_GRAD_NORM = 1.0                                           # gradient clipping (ours)


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/sft", help="where the GVM starts: the SFT checkpoint (paper)")
    data: str = HfArg(default="runs/atlas/data", help="folder with scored.jsonl or pairs.jsonl, or hub name")
    output: str = HfArg(default="runs/atlas/gvm", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    supervision: Literal["scores", "pairs"] = HfArg(default="scores", help="rewards, or pairs: +1/-1 (G)")
    gamma: float = HfArg(default=1.0, help="discount factor (paper: 1)")
    td_lambda: float = HfArg(default=0.95, help="0: Eq. (1)'s target, 1: Monte Carlo (released: 0.95)")
    tau_pairs: int = HfArg(default=0, help="examples of the policy in front: tau (released: 0)") # DEVIATION 8
    max_length: int = HfArg(default=256, help="longer rows (tokens) are dropped and counted (paper: 1024)")
    lr: float = HfArg(default=1e-3, help="peak learning rate (paper: 2e-6)")
    warmup_steps: int = HfArg(default=20, help="updates of linear warm-up before the cosine decay (ours)")
    epochs: int = HfArg(default=4, help="passes over the data (ours; released code: 1)")
    batch_size: int = HfArg(default=16, help="rows per update, over all processes (paper: 32)")
    micro_batch_size: int = HfArg(default=8, help="most rows per forward pass and process (ours)")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory: layers run twice")
    save_steps: int = HfArg(default=0, help="updates between two checkpoints, of which two are kept; 0: none")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    log_with: str = HfArg(default="", help="tracker of the metrics: tensorboard, wandb ... (ours: none)")
    seed: int = HfArg(default=1, help="seed of everything random")


# ---- 2. Data and models: rows, tokens, batches ----
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


class Trajectory(NamedTuple):
    """One answer: T elements (tau, s_t, a_t, G_t) of section 3.1's D."""
    prompt: object              # str or chat messages
    sequence: tuple             # (prompt ids, response ids)
    reward: float               # r(x, y)
    policy: str | None          # who wrote the answer: tau is drawn from its other answers


def read_trajectories(args, tokenizer, split, supervision):
    """data/split.jsonl -> [Trajectory, ...], without rows longer than max_length. supervision "scores": the
    rows' own rewards; "pairs": +1 for chosen, -1 for rejected (Appendix G), the two next to each other."""
    policies = {"response": "policy", "chosen": "policy_chosen", "rejected": "policy_rejected"}
    sides = ["response"] if supervision == "scores" else ["chosen", "rejected"]
    fields = [*sides, "reward"] if supervision == "scores" else sides
    fields = fields + [policies[side] for side in sides if args.tau_pairs]
    rows = read_rows(args.data, split, "prompt", *fields, tokenizer=tokenizer)
    kept = []
    for number, row in enumerate(rows, 1):
        answers = []
        for side, sign in zip(sides, (1.0, -1.0)):
            reward = row["reward"] if supervision == "scores" else sign
            sequence = row["prompt_ids"], encode_response(tokenizer, row[side])
            answers.append(Trajectory(row["prompt"], sequence, reward, row.get(policies[side])))
        if len(answers) == 2 and answers[0].sequence == answers[1].sequence:
            fail(f"{args.data}, {split}, row {number}: chosen and rejected are the same")
        if all(sum(map(len, answer.sequence)) <= args.max_length for answer in answers):
            kept += answers
    dropped = len(rows) - len(kept) // len(sides)
    PartialState().print(f"{split}: {len(rows)} rows; {dropped} longer than --max_length dropped")
    return kept


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


def pool_by_policy(data):
    """{policy: [(prompt, (prompt ids, response ids)), ...]}: what tau is drawn from."""
    pools = {}
    for answer in data:
        pools.setdefault(answer.policy, []).append((answer.prompt, answer.sequence))
    return pools


def with_taus(rows, data, pools, args, step):
    """The sequences of these rows of data with tau in front, and the mean number of pairs in a tau. What is
    drawn depends on seed, step and row only, not on how the batch is divided."""
    sequences, pairs = [], 0
    for row in rows:
        prompt, (prompt_ids, response_ids), _, policy = data[row]
        rng = random.Random(f"{args.seed} {step} {row}")
        tau, drawn = draw_tau(prompt, data[row].sequence, pools[policy], args.tau_pairs, args.max_length, rng)
        sequences.append(([*tau, *prompt_ids], response_ids))
        pairs += drawn
    return sequences, pairs / len(rows)


def collate(sequences, pad_id):
    """[(prompt ids, response ids)] -> right-padded ids (B, L) and lengths (B,) long, is_response (B, L) bool.
    The mask comes from lengths: where pad and EOS are one token, `ids != pad` would hide EOS from the loss,
    and the model would never stop. No attention mask: padding is on the right, where no token sees it."""
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), pad_id)
    is_response = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, :lengths[row]] = torch.tensor([*prompt, *response])
        is_response[row, len(prompt):lengths[row]] = True
    return ids, is_response, lengths


def row_order(n, batch_size, epochs, seed):
    """The rows of each update: (updates, batch_size) row numbers, each epoch in another order, without its
    incomplete last batch. All processes compute the same order; each takes its part of every batch."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator)[:n // batch_size * batch_size] for _ in range(epochs)]
    return torch.cat(orders).view(-1, batch_size)


# ---- 3. Loss: Eq. (1) ----
def is_last_token(is_response):
    """True at each row's last response token: (B, L) bool -> (B, L) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def value_positions(is_response):
    """The response tokens and the last prompt token: (B, L) bool -> (B, L) bool. At the latter r = 0, so its
    target is gamma * Q(s_1, a_1). The model has not seen a_1 there and learns the mean over a_1: gamma *
    V(s_1), which train_dvpo.py --advantage gae subtracts.                            # DEVIATION 3: V(s_1)"""
    return is_response | torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def td_loss(q, reward, is_value, gamma, td_lambda, denominator=None):
    """Eq. (1): L_GVM(phi) = E[(r_t + gamma * Q_phi(tau, s_{t+1}, a_{t+1}) - Q_phi(tau, s_t, a_t))^2]

    q            (B, L) float  Q_phi(tau, s_t, a_t), read at the position of token a_t
    reward       (B, L) float  r_t: r(x, y) at the last response token, 0 elsewhere
    is_value     (B, L) bool   the response tokens, and the last prompt token for V(s_1)
    denominator  divides the sum over tokens; None: the number of value positions here, for E[.] as their mean
    Returns a scalar. No gradient goes through the target.                    # DEVIATION 2: semi-gradient"""
    assert q.shape == reward.shape == is_value.shape and is_value.dtype == torch.bool
    target = lambda_return(q, reward, is_value, gamma, td_lambda)
    delta = torch.where(is_value, target - q, 0.0)            # the bracket of Eq. (1)
    return delta.square().sum() / (is_value.sum() if denominator is None else denominator)


@torch.no_grad()
def lambda_return(q, reward, is_value, gamma, td_lambda):
    """G_t = r_t + gamma * ((1 - lambda) * Q(tau, s_{t+1}, a_{t+1}) + lambda * G_{t+1}); 0 past the end.

    lambda = 0 is the one-step target of section 3.2, lambda = 1 the Monte Carlo return gamma^(T-t) * r(x, y),
    values in between the lambda-return (Sutton and Barto 2018, chapter 12).  # DEVIATION 1: lambda
    q, reward (B, L) float; is_value (B, L) bool, contiguous in each row. Returns (B, L), 0 off the mask."""
    target = torch.zeros_like(q)
    q_next = g_next = torch.zeros_like(q[:, 0])                                          # (B,)
    for t in reversed(range(q.shape[1])):
        g = reward[:, t] + gamma * ((1 - td_lambda) * q_next + td_lambda * g_next)
        # NaN * 0 is NaN: select with where, never multiply by a mask.
        g_next = torch.where(is_value[:, t], g, 0.0)
        q_next = torch.where(is_value[:, t], q[:, t], 0.0)
        target[:, t] = g_next
    return target


# ---- 4. Measuring: held-out pair accuracy ----
def response_scores(q, is_response):
    """One number per answer from its token values: Table 8's mean and percentiles, and the last value.
    q (B, L) float, is_response (B, L) bool. Returns {aggregate: (B,) float}."""
    values = torch.where(is_response, q.float(), torch.nan)                              # (B, L)
    last = torch.where(is_last_token(is_response), q.float(), 0.0).sum(-1)
    scores = {"mean": values.nanmean(-1), "last": last}
    return scores | {f"p{k}": values.nanquantile(k / 100, dim=-1) for k in (1, 5, 10, 90, 95, 99)}


def pair_accuracy(chosen, rejected):
    """Share of pairs whose better answer has the higher score; a tie counts half. (N,) and (N,) -> float."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


@torch.no_grad()
def evaluate(accelerator, model, held_out, args, micro_size, pad_id):
    """{"pair_accuracy/mean", ".../last", ...}: held-out pair accuracy by each score of response_scores.
    held_out  [chosen, rejected, chosen, rejected, ...] as Trajectories"""
    sequences, _ = with_taus(range(len(held_out)), held_out, pool_by_policy(held_out), args, 0)
    order = torch.tensor([len(prompt) + len(response) for prompt, response in sequences]).argsort()
    parts = []
    for rows in order.split(micro_size):                      # on all processes alike, as ZeRO-3 needs
        ids, is_response, _ = collate([sequences[row] for row in rows], pad_id)
        q = model(input_ids=ids.to(accelerator.device), use_cache=False).logits.squeeze(-1)        # (rows, L)
        parts.append(response_scores(q.cpu(), is_response))
    back = order.argsort()                                    # to the order of held_out
    scores = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
    return {f"pair_accuracy/{name}": pair_accuracy(x[0::2], x[1::2]) for name, x in scores.items()}


# ---- 5. Training ----
def main(args):
    accelerator, micro_size = start_accelerator(args, args.batch_size)
    tokenizer = load_tokenizer(args.model)
    split = "scored" if args.supervision == "scores" else "pairs"
    data = read_trajectories(args, tokenizer, split, args.supervision)
    if len(data) < args.batch_size:
        fail(f"{args.data}: {len(data)} answers do not fill --batch_size {args.batch_size}")
    rewards = torch.tensor([answer.reward for answer in data], dtype=torch.float64)
    mean, std = 0.0, 1.0
    if args.supervision == "scores":       # in units of their standard deviation    # DEVIATION 7: scale
        mean, std = rewards.mean().item(), rewards.std(correction=0).item()
    if not (std > 0 and math.isfinite(std)):
        fail(f"{args.data}: the rewards' standard deviation is {std}: nothing to learn")
    rewards = ((rewards - mean) / std).float()
    is_held_out = Path(args.data, "test_pairs.jsonl").is_file()
    held_out = read_trajectories(args, tokenizer, "test_pairs", "pairs") if is_held_out else []
    pools = pool_by_policy(data)

    model = load_model(AutoModelForTokenClassification, args.model, tokenizer, args.max_length, num_labels=1)
    model.config.gvm = {"gamma": args.gamma, "td_lambda": args.td_lambda, "tau_pairs": args.tau_pairs,
                        "max_length": args.max_length, "supervision": args.supervision, "reward_mean": mean,
                        "reward_std": std}
    head = getattr(model, "score", None) or model.classifier
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)    # Q = 0 everywhere: no opinion before the data
    output = start_run(accelerator, args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    updates = row_order(len(data), args.batch_size, args.epochs, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    # Stepped by hand: a prepared scheduler would take a step per process. Its state is its number of steps.
    scheduler = get_scheduler("cosine", optimizer, min(args.warmup_steps, len(updates)), len(updates))
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    first = scheduler.last_epoch = load_checkpoint(accelerator, output) if args.resume else 0
    progress = tqdm(range(first + 1, len(updates) + 1), "gvm", disable=not accelerator.is_main_process)
    for step in progress:
        started = time.time()
        batch = updates[step - 1]
        # The one denominator. E[.] is over the value positions of the update: response tokens, and one more
        # per row. Accelerate averages gradients over micro-batches and processes, so it is as much smaller.
        positions = sum(len(data[row].sequence[1]) + 1 for row in batch)
        denominator = positions / (accelerator.gradient_accumulation_steps * accelerator.num_processes)
        loss_of_update = torch.zeros((), device=accelerator.device)
        mine = batch[accelerator.process_index::accelerator.num_processes].tolist()
        mine.sort(key=lambda row: sum(map(len, data[row].sequence)))           # by length: little padding
        sequences, pairs = with_taus(mine, data, pools, args, step)
        for start in range(0, len(mine), micro_size):
            micro = slice(start, start + micro_size)
            ids, is_response, _ = collate(sequences[micro], tokenizer.pad_token_id)
            is_value, reward = value_positions(is_response), torch.zeros(ids.shape)      # (micro, L)
            reward[is_last_token(is_response)] = rewards[mine[micro]]
            ids, is_value, reward = [x.to(accelerator.device) for x in (ids, is_value, reward)]
            with accelerator.accumulate(model):
                q = model(input_ids=ids, use_cache=False).logits.squeeze(-1).float()     # (micro, L)
                loss = td_loss(q, reward, is_value, args.gamma, args.td_lambda, denominator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:                # the update is complete
                    grad_norm = clip_grad_norm(accelerator, model)
                optimizer.step()                              # does nothing before that
                optimizer.zero_grad()
            loss_of_update += loss.detach() * denominator / positions
        scheduler.step()
        record = {"step": step, "loss": accelerator.reduce(loss_of_update).item(), "grad_norm": grad_norm,
                  "lr": scheduler.get_last_lr()[0], "tau_pairs": pairs, "seconds": time.time() - started}
        progress.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        if step == len(updates) and held_out:
            model.eval()
            record |= evaluate(accelerator, model, held_out, args, micro_size, tokenizer.pad_token_id)
            accelerator.print(f"held-out pair accuracy by the last value: {record['pair_accuracy/last']:.3f}")
        log_step(accelerator, output, record)
        if args.save_steps and step % args.save_steps == 0:
            save_checkpoint(accelerator, output, step)
    save_run(accelerator, model, accelerator.get_state_dict(model), tokenizer, output,
             f"Global value model, from {args.model}. `model(input_ids=ids).logits.squeeze(-1) * {std:.6g} + "
             f"{mean:.6g}` is Q(tau, s_t, a_t) of each token, on the scale of the scores.")
    accelerator.end_training()


# ---- 6. The same in every script: command line, engines, run folder ----
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


def start_accelerator(args, update_size):
    """The Accelerator, and the rows of a micro-batch: update_size over processes and micro-batches."""
    accelerator = Accelerator(log_with=args.log_with or None, project_dir=args.output)
    unset_hf_deepspeed_config()                               # models are loaded whole, and divided later
    torch.backends.cuda.enable_cudnn_sdp(False)               # NaN gradients on H100: pytorch issue 196678
    micro_size = max(1, min(args.micro_batch_size, update_size // accelerator.num_processes))
    accumulation, rest = divmod(update_size, micro_size * accelerator.num_processes)
    if rest or accelerator.distributed_type == "FSDP":
        fail(f"{update_size} rows an update do not divide into {accelerator.num_processes} processes x "
             f"--micro_batch_size {micro_size}; or this is FSDP: use DDP or ZeRO")
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.deepspeed_plugin:
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "gradient_accumulation_steps": accumulation, "gradient_clipping": MAX_GRAD_NORM,
            "train_micro_batch_size_per_gpu": micro_size}
    return accelerator, micro_size


def clip_grad_norm(accelerator, model):
    """Clips the gradient (DeepSpeed has). Returns its norm before; one that is not finite ends the run."""
    norm = float(accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
    return norm if math.isfinite(norm) else fail(f"gradient norm {norm}: lower --lr, or --resume")


def start_run(accelerator, args):
    """Makes the run folder and writes args.json. A run that is there stays, unless --overwrite is given."""
    output = Path(args.output)
    if accelerator.is_main_process:
        if [Path(x).resolve() for x in vars(args).values() if isinstance(x, str)].count(output.resolve()) > 1:
            fail(f"{output}: is an input of this run. Choose another --output")
        if any(output.glob("*")) and (any(output.glob("*.safetensors")) or not args.resume):
            if not (args.overwrite and (output / "args.json").is_file()):
                fail(f"{output}: is in use. Pass another --output, or --overwrite; --resume if unfinished")
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("dvpo_logs", asdict(args))
    return output


def save_checkpoint(accelerator, output, step):
    """Weights and optimizer, written under another name and then renamed. The newest two are kept."""
    unfinished = output / "checkpoints" / "unfinished"
    accelerator.save_state(str(unfinished))                   # every process takes part
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(unfinished.with_name(f"step_{step:08d}"))
        for old in sorted(output.glob("checkpoints/step_*"))[:-2]:
            shutil.rmtree(old)


def load_checkpoint(accelerator, output):
    """Loads the newest checkpoint, if there is one, and cuts the logs back to it. Returns its step, or 0."""
    newest = sorted(output.glob("checkpoints/step_*"))[-1:]
    step = int(newest[0].name.removeprefix("step_")) if newest else 0
    if newest:
        accelerator.load_state(str(newest[0]))
    for log in output.glob("*.jsonl") if accelerator.is_main_process else ():
        lines = log.read_text().split("\n")[:-1]              # the last line may be half written
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
    return step


def log_step(accelerator, output, record, rollouts=()):
    """A line of metrics.jsonl, and of the tracker; a line of rollouts.jsonl for each answer."""
    accelerator.log(record, step=record["step"])
    for name, rows in {"metrics": [record], "rollouts": rollouts}.items():
        if rows and accelerator.is_main_process:
            with open(output / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save_run(accelerator, model, state, tokenizer, output, about):
    """Saves the weights (state: gathered from all processes), the tokenizer and a short model card."""
    if accelerator.is_main_process:
        card = f"---\nlibrary_name: transformers\ntags: [dvpo]\n---\n{about}\n\n    {' '.join(sys.argv)}\n"
        tokenizer.save_pretrained(output)
        (output / "README.md").write_text(card)
        model = accelerator.unwrap_model(model)
        tied = model.all_tied_weights_keys                    # ZeRO-1 and -2 copy them: save them once
        model.save_pretrained(output, state_dict={key: x for key, x in state.items() if key not in tied})
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(parse_args(Args, sys.argv[1:]))
