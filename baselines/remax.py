"""Baseline: ReMax. A reward model, no critic: the score of the greedy answer to the same prompt is the baseline.

    python baselines/remax.py                                             # Atlas, on a laptop
    accelerate launch baselines/remax.py --kl_coef 0.05

Li et al. (2023): REINFORCE. Every prompt is answered twice, by sampling and greedily. The sampled answer learns with
the difference of the two scores, in one update per batch: no ratio, no clipping. The published code samples with
top_p 0.9, scores with the whole softmax, and clips the difference at 5; here what is sampled is what is scored.

Shapes   B rollouts, T tokens of the longest row. Rows are [prompt | response | padding].
Masks    is_token (B, T) no padding; is_response (B, T) tokens that the policy wrote, y^1..y^T, EOS included.
Where    logp[b, t] and advantage[b, t] belong to the token at position t: log pi(a_t | s_t).

Sections 1 to 5 are the method. Section 6 is plumbing that the scripts share, word for word: leave it for later.
"""
import copy
import json
import math
import os
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
from typing import Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, gather_object,
                              set_seed)
from accelerate.utils import load as load_safely
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          ContinuousBatchingConfig, GenerationConfig, HfArgumentParser)
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/sft", help="SFT model: the policy's start and the reference")
    reward_model: str = HfArg(default="runs/atlas/reward_model", help="output of baselines/reward_model.py")
    data: str = HfArg(default="runs/atlas/data", help="data folder with rl.jsonl, or hub data set with prompts")
    output: str = HfArg(default="runs/atlas/remax", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    kl_coef: float = HfArg(default=0.05, help="beta of the KL penalty (paper: 0.05)")
    truncated: Literal["keep", "mask", "penalise"] = HfArg(default="keep", help="responses cut at the length limit: "
                                                           "as they are; left out; 1 off the reward")   # DEVIATION 10
    rollout: Literal["padded", "continuous"] = HfArg(default="padded", help="how answers are generated: in one batch, "
                                                     "or with a paged cache where ended ones make room")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens)")
    max_response_length: int = HfArg(default=64, help="tokens after which a response is cut (paper: 1024)")
    lr: float = HfArg(default=4e-4, help="learning rate, constant (paper: 2e-6)")
    steps: int = HfArg(default=50, help="batches of rollouts")
    batch_size: int = HfArg(default=64, help="rollouts per step and update, over all processes (paper: 8)")
    micro_batch_size: int = HfArg(default=32, help="most rollouts per forward pass and process")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory: layers run again in the backward pass")
    frozen_dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(default="auto", help="of frozen models' "
                                                                            "weights; auto: the run's precision")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping (ours; released code: none)")
    sample_every: int = HfArg(default=15, help="steps between two printed samples")
    save_steps: int = HfArg(default=0, help="steps between two checkpoints, of which two are kept; 0: none")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    log_with: Literal["none", "tensorboard", "wandb"] = HfArg(default="none", help="tracker that gets the metrics too")
    seed: int = HfArg(default=1, help="seed of everything random")


# ---- 2. Data ----
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


# ---- 3. Loss: REINFORCE with a greedy baseline ----
def kl_reward(logp_old, logp_ref, is_response, kl_coef):
    """r^KL_t = -beta * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)), the KL penalty by k1 (Schulman, 2020). (B, T)."""
    return torch.where(is_response, -kl_coef * (logp_old - logp_ref), 0.0)


def remax_advantage(score, score_greedy, reward_kl, is_response):
    """A_t = r^KL_t + r(x, y) - r(x, y_greedy): the KL term is the token's own, the difference is the whole answer's.

    score, score_greedy (B,) float; reward_kl (B, T) float; is_response (B, T) bool. Returns (B, T), 0 off the mask.
    """
    return torch.where(is_response, reward_kl + (score - score_greedy)[:, None], 0.0)


def remax_loss(logp, advantage, is_response):
    """REINFORCE, -E[A_t * log pi_theta(a_t|s_t)]: its gradient is minus the policy gradient, its value means nothing.

    logp (B, T) float, with gradient; advantage (B, T) float, a constant; is_response (B, T) bool.
    Returns the mean over the batch's response tokens, a scalar.
    """
    assert logp.shape == advantage.shape == is_response.shape and is_response.dtype == torch.bool
    return -torch.where(is_response, advantage * logp, 0.0).sum() / is_response.sum().clamp(min=1)


def last_token(is_response):
    """True at each row's last response token: (B, T) bool -> (B, T) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


# ---- 4. Rollouts and scores ----
@torch.no_grad()
def rollout(policy, tokenizer, prompts, max_response_length, how, greedy=False):
    """Samples one response to each prompt from pi_theta exactly. prompts: list of id lists. Returns a list of id lists.

    how     "padded": all rows in one batch, until the longest is done; "continuous": a paged key-value cache, in which
            finished rows make room (transformers' continuous batching, in the precision of the weights: no autocast)
    greedy  takes the likeliest token each time instead: ReMax's baseline, never what the policy learns from
    A response ends with EOS, unless it was cut at max_response_length. It stays token ids: decoded and encoded again,
    it could be split into other tokens than the policy chose.
    """
    # generate() fills what a GenerationConfig leaves open from the model's own (top_k = 50, a repetition penalty, ...).
    # Then pi_theta is not what is sampled, and the KL estimate goes negative. So the model's own is set aside.
    own, policy.generation_config = policy.generation_config, GenerationConfig(
        do_sample=not greedy, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_response_length,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    try:
        if how == "continuous":
            blocks = sum((len(prompt) + max_response_length) // 256 + 2 for prompt in prompts)     # of 256 tokens
            batching = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=max(2048, len(prompts)),
                                                seed=torch.randint(2 ** 31, ()).item())
            done = policy.generate_batch([list(prompt) for prompt in prompts], policy.generation_config, batching)
            errors = [answer.error for answer in done.values() if answer.error is not None]
            if errors or len(done) < len(prompts):
                fail(f"generation failed: {errors[0] if errors else 'some prompts have no answer'}")
            return [answer.generated_tokens for answer in done.values()]       # in the order of the prompts
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts])
        is_token = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
        written = policy.generate(input_ids=ids.to(policy.device), attention_mask=is_token.to(policy.device),
                                  synced_gpus=False)[:, width:].tolist()       # each process has all weights
    finally:
        policy.generation_config = own
    # Up to the first EOS: what stands behind it is padding, also where pad and EOS are the same token.
    return [row[:row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in written]


LOGITS_AT_ONCE = 2 ** 26                                      # numbers in float32: 256 MiB


def token_logp(model, ids, is_response):
    """log pi(a_t | s_t) of the response tokens, each at the token's own position: (B, T) float, 0 off the mask.

    The logits of the whole batch in float32, (B, T, V), would be the largest tensor of the step by far. Here only the
    positions that predict a response token meet the output layer. If they are many, float32 exists for a chunk of them
    at a time: in the backward pass it is computed again.
    """
    # No attention mask: rows are padded on the right, and no token sees what is behind it. GPUs are faster without.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state                    # (B, T, H)
    # The hidden state at t-1 predicts the token at t: [:, :-1] of the states goes with [:, 1:] of mask and ids.
    logits = model.get_output_embeddings()(hidden[:, :-1][is_response[:, 1:]])                     # (N, V)
    token = ids[:, 1:][is_response[:, 1:]]                                                         # (N,)

    def logp_of(logits, token):
        return logits.float().gather(-1, token[:, None]).squeeze(-1) - logits.float().logsumexp(-1)

    chunk = max(LOGITS_AT_ONCE // logits.shape[-1], 1)
    parts = list(zip(logits.split(chunk), token.split(chunk)))
    logp = [checkpoint(logp_of, *part, use_reentrant=False) if len(parts) > 1 else logp_of(*part) for part in parts]
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(is_response, torch.cat(logp))


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


def value_head(model):
    """The linear layer hidden -> 1, whatever the architecture calls it."""
    return getattr(model, "score", None) or model.classifier


def load_reward_model(name, dtype):
    """A scalar reward model: AutoModelForSequenceClassification with one label, and a scale that can be divided by."""
    config = load(AutoConfig, name)
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification") or config.num_labels != 1:
        fail(f"{name}: holds a {(config.architectures or ['?'])[0]} with {config.num_labels} labels; a scalar reward "
             f"model is wanted here (baselines/reward_model.py makes one)")
    model = load(AutoModelForSequenceClassification, name, kind="value", dtype=dtype).eval()
    mean, std = score_scale(model)
    return model if math.isfinite(mean) and 0 < std < math.inf else fail(
        f"{name}: reward_mean {mean} and reward_std {std} in config.json are no scale")


def response_reward(reward_model, ids, is_response):
    """r(x, y), the reward model's score at the last response token: (B,) float, in deviations of its training scores.

    The head is applied by hand: the model's own forward looks for the last token that is not padding, and takes the one
    before EOS where pad and EOS are the same token.
    """
    hidden = reward_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    score = value_head(reward_model)(hidden).squeeze(-1).float()                                   # (B, T)
    mean, std = score_scale(reward_model)
    return torch.where(last_token(is_response), (score - mean) / std, 0.0).sum(-1)


def score_scale(reward_model):
    """(mean, standard deviation) of the reward model's scores in its training; (0, 1) for one that does not say."""
    scale = getattr(reward_model.config, "reward_model", None) or {"reward_mean": 0.0, "reward_std": 1.0}
    return scale["reward_mean"], scale["reward_std"]


class ResponseReward(torch.nn.Module):
    """A reward model as a function from tokens to rewards: this is the call that ZeRO and FSDP have to see."""

    def __init__(self, reward_model):
        super().__init__()
        self.reward_model, self.config = reward_model, reward_model.config
        self._no_split_modules = reward_model._no_split_modules

    def forward(self, ids, is_response):
        return response_reward(self.reward_model, ids, is_response)


@torch.no_grad()
def score_rollouts(policy, reference, reward_model, sequences, greedy, args, pad_id):
    """log pi_theta and log pi_ref of every sampled token, and the scores of both answers; each model once per answer.

    sequences, greedy   [(prompt ids, response ids)]: the sampled and the greedy answers
    Returns ids, is_token, is_response, logp_old, logp_ref, each (B, T), of the sampled; score, score_greedy (B,).
    """
    ids, is_token, is_response = collate(sequences, pad_id, next(policy.parameters()).device)
    logp_old, logp_ref = torch.zeros(2, *ids.shape, device=ids.device)
    score, score_greedy = torch.zeros(2, len(ids), device=ids.device)
    length = is_token.sum(-1).cpu()
    for rows in length.argsort().split(args.micro_batch_size):                 # rows of like length: little padding
        width = length[rows].max()
        micro = ids[rows, :width], is_response[rows, :width]
        logp_old[rows, :width], logp_ref[rows, :width] = policy(*micro), reference(*micro)
        score[rows] = reward_model(*micro)
        ids_greedy, _, is_response_greedy = collate([greedy[row] for row in rows], pad_id, ids.device)
        score_greedy[rows] = reward_model(ids_greedy, is_response_greedy)
    return ids, is_token, is_response, logp_old, logp_ref, score, score_greedy


# ---- 5. Training ----
def improve(accelerator, policy, optimizer, batch, args, stop_if_bad):
    """One update with one batch of rollouts: on-policy, so every rollout is used once.

    batch        (ids, is_token, is_response, logp_old, advantage), each (B, T): this process's rollouts
    stop_if_bad  is called with the gradient norm before the update
    Returns {metric: float}, over all processes (docs/metrics.md).
    """
    _, is_token, learned, *_ = batch
    length = is_token.sum(-1).cpu()
    tokens = accelerator.reduce(learned.sum()).clamp(min=1)                    # response tokens of the global batch
    seen = torch.zeros(2, device=learned.device)
    for micro in length.argsort().split(args.micro_batch_size):                # rows of like length: little padding
        ids, _, is_response, logp_old, advantage = (x[micro, :length[micro].max()] for x in batch)
        with accelerator.accumulate(policy):
            logp = policy(ids, is_response)                                                        # (micro, width)
            # backward() divides by the number of micro-batches, and the processes' gradients are averaged: both are
            # undone here, so that a token of the batch weighs the same wherever it falls.                # DEVIATION 9
            loss = remax_loss(logp, advantage, is_response) * is_response.sum() / tokens
            accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
        log_ratio = torch.where(is_response, logp.detach() - logp_old, 0.0)
        seen += torch.stack([loss.detach(), (log_ratio.exp() - 1).abs().sum()])
    grad_norm = clip_grad_norm(accelerator, policy.parameters(), args.max_grad_norm)
    stop_if_bad(grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    total, error = accelerator.reduce(seen).tolist()
    return {"loss": total, "grad_norm": grad_norm, "ratio_error": error / tokens.item()}


def main(args):
    started = time.time()
    check_numbers(args)
    accelerator = start_accelerator(args, accumulation_steps)
    set_seed(args.seed, device_specific=True)                 # else every process would sample the same answers
    tokenizer = load(AutoTokenizer, args.model)
    rm_tokenizer = load(AutoTokenizer, args.reward_model)
    if (tokenizer.get_vocab(), tokenizer.chat_template) != (rm_tokenizer.get_vocab(), rm_tokenizer.chat_template):
        fail(f"{args.reward_model}: its tokenizer or chat template is not that of {args.model}. A reward model reads "
             f"the policy's own tokens: train it from this SFT model")
    if tokenizer.chat_template is None:
        fail(f"{args.model}: the tokenizer has no chat template. Start from the output of sft.py")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [row["prompt"] for row in read_rows(args.data, "rl", {"prompt": "prompt"}, args.bad_rows)]
    data = [(prompt, encode_prompt(tokenizer, prompt)) for prompt in prompts]
    data = [(prompt, ids) for prompt, ids in data if len(ids) <= args.max_prompt_length]
    accelerator.print(f"{len(data)} prompts; {len(prompts) - len(data)} longer than {args.max_prompt_length} dropped")
    if len(data) < args.batch_size:
        fail(f"{args.data}: {len(data)} usable prompts do not fill one batch: lower --batch_size {args.batch_size}, or "
             f"raise --max_prompt_length {args.max_prompt_length}")

    # Models. eval() switches dropout off (else the ratio of a policy to itself is not 1); gradients flow all the same.
    policy = load(AutoModelForCausalLM, args.model, kind="policy", dtype=torch.float32).eval()
    dtype = args.frozen_dtype
    if dtype == "auto":
        dtype = {"no": "float32", "bf16": "bfloat16"}[accelerator.mixed_precision]
    reference = load(AutoModelForCausalLM, args.model, kind="policy", dtype=dtype).eval()
    reward_model = load_reward_model(args.reward_model, dtype)
    context = min(getattr(model.config, "max_position_embeddings", math.inf) for model in (policy, reward_model))
    if args.max_prompt_length + args.max_response_length > context:
        fail(f"--max_prompt_length + --max_response_length is more than the context of {args.model}, {context} tokens")
    output = start_run(accelerator, args)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    policy, optimizer = accelerator.prepare(TokenLogp(policy), optimizer)
    reward_mean, reward_std = score_scale(reward_model)
    reference = prepare_frozen(accelerator, TokenLogp(reference))
    reward_model = prepare_frozen(accelerator, ResponseReward(reward_model))
    epochs = math.ceil(args.steps / (len(data) // args.batch_size))
    batches = update_order(len(data), args.batch_size, epochs, args.seed)[:args.steps]

    first, seconds = load_checkpoint(accelerator, output) if args.resume else (0, 0.0)
    started -= seconds
    progress = tqdm(total=args.steps, initial=first, desc="remax", mininterval=1,
                    disable=not accelerator.is_main_process)
    for step, batch in enumerate(batches[first:], first + 1):
        # 1. Rollouts. Sampling, scoring and updating are under the same autocast: else the first ratio would not be 1.
        clock = [time.time()]
        mine = batch[accelerator.process_index::accelerator.num_processes].tolist()
        questions, prompt_ids = [data[row][0] for row in mine], [data[row][1] for row in mine]
        with gathered(accelerator, policy, "policy") as plain, accelerator.autocast():
            responses = rollout(plain, tokenizer, prompt_ids, args.max_response_length, args.rollout)
            best = rollout(plain, tokenizer, prompt_ids, args.max_response_length, args.rollout, greedy=True)
        clock.append(time.time())

        # 2. Scores
        sequences = list(zip(prompt_ids, responses))
        with accelerator.autocast():
            ids, is_token, is_response, logp_old, logp_ref, score, score_greedy = score_rollouts(
                policy, reference, reward_model, sequences, list(zip(prompt_ids, best)), args,
                tokenizer.pad_token_id)
        if not (score - score_greedy).isfinite().all():
            row = (score - score_greedy).isfinite().logical_not().nonzero()[0].item()
            fail(f"step {step}: {args.reward_model} gives {score[row].item()} and {score_greedy[row].item()} to the "
                 f"answers to {questions[row]!r:.80}")

        # 3. Advantages
        ended = torch.tensor([row[-1] == tokenizer.eos_token_id for row in responses], device=ids.device)[:, None]
        if args.truncated == "penalise":                               # both, or a cut greedy answer would be a gain
            cut = [float(row[-1] != tokenizer.eos_token_id) for row in best]
            score_greedy = score_greedy - torch.tensor(cut).to(score)
        reward = score - (~ended.squeeze(-1)).float() if args.truncated == "penalise" else score
        advantage = remax_advantage(reward, score_greedy, kl_reward(logp_old, logp_ref, is_response, args.kl_coef),
                                    is_response)
        learned = is_response & ended if args.truncated == "mask" else is_response
        clock.append(time.time())

        # 4. The update
        checkpoint_layers(policy, args.gradient_checkpointing)
        metrics = improve(accelerator, policy, optimizer, (ids, is_token, learned, logp_old, advantage), args,
                          lambda grad_norm: stop_if_not_finite(accelerator, policy, tokenizer, output, grad_norm,
                                                               f"step {step}, rows {batch.tolist()}", "policy"))
        checkpoint_layers(policy, False)
        clock.append(time.time())
        if metrics["ratio_error"] > (1e-4 if accelerator.mixed_precision == "no" else 0.1):
            fail(f"step {step}: the ratio differs from 1 by {metrics['ratio_error']:.2g} on average before the "
                 f"update: log pi_old and log pi_theta are not computed alike (dropout? another precision?)")

        # 5. The log
        per_response = {
            "reward": score * reward_std + reward_mean,                        # in units of the reward model
            "kl": torch.where(is_response, logp_old - logp_ref, 0.0).sum(-1),
            "entropy": torch.where(is_response, -logp_old, 0.0).sum(-1) / is_response.sum(-1),
            "response_length": is_response.sum(-1).float(), "eos_rate": ended.squeeze(-1).float()}     # (B,) each
        texts = [{"prompt": question, "response": tokenizer.decode(response, skip_special_tokens=True)}
                 for question, response in zip(questions, responses)]
        record = log_step(accelerator, args, output, progress, {"step": step} | metrics, per_response, texts, clock,
                          started)
        save_if_due(accelerator, output, step, args.steps, args.save_steps)
    progress.close()
    save_run(accelerator, policy, tokenizer, output,
             f"# ReMax policy\n\n`{args.model}` aligned by the reward model `{args.reward_model}` on prompts of "
             f"`{args.data}` (rl): {args.steps} steps of {args.batch_size} rollouts.",
             {name: record[name] for name in ("reward", "kl", "response_length", "eos_rate")}, "policy")
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


def prepare_frozen(accelerator, model):
    """A model that does not learn, where the policy is: divided among the processes by ZeRO-3 and FSDP2, else a copy on
    each device. It has neither gradients nor an optimizer, and is in no checkpoint."""
    model.requires_grad_(False)
    if is_zero3(accelerator):
        import deepspeed
        config, dtype = copy.deepcopy(accelerator.deepspeed_plugin.deepspeed_config), next(model.parameters()).dtype
        config["bf16"], config["fp16"] = ({"enabled": dtype == kind} for kind in (torch.bfloat16, torch.float16))
        return deepspeed.initialize(model=model, config=config)[0]
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
        return fsdp2_prepare_model(accelerator, model)
    return model.to(accelerator.device)


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


def log_step(accelerator, args, output, progress, record, per_response, texts, clock, started):
    """Completes a step's record, and writes metrics.jsonl and rollouts.jsonl. Returns the record.

    per_response  {name: (B,) float} of this process's rollouts, the name that is printed first; means go to the record
    texts         [{"prompt", "response"}, ...] of the same rollouts
    clock         when generation, scoring and the update began, and when the update ended; started: when the run did
    """
    record |= {name: (accelerator.reduce(x.sum()) / args.batch_size).item() for name, x in per_response.items()}
    record |= {f"seconds_{part}": clock[i + 1] - clock[i] for i, part in enumerate(("generate", "score", "update"))}
    record["seconds"] = time.time() - started
    first = next(iter(per_response))
    numbers = zip(per_response[first].tolist(), per_response["kl"].tolist())
    samples = gather_object([{"step": record["step"]} | text | {first: round(x, 4), "kl": round(kl, 4)}
                             for text, (x, kl) in zip(texts, numbers, strict=True)])
    progress.update()
    progress.set_postfix({name: f"{record[name]:.3f}" for name in (first, "kl", "response_length")})
    if accelerator.is_main_process:
        write_lines(output / "metrics.jsonl", [record])
        accelerator.log(record, step=record["step"])
        write_lines(output / "rollouts.jsonl", samples)
        if record["step"] % args.sample_every == 0:
            progress.write("\n".join(f"{it['step']:5} {it[first]:+.2f}  {it['prompt']}\n{'':12}{it['response']}"
                                     for it in samples[:3]))
    return record


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
