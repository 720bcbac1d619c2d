"""Baseline: ReMax. A reward model, no critic: the greedy answer to the same prompt is the baseline.

    python baselines/remax.py                                             # Atlas, on a laptop
    accelerate launch baselines/remax.py --kl_coef 0.05

Li et al. (2023): REINFORCE. A prompt is answered twice, by sampling and greedily. The sampled answer is
reinforced by the difference of the two scores, in one update per batch: no ratio, no clipping. The published
code samples with top_p 0.9 but scores with the whole softmax, and clips the difference at 5: not done here.

Alignment. A prompt of two tokens, an answer of T = 3 tokens (END included), padding to the batch's width L.
Everything about a token stands in its column; B rows make tensors of shape (B, L).

    ids             x1    x2     y1     y2     END    pad
    is_response     .     .      1      1      1      .     written by the policy: the loss covers these
    logp            .     .      *      *      *      .     log pi(a_t | s_t): logits of one column earlier
    advantage       .     .      A1     A2     A3     .     A_t = r^KL_t + r(x, y) - r(x, y_greedy)

Worked example, no KL: the sampled answer has the score 0.8, the greedy one 0.5. A_t = 0.3 at every token.

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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # waiting threads sleep instead of spinning
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import load_dataset
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, GenerationConfig, logging)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

MAX_GRAD_NORM = 1.0                                           # gradient clipping (ours; released code: none)


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/sft", help="SFT model: the policy's start and the reference")
    reward_model: str = HfArg(default="runs/atlas/reward_model", help="output of baselines/reward_model.py")
    data: str = HfArg(default="runs/atlas/data", help="data folder with rl.jsonl, or hub data set")
    output: str = HfArg(default="runs/atlas/remax", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    kl_coef: float = HfArg(default=0.05, help="beta of the KL penalty (paper: 0.05)")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens; ours)")
    max_response_length: int = HfArg(default=64, help="tokens after which an answer is cut (paper: 1024)")
    lr: float = HfArg(default=4e-4, help="learning rate, constant (paper: 2e-6)")
    steps: int = HfArg(default=30, help="batches of rollouts (ours)")
    batch_size: int = HfArg(default=64, help="rollouts per step and update, over all processes (paper: 8)")
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


# ---- 3. Advantages and loss: REINFORCE with a greedy baseline ----
def kl_reward(logp_old, logp_ref, is_response, kl_coef):
    """r^KL_t = -beta * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)); its expectation is -beta * KL (Schulman,
    2020: the estimator k1). All (B, L): two floats and a bool -> float, 0 off the mask."""
    return torch.where(is_response, -kl_coef * (logp_old - logp_ref), 0.0)


def remax_advantage(score, score_greedy, reward_kl, is_response):
    """A_t = r^KL_t + r(x, y) - r(x, y_greedy): the token's own KL term, and the whole answer's difference.
    score, score_greedy (B,) float; reward_kl (B, L) float; is_response (B, L) bool. Returns (B, L)."""
    return torch.where(is_response, reward_kl + (score - score_greedy)[:, None], 0.0)


def remax_loss(logp, advantage, is_response, denominator=None):
    """REINFORCE: -E[A_t * log pi_theta(a_t|s_t)]. Its gradient, minus the policy gradient, is what counts.

    logp         (B, L) float  log pi_theta(a_t|s_t), with gradient
    advantage    (B, L) float  A_t, a constant                    is_response (B, L) bool
    denominator  divides the sum over tokens; None: the number of response tokens here, for E[.] as their mean
    Returns a scalar, to be minimised, hence the minus."""
    assert logp.shape == advantage.shape == is_response.shape
    objective = torch.where(is_response, advantage * logp, 0.0)
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


def response_reward(reward_model, ids):
    """r(x, y): (B,) float. The stock class reads it at each row's last token that is not padding."""
    return reward_model(input_ids=ids, use_cache=False).logits.squeeze(-1).float()


@torch.no_grad()
def score_rollouts(policy, reference, reward_model, sequences, greedy, micro_size, pad_id):
    """log pi_old and log pi_ref of every sampled token, r of both answers; each model reads each row once.
    Returns ids, is_response, lengths, logp_old, logp_ref, score, score_greedy: r are (B,)."""
    ids, is_response, lengths = collate(sequences, pad_id)
    ids, is_response = ids.to(reference.device), is_response.to(reference.device)
    logp_old, logp_ref = torch.zeros(2, *ids.shape, device=ids.device)
    score, score_greedy = torch.zeros(2, len(ids), device=ids.device)
    for rows in lengths.argsort().split(micro_size):          # rows of like length: little padding
        width = int(lengths[rows].max())
        # log pi_old comes from the code path of the update, not from generation: then the first ratio is 1.
        logp_old[rows, :width] = token_logp(policy, ids[rows, :width], is_response[rows, :width])
        logp_ref[rows, :width] = token_logp(reference, ids[rows, :width], is_response[rows, :width])
        score[rows] = response_reward(reward_model, ids[rows, :width])
        ids_greedy = collate([greedy[row] for row in rows], pad_id)[0].to(ids.device)
        score_greedy[rows] = response_reward(reward_model, ids_greedy)
    return ids, is_response, lengths, logp_old, logp_ref, score, score_greedy


# ---- 5. Training ----
def remax_update(accelerator, model, optimizer, batch, lengths, micro_size):
    """One update with a batch of rollouts: on-policy, so every rollout is used once.

    batch    (ids, is_response, logp_old, advantage), each (B, L): this process's rollouts
    lengths  (B,) long, on the CPU: tokens of each row, prompt included
    Returns {metric: float} over all processes (docs/metrics.md)."""
    tokens = accelerator.reduce(batch[1].sum())               # response tokens of the whole batch
    # The one denominator. Gradients are averaged over micro-batches and processes: that is undone here, for
    # E[.] over the batch's tokens.                                                        # DEVIATION 9: E[.]
    denominator = tokens / (accelerator.gradient_accumulation_steps * accelerator.num_processes)
    total, errors = torch.zeros((), device=batch[0].device), []
    for micro in lengths.argsort().split(micro_size):         # rows of like length: little padding
        ids, is_response, logp_old, advantage = [x[micro, :lengths[micro].max()] for x in batch]
        with accelerator.accumulate(model):
            logp = token_logp(model, ids, is_response)                         # (micro, width)
            loss = remax_loss(logp, advantage, is_response, denominator)
            accelerator.backward(loss)
            if accelerator.sync_gradients:                    # the batch is complete
                grad_norm = clip_grad_norm(accelerator, model)
            optimizer.step()                                  # does nothing before that
            optimizer.zero_grad()
        total += loss.detach() * denominator
        ratio = torch.where(is_response, logp.detach() - logp_old, 0.0).exp()
        errors.append((ratio - 1).abs().max())
    ratio_error = accelerator.gather(errors[0]).max().item()  # has to be 0
    if ratio_error > (1e-3 if accelerator.mixed_precision == "no" else 0.5):
        fail(f"the ratio is {ratio_error:.2g} away from 1: pi_old and pi_theta are not computed alike")
    loss = (accelerator.reduce(total) / tokens).item()
    return {"loss": loss, "ratio_error": ratio_error, "grad_norm": grad_norm}


def main(args):
    accelerator, micro_size = start_accelerator(args, args.batch_size)
    tokenizer, other = load_tokenizer(args.model), load_tokenizer(args.reward_model)
    if (other.get_vocab(), other.chat_template) != (tokenizer.get_vocab(), tokenizer.chat_template):
        fail(f"{args.reward_model}: another tokenizer or chat template than {args.model}. Train it from that")
    rows = read_rows(args.data, "rl", "prompt", tokenizer=tokenizer)
    data = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length]
    accelerator.print(f"{len(data)} prompts; {len(rows) - len(data)} longer than --max_prompt_length dropped")
    if len(data) < args.batch_size:
        fail(f"{args.data}: {len(data)} prompts do not fill --batch_size {args.batch_size}")

    sizes = tokenizer, args.max_prompt_length + args.max_response_length
    frozen_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    policy = load_model(AutoModelForCausalLM, args.model, *sizes)
    reference = load_model(AutoModelForCausalLM, args.model, *sizes, dtype=frozen_dtype)
    reward_model = load_model(AutoModelForSequenceClassification, args.reward_model, *sizes, trained=True,
                              dtype=frozen_dtype)
    # reward_model.py measured mean and deviation of its scores. Other models' scores are taken as they are.
    scale = getattr(reward_model.config, "reward_model", {"reward_mean": 0.0, "reward_std": 1.0})
    stop_ids = policy.generation_config.eos_token_id
    # The stock class reads the score at the last token that is not padding: END must not be the padding.
    pad_id = next(token for token in (*tokenizer.all_special_ids, 0, 1, 2) if token not in stop_ids)
    reward_model.config.pad_token_id = pad_id
    output = start_run(accelerator, args)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(policy.eval(), optimizer)
    reference = prepare_frozen(accelerator, reference)
    reward_model = prepare_frozen(accelerator, reward_model)

    first = load_checkpoint(accelerator, output) + 1 if args.resume else 1
    for step in tqdm(range(first, args.steps + 1), "remax", disable=not accelerator.is_main_process):
        # What is random in a step depends on seed and step alone: a resumed run draws the same.
        rng = random.Random(f"{args.seed} {step}")
        torch.manual_seed(rng.getrandbits(62) + accelerator.process_index)
        batch = rng.sample(data, args.batch_size)[accelerator.process_index::accelerator.num_processes]

        # 1. Rollouts: y ~ pi_old(.|x)
        clock = [time.time()]
        questions, prompt_ids = zip(*[(row["prompt"], row["prompt_ids"]) for row in batch])
        with gathered(accelerator, model), accelerator.autocast():
            responses = rollout(policy, prompt_ids, args.max_response_length, stop_ids)
            best = rollout(policy, prompt_ids, args.max_response_length, stop_ids, greedy=True)
        sequences, greedy = list(zip(prompt_ids, responses)), list(zip(prompt_ids, best))
        clock.append(time.time())

        # 2. Fixed during the step: log pi_old, log pi_ref, r(x, y), r(x, y_greedy)
        with accelerator.autocast():
            ids, is_response, lengths, logp_old, logp_ref, score, score_greedy = score_rollouts(
                model, reference, reward_model, sequences, greedy, micro_size, pad_id)
        if not (score - score_greedy).isfinite().all():
            fail(f"step {step}: {args.reward_model} gives a score that is not finite")

        # 3. Advantages: the score of the answer, less that of the greedy one
        reward_kl = kl_reward(logp_old, logp_ref, is_response, args.kl_coef)
        std = scale["reward_std"]                              # the mean cancels out
        advantage = remax_advantage(score / std, score_greedy / std, reward_kl, is_response)
        entropy = -logp_old.sum(-1) / is_response.sum(-1)
        per_answer = torch.stack([score, (logp_old - logp_ref).sum(-1), entropy]).tolist()
        clock.append(time.time())

        # 4. One update
        model.train()                                         # gradient checkpointing works in this mode only
        metrics = remax_update(accelerator, model, optimizer, (ids, is_response, logp_old, advantage),
                               lengths, micro_size)
        model.eval()
        clock.append(time.time())

        # 5. Log and checkpoint
        texts = tokenizer.batch_decode(
            [y[:-1] if y[-1] in stop_ids else y for y in responses], skip_special_tokens=True)
        rollouts = gather_object([
            {"step": step, "prompt": prompt, "response": text, "reward": score, "kl": kl, "entropy": entropy,
             "response_length": len(y), "eos_rate": float(y[-1] in stop_ids)}
            for prompt, text, y, score, kl, entropy in zip(questions, texts, responses, *per_answer)])
        for name in ("reward", "kl", "entropy", "response_length", "eos_rate"):
            metrics[name] = sum(row[name] for row in rollouts) / len(rollouts)
        for part, began, ended in zip(("generate", "score", "update"), clock, clock[1:]):
            metrics[f"seconds_{part}"] = ended - began
        log_step(accelerator, output, {"step": step} | metrics, rollouts)
        if args.save_steps and step % args.save_steps == 0:
            save_checkpoint(accelerator, output, step)
    save_run(accelerator, model, accelerator.get_state_dict(model), tokenizer, output,
             f"ReMax policy: {args.model} after {args.steps} steps with reward model {args.reward_model}.")
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
