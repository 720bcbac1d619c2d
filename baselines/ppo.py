"""Baseline: PPO with a reward model and a trained critic. Four models, two of which learn.

    python baselines/ppo.py                                               # Atlas, on a laptop
    accelerate launch baselines/ppo.py --critic_init sft --kl_coef 0.05

Schulman et al. (2017), as in RLHF (Ouyang et al., 2022). `diff train_dvpo.py baselines/ppo.py` is what DVPO removes:
the reward model's pass, and the critic with its optimizer, its loss and its returns.

Shapes   B rollouts, T tokens of the longest row. Rows are [prompt | response | padding].
Masks    is_token (B, T) no padding; is_response (B, T) tokens that the policy wrote, y^1..y^T, EOS included.
Where    logp[b, t], value[b, t] and advantage[b, t] belong to the token at position t: log pi(a_t | s_t), V(s_t).

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
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer, ContinuousBatchingConfig,
                          GenerationConfig, HfArgumentParser)
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
    output: str = HfArg(default="runs/atlas/ppo", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    critic_init: Literal["reward_model", "sft"] = HfArg(default="reward_model", help="where the critic starts: the "
                                                        "reward model and its head; the SFT model, a zero head")
    critic_lr: float = HfArg(default=5e-4, help="learning rate of the critic, constant (ours; paper: 2e-6 for all)")
    value_clip: float = HfArg(default=0.2, help="how far V may move from V_old in a batch (ours; common: 0.2)")
    gamma: float = HfArg(default=1.0, help="discount factor (paper: 1)")
    gae_lambda: float = HfArg(default=0.95, help="lambda of GAE (common: 0.95)")
    kl_coef: float = HfArg(default=0.05, help="beta of the KL penalty (paper: 0.05)")
    target_kl: float = HfArg(default=0.1, help="KL(pi_old, pi) per token that ends a batch's epochs (paper: 0.1)")
    clip_range: float = HfArg(default=0.2, help="epsilon of Eq. (2) (released code: 0.2)")
    ppo_epochs: int = HfArg(default=2, help="passes over each batch of rollouts (paper: 4)")
    truncated: Literal["keep", "mask", "penalise"] = HfArg(default="keep", help="responses cut at the length limit: "
                                                           "as they are; left out; 1 off the reward")   # DEVIATION 10
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


def update_order(n, batch_size, epochs, seed):
    """Which rows each update sees: (updates, batch_size) row numbers, every epoch in another random order.

    A pure function of the seed: every process computes the same order and takes its own part of each batch. The
    incomplete last batch of an epoch is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator)[:n // batch_size * batch_size] for _ in range(epochs)]
    return torch.cat(orders).view(-1, batch_size)


# ---- 3. Loss: Eq. (2), and the critic's ----
def kl_reward(logp_old, logp_ref, is_response, kl_coef):
    """r^KL_t = -beta * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)); its expectation is -beta * KL (Schulman,
    2020: the estimator k1). (B, L) float, 0 off the mask."""
    return torch.where(is_response, -kl_coef * (logp_old - logp_ref), 0.0)


def last_token(is_response):
    """True at each row's last response token: (B, T) bool -> (B, T) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def shift_right(x):
    """What stands one column earlier: (B, L) -> (B, L). Of q that is gamma * V(s_t)."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))


def discounted_sum(delta, is_response, decay):
    """A_t = delta_t + decay * A_{t+1}, 0 past the last token: GAE's recursion. (B, L), 0 off the mask."""
    advantage, a_next = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])           # (B, L), (B,)
    for t in reversed(range(delta.shape[1])):
        # NaN * 0 is NaN: select with where, never multiply by a mask.
        a_next = torch.where(is_response[:, t], delta[:, t] + decay * a_next, 0.0)
        advantage[:, t] = a_next
    return advantage


def advantage_from_critic(value, reward, is_response, gamma, gae_lambda):
    """GAE (Schulman et al., 2016) with a learned V, which is 0 past the last token:

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)           A_t = delta_t + gamma * lambda * A_{t+1}

    value, reward (B, T) float: V(s_t) and r_t (the KL term, and the score at the last token); is_response (B, T) bool.
    Returns (B, T), 0 off the mask. A + V is the return that the critic learns, before the whitening of A.
    """
    v_next = torch.where(last_token(is_response), 0.0, torch.nn.functional.pad(value[:, 1:], (0, 1)))
    return discounted_sum(reward + gamma * v_next - value, is_response, gamma * gae_lambda)


def whiten(x, mask, accelerator):
    """(x - mean) / standard deviation over the True positions of all processes; (B, L), 0 off the mask. Then
    the rewards' scale does not matter, and A = Q has a baseline: its mean.     # DEVIATION 6: whitening"""
    count = accelerator.reduce(mask.sum())
    mean = accelerator.reduce(torch.where(mask, x, 0.0).sum()) / count
    centred = torch.where(mask, x - mean, 0.0)
    variance = accelerator.reduce(centred.square().sum()) / count
    return centred * torch.rsqrt(variance + 1e-8)


def ppo_loss(logp, logp_old, advantage, is_response, clip_range, denominator=None):
    """Minus Eq. (2): L_PPO(theta) = E[min(r_t(theta) * A_t, clip(r_t(theta), 1-eps, 1+eps) * A_t)]

    logp         (B, L) float  log pi_theta(a_t|s_t), with gradient
    logp_old     (B, L) float  log pi_old(a_t|s_t), of the policy that wrote the batch
    advantage    (B, L) float  A_t, a constant                    is_response (B, L) bool
    denominator  divides the sum over tokens; None: the number of response tokens here, for E[.] as their mean
    Returns a scalar, to be minimised, hence the minus.
    """
    assert logp.shape == logp_old.shape == advantage.shape == is_response.shape
    ratio = torch.where(is_response, logp - logp_old, 0.0).exp()               # r_t(theta) of Eq. (2)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    objective = torch.where(is_response, torch.minimum(unclipped, clipped), 0.0)
    return -objective.sum() / (is_response.sum() if denominator is None else denominator)


def value_loss(value, value_old, returns, is_response, value_clip):
    """The critic's loss: 1/2 E[max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)], the larger error counts.

    value      (B, T) float  V_phi(s_t), with gradient          value_old  (B, T) float  V(s_t) when the batch was made
    returns    (B, T) float  R_t = A_t + V_old(s_t)             is_response (B, T) bool
    Returns the mean over the batch's response tokens, a scalar.
    """
    assert value.shape == value_old.shape == returns.shape == is_response.shape and is_response.dtype == torch.bool
    value, value_old, returns = (torch.where(is_response, x, 0.0) for x in (value, value_old, returns))
    near = value_old + (value - value_old).clamp(-value_clip, value_clip)
    error = torch.maximum((value - returns).square(), (near - returns).square())
    return 0.5 * error.sum() / is_response.sum().clamp(min=1)


# ---- 4. Rollouts and scores ----
@torch.no_grad()
def rollout(policy, prompts, max_response_length, stop_ids, greedy=False):
    """Samples one answer to each prompt from pi_theta exactly: no temperature, no top-k, no top-p.

    prompts   [[token id, ...], ...]
    stop_ids  ids that end an answer; the last token is one of them, unless the answer was cut
    greedy    takes the likeliest token instead: ReMax's baseline, never what the policy learns from
    Returns [[token id, ...], ...]: decoded and encoded again, a text could split into other tokens.
    """
    width = max(map(len, prompts))                            # padded on the left, to end in the same column
    padded = [([0] * (width - len(prompt)) + prompt, [0] * (width - len(prompt)) + [1] * len(prompt))
              for prompt in prompts]
    ids, is_token = torch.tensor(padded, device=policy.device).unbind(1)
    responses, rows, cache = [[] for _ in prompts], list(range(len(prompts))), None
    for _ in range(max_response_length):
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


def state_values(critic, ids):
    """V(s_t) at the position of a_t: (B, T) float. What the critic says one position earlier, a_t not yet seen."""
    return shift_right(critic(input_ids=ids, use_cache=False).logits.squeeze(-1).float())


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


class ActorCritic(torch.nn.Module):
    """The two models that learn, as one function from tokens: this is the call that DDP, ZeRO and FSDP have to see."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic, self.config = policy, critic, policy.config
        self._no_split_modules = policy._no_split_modules

    def forward(self, ids, is_response):
        """log pi(a_t | s_t) and V(s_t), each (B, T)."""
        return token_logp(self.policy, ids, is_response), state_values(self.critic, ids)


class ResponseReward(torch.nn.Module):
    """A reward model as a function from tokens to rewards: this is the call that ZeRO and FSDP have to see."""

    def __init__(self, reward_model):
        super().__init__()
        self.reward_model, self.config = reward_model, reward_model.config
        self._no_split_modules = reward_model._no_split_modules

    def forward(self, ids, is_response):
        return response_reward(self.reward_model, ids, is_response)


@torch.no_grad()
def score_rollouts(model, reference, reward_model, sequences, args, pad_id):
    """log pi_old, log pi_ref, V_old of every token, and r(x, y); each model once. Rows are [prompt | response | pad].

    sequences   [(prompt ids, response ids)]
    Returns ids, is_token, is_response, logp_old, logp_ref, value_old, each (B, T), and score (B,).
    """
    ids, is_token, is_response = collate(sequences, pad_id, next(model.parameters()).device)
    logp_old, logp_ref, value_old = torch.zeros(3, *ids.shape, device=ids.device)
    score = torch.zeros(len(ids), device=ids.device)
    length = is_token.sum(-1).cpu()
    for rows in length.argsort().split(args.micro_batch_size):                 # rows of like length: little padding
        width = length[rows].max()
        micro = ids[rows, :width], is_response[rows, :width]
        # log pi_old comes from the code path of the update, not from generation: then the first ratio is 1.
        logp_old[rows, :width], value_old[rows, :width] = model(*micro)
        logp_ref[rows, :width] = reference(*micro)
        score[rows] = reward_model(*micro)
    return ids, is_token, is_response, logp_old, logp_ref, value_old, score


# ---- 5. Training ----
def new_critic(args, reward_model):
    """The critic: a value per token (AutoModelForTokenClassification), started from the SFT model with a zero head, or
    from the reward model, as the score that the model would give to each prefix, in the units of response_reward."""
    config = AutoConfig.from_pretrained(args.model, num_labels=1)
    config.classifier_dropout = config.attention_dropout = 0.0
    config.critic = True                                      # for evaluate.py: V(s_t), not Q, read before the token
    critic = load(AutoModelForTokenClassification, args.model, kind="policy", config=config, dtype=torch.float32)
    head, (mean, std) = value_head(critic), score_scale(reward_model)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    if args.critic_init == "reward_model":
        try:
            critic.base_model.load_state_dict(reward_model.base_model.state_dict())
        except RuntimeError:
            fail(f"{args.reward_model}: not the architecture of {args.model}, so the critic cannot start there. Pass "
                 f"--critic_init sft")
        with torch.no_grad():
            head.weight.copy_(value_head(reward_model).weight / std)
            head.bias.fill_(-mean / std)
    return critic


def improve(accelerator, model, optimizer, batch, args, stop_if_bad):
    """The PPO epochs on one batch of rollouts: Eq. (2), mini-batch by mini-batch, until the target KL is passed.

    model        ActorCritic, prepared
    batch        (ids, is_token, is_response, logp_old, advantage, value_old, returns), each (B, T): this process's rows
    stop_if_bad  is called with the gradient norm before every update
    Returns {metric: float}, over all processes (docs/metrics.md).
    """
    _, is_token, learned, *_ = batch
    length = is_token.sum(-1).cpu()
    tokens = accelerator.reduce(learned.sum()).clamp(min=1)                    # response tokens of the global batch
    updates = args.batch_size // args.mini_batch_size                          # updates per epoch
    history, norms, seen = [], [], torch.zeros(6, device=learned.device)
    order, micro_batches = torch.cat([torch.randperm(len(learned)) for _ in range(args.ppo_epochs)]), []
    for mini in order.split(args.mini_batch_size // accelerator.num_processes):
        # A mini-batch is random; within it rows of like length form a micro-batch: little padding.
        micro_batches += mini[length[mini].argsort()].split(args.micro_batch_size)
    for micro in micro_batches:
        ids, _, is_response, logp_old, advantage, value_old, returns = (
            x[micro, :length[micro].max()] for x in batch)
        with accelerator.accumulate(model):
            logp, value = model(ids, is_response)                                                  # (micro, width) each
            # Eq. (2)'s E[.] is over the batch: a token weighs the same in every mini-batch.            # DEVIATION 9
            share = is_response.sum() / tokens * updates
            loss = ppo_loss(logp, logp_old, advantage, is_response, args.clip_range) * share
            critic_loss = value_loss(value, value_old, returns, is_response, args.value_clip) * share

            log_ratio = torch.where(is_response, logp.detach() - logp_old, 0.0)
            ratio = log_ratio.exp()
            # k3 = r - 1 - log r (Schulman, 2020), never negative, estimates KL(pi_old, pi_theta).
            seen += torch.stack([loss.detach(), critic_loss.detach(), (ratio - 1 - log_ratio).sum(),
                                 (ratio - 1).abs().sum(), ((ratio - 1).abs() > args.clip_range).sum(),
                                 is_response.sum()])
            loss = loss + critic_loss                                          # no weights shared: no weight between
            if accelerator.sync_gradients:                                     # the mini-batch is complete
                total, total_critic, *sums, count = accelerator.reduce(seen).tolist()
                history.append((total, *(x / max(count, 1) for x in sums), total_critic))
                seen.zero_()
            # Appendix C names KL_target = 0.1, not its use. Ours: beyond it, no more updates with this batch.
            if accelerator.sync_gradients and norms and history[-1][1] > args.target_kl:
                drop_update(accelerator, optimizer, loss)
                break
            # backward() divides by the number of micro-batches, and the processes' gradients are averaged: both are
            # undone here.
            accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
        if accelerator.sync_gradients:
            # Clipped apart: a critic that is far off must not shorten the policy's step. (DeepSpeed: one norm of both.)
            norms.append([clip_grad_norm(accelerator, group["params"], args.max_grad_norm)
                          for group in optimizer.param_groups])
            stop_if_bad(sum(norms[-1]))                                        # not finite if either is not
        optimizer.step()                                                       # of a whole mini-batch: else a no-op
        optimizer.zero_grad()
    loss, _, _, clip_fraction, critic_loss = torch.tensor(history).mean(0).tolist()
    grad_norm, critic_grad_norm = torch.tensor(norms).mean(0).tolist()
    # KL: the last, which --target_kl was compared with. Ratio: the first, before any update, where it has to be 1.
    return {"loss": loss, "approx_kl": history[-1][1], "ratio_error": history[0][2], "clip_fraction": clip_fraction,
            "critic_loss": critic_loss, "grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm,
            "updates": len(norms)}


def main(args):
    started = time.time()
    check_numbers(args)
    if args.gamma > 1 or args.gae_lambda > 1:
        fail(f"--gamma {args.gamma} and --gae_lambda {args.gae_lambda} have to be at most 1")
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
    critic = new_critic(args, reward_model).eval()
    context = min(getattr(model.config, "max_position_embeddings", math.inf) for model in (policy, reward_model))
    if args.max_prompt_length + args.max_response_length > context:
        fail(f"--max_prompt_length + --max_response_length is more than the context of {args.model}, {context} tokens")
    output = start_run(accelerator, args)
    if args.gradient_checkpointing:
        for model in (policy, critic):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = [{"params": list(policy.parameters()), "lr": args.lr},
              {"params": list(critic.parameters()), "lr": args.critic_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(ActorCritic(policy, critic), optimizer)
    reward_mean, reward_std = score_scale(reward_model)
    reference = prepare_frozen(accelerator, TokenLogp(reference))
    reward_model = prepare_frozen(accelerator, ResponseReward(reward_model))
    epochs = math.ceil(args.steps / (len(data) // args.batch_size))
    batches = update_order(len(data), args.batch_size, epochs, args.seed)[:args.steps]

    first, seconds = load_checkpoint(accelerator, output) if args.resume else (0, 0.0)
    started -= seconds
    progress = tqdm(total=args.steps, initial=first, desc="ppo", mininterval=1,
                    disable=not accelerator.is_main_process)
    for step, batch in enumerate(batches[first:], first + 1):
        # 1. Rollouts. Sampling, scoring and updating are under the same autocast: else the first ratio would not be 1.
        clock = [time.time()]
        mine = batch[accelerator.process_index::accelerator.num_processes].tolist()
        questions, prompt_ids = [data[row][0] for row in mine], [data[row][1] for row in mine]
        with gathered(accelerator, model, "policy") as plain, accelerator.autocast():
            responses = rollout(plain, tokenizer, prompt_ids, args.max_response_length, args.rollout)
        clock.append(time.time())

        # 2. Scores
        sequences = list(zip(prompt_ids, responses))
        with accelerator.autocast():
            ids, is_token, is_response, logp_old, logp_ref, value_old, score = score_rollouts(
                model, reference, reward_model, sequences, args, tokenizer.pad_token_id)
        if not score.isfinite().all():
            row = score.isfinite().logical_not().nonzero()[0].item()
            fail(f"step {step}: {args.reward_model} gives {score[row].item()} to the answer to {questions[row]!r:.80}")

        # 3. Advantages
        ended = torch.tensor([row[-1] == tokenizer.eos_token_id for row in responses], device=ids.device)[:, None]
        reward = kl_reward(logp_old, logp_ref, is_response, args.kl_coef)                          # r^KL_t
        reward = reward + last_token(is_response) * score[:, None]                                 # r_T = r(x, y)
        if args.truncated == "penalise":
            reward = reward - (last_token(is_response) & ~ended).float()
        advantage = advantage_from_critic(value_old, reward, is_response, args.gamma, args.gae_lambda)
        returns = advantage + value_old
        learned = is_response & ended if args.truncated == "mask" else is_response
        advantage = whiten(advantage, learned, accelerator.reduce)
        clock.append(time.time())

        # 4. The PPO epochs
        checkpoint_layers(model, args.gradient_checkpointing)
        metrics = improve(accelerator, model, optimizer,
                          (ids, is_token, learned, logp_old, advantage, value_old, returns), args,
                          lambda grad_norm: stop_if_not_finite(accelerator, model, tokenizer, output, grad_norm,
                                                               f"step {step}, rows {batch.tolist()}", "policy"))
        checkpoint_layers(model, False)
        clock.append(time.time())
        if metrics["ratio_error"] > (1e-4 if accelerator.mixed_precision == "no" else 0.1):
            fail(f"step {step}: the ratio differs from 1 by {metrics['ratio_error']:.2g} on average before the first "
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
    save_run(accelerator, model, tokenizer, output / "critic",
             f"# Critic of the PPO run `{args.output}`\n\n`v = model(input_ids=ids).logits.squeeze(-1)` is (B, T): V "
             f"of the state after each token; at the last response token it is never trained. `v * {reward_std:.6g} "
             f"+ {reward_mean:.6g}` is in units of the reward model's scores.", {"critic_loss": record["critic_loss"]},
             "critic")
    save_run(accelerator, model, tokenizer, output,
             f"# PPO policy\n\n`{args.model}` aligned by the reward model `{args.reward_model}` on prompts of "
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


def start_accelerator(args, update_size):
    """The Accelerator, and the rows of a micro-batch: update_size is divided over processes and
    micro-batches."""
    tracker = None if args.log_with == "none" else args.log_with
    accelerator = Accelerator(log_with=tracker, project_dir=args.output)
    unset_hf_deepspeed_config()                               # models are loaded whole, and divided later
    micro_size = max(1, min(args.micro_batch_size, update_size // accelerator.num_processes))
    accumulation, rest = divmod(update_size, micro_size * accelerator.num_processes)
    if rest or accelerator.distributed_type == DistributedType.FSDP:
        fail(f"{update_size} rows an update do not divide into {accelerator.num_processes} processes x "
             f"--micro_batch_size {micro_size}; or this is FSDP: use DDP or ZeRO")
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "gradient_accumulation_steps": accumulation, "gradient_clipping": MAX_GRAD_NORM,
            "train_micro_batch_size_per_gpu": micro_size}
    return accelerator, micro_size


def is_zero3(accelerator):
    """Does DeepSpeed divide the weights among the processes?"""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3


def prepare_frozen(accelerator, model):
    """A model that does not learn: divided among the processes by ZeRO-3, else a copy on each device."""
    model.eval().requires_grad_(False)
    if getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) != 3:
        return model.to(accelerator.device)
    import deepspeed
    config = copy.deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
    config["bf16"] = {"enabled": model.dtype == torch.bfloat16}
    return deepspeed.initialize(model=model, config=config)[0]


@contextmanager
def gathered(accelerator, model):
    """The plain model, to generate with. ZeRO-3 gathers its weights once, not for each token."""
    if getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3:
        from deepspeed.runtime.zero import unwrap_model_for_generation
        with unwrap_model_for_generation(model):
            yield accelerator.unwrap_model(model)
    else:
        yield accelerator.unwrap_model(model)


def clip_grad_norm(accelerator, model):
    """Clips the gradient (DeepSpeed has). Returns its norm before; one that is not finite ends the run."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = float(accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm())
    else:
        norm = float(accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
    return norm if math.isfinite(norm) else fail(f"gradient norm {norm}: lower --lr, or --resume")


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
    """Makes the run folder and writes args.json. A run that is there stays, unless --overwrite is given."""
    output = Path(args.output)
    if accelerator.is_main_process:
        inputs = [value for name, value in vars(args).items() if name != "output" and isinstance(value, str)]
        if output.resolve() in [Path(value).resolve() for value in inputs]:
            fail(f"{output}: is an input of this run. Choose another --output")
        if output.exists() and any(output.iterdir()) and not args.resume:
            if not (args.overwrite and (output / "args.json").is_file()):
                fail(f"{output}: is in use. Choose another --output, or pass --resume or --overwrite")
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("dvpo_logs", asdict(args))
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
    """Weights and optimizer, written under another name and then renamed. The newest two are kept."""
    unfinished = output / "checkpoints" / "unfinished"
    accelerator.save_state(str(unfinished))                   # every process takes part
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(unfinished.with_name(f"step_{step:08d}"))
        for old in sorted(output.glob("checkpoints/step_*"))[:-2]:
            shutil.rmtree(old)


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
    """Loads the newest checkpoint, if there is one, and cuts the logs back to it. Returns its step, or 0."""
    newest = sorted(output.glob("checkpoints/step_*"))[-1:]
    step = int(newest[0].name.removeprefix("step_")) if newest else 0
    if newest:
        accelerator.load_state(str(newest[0]))
    for log in output.glob("*.jsonl") if accelerator.is_main_process else ():
        lines = log.read_text().split("\n")[:-1]              # the last line may be half written
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
    return step


def write_lines(path, records):
    """Appends JSON lines: metrics.jsonl, rollouts.jsonl."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def log_step(accelerator, output, record, rollouts=()):
    """A line of metrics.jsonl, and of the tracker; a line of rollouts.jsonl for each answer."""
    accelerator.log(record, step=record["step"])
    for name, rows in {"metrics": [record], "rollouts": rollouts}.items():
        if rows and accelerator.is_main_process:
            with open(output / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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


def save_run(accelerator, model, state, tokenizer, output, about):
    """Saves the weights (state: gathered from all processes), the tokenizer and a short model card."""
    if accelerator.is_main_process:
        card = f"---\nlibrary_name: transformers\ntags: [dvpo]\n---\n{about}\n\n    {' '.join(sys.argv)}\n"
        (output / "README.md").write_text(card)
        tokenizer.save_pretrained(output)
        accelerator.unwrap_model(model).save_pretrained(output, state_dict=state)
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
