"""Stage 1: supervised fine-tuning. Gives the policy its start, pi_ref, and the value model its weights.

    python sft.py                                                     # Atlas, on a laptop
    accelerate launch sft.py recipes/paper_llama3.2_3b_base.yaml      # the paper's settings (Appendix C)

Section 4.2: "We fine-tune a base model to obtain an SFT model." Appendix C: "We calculate the loss only for the
target tokens rather than the full input sequence."

Shapes   B rows, T tokens of the longest row, V vocabulary. Rows are [prompt | response | padding].
Masks    is_token (B, T) no padding; is_response (B, T) tokens that the answerer wrote, y^1..y^T, EOS included.

Sections 1 to 5 are the method. Section 6 is plumbing that the scripts share, word for word: leave it for later.
"""
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
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, set_seed
from accelerate.utils import load as load_safely
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

# A chat template for base models that have none (Llama-3.2-3B, say). It is saved with the model, so that all later
# stages, and everyone who loads it, write prompts exactly as they were written here.
PLAIN_TEMPLATE = ("{{ bos_token or '' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
                  "Assistant: {{ m['content'] }}{{ eos_token }}\n{% else %}{{ m['role'] | capitalize }}: "
                  "{{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}")


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/base", help="base model: folder or hub name")
    data: str = HfArg(default="runs/atlas/data", help="data folder with sft.jsonl, or hub data set")
    output: str = HfArg(default="runs/atlas/sft", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    max_length: int = HfArg(default=256, help="longer rows (prompt + response, tokens) are dropped and counted")
    lr: float = HfArg(default=3e-3, help="peak learning rate (paper: 2e-5)")
    warmup_steps: int = HfArg(default=20, help="updates of linear warm-up before the cosine decay (paper: 2)")
    epochs: int = HfArg(default=4, help="passes over the data (paper: 3)")
    batch_size: int = HfArg(default=16, help="rows per update, over all processes (paper: 16)")
    micro_batch_size: int = HfArg(default=16, help="most rows per forward pass and process; the rest accumulates")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory: layers run again in the backward pass")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping (ours)")
    log_every: int = HfArg(default=10, help="updates between two lines of metrics.jsonl")
    save_steps: int = HfArg(default=0, help="updates between two checkpoints, of which two are kept; 0: none")
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


# ---- 3. Loss ----
def sft_loss(logp, is_response):
    """-E[log pi(y^t | x, y^{<t})]: cross-entropy of the response tokens; the prompt is given, not learned.

    logp (B, T) float  log pi of each token, at the token's own position        is_response (B, T) bool
    Returns the mean over the batch's response tokens, a scalar.
    """
    assert logp.shape == is_response.shape and is_response.dtype == torch.bool
    return -logp[is_response].mean()                                           # E[.]: per response token of the batch


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


# ---- 5. Training ----
def main(args):
    started = time.time()
    check_numbers(args)
    accelerator = start_accelerator(args, accumulation_steps)
    set_seed(args.seed)
    tokenizer = load(AutoTokenizer, args.model)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    rows = read_rows(args.data, "sft", {"prompt": "prompt", "response": "text"}, args.bad_rows)
    data = [(encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row["response"])) for row in rows]
    data = [sequence for sequence in data if sum(map(len, sequence)) <= args.max_length]
    accelerator.print(f"{len(data)} rows; {len(rows) - len(data)} longer than {args.max_length} tokens dropped")
    if len(data) < args.batch_size:
        fail(f"{args.data}: {len(data)} usable rows do not fill one batch: lower --batch_size {args.batch_size}, "
             f"or raise --max_length {args.max_length}")

    model = load(AutoModelForCausalLM, args.model, kind="policy", dtype=torch.float32)
    if args.max_length > getattr(model.config, "max_position_embeddings", math.inf):
        fail(f"--max_length {args.max_length} is more than the context of {args.model}")
    output = start_run(accelerator, args)
    model.eval()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    lengths = torch.tensor([sum(map(len, sequence)) for sequence in data])
    updates = update_order(len(data), args.batch_size, args.epochs, args.seed)
    # The scheduler is stepped by hand: a prepared one would take `num_processes` steps an update.
    scheduler = get_scheduler("cosine", optimizer, min(args.warmup_steps, len(updates)), len(updates))
    model, optimizer = accelerator.prepare(TokenLogp(model).train(), optimizer)

    first, seconds = load_checkpoint(accelerator, output) if args.resume else (0, 0.0)
    # The rate is a function of the update. A scheduler's own state would be read as an unchecked pickle.
    started, scheduler.last_epoch = started - seconds, first
    progress = tqdm(total=len(updates), initial=first, desc="sft", mininterval=1,
                    disable=not accelerator.is_main_process)
    for update, batch in enumerate(updates[first:], first + 1):
        tokens = sum(len(data[row][1]) for row in batch)                       # response tokens of the whole update
        mine = batch[accelerator.process_index::accelerator.num_processes]
        mine = mine[lengths[mine].argsort()]                                   # micro-batches with little padding
        loss_of_update = torch.zeros((), device=accelerator.device)
        for micro in mine.split(args.micro_batch_size):
            ids, _, is_response = collate([data[row] for row in micro], tokenizer.pad_token_id, accelerator.device)
            with accelerator.accumulate(model):
                logp = model(ids, is_response)                                                     # (B, T)
                # A micro-batch counts by its share of the update's tokens, so that the update is the mean over all
                # of them however they are divided into micro-batches and processes. backward() divides by the number
                # of micro-batches, and the processes' gradients are averaged: both are undone here.
                loss = sft_loss(logp, is_response) * is_response.sum() / tokens
                accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
            loss_of_update += loss.detach()
        grad_norm = clip_grad_norm(accelerator, model.parameters(), args.max_grad_norm)
        stop_if_not_finite(accelerator, model, tokenizer, output, grad_norm, f"update {update}, rows {batch.tolist()}",
                           "policy")
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

        progress.update()
        if update % args.log_every == 0 or update == len(updates):
            record = {"update": update, "loss": accelerator.reduce(loss_of_update).item(), "grad_norm": grad_norm,
                      "lr": scheduler.get_last_lr()[0], "seconds": time.time() - started}
            progress.set_postfix(loss=f"{record['loss']:.3f}")
            if accelerator.is_main_process:
                write_lines(output / "metrics.jsonl", [record])
                accelerator.log(record, step=update)
        save_if_due(accelerator, output, update, len(updates), args.save_steps)
    progress.close()
    save_run(accelerator, model, tokenizer, output,
             f"# SFT model\n\n`{args.model}` fine-tuned on {len(data)} rows of `{args.data}` (sft), {args.epochs} "
             f"epochs, {len(updates)} updates. The loss is in nats per response token.", {"loss": record["loss"]},
             "policy")
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


def clip_grad_norm(accelerator, parameters, max_norm):
    """Clips the gradient; returns its norm before. DeepSpeed has clipped already, in backward(), and made the update
    unless the norm was not finite."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # FSDP2: every process has a part


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
