"""Stage 3: decoupled value policy optimization. The value model is frozen; only the policy learns.

    python train_dvpo.py                                                  # Atlas, on a laptop
    accelerate launch train_dvpo.py --advantage q

Section 3.3, Eq. (2): clipped PPO in which the advantages are read off the frozen global value model. No reward model,
no critic, no critic's optimiser: per step the policy answers prompts, three forward passes give log pi_old, log pi_ref
and Q, and the policy is updated. Section 3.3 takes A = Q (--advantage q). The default takes V off, as section 3.4.1
does, and sums up as GAE does, which is ours (DEVIATION 5; docs/deviations.md lists them all).

Shapes   (B, T): B rollouts, T the width, tokens of the longest row. Rows are [prompt | response | padding].
         In formulas t and T are the paper's: they count the response's tokens, from 1 to T.
Masks    is_token (B, T) no padding; is_response (B, T) tokens that the policy wrote, y^1..y^T, EOS included.
Where    logp[b, t], q[b, t] and advantage[b, t] belong to the token at position t: log pi(a_t | s_t), Q(tau, s_t, a_t).

Sections 1 to 5 are the method. Section 6 is plumbing that the scripts share, word for word: leave it for later.
"""
import copy
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
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer,
                          ContinuousBatchingConfig, GenerationConfig, HfArgumentParser)
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/sft", help="SFT model: the policy's start and the reference")
    gvm: str = HfArg(default="runs/atlas/gvm", help="global value model, the output of train_gvm.py")
    data: str = HfArg(default="runs/atlas/data", help="data folder with rl.jsonl, or hub data set with prompts")
    output: str = HfArg(default="runs/atlas/dvpo", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    advantage: Literal["q", "gae", "released"] = HfArg(default="gae", help="section 3.3's A = Q; section 3.4.1's "
                                                       "A = Q - b, with GAE; the authors' code's")     # DEVIATION 5
    gae_lambda: float = HfArg(default=0.95, help="lambda of gae and released; 0: A_t = Q_t - V(s_t)")
    kl_coef: float = HfArg(default=0.05, help="beta of the KL penalty (paper: 0.05)")
    target_kl: float = HfArg(default=0.1, help="KL(pi_old, pi) per token that ends a batch's epochs (paper: 0.1)")
    clip_range: float = HfArg(default=0.2, help="epsilon of Eq. (2) (released code: 0.2)")
    ppo_epochs: int = HfArg(default=2, help="passes over each batch of rollouts (paper: 4)")
    truncated: Literal["keep", "mask", "penalise"] = HfArg(default="keep", help="responses cut at the length limit: "
                                                           "as they are; left out; 1 less at the end")  # DEVIATION 10
    rollout: Literal["padded", "continuous"] = HfArg(default="padded", help="how answers are generated: in one batch, "
                                                     "or with a paged cache where ended ones make room")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens)")
    max_response_length: int = HfArg(default=64, help="tokens after which a response is cut (paper: 1024)")
    lr: float = HfArg(default=2e-4, help="learning rate, constant (paper: 2e-6)")
    steps: int = HfArg(default=50, help="batches of rollouts")
    batch_size: int = HfArg(default=64, help="rollouts per step, over all processes (paper: 8)")
    mini_batch_size: int = HfArg(default=32, help="rollouts per update, over all processes (paper: 4, 2 at a time)")
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


# ---- 3. Loss: Eq. (2) ----
def kl_reward(logp_old, logp_ref, is_response, kl_coef):
    """r^KL_t = -beta * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)), the KL penalty by k1 (Schulman, 2020). (B, T)."""
    return torch.where(is_response, -kl_coef * (logp_old - logp_ref), 0.0)


def advantage_q(q, reward_kl, is_response):
    """Section 3.3: A_t = Q~_phi(tau, s_t, a_t); the token's own r^KL_t is added.                 # DEVIATION 4

    q, reward_kl (B, T) float; is_response (B, T) bool. Returns (B, T), 0 off the mask.
    """
    return torch.where(is_response, q + reward_kl, 0.0)


def last_token(is_response):
    """True at each row's last response token: (B, T) bool -> (B, T) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def shift_right(x):
    """The value one position earlier: (B, T) -> (B, T). shift_right(q)[t] was read when s_t was seen, a_t not yet."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))


def discounted_sum(delta, is_response, decay):
    """A_t = delta_t + decay * A_{t+1}, and 0 past the last token: the recursion of GAE. (B, T), 0 off the mask."""
    advantage, a_next = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])                     # (B, T), (B,)
    for t in reversed(range(delta.shape[1])):
        # `where`, not a product with the mask: whatever stands off the mask (a NaN too) must not leak in.
        a_next = torch.where(is_response[:, t], delta[:, t] + decay * a_next, 0.0)
        advantage[:, t] = a_next
    return advantage


def advantage_gae(q, reward_kl, is_response, gamma, gae_lambda):
    """Section 3.4.1, A(s, a) = Q(s, a) - b(s) with b(s) = V(s), accumulated as in GAE (Schulman et al., 2016), which is
    ours:                                                                                          # DEVIATION 5

        delta_t = r^KL_t + Q(tau, s_t, a_t) - V(s_t)          A_t = delta_t + gamma * lambda * A_{t+1}

    Transitions are deterministic, so V(s_t) needs no second model: it is Q one position earlier, divided by gamma
    (Q(s_{t-1}, a_{t-1}) = r + gamma * V(s_t), r = 0), and V(s_1) is what the GVM says at the last prompt token.
    lambda = 0: A = Q - V. lambda = 1, gamma = 1, without KL: A_t = Q_T - V(s_t).
    q, reward_kl (B, T) float; is_response (B, T) bool. Returns (B, T), 0 off the mask.
    """
    return discounted_sum(reward_kl + q - shift_right(q) / gamma, is_response, gamma * gae_lambda)


def advantage_released(q, reward_kl, is_response, gamma, gae_lambda):
    """What the authors' released code computes, kept as an ablation: KL rewards only, and V = 0 past the end.

        delta_t = r^KL_t + gamma * V(s_{t+1}) - V(s_t)        A_t = delta_t + gamma * lambda * A_{t+1}

    No reward and no terminal value: it is advantage_gae without Q_T. Without KL, the last token's advantage is
    -V(s_T), and at lambda = 1, gamma = 1 every token's is -V(s_t). Shapes as in advantage_gae.
    """
    q = torch.where(last_token(is_response), 0.0, q)               # gamma * V(s_{t+1}) is Q(s_t, a_t)
    return advantage_gae(q, reward_kl, is_response, gamma, gae_lambda)


def whiten(x, mask, reduce=lambda total: total):
    """(x - mean) / standard deviation over the True positions of the global batch; 0 elsewhere. (B, T) -> (B, T).

    The paper does not say how advantages are scaled; whitening makes the learning rate independent of the scale of the
    rewards, and its mean is the baseline that A = Q lacks.                                        # DEVIATION 6

    reduce  sums a tensor over all processes: the statistics are those of the whole batch, not of one GPU's part.
    """
    count = reduce(mask.sum()).clamp(min=1)
    mean = reduce(torch.where(mask, x, 0.0).sum()) / count
    centred = torch.where(mask, x - mean, 0.0)
    variance = reduce(centred.square().sum()) / count
    return centred * torch.rsqrt(variance + 1e-8)


def ppo_loss(logp, logp_old, advantage, is_response, clip_range):
    """Minus Eq. (2): L_PPO(theta) = E[min(r_t(theta) * A_t, clip(r_t(theta), 1-eps, 1+eps) * A_t)]

    logp       (B, T) float  log pi_theta(a_t|s_t), with gradient
    logp_old   (B, T) float  log pi_old(a_t|s_t), of the policy that wrote the batch
    advantage  (B, T) float  A_t, whitened; a constant       is_response (B, T) bool
    Returns the mean over the batch's response tokens, a scalar (to be minimised, hence the minus).
    """
    assert logp.shape == logp_old.shape == advantage.shape == is_response.shape and is_response.dtype == torch.bool
    log_ratio = torch.where(is_response, logp - logp_old, 0.0)
    ratio = log_ratio.exp()                                                    # r_t(theta) of Eq. (2)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    objective = torch.where(is_response, torch.minimum(unclipped, clipped), 0.0)
    return -objective.sum() / is_response.sum().clamp(min=1)                   # E[.]: per response token of the batch


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


def token_values(gvm, sequences, behind_tau, width, pad_id):
    """Q(tau, s_t, a_t) at the positions of [prompt | response]: (B, width) float; arbitrary behind the last token.

    sequences   [(prompt ids, response ids)]
    behind_tau  the same with tau in front of the prompt: what the GVM reads. tau's own positions are cut off.
    """
    ids, _, _ = collate(behind_tau, pad_id, gvm.device)
    q = gvm(input_ids=ids, use_cache=False).logits.squeeze(-1).float()                             # (B, longest)
    start = torch.tensor([[len(behind[0]) - len(plain[0])] for behind, plain in zip(behind_tau, sequences)])
    position = start + torch.arange(width)                                                         # (B, width)
    return q.gather(1, position.clamp(max=q.shape[1] - 1).to(q.device))


@torch.no_grad()
def score_rollouts(policy, reference, gvm, sequences, behind_tau, args, pad_id):
    """log pi_old, log pi_ref and Q of every token, each model once. Rows are [prompt | response | padding].

    sequences   [(prompt ids, response ids)]       behind_tau  the same with tau in front, for the GVM
    Returns ids, is_token, is_response, logp_old, logp_ref, q, each (B, T); q at the last prompt token is V(s_1).
    """
    ids, is_token, is_response = collate(sequences, pad_id, next(policy.parameters()).device)
    logp_old, logp_ref, q = torch.zeros(3, *ids.shape, device=ids.device)
    length = is_token.sum(-1).cpu()
    for rows in length.argsort().split(args.micro_batch_size):                 # rows of like length: little padding
        width = length[rows].max()
        micro = ids[rows, :width], is_response[rows, :width]
        # log pi_old comes from the code path of the update, not from generation: then the first ratio is 1.
        logp_old[rows, :width], logp_ref[rows, :width] = policy(*micro), reference(*micro)
        q[rows, :width] = token_values(gvm, [sequences[row] for row in rows], [behind_tau[row] for row in rows], width,
                                       pad_id)
    return ids, is_token, is_response, logp_old, logp_ref, q


# ---- 5. Training ----
def improve(accelerator, policy, optimizer, batch, args, stop_if_bad):
    """The PPO epochs on one batch of rollouts: Eq. (2), mini-batch by mini-batch, until the target KL is passed.

    batch        (ids, is_token, is_response, logp_old, advantage), each (B, T): this process's rollouts. is_response
                 are the tokens to learn from: with --truncated mask, cut answers have none
    stop_if_bad  is called with the gradient norm before every update
    Returns {metric: float}, over all processes (docs/metrics.md).
    """
    _, is_token, learned, *_ = batch
    length = is_token.sum(-1).cpu()
    tokens = accelerator.reduce(learned.sum()).clamp(min=1)                    # response tokens of the global batch
    updates = args.batch_size // args.mini_batch_size                          # updates per epoch
    history, norms, seen = [], [], torch.zeros(5, device=learned.device)
    order, micro_batches = torch.cat([torch.randperm(len(learned)) for _ in range(args.ppo_epochs)]), []
    for mini in order.split(args.mini_batch_size // accelerator.num_processes):
        # A mini-batch is random; within it rows of like length form a micro-batch: little padding.
        micro_batches += mini[length[mini].argsort()].split(args.micro_batch_size)
    for micro in micro_batches:
        ids, _, is_response, logp_old, advantage = (x[micro, :length[micro].max()] for x in batch)
        with accelerator.accumulate(policy):
            logp = policy(ids, is_response)                                                        # (micro, width)
            # Eq. (2)'s E[.] is over the batch: a token weighs the same in every mini-batch.            # DEVIATION 9
            # Mean of these tokens -> their share of the batch's mean -> times the updates that share the batch.
            loss = ppo_loss(logp, logp_old, advantage, is_response, args.clip_range)
            loss = loss * is_response.sum() / tokens * updates

            log_ratio = torch.where(is_response, logp.detach() - logp_old, 0.0)
            ratio = log_ratio.exp()
            # k3 = r - 1 - log r (Schulman, 2020), never negative, estimates KL(pi_old, pi_theta).
            seen += torch.stack([loss.detach(), (ratio - 1 - log_ratio).sum(), (ratio - 1).abs().sum(),
                                 ((ratio - 1).abs() > args.clip_range).sum(), is_response.sum()])
            if accelerator.sync_gradients:                                     # the mini-batch is complete
                total, *sums, count = accelerator.reduce(seen).tolist()
                history.append((total, *(x / max(count, 1) for x in sums)))
                seen.zero_()
            # Appendix C names KL_target = 0.1, not its use. Ours: beyond it, no more updates with this batch.
            if accelerator.sync_gradients and norms and history[-1][1] > args.target_kl:
                drop_update(accelerator, optimizer, loss)
                break
            # backward() divides by the number of micro-batches, and the processes' gradients are averaged: both are
            # undone here.
            accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
        if accelerator.sync_gradients:
            norms.append(clip_grad_norm(accelerator, policy.parameters(), args.max_grad_norm))
            stop_if_bad(norms[-1])
        optimizer.step()                                                       # of a whole mini-batch: else a no-op
        optimizer.zero_grad()
    loss, _, _, clip_fraction = torch.tensor(history).mean(0).tolist()
    # KL: the last, which --target_kl was compared with. Ratio: the first, before any update, where it has to be 1.
    return {"loss": loss, "approx_kl": history[-1][1], "ratio_error": history[0][2], "clip_fraction": clip_fraction,
            "grad_norm": sum(norms) / len(norms), "updates": len(norms)}


def main(args):
    started = time.time()
    check_numbers(args)
    if args.gae_lambda > 1:
        fail(f"--gae_lambda {args.gae_lambda} has to be at most 1")
    accelerator = start_accelerator(args, accumulation_steps)
    set_seed(args.seed, device_specific=True)                 # else every process would sample the same answers
    tokenizer = load(AutoTokenizer, args.model)
    gvm_tokenizer = load(AutoTokenizer, args.gvm)
    if (tokenizer.get_vocab(), tokenizer.chat_template) != (gvm_tokenizer.get_vocab(), gvm_tokenizer.chat_template):
        fail(f"{args.gvm}: its tokenizer or chat template is not that of {args.model}. A GVM reads the policy's own "
             f"tokens: train it from this SFT model")
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
    gvm = load(AutoModelForTokenClassification, args.gvm, kind="value", dtype=dtype).eval()
    gvm_args = getattr(gvm.config, "gvm", None) or fail(f"{args.gvm}: not made by train_gvm.py (no gvm in config.json)")
    context = min(getattr(model.config, "max_position_embeddings", math.inf) for model in (policy, gvm))
    if args.max_prompt_length + args.max_response_length > context:
        fail(f"--max_prompt_length + --max_response_length is more than the context of {args.model}, {context} tokens")
    if args.max_prompt_length + args.max_response_length > gvm_args["max_length"]:
        accelerator.print(f"rows may be longer than the {gvm_args['max_length']} tokens that the GVM was trained on")
    output = start_run(accelerator, args)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    policy, optimizer = accelerator.prepare(TokenLogp(policy), optimizer)
    reference, gvm = prepare_frozen(accelerator, TokenLogp(reference)), prepare_frozen(accelerator, gvm)
    epochs = math.ceil(args.steps / (len(data) // args.batch_size))
    batches = update_order(len(data), args.batch_size, epochs, args.seed)[:args.steps]

    first, seconds = load_checkpoint(accelerator, output) if args.resume else (0, 0.0)
    started -= seconds
    progress = tqdm(total=args.steps, initial=first, desc="dvpo", mininterval=1,
                    disable=not accelerator.is_main_process)
    for step, batch in enumerate(batches[first:], first + 1):
        # 1. Rollouts. Sampling, scoring and updating are under the same autocast: else the first ratio would not be 1.
        clock = [time.time()]
        mine = batch[accelerator.process_index::accelerator.num_processes].tolist()
        questions, prompt_ids = [data[row][0] for row in mine], [data[row][1] for row in mine]
        with gathered(accelerator, policy, "policy") as plain, accelerator.autocast():
            responses = rollout(plain, tokenizer, prompt_ids, args.max_response_length, args.rollout)
        clock.append(time.time())

        # 2. Scores: log pi_old, log pi_ref, Q
        sequences = list(zip(prompt_ids, responses))
        pool = gather_object(list(zip(questions, sequences)))          # tau: the current policy's own latest answers
        behind_tau = [with_tau(question, sequence, pool, gvm_args["tau_pairs"], gvm_args["max_length"], random)
                      for question, sequence in zip(questions, sequences)]
        with accelerator.autocast():
            ids, is_token, is_response, logp_old, logp_ref, q = score_rollouts(
                policy, reference, gvm, sequences, behind_tau, args, tokenizer.pad_token_id)

        # 3. Advantages
        ended = torch.tensor([row[-1] == tokenizer.eos_token_id for row in responses], device=ids.device)[:, None]
        reward = kl_reward(logp_old, logp_ref, is_response, args.kl_coef)                          # r^KL_t
        if args.truncated == "penalise":
            reward = reward - (last_token(is_response) & ~ended).float()
        if args.advantage == "q":
            advantage = advantage_q(q, reward, is_response)
        elif args.advantage == "gae":
            advantage = advantage_gae(q, reward, is_response, gvm_args["gamma"], args.gae_lambda)
        else:
            advantage = advantage_released(q, reward, is_response, gvm_args["gamma"], args.gae_lambda)
        learned = is_response & ended if args.truncated == "mask" else is_response
        advantage = whiten(advantage, learned, accelerator.reduce)
        clock.append(time.time())

        # 4. The PPO epochs
        checkpoint_layers(policy, args.gradient_checkpointing)
        metrics = improve(accelerator, policy, optimizer, (ids, is_token, learned, logp_old, advantage), args,
                          lambda grad_norm: stop_if_not_finite(accelerator, policy, tokenizer, output, grad_norm,
                                                               f"step {step}, rows {batch.tolist()}", "policy"))
        checkpoint_layers(policy, False)
        clock.append(time.time())
        if metrics["ratio_error"] > (1e-4 if accelerator.mixed_precision == "no" else 0.1):
            fail(f"step {step}: the ratio differs from 1 by {metrics['ratio_error']:.2g} on average before the first "
                 f"update: log pi_old and log pi_theta are not computed alike (dropout? another precision?)")

        # 5. The log
        per_response = {
            "value": torch.where(last_token(is_response), q * gvm_args["reward_std"], 0.0).sum(-1)
            + gvm_args["reward_mean"],                                         # in units of the training scores
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
             f"# DVPO policy\n\n`{args.model}` aligned by the frozen value model `{args.gvm}` on prompts of "
             f"`{args.data}` (rl): {args.steps} steps of {args.batch_size} rollouts.",
             {name: record[name] for name in ("value", "kl", "response_length", "eos_rate")}, "policy")
    accelerator.end_training()


def accumulation_steps(args, processes):
    """Micro-batches per update. --mini_batch_size is the total over all processes, so that a run means the same on one
    GPU and on eight; --micro_batch_size is how much of it a process takes at a time: lowered to what it has."""
    if args.mini_batch_size < 1 or args.mini_batch_size % processes or args.batch_size % args.mini_batch_size:
        fail(f"--batch_size {args.batch_size} must be a multiple of --mini_batch_size {args.mini_batch_size}, and that "
             f"of the {processes} processes")
    args.micro_batch_size = min(args.micro_batch_size, args.mini_batch_size // processes)
    if args.micro_batch_size < 1 or args.mini_batch_size % (args.micro_batch_size * processes):
        fail(f"--mini_batch_size {args.mini_batch_size} is not a multiple of --micro_batch_size x processes = "
             f"{args.micro_batch_size * processes}")
    return args.mini_batch_size // (args.micro_batch_size * processes)


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


def drop_update(accelerator, optimizer, loss):
    """In place of backward(loss) and step(): forgets the gradients of an update that is not made. The backward pass has
    to run all the same, since with it engines end their summing up over micro-batches."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:              # accelerator.backward() would step
        engine = accelerator.deepspeed_engine_wrapped.engine
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(loss)
        engine.optimizer.zero_grad()
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
    else:
        accelerator.backward(loss)
    optimizer.zero_grad()


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
