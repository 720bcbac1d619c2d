"""Stage 3: decoupled value policy optimization. The value model is frozen; only the policy learns.

    python train_dvpo.py                                                  # Atlas, on a laptop
    accelerate launch train_dvpo.py --advantage q --whiten false          # section 3.3's A = Q

Section 3.3, Eq. (2): clipped PPO whose advantages are read from the frozen global value model. There is no
reward model and no critic. Section 3.3 takes A = Q (--advantage q). The default subtracts V(s) as a baseline,
as section 3.4.1 does; accumulating with GAE is our addition. (DEVIATION n in a comment: docs/deviations.md.)
Q and V are those of the policies that wrote the GVM's data, not of the policy in training. DVPO relies on
them while the policy moves; the KL penalty keeps the policy near the reference.

Alignment. A prompt of two tokens, an answer of T = 3 tokens (END included), padding to the batch's width L.
Everything about a token stands in its column; B rows make tensors of shape (B, L).

    ids             x1    x2     y1     y2     END    pad
    is_response     .     .      1      1      1      .     written by the policy: the loss covers these
    logp            .     .      *      *      *      .     log pi(a_t | s_t): logits of one column earlier
    q               .     gV(s1) Q1     Q2     Q3     .     Q_t = Q(tau, s_t, a_t): state and action are seen
    shift_right(q)  .     .      gV(s1) gV(s2) gV(s3) .     one column earlier: the state, gamma * V(s_t)

Worked example, gamma = 1, no KL:   V(s1) = 0.1;   Q1, Q2, Q3 =  0.4,  -0.2,  0.8
    --advantage q                      A_t = Q_t              =  0.4,  -0.2,  0.8
    --advantage gae --gae_lambda 0     A_t = Q_t - V(s_t)     =  0.3,  -0.6,  1.0   token 2 hurt, 3 helped
    --advantage gae --gae_lambda 0.5   ... + 0.5 * A_{t+1}    =  0.25, -0.1,  1.0

Read sections 3 to 5 first: the method. Sections 2 (data) and 6 (engines, run folder) are shared helpers.
"""
import copy
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # waiting threads sleep instead of spinning
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import load_dataset
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer,
                          GenerationConfig, logging)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

MAX_GRAD_NORM = 1.0                                           # gradient clipping (ours; released code: none)


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/sft", help="SFT model: the policy's start and the reference")
    gvm: str = HfArg(default="runs/atlas/gvm", help="global value model, the output of train_gvm.py")
    data: str = HfArg(default="runs/atlas/data", help="data folder with rl.jsonl, or hub data set")
    output: str = HfArg(default="runs/atlas/dvpo", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    advantage: Literal["q", "gae", "released"] = HfArg(
        default="gae", help="A = Q (section 3.3); A = Q - V (3.4.1) with GAE (ours); as the released code")
    gae_lambda: float = HfArg(default=0.95, help="lambda of gae and released (released code: 0.95)")
    whiten: bool = HfArg(default=True, help="advantages to mean 0 and deviation 1 (paper: silent)")
    kl_coef: float = HfArg(default=0.05, help="beta of the KL penalty (paper: 0.05)")
    target_kl: float = HfArg(default=0.1, help="KL per token that ends a batch's epochs (paper: 0.1)")
    clip_range: float = HfArg(default=0.2, help="epsilon of Eq. (2) (released code: 0.2)")
    ppo_epochs: int = HfArg(default=2, help="passes over each batch of rollouts (paper: 4)")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens; ours)")
    max_response_length: int = HfArg(default=64, help="tokens after which an answer is cut (paper: 1024)")
    lr: float = HfArg(default=2e-4, help="learning rate, constant (paper: 2e-6)")
    steps: int = HfArg(default=30, help="batches of rollouts (ours)")
    batch_size: int = HfArg(default=64, help="rollouts per step, over all processes (paper: 8)")
    mini_batch_size: int = HfArg(default=32, help="rollouts per update, over all processes (paper: 4)")
    micro_batch_size: int = HfArg(default=8, help="most rollouts per forward pass and process (paper: 2)")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory: layers run twice")
    save_steps: int = HfArg(default=0, help="steps between two checkpoints, of which two are kept; 0: none")
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


# ---- 3. Advantages and loss: sections 3.3 and 3.4.1, Eq. (2) ----
def kl_reward(logp_old, logp_ref, is_response, kl_coef):
    """r^KL_t = -beta * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)); its expectation is -beta * KL (Schulman,
    2020: the estimator k1). All (B, L): two floats and a bool -> float, 0 off the mask."""
    return torch.where(is_response, -kl_coef * (logp_old - logp_ref), 0.0)


def advantage_q(q, reward_kl, is_response):
    """Section 3.3: A_t = Q_phi(tau, s_t, a_t); r^KL_t is added.                         # DEVIATION 4: KL
    q, reward_kl (B, L) float; is_response (B, L) bool. Returns (B, L), 0 off the mask."""
    return torch.where(is_response, q + reward_kl, 0.0)


def is_last_token(is_response):
    """True at each row's last response token: (B, L) bool -> (B, L) bool."""
    return is_response & ~torch.nn.functional.pad(is_response[:, 1:], (0, 1))


def shift_right(x):
    """What stands one column earlier: (B, L) -> (B, L). Of q that is gamma * V(s_t)."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))


def discounted_sum(delta, is_response, decay):
    """A_t = delta_t + decay * A_{t+1}, 0 past the last token: GAE's recursion. delta (B, L) float,
    is_response (B, L) bool -> (B, L) float, 0 off the mask."""
    advantage, a_next = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])           # (B, L), (B,)
    for t in reversed(range(delta.shape[1])):
        # NaN * 0 is NaN: select with where, never multiply by a mask.
        a_next = torch.where(is_response[:, t], delta[:, t] + decay * a_next, 0.0)
        advantage[:, t] = a_next
    return advantage


def advantage_gae(q, reward_kl, is_response, gamma, gae_lambda):
    """Section 3.4.1, A(s, a) = Q(s, a) - b(s) with b(s) = V(s), accumulated as in GAE (Schulman et al. 2016):

        delta_t = r^KL_t + Q(tau, s_t, a_t) - V(s_t)     A_t = delta_t + gamma * lambda * A_{t+1}

    Transitions are deterministic and r_t = 0 before the end, so Q(s_{t-1}, a_{t-1}) = gamma * V(s_t): V is q
    one column earlier, divided by gamma. V(s_1) is read at the last prompt token.       # DEVIATION 5: GAE
    q, reward_kl (B, L) float; is_response (B, L) bool. Returns (B, L), 0 off the mask."""
    return discounted_sum(reward_kl + q - shift_right(q) / gamma, is_response, gamma * gae_lambda)


def advantage_released(q, reward_kl, is_response, gamma, gae_lambda):
    """What the authors' released code computes, an ablation. It takes 0 past the end, where Q_T belongs: the
    reward enters only through V.

        delta_t = r^KL_t + gamma * V(s_{t+1}) - V(s_t)        A_t = delta_t + gamma * lambda * A_{t+1}

    Without KL the last token's advantage is -V(s_T); with lambda = gamma = 1 every token's is -V(s_t)."""
    v_next = torch.where(is_last_token(is_response), 0.0, q)                   # gamma * V(s_{t+1})
    return discounted_sum(reward_kl + v_next - shift_right(q) / gamma, is_response, gamma * gae_lambda)


def whiten(x, mask, accelerator):
    """(x - mean) / sqrt(variance + 1e-8) over the True positions of all processes. x (B, L) float, mask (B,
    L) bool -> (B, L), 0 off the mask. The step's size then does not depend on the scale of x, and A = Q has
    a baseline: its mean. The weight of KL against Q stays as it was.           # DEVIATION 6: whitening"""
    count = accelerator.reduce(mask.sum())
    mean = accelerator.reduce(torch.where(mask, x, 0.0).sum()) / count
    centred = torch.where(mask, x - mean, 0.0)
    variance = accelerator.reduce(centred.square().sum()) / count
    return centred * torch.rsqrt(variance + 1e-8)


def ppo_loss(logp, logp_old, advantage, is_response, clip_range, denominator=None):
    """Minus Eq. (2): L_PPO(theta) = E[min(r_t(theta) * A_t, clip(r_t(theta), 1-eps, 1+eps) * A_t)], where the
    paper's r_t(theta) is the ratio pi_theta / pi_old, not the reward.

    logp         (B, L) float  log pi_theta(a_t|s_t), with gradient
    logp_old     (B, L) float  log pi_old(a_t|s_t), of the policy that wrote the batch
    advantage    (B, L) float  A_t, a constant                    is_response (B, L) bool
    denominator  divides the sum over tokens; None: the number of response tokens here, for E[.] as their mean
    Returns a scalar, to be minimised, hence the minus."""
    assert logp.shape == logp_old.shape == advantage.shape == is_response.shape
    # Selected before exp, too: a where after it would let NaN * 0 = NaN back into the gradient.
    ratio = torch.where(is_response, logp - logp_old, 0.0).exp()               # r_t(theta) of Eq. (2)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    objective = torch.where(is_response, torch.minimum(unclipped, clipped), 0.0)
    return -objective.sum() / (is_response.sum() if denominator is None else denominator)


# ---- 4. Rollouts and scores ----
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


def token_values(gvm, sequences, taus, pad_id):
    """Q(tau, s_t, a_t) of each token of [prompt | response]: (B, >= L) float; arbitrary beyond the end."""
    with_tau = [([*tau, *prompt], response) for tau, (prompt, response) in zip(taus, sequences)]
    ids = collate(with_tau, pad_id)[0].to(gvm.device)
    q = gvm(input_ids=ids, use_cache=False).logits.squeeze(-1).float()
    without_tau = [row[len(tau):] for row, tau in zip(q, taus)]
    return torch.nn.utils.rnn.pad_sequence(without_tau, batch_first=True)


@torch.no_grad()
def score_rollouts(policy, reference, gvm, sequences, taus, micro_size, pad_id):
    """log pi_old, log pi_ref and Q of every token; each model reads each row once.
    Returns ids, is_response, lengths, logp_old, logp_ref, q; q at the last prompt token is gamma * V(s_1)."""
    ids, is_response, lengths = collate(sequences, pad_id)
    ids, is_response = ids.to(reference.device), is_response.to(reference.device)
    logp_old, logp_ref, q = torch.zeros(3, *ids.shape, device=ids.device)
    for rows in lengths.argsort().split(micro_size):          # rows of like length: little padding
        width = int(lengths[rows].max())
        # log pi_old comes from the code path of the update, not from generation: then the first ratio is 1.
        logp_old[rows, :width] = token_logp(policy, ids[rows, :width], is_response[rows, :width])
        logp_ref[rows, :width] = token_logp(reference, ids[rows, :width], is_response[rows, :width])
        values = token_values(gvm, [sequences[row] for row in rows], [taus[row] for row in rows], pad_id)
        q[rows, :width] = values[:, :width]
    return ids, is_response, lengths, logp_old, logp_ref, q


# ---- 5. Training ----
def ppo_update(accelerator, model, optimizer, batch, lengths, micro_size, args):
    """Eq. (2) on a batch of rollouts: ppo_epochs passes, in mini-batches, until the target KL is passed.

    batch    (ids, is_response, logp_old, advantage), each (B, L): this process's rollouts
    lengths  (B,) long, on the CPU: tokens of each row, prompt included
    Returns {metric: float} over all processes (docs/metrics.md)."""
    tokens = accelerator.reduce(batch[1].sum())               # response tokens of the whole batch
    # The one denominator. E[.] is over the batch's tokens, whichever mini-batch they fall into: an update has
    # its share of them. Accelerate averages gradients over the micro-batches of an update and over processes,
    # so the sum is divided by as much less.                                              # DEVIATION 9: E[.]
    tokens_of_update = tokens / (args.batch_size // args.mini_batch_size)
    denominator = tokens_of_update / (accelerator.gradient_accumulation_steps * accelerator.num_processes)
    history, errors, norms = [], [], []       # one entry per epoch; per micro-batch; per mini-batch
    for _ in range(args.ppo_epochs):
        micro_batches, sums = [], torch.zeros(3, device=batch[0].device)
        for mini in torch.randperm(len(lengths)).split(args.mini_batch_size // accelerator.num_processes):
            micro_batches += mini[lengths[mini].argsort()].split(micro_size)   # sorted: little padding
        for micro in micro_batches:
            ids, is_response, logp_old, advantage = [x[micro, :lengths[micro].max()] for x in batch]
            with accelerator.accumulate(model):
                logp = token_logp(model, ids, is_response)                     # (micro, width)
                loss = ppo_loss(logp, logp_old, advantage, is_response, args.clip_range, denominator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:                # the mini-batch is complete
                    norms.append(clip_grad_norm(accelerator, model))
                optimizer.step()                              # does nothing before that
                optimizer.zero_grad()
            log_ratio = torch.where(is_response, logp.detach() - logp_old, 0.0)
            ratio = log_ratio.exp()
            k3 = ratio - 1 - log_ratio                        # estimates KL(pi_old, pi_theta), never below 0
            clipped = (ratio - 1).abs() > args.clip_range
            sums += torch.stack([loss.detach() * denominator, k3.sum(), clipped.sum()])
            errors.append((ratio - 1).abs().max())
        history.append((accelerator.reduce(sums) / tokens).tolist())
        if history[-1][1] > args.target_kl:                   # Appendix C: KL_target = 0.1; how, is ours
            break
    ratio_error = accelerator.gather(errors[0]).max().item()  # before any update: has to be 0
    if ratio_error > (1e-3 if accelerator.mixed_precision == "no" else 0.5):
        fail(f"the first ratio is {ratio_error:.2g} away from 1: pi_old and pi_theta are not computed alike")
    loss, _, clip_fraction = torch.tensor(history).mean(0).tolist()
    return {"loss": loss, "approx_kl": history[-1][1], "clip_fraction": clip_fraction, "updates": len(norms),
            "ratio_error": ratio_error, "grad_norm": sum(norms) / len(norms)}


def main(args):
    accelerator, micro_size = start_accelerator(args, args.mini_batch_size)
    if args.batch_size % args.mini_batch_size:
        fail(f"--batch_size {args.batch_size} is not a multiple of --mini_batch_size {args.mini_batch_size}")
    tokenizer, other = load_tokenizer(args.model), load_tokenizer(args.gvm)
    if (other.get_vocab(), other.chat_template) != (tokenizer.get_vocab(), tokenizer.chat_template):
        fail(f"{args.gvm}: another tokenizer or chat template than {args.model}. Train it from this model")
    rows = read_rows(args.data, "rl", "prompt", tokenizer=tokenizer)
    data = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length]
    accelerator.print(f"{len(data)} prompts; {len(rows) - len(data)} longer than --max_prompt_length dropped")
    if len(data) < args.batch_size:
        fail(f"{args.data}: {len(data)} prompts do not fill --batch_size {args.batch_size}")

    sizes = tokenizer, args.max_prompt_length + args.max_response_length
    frozen_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    policy = load_model(AutoModelForCausalLM, args.model, *sizes)
    reference = load_model(AutoModelForCausalLM, args.model, *sizes, dtype=frozen_dtype)
    gvm = load_model(AutoModelForTokenClassification, args.gvm, *sizes, trained=True, dtype=frozen_dtype)
    gvm_args = getattr(gvm.config, "gvm", None) or fail(f"{args.gvm}: not made by train_gvm.py")
    stop_ids = policy.generation_config.eos_token_id
    output = start_run(accelerator, args)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(policy.eval(), optimizer)
    reference = prepare_frozen(accelerator, reference)
    gvm = prepare_frozen(accelerator, gvm)

    first = load_checkpoint(accelerator, output) + 1 if args.resume else 1
    for step in tqdm(range(first, args.steps + 1), "dvpo", disable=not accelerator.is_main_process):
        # What is random in a step depends on seed and step alone: a resumed run draws the same.
        rng = random.Random(f"{args.seed} {step}")
        torch.manual_seed(rng.getrandbits(62) + accelerator.process_index)
        batch = rng.sample(data, args.batch_size)[accelerator.process_index::accelerator.num_processes]

        # 1. Rollouts: y ~ pi_old(.|x)
        clock = [time.time()]
        questions, prompt_ids = zip(*[(row["prompt"], row["prompt_ids"]) for row in batch])
        with gathered(accelerator, model), accelerator.autocast():
            responses = rollout(policy, prompt_ids, args.max_response_length, stop_ids)
        sequences = list(zip(prompt_ids, responses))
        clock.append(time.time())

        # 2. Fixed during the step: log pi_old, log pi_ref, Q. tau: the policy's own latest answers
        pool = gather_object(list(zip(questions, sequences)))
        taus = [draw_tau(question, sequence, pool, gvm_args["tau_pairs"], gvm_args["max_length"], rng)[0]
                for question, sequence in zip(questions, sequences)]
        with accelerator.autocast():
            ids, is_response, lengths, logp_old, logp_ref, q = score_rollouts(
                model, reference, gvm, sequences, taus, micro_size, tokenizer.pad_token_id)

        # 3. Advantages: section 3.3, A = Q; or section 3.4.1, A = Q - V
        reward_kl = kl_reward(logp_old, logp_ref, is_response, args.kl_coef)
        if args.advantage == "q":
            advantage = advantage_q(q, reward_kl, is_response)
        elif args.advantage == "gae":
            advantage = advantage_gae(q, reward_kl, is_response, gvm_args["gamma"], args.gae_lambda)
        else:
            advantage = advantage_released(q, reward_kl, is_response, gvm_args["gamma"], args.gae_lambda)
        if args.whiten:
            advantage = whiten(advantage, is_response, accelerator)
        # What the GVM thinks of each whole answer: Q_T (B,), on the scale of the rewards.
        value = torch.where(is_last_token(is_response), q, 0.0).sum(-1)
        value = value * gvm_args["reward_std"] + gvm_args["reward_mean"]
        entropy = -logp_old.sum(-1) / is_response.sum(-1)
        per_answer = torch.stack([value, (logp_old - logp_ref).sum(-1), entropy]).tolist()
        clock.append(time.time())

        # 4. Eq. (2): epochs of mini-batches
        model.train()                                         # gradient checkpointing works in this mode only
        tensors = ids, is_response, logp_old, advantage
        metrics = ppo_update(accelerator, model, optimizer, tensors, lengths, micro_size, args)
        model.eval()
        clock.append(time.time())

        # 5. Log and checkpoint
        texts = tokenizer.batch_decode(
            [y[:-1] if y[-1] in stop_ids else y for y in responses], skip_special_tokens=True)
        rollouts = gather_object([
            {"step": step, "prompt": prompt, "response": text, "value": value, "kl": kl, "entropy": entropy,
             "response_length": len(y), "eos_rate": float(y[-1] in stop_ids)}
            for prompt, text, y, value, kl, entropy in zip(questions, texts, responses, *per_answer)])
        for name in ("value", "kl", "entropy", "response_length", "eos_rate"):
            metrics[name] = sum(row[name] for row in rollouts) / len(rollouts)
        for part, began, ended in zip(("generate", "score", "update"), clock, clock[1:]):
            metrics[f"seconds_{part}"] = ended - began
        log_step(accelerator, output, {"step": step} | metrics, rollouts)
        if args.save_steps and step % args.save_steps == 0:
            save_checkpoint(accelerator, output, step)
    save_run(accelerator, model, accelerator.get_state_dict(model), tokenizer, output,
             f"DVPO policy: {args.model} after {args.steps} steps with the frozen value model {args.gvm}.")
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


def prepare_frozen(accelerator, model):
    """A model that does not learn: divided among the processes by ZeRO-3, else a copy on each device."""
    model.eval().requires_grad_(False)
    if getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) != 3:
        return model.to(accelerator.device)
    import deepspeed
    config = copy.deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
    config["bf16"] = {"enabled": model.dtype == torch.bfloat16}
    return deepspeed.initialize(model=model, config=config)[0]


def gathered(accelerator, model):
    """A context to generate in: ZeRO-3 gathers the weights once, not for each token."""
    if getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) != 3:
        return nullcontext()
    from deepspeed.runtime.zero import unwrap_model_for_generation
    return unwrap_model_for_generation(model)


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
