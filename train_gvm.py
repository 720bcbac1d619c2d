"""Stage 2: pretrain the global value model (GVM), Q_phi(tau, s, a), offline, by temporal differences. Then freeze it.

    python train_gvm.py                                                   # Atlas, on a laptop
    accelerate launch train_gvm.py --supervision pairs --tau_pairs 1      # from preferences, policy-conditioned

Section 3.2, Eq. (1): the GVM learns the return-to-go of every prefix of every response in fixed preference data. It is
a language model with one number per token instead of a vocabulary: a stock AutoModelForTokenClassification.
"Released code" is the authors', github.com/microsoft/DKI_LLM; docs/deviations.md lists where we depart from the paper.

Shapes   (B, T): B rows, T the width, tokens of the longest row. Rows are [tau | prompt | response | padding].
         In formulas t and T are the paper's: they count the response's tokens, from 1 to T.
Masks    is_token (B, T) no padding; is_response (B, T) tokens that the behaviour policy wrote, y^1..y^T, EOS included.
Where    q[b, t] is read *at* the position of token a_t = y^t: there the model has seen s_t = [x, y^{<t}] and a_t.
         One position earlier it has seen s_t only: that is V(s_t), which the authors' released code uses instead.

Sections 1 to 5 are the method. Section 6 is plumbing that the scripts share, word for word: leave it for later.
"""
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, set_seed
from accelerate.utils import load as load_safely
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForTokenClassification, AutoTokenizer, HfArgumentParser, get_scheduler)
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/sft", help="where the GVM starts: the SFT checkpoint (paper)")
    data: str = HfArg(default="runs/atlas/data", help="data folder with scored.jsonl or pairs.jsonl, or hub data set")
    output: str = HfArg(default="runs/atlas/gvm", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    supervision: Literal["scores", "pairs"] = HfArg(default="scores", help="scalar rewards, or pairs as +1/-1 (App. G)")
    gamma: float = HfArg(default=1.0, help="discount factor (paper: 1)")
    td_lambda: float = HfArg(default=0.95, help="0: Eq. (1)'s one-step target, 1: Monte Carlo (released code: 0.95)")
    tau_pairs: int = HfArg(default=0, help="K question-answer pairs that tell the policy (released: 0)")  # DEVIATION 8
    max_length: int = HfArg(default=256, help="longer rows (prompt + response, tokens) are dropped (paper: 1024)")
    lr: float = HfArg(default=1e-3, help="peak learning rate (paper: 2e-6)")
    warmup_steps: int = HfArg(default=20, help="updates of linear warm-up before the cosine decay (ours)")
    epochs: int = HfArg(default=4, help="passes over the data (ours; released code: 1)")
    batch_size: int = HfArg(default=16, help="rows per update, over all processes (paper: 32)")
    micro_batch_size: int = HfArg(default=16, help="most rows per forward pass and process; the rest accumulates")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory: layers run again in the backward pass")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping (ours)")
    eval_every: int = HfArg(default=1500, help="updates between two evaluations on test_pairs.jsonl")
    log_every: int = HfArg(default=10, help="updates between two lines of metrics.jsonl")
    save_steps: int = HfArg(default=0, help="updates between two checkpoints, of which two are kept; 0: none")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    log_with: Literal["none", "tensorboard", "wandb"] = HfArg(default="none", help="tracker that gets the metrics too")
    seed: int = HfArg(default=1, help="seed of everything random")


# ---- 2. Data ----
class Trajectory(NamedTuple):
    """One response: T elements (tau, s_t, a_t, G_t) of section 3.1's D. Its tau is drawn anew each time."""
    prompt: object              # str or chat messages
    sequence: tuple             # (prompt ids, response ids)
    reward: float               # r(x, y)
    policy: str | None          # who wrote the response


def same_tokens(row, tokenizer):
    """The fault of a pair whose answers differ as texts, but not as tokens; None if there is none."""
    chosen, rejected = (encode_response(tokenizer, row[side]) for side in ("chosen", "rejected"))
    return '"chosen" and "rejected" are the same tokens' if chosen == rejected else None


def read_trajectories(args, tokenizer, split, supervision):
    """data/split.jsonl -> ([Trajectory, ...], number of rows dropped because they are longer than max_length).

    supervision  "scores": the rows' rewards as they are. "pairs": +1 for chosen, -1 for rejected (Appendix G), the two
                 of a pair next to each other; a pair is dropped whole.
    """
    if supervision == "pairs":
        sides = [("chosen", "policy_chosen", 1.0), ("rejected", "policy_rejected", -1.0)]
        fields, also = {}, lambda row: same_tokens(row, tokenizer)
    else:
        sides = [("response", "policy", None)]                                 # None: the row's own reward
        fields, also = {"reward": "number"}, lambda row: None
    fields |= {"prompt": "prompt"} | {side: "text" for side, _, _ in sides}
    if args.tau_pairs:
        fields |= {policy: "text" for _, policy, _ in sides}
    rows = read_rows(args.data, split, fields, args.bad_rows, also)
    kept = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        group = [Trajectory(row["prompt"], (prompt, encode_response(tokenizer, row[side])),
                            row["reward"] if sign is None else sign, row.get(policy)) for side, policy, sign in sides]
        if all(sum(map(len, trajectory.sequence)) <= args.max_length for trajectory in group):
            kept += group
    return kept, len(rows) - len(kept) // len(sides)


def pool_by_policy(trajectories):
    """{policy: [(prompt, (prompt ids, response ids)), ...]}: what tau is drawn from."""
    pool = {}
    for trajectory in trajectories:
        pool.setdefault(trajectory.policy, []).append((trajectory.prompt, trajectory.sequence))
    return pool


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


def with_taus(trajectories, pool, args, seeds):
    """The sequences of some trajectories, each behind its tau of the same policy, drawn by its own seed: the draws must
    not depend on which process or micro-batch a row falls to."""
    return [with_tau(t.prompt, t.sequence, pool[t.policy], args.tau_pairs, args.max_length,
                     random.Random(str(seed))) for t, seed in zip(trajectories, seeds, strict=True)]


def collate(sequences, pad_id, device):
    """[(prompt ids, response ids)] -> right-padded ids (B, T) long, is_token (B, T) bool, is_response (B, T) bool.

    The masks come from the lengths, never from the ids: where pad and EOS are the same token, a mask made by
    `ids != pad` would hide every EOS from the loss, and the model would never learn to stop.
    """
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), longest), pad_id)                                            # (B, T)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, :len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    start = torch.tensor([[len(prompt)] for prompt, _ in sequences])                               # (B, 1)
    end = start + torch.tensor([[len(response)] for _, response in sequences])                     # (B, 1)
    position = torch.arange(longest)                                                               # (T,)
    return ids.to(device), (position < end).to(device), ((start <= position) & (position < end)).to(device)


def update_order(n, batch_size, epochs, seed):
    """Which rows each update sees: (updates, batch_size) row numbers, every epoch in another random order.

    A pure function of the seed: every process computes the same order and takes its own part of each batch. The
    incomplete last batch of an epoch is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator)[:n // batch_size * batch_size] for _ in range(epochs)]
    return torch.cat(orders).view(-1, batch_size)


# ---- 3. Loss: Eq. (1) ----
def last_token(is_response):
    """True at each row's last response token: (B, T) bool -> (B, T) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def value_positions(is_response):
    """The response tokens and the last prompt token: (B, T) bool -> (B, T) bool.

    At the last prompt token the model has seen s_1 = x and no action yet. With r = 0 and the target of every other
    position it learns gamma * V(s_1), the baseline that `--advantage gae` needs (V(s_1) itself, with the paper's
    gamma = 1).                                                                                     # DEVIATION 3
    """
    return is_response | torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def td_loss(q, reward, is_value, gamma, td_lambda):
    """Eq. (1): L_GVM(phi) = E[(r_t + gamma * Q_phi(tau, s_{t+1}, a_{t+1}) - Q_phi(tau, s_t, a_t))^2]

    q          (B, T) float  Q_phi(tau, s_t, a_t), read at the position of token a_t
    reward     (B, T) float  r_t: r(x, y) at the last response token, 0 elsewhere (section 3.1)
    is_value   (B, T) bool   True where a value is learned: the response tokens, and the last prompt token (for V(s_1))
    gamma      discount; td_lambda  0 is Eq. (1)'s one-step target                                 # DEVIATION 1
    Returns the mean over the batch's value positions, a scalar.
    """
    assert q.shape == reward.shape == is_value.shape and is_value.dtype == torch.bool
    target = lambda_return(q, reward, is_value, gamma, td_lambda)      # no gradient: a target, as in TD(0); DEVIATION 2
    delta = torch.where(is_value, target - q, 0.0)                     # the bracket of Eq. (1)
    return delta.square().sum() / is_value.sum()                       # E[.]: per value position of the batch


@torch.no_grad()
def lambda_return(q, reward, is_value, gamma, td_lambda):
    """G_t = r_t + gamma * ((1 - lambda) * Q(tau, s_{t+1}, a_{t+1}) + lambda * G_{t+1}), and 0 past the last token.

    lambda = 0 is the one-step target of section 3.2, G_t = r_t + gamma * Q(tau, s_{t+1}, a_{t+1}). lambda = 1 is the
    Monte Carlo return, G_t = gamma^(T-t) * r(x, y). In between: Sutton and Barto (2018), chapter 12.
    q, reward (B, T) float; is_value (B, T) bool, contiguous in each row. Returns (B, T) float, 0 off the mask.
    """
    target = torch.zeros_like(q)
    q_next = g_next = torch.zeros_like(q[:, 0])                                                    # (B,)
    for t in reversed(range(q.shape[1])):
        g = reward[:, t] + gamma * ((1 - td_lambda) * q_next + td_lambda * g_next)
        # `where`, not a product with the mask: whatever stands off the mask (a NaN too) must not leak in.
        g_next = torch.where(is_value[:, t], g, 0.0)
        q_next = torch.where(is_value[:, t], q[:, t], 0.0)
        target[:, t] = g_next
    return target


# ---- 4. Measuring: pair accuracy ----
def response_scores(q, is_response):
    """One number per response from its token values: Table 8's mean and percentiles, and the last token's value.

    q (B, T) float, is_response (B, T) bool. Returns {aggregate: (B,) float}.
    """
    nan = torch.where(is_response, q.float(), torch.nan)                                           # (B, T)
    scores = {"mean": nan.nanmean(-1), "last": torch.where(last_token(is_response), q.float(), 0.0).sum(-1)}
    return scores | {f"p{k}": nan.nanquantile(k / 100, dim=-1) for k in (1, 5, 10, 90, 95, 99)}


@torch.no_grad()
def score_responses(model, sequences, batch_size, pad_id):
    """{aggregate: (N,) float} of N (prompt ids, response ids)."""
    order = sorted(range(len(sequences)), key=lambda row: sum(map(len, sequences[row])))           # little padding
    parts = []
    for start in range(0, len(order), batch_size):
        ids, _, is_response = collate([sequences[row] for row in order[start:start + batch_size]], pad_id, model.device)
        q = model(input_ids=ids, use_cache=False).logits.squeeze(-1)                               # (rows, T)
        parts.append(response_scores(q, is_response))
    back = torch.tensor(order).argsort()
    return {name: torch.cat([part[name].cpu() for part in parts])[back] for name in parts[0]}


def pair_accuracy(chosen, rejected):
    """Share of pairs in which the better answer has the higher score; a tie counts half. (N,) and (N,) -> float."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


def evaluate(model, pairs, args, tokenizer):
    """Held-out pair accuracy by each score of response_scores: {"mean": ..., "last": ..., "p1": ..., ...}.

    pairs  [chosen, rejected, chosen, rejected, ...] as Trajectories. The same tau every time.
    """
    sequences = with_taus(pairs, pool_by_policy(pairs), args, range(len(pairs)))
    scores = score_responses(model, sequences, args.micro_batch_size, tokenizer.pad_token_id)
    return {name: pair_accuracy(score[0::2], score[1::2]) for name, score in scores.items()}


def value_head(model):
    """The linear layer hidden -> 1, whatever the architecture calls it."""
    return getattr(model, "score", None) or model.classifier


# ---- 5. Training ----
def main(args):
    started = time.time()
    check_numbers(args)
    if not (0 < args.gamma <= 1 and args.td_lambda <= 1):
        fail(f"--gamma {args.gamma} and --td_lambda {args.td_lambda} have to be at most 1, and --gamma above 0")
    accelerator = start_accelerator(args, accumulation_steps)
    set_seed(args.seed)
    tokenizer = load(AutoTokenizer, args.model)
    if tokenizer.chat_template is None:
        fail(f"{args.model}: the tokenizer has no chat template. Start from the output of sft.py")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    split = "scored" if args.supervision == "scores" else "pairs"
    data, dropped = read_trajectories(args, tokenizer, split, args.supervision)
    accelerator.print(f"{len(data)} trajectories; {dropped} rows longer than {args.max_length} tokens dropped")
    if len(data) < args.batch_size:
        fail(f"{args.data}: {len(data)} trajectories do not fill one batch: lower --batch_size {args.batch_size}, or "
             f"raise --max_length {args.max_length}")
    rewards = torch.tensor([trajectory.reward for trajectory in data], dtype=torch.float64)
    # Scores of any scale: learn in units of the training set's deviation, and save both to map values back. DEVIATION 7
    mean, std = 0.0, 1.0
    if args.supervision == "scores":
        mean, std = rewards.mean().item(), rewards.std(correction=0).item()
    if rewards.min() == rewards.max() or not math.isfinite(std):
        fail(f"{args.data}: all rewards are equal ({mean}), or too large to have a deviation: nothing to learn")
    rewards = ((rewards - mean) / std).float()
    pairs = []
    if not Path(args.data).is_dir() or (Path(args.data) / "test_pairs.jsonl").is_file():
        pairs, _ = read_trajectories(args, tokenizer, "test_pairs", "pairs")
    else:
        accelerator.print(f"{args.data}: no test_pairs.jsonl, so no pair accuracy is measured")

    config = AutoConfig.from_pretrained(args.model, num_labels=1)
    config.classifier_dropout = config.attention_dropout = 0.0         # a value should not depend on chance
    config.gvm = {"gamma": args.gamma, "td_lambda": args.td_lambda, "tau_pairs": args.tau_pairs,
                  "max_length": args.max_length, "supervision": args.supervision, "reward_mean": mean,
                  "reward_std": std}
    model = load(AutoModelForTokenClassification, args.model, kind="policy", config=config, dtype=torch.float32)
    if args.max_length > getattr(config, "max_position_embeddings", math.inf):
        fail(f"--max_length {args.max_length} is more than the context of {args.model}")
    for parameter in value_head(model).parameters():
        torch.nn.init.zeros_(parameter)                                # Q = 0 everywhere: no opinion before the data
    for rows in (data, pairs):                                         # too few pairs for tau? Better now than later
        pool = pool_by_policy(rows)
        for row in rows:
            with_taus([row], pool, args, [args.seed])
    pool = pool_by_policy(data)
    output = start_run(accelerator, args)
    model.eval()                                                       # dropout off; gradients flow all the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    lengths = torch.tensor([sum(map(len, trajectory.sequence)) for trajectory in data])
    updates = update_order(len(data), args.batch_size, args.epochs, args.seed)
    scheduler = get_scheduler("cosine", optimizer, min(args.warmup_steps, len(updates)), len(updates))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint_layers(model, args.gradient_checkpointing)
    model, optimizer = accelerator.prepare(model, optimizer)

    first, seconds = load_checkpoint(accelerator, output) if args.resume else (0, 0.0)
    # The rate is a function of the update. A scheduler's own state would be read as an unchecked pickle.
    started, scheduler.last_epoch = started - seconds, first
    progress = tqdm(total=len(updates), initial=first, desc="gvm", mininterval=1,
                    disable=not accelerator.is_main_process)
    for update, batch in enumerate(updates[first:], first + 1):
        tokens = sum(len(data[row].sequence[1]) + 1 for row in batch)          # value positions of the whole update
        mine = batch[accelerator.process_index::accelerator.num_processes]
        mine = mine[lengths[mine].argsort()]                                   # micro-batches with little padding
        loss_of_update = torch.zeros((), device=accelerator.device)
        for micro in mine.split(args.micro_batch_size):
            seeds = [f"{args.seed} {update} {row}" for row in micro]
            sequences = with_taus([data[row] for row in micro], pool, args, seeds)
            ids, _, is_response = collate(sequences, tokenizer.pad_token_id, accelerator.device)
            reward = last_token(is_response) * rewards[micro, None].to(accelerator.device)             # (B, T): r_t
            is_value = value_positions(is_response)
            with accelerator.accumulate(model):
                # No attention mask: rows are padded on the right, and no token sees what is behind it.
                q = model(input_ids=ids, use_cache=False).logits.squeeze(-1).float()
                # A micro-batch counts by its share of the update's positions, so that the update is the mean over all
                # of them however they are divided into micro-batches and processes. backward() divides by the number
                # of micro-batches, and the processes' gradients are averaged: both are undone here.
                loss = td_loss(q, reward, is_value, args.gamma, args.td_lambda) * is_value.sum() / tokens
                accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
            loss_of_update += loss.detach()
        grad_norm = clip_grad_norm(accelerator, model.parameters(), args.max_grad_norm)
        stop_if_not_finite(accelerator, model, tokenizer, output, grad_norm, f"update {update}, rows {batch.tolist()}")
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

        progress.update()
        last = update == len(updates)
        record = {"update": update, "loss": accelerator.reduce(loss_of_update).item(), "grad_norm": grad_norm,
                  "lr": scheduler.get_last_lr()[0], "seconds": time.time() - started}
        if pairs and (update % args.eval_every == 0 or last):
            with gathered(accelerator, model) as plain:
                record["pair_accuracy"] = evaluate(plain, pairs, args, tokenizer)
            accelerator.print("\nheld-out pair accuracy: mean value {mean:.3f}, last value {last:.3f}".format(
                **record["pair_accuracy"]))
        accuracy = {f"pair_accuracy/{name}": x for name, x in record.get("pair_accuracy", {}).items()}
        if accelerator.is_main_process and (update % args.log_every == 0 or "pair_accuracy" in record or last):
            write_lines(output / "metrics.jsonl", [record])
            accelerator.log({name: x for name, x in record.items() if name != "pair_accuracy"} | accuracy, step=update)
            progress.set_postfix(loss=f"{record['loss']:.3f}")
        save_if_due(accelerator, output, update, len(updates), args.save_steps)
    progress.close()
    save_run(accelerator, model, tokenizer, output,
             f"# Global value model\n\nQ(tau, s_t, a_t): the score that an answer is expected to get once token a_t is "
             f"written, if the policy that began it goes on. Started from `{args.model}`, trained on {len(data)} "
             f"trajectories of `{args.data}` ({split}), {args.epochs} epochs, {len(updates)} updates.\n\n`q = model("
             f"input_ids=ids).logits.squeeze(-1)` is (B, T): the value of each token, after it is read, in standard "
             f"deviations of the training scores. `q * {std:.6g} + {mean:.6g}` (config.gvm) is in units of the scores.",
             {"loss": record["loss"]} | accuracy)
    accelerator.end_training()


def accumulation_steps(args, processes):
    """Micro-batches per update. --batch_size is the total over all processes, so that a run means the same on one GPU
    and on eight; --micro_batch_size is how much of it a process takes at a time: lowered to what it has."""
    if args.batch_size < 1 or args.batch_size % processes:
        fail(f"--batch_size {args.batch_size} is not a multiple of the {processes} processes")
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size // processes)
    if args.micro_batch_size < 1 or args.batch_size % (args.micro_batch_size * processes):
        fail(f"--batch_size {args.batch_size} is not a multiple of --micro_batch_size x processes = "
             f"{args.micro_batch_size * processes}")
    return args.batch_size // (args.micro_batch_size * processes)


# ---- 6. The same in every script: command line, rows and prompts, engine, run folder ----
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


def check_numbers(args):
    """Ends the program before it touches a file if a count is below 1, or another number negative or not finite."""
    for name, value in vars(args).items():
        may_be_0 = name in ("seed", "retries", "warmup_steps", "tau_pairs", "save_steps")
        least = 0 if type(value) is float or may_be_0 else 1
        most = 2 ** 32 if name == "seed" else math.inf        # numpy's generators take no larger seed
        if type(value) in (int, float) and not least <= value < most:
            fail(f"--{name} {value}: it has to be at least {least} and less than {most}")


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
              split "test" is read for a "test_*" file, "train" for our other files, and any other split by its name
    bad_rows  "error": the first bad row ends the program, naming file, line and fault; "skip": dropped and counted
    """
    path = Path(data) / f"{split}.jsonl"
    if os.path.isfile(path):                      # not path.is_file(): it raises on a name that is too long
        lines = path.read_bytes().split(b"\n")    # not splitlines(): text may hold U+2028, which is no end of line
    elif os.path.exists(data) or str(data).count("/") != 1:
        fail(f"{path}: no such file (python atlas.py world, or prepare_data.py, writes data folders)")
    else:
        import datasets
        try:
            theirs = {"sft": "train", "scored": "train", "pairs": "train", "rl": "train"}.get(split, split)
            lines = datasets.load_dataset(str(data), split="test" if split.startswith("test_") else theirs)
        except Exception as problem:
            fail(f"{data}: neither a data folder here nor a readable hub data set ({str(problem).splitlines()[0]})")
    rows, skipped = [], 0
    for number, line in enumerate(lines, 1):
        if isinstance(line, bytes) and not line.strip():
            continue
        try:
            row = json.loads(line) if isinstance(line, bytes) else line
            json.dumps(row, ensure_ascii=False, default=str).encode()          # half a character (\\ud800) is no text
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
    A control token spelled out in a message ("<|im_end|>", typed by a user or left in scraped text) would end the turn.
    It stays text, as in encode_response: a mark breaks it until the template's own control tokens are found.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern, mark = "|".join(map(re.escape, sorted(control, reverse=True))) or "(?!)", "\ufdd0"    # never a character
    broken = [message | {key: re.sub(pattern, lambda found: found[0][0] + mark + found[0][1:], message[key])
                         for key in ("role", "content")} for message in messages]
    try:
        text = tokenizer.apply_chat_template(broken, add_generation_prompt=True, tokenize=False)
        if not text.strip():
            raise ValueError("it writes nothing")
        if broken == messages:
            return tokenizer(text, add_special_tokens=False).input_ids
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        return [i for part in re.split(f"({pattern})", text) for i in
                ([control[part]] if part in control else tokenizer(part.replace(mark, ""), **plain).input_ids)]
    except Exception as problem:                              # the template's own raise_exception, or a fault in it
        fail(f"{tokenizer.name_or_path}: its chat template cannot write the prompt {str(prompt)[:80]!r} ({problem})")


def encode_response(tokenizer, response):
    """Token ids y^1..y^T of a response. y^T is EOS: to stop is an action too, and has to be learned."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids + [tokenizer.eos_token_id]


def start_accelerator(args, accumulation_steps):
    """The Accelerator, with what an engine has to know of this script."""
    # cuDNN's attention, which torch prefers on an H100, gives NaN gradients in some cases (pytorch issue 196678), and
    # prepares a plan for every new length of a row. Writing a large checkpoint may take longer than NCCL's 10 minutes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    kwargs = [DistributedDataParallelKwargs(gradient_as_bucket_view=True),     # else DDP holds the gradients twice
              InitProcessGroupKwargs(timeout=timedelta(hours=2))]
    accelerator = Accelerator(kwargs_handlers=kwargs, **tracker(args))
    unset_hf_deepspeed_config()            # models are loaded whole: ZeRO-3 divides them once their heads are made
    if accelerator.mixed_precision == "fp16":
        fail("--mixed_precision fp16: not supported, since gradients underflow. Use bf16, or no")
    accelerator.gradient_accumulation_steps = accumulation_steps(args, accelerator.num_processes)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":         # log-probabilities have to stay float32
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            gradient_accumulation_steps=accelerator.gradient_accumulation_steps, gradient_clipping=args.max_grad_norm,
            train_micro_batch_size_per_gpu=args.micro_batch_size)
    return accelerator


def is_zero3(accelerator):
    """Does DeepSpeed divide the weights among the processes?"""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3


@contextmanager
def gathered(accelerator, model, part=""):
    """The plain model (or a part of it, by name), whole on every process, to generate or to evaluate with. ZeRO-3 and
    FSDP2 gather the weights once here, instead of layer by layer for each token, and the processes need not take
    equally many steps."""
    plain = accelerator.unwrap_model(model).get_submodule(part)
    if is_zero3(accelerator):
        import deepspeed
        zero = model.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(plain.parameters())):
            for hook in zero.forward_hooks + zero.backward_hooks:              # they would divide the layers again
                hook.remove()
            zero.forward_hooks, zero.backward_hooks = [], []
            try:
                yield plain
            finally:
                zero._register_deepspeed_module(zero.module)
    elif accelerator.is_fsdp2:
        from torch.distributed.fsdp import FSDPModule
        root = accelerator.unwrap_model(model)                # has the weights that are in no layer
        root._get_fsdp_state()._lazy_init()                   # else the first layer that runs takes itself for the root
        root.set_reshard_after_forward(False)
        parts = [root, *(module for module in plain.modules() if isinstance(module, FSDPModule))]
        for module in parts:
            module.unshard()
        try:
            yield plain
        finally:
            root.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
            for module in parts:
                module.reshard()
    else:
        yield plain


def clip_grad_norm(accelerator, parameters, max_norm):
    """Clips the gradient; returns its norm before. DeepSpeed has clipped already, in backward(), and made the update
    unless the norm was not finite."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # FSDP2: every process has a part


def checkpoint_layers(model, on):
    """Gradient checkpointing on or off. transformers does it only in layers whose `training` is set, which eval() unset
    to switch dropout off: so it is set on the layers alone. Off for generation: such layers keep no key-value cache."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = on


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


def tracker(args):
    """Accelerator's arguments for --log_with. It would pass over a tracker that is not installed without a word."""
    if args.log_with not in ("none", *map(str, get_available_trackers())):
        fail(f"--log_with {args.log_with}: not installed here. pip install {args.log_with}")
    return {"log_with": args.log_with, "project_dir": args.output} if args.log_with != "none" else {}


def start_run(accelerator, args):
    """Makes the run folder and writes args.json. What is in the folder already is only replaced with --overwrite, and
    only if it is a run, and none of this run's own inputs; with --resume it has to be this very run, unfinished."""
    output, inputs = Path(args.output), ("model", "gvm", "reward_model", "data")
    free = ("output", "overwrite", "resume", "save_steps", "log_with")          # may differ when a run is resumed
    if accelerator.is_main_process:
        folder = output.resolve()                             # --output may be a link
        replaced = folder.with_name(f".{folder.name}.replaced")
        if os.path.exists(output) and not output.is_dir():
            fail(f"{output}: is a file. Choose another --output")
        for name in inputs:
            if hasattr(args, name) and Path(getattr(args, name)).resolve().is_relative_to(folder):
                fail(f"{output}: holds --{name} {getattr(args, name)}, which this run reads. Choose another --output")
        if os.path.exists(output) and any(output.iterdir()):
            if not (args.overwrite or args.resume):
                fail(f"{output}: holds another run. Choose another --output, or pass --resume or --overwrite")
            if not (output / "args.json").is_file():
                fail(f"{output}: is not a run folder (no args.json), so it is neither resumed nor deleted")
            if args.resume:
                try:
                    was = dict(json.loads((output / "args.json").read_text()))
                except (ValueError, TypeError, RecursionError) as problem:
                    fail(f"{output / 'args.json'}: not the settings of a run ({problem}). Choose another --output")
                states = len(list(checkpoints(output)[-1].glob("random_states_*"))) if checkpoints(output) else 0
                if states not in (0, accelerator.num_processes):
                    fail(f"{output}: its checkpoints are of {states} processes. Resume it with as many")
                changed = [f"--{name} {was.get(name)}" for name, value in asdict(args).items()
                           if name not in free and was.get(name) != value]
                if changed or any(output.glob("*.safetensors")):
                    fail(f"{output}: " + (f"was started with {changed[0]}" if changed else "is finished") +
                         ", so there is nothing to resume. Choose another --output")
            else:
                print(f"{output}: replacing the run that was here")
                shutil.rmtree(replaced, ignore_errors=True)
                with writing(output):
                    folder.rename(replaced)                   # and only deleted when this run has begun
        failed = f"{output} cannot be written"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            failed = f"--log_with {args.log_with} does not start"               # wandb: not logged in, no network, ...
            accelerator.init_trackers("dvpo_logs", asdict(args), {"wandb": {"dir": str(output), "name": str(output)}})
            failed = f"{output} cannot be written"
            (output / "args.json.part").write_text(json.dumps(asdict(args), indent=2) + "\n")
            (output / "args.json.part").replace(output / "args.json")
        except Exception as problem:
            if os.path.exists(replaced) and not args.resume:
                shutil.rmtree(folder, ignore_errors=True)
                replaced.rename(folder)
            fail(f"{failed}: {(str(problem) or repr(problem)).splitlines()[0]}")
        shutil.rmtree(replaced, ignore_errors=True)
    accelerator.wait_for_everyone()
    return output


@contextmanager
def writing(place):
    """A full disk, or a folder that cannot be written, ends in one clear line. What was saved before stays as it is."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as problem:                 # RuntimeError: torch.save's
        reason = (str(problem).strip() or repr(problem)).splitlines()[0]
        fail(f"{place}: cannot be written ({reason}). Mend that: then the same command with --resume goes on from the "
             f"last checkpoint")


def checkpoints(output):
    """The checkpoints of a run, oldest first. A folder with this name is whole: it was renamed when it was."""
    found = [folder for folder in output.glob("checkpoints/step_*") if folder.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step_")))


def save_checkpoint(accelerator, output, step):
    """Everything that the rest of the run depends on: weights, optimizer, every process's random numbers. (Which rows
    come next is a function of seed and step, and so is a learning rate.) The newest two are kept."""
    unfinished = output / "checkpoints" / f".step_{step}"
    with writing(unfinished):
        accelerator.save_state(str(unfinished))                                # every process takes part
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with writing(unfinished):
            unfinished.rename(unfinished.with_name(f"step_{step}"))
        for old in checkpoints(output)[:-2]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


STOP_SIGNALS = []                                             # when they came


def heed_signals():
    """Ctrl-C and SIGTERM (a cluster takes the machine back) let the step end and a checkpoint be saved. Called only
    where a script is the program. A launcher hands the signal on, so it may come twice at once; one that comes later
    ends the program on the spot."""
    def note(number, frame):
        if STOP_SIGNALS and time.time() > STOP_SIGNALS[0] + 3:
            fail("stopped in the middle of a step. --resume goes on from the last checkpoint")
        STOP_SIGNALS.append(time.time())
        print("\nstopping after this step; the same signal in three seconds or more stops at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:        # a job in the background may be told to ignore them
            signal.signal(number, note)


def save_if_due(accelerator, output, step, last, save_steps):
    """A checkpoint every --save_steps; and when a signal has come, to whichever process: then the run ends here."""
    stop = accelerator.reduce(torch.tensor(len(STOP_SIGNALS), device=accelerator.device)).item()
    if step < last and (stop or (save_steps and step % save_steps == 0)):
        save_checkpoint(accelerator, output, step)
        if stop:
            fail(f"{output}: stopped by a signal after step {step}. The same command with --resume goes on from there")


def load_checkpoint(accelerator, output):
    """Takes up the newest checkpoint, if there is one, and cuts the logs back to it. Returns its step, or 0, and the
    seconds that the run had taken, which only the main process knows."""
    newest, seconds = checkpoints(output)[-1:], 0.0
    step = int(newest[0].name.removeprefix("step_")) if newest else 0
    if newest:
        try:
            accelerator.load_state(str(newest[0]))
            # It passes over random numbers that it cannot read, or set, without a word.
            saved = load_safely(newest[0] / f"random_states_{accelerator.process_index}.pkl")
            ours = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
            if not all(map(torch.equal, ours, [saved["torch_manual_seed"], *saved.get("torch_cuda_manual_seed", [])])):
                raise ValueError("its random numbers were not taken up")
        except Exception as problem:                          # a file is missing, cut off, or of another run; a pickle
            reason = (str(problem).strip() or repr(problem)).splitlines()[0]
            fail(f"{newest[0]}: no whole checkpoint of this run ({reason}). Remove it: --resume takes the one before")
    if accelerator.is_main_process:
        for half in output.glob("checkpoints/.step_*"):       # what a kill, or a full disk, has left
            shutil.rmtree(half)
        for log in (output / name for name in ("metrics.jsonl", "rollouts.jsonl") if (output / name).exists()):
            kept = []
            for number, line in enumerate(log.read_bytes().split(b"\n")[:-1], 1):  # what was cut off is no line
                try:
                    record = json.loads(line)
                    if record.get("step", record.get("update")) <= step:
                        kept.append(line + b"\n")
                        seconds = float(record.get("seconds", seconds))
                except Exception as problem:
                    fail(f"{log}:{number}: not a line of a run's log ({problem}). Remove the line, then --resume again")
            unfinished = log.with_name(log.name + ".part")
            unfinished.write_bytes(b"".join(kept))
            unfinished.replace(log)
        print(f"{output}: from step {step} on" if step else f"{output}: from the beginning")
    accelerator.wait_for_everyone()
    return step, seconds


def write_lines(path, records):
    """Appends JSON lines: metrics.jsonl, rollouts.jsonl."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def model_card(accelerator, model, output, about, numbers):
    """README.md of a run folder, in the form that the Hugging Face hub reads. numbers: {metric: last value}."""
    kinds, source = ("TokenClassification", "SequenceClassification"), model.config.name_or_path
    auto = "AutoModelFor" + next((kind for kind in kinds if type(model).__name__.endswith(kind)), "CausalLM")
    base_model = "" if Path(source).exists() else f"base_model: {source}\n"    # the hub knows nothing of our folders
    processes, precision = accelerator.num_processes, accelerator.mixed_precision
    engine = "fsdp2" if accelerator.is_fsdp2 else ""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = f"zero{accelerator.deepspeed_plugin.zero_stage}"
    launch = "accelerate launch " + f"--config_file recipes/accelerate_{engine}.yaml " * bool(engine)
    launch += f"--num_processes {processes} --mixed_precision {precision}"
    command = f"{'python' if (processes, precision) == (1, 'no') else launch} {shlex.join(sys.argv)}"
    table = "".join(f"| {name} | {value:.4g} |\n" for name, value in numbers.items())
    return (f"---\nlibrary_name: transformers\ntags: [dvpo, {Path(__file__).stem}]\n{base_model}---\n{about}\n\n"
            f"| metric | last value |\n|---|---|\n{table}\n"
            f"```python\nfrom transformers import {auto}, AutoTokenizer\n"
            f"model = {auto}.from_pretrained({str(output)!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({str(output)!r})\n```\n\n"
            f"Made by `{Path(__file__).name}` of an educational reference of DVPO (arXiv 2502.16944); not an aligned "
            f"product. Settings: args.json. Log: metrics.jsonl. Command:\n\n```\n{command}\n```\n")


def save_run(accelerator, model, tokenizer, output, about, numbers, part=""):
    """Saves model, tokenizer and model card. The weights are moved in last: a folder with weights is a whole run.

    model  as prepared: only so can its weights be gathered from all processes
    part   name of the submodule that is saved; the model itself without it
    """
    state, saving = accelerator.get_state_dict(model), Path(output) / ".saving"       # every process takes part
    if accelerator.is_main_process:
        model, prefix = accelerator.unwrap_model(model).get_submodule(part), part and part + "."
        state = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
        state = {name: state[name] for name in state if name not in model.all_tied_weights_keys}
        with writing(output):
            model.save_pretrained(saving, state_dict=state)
            tokenizer.save_pretrained(saving)
            (saving / "README.md").write_text(model_card(accelerator, model, output, about, numbers), encoding="utf-8")
            for file in sorted(saving.iterdir(), key=lambda file: "safetensors" in file.name):
                os.replace(file, Path(output) / file.name)
            saving.rmdir()
    accelerator.wait_for_everyone()


def stop_if_not_finite(accelerator, model, tokenizer, output, grad_norm, where, part=""):
    """Ends the program before a NaN reaches the weights: they are saved as they were, and the place is named."""
    if not math.isfinite(grad_norm):
        saved = Path(output) / "checkpoints" / "before_nan"
        save_run(accelerator, model, tokenizer, saved, "# Weights before a gradient that was not finite",
                 {"grad_norm": grad_norm}, part)
        fail(f"gradient norm {grad_norm} at {where}. The weights before it: {saved}. A lower --lr may help")


if __name__ == "__main__":
    heed_signals()
    main(parse_args(Args, sys.argv[1:]))
