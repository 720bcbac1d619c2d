"""Baseline: the scalar reward model (ScalarRM), which PPO, GRPO and ReMax need and DVPO does not.

    python baselines/reward_model.py                                      # Atlas, on a laptop
    accelerate launch baselines/reward_model.py --data ORG/PAIRS --lr 2e-5

Bradley and Terry (1952), as in RLHF (Ouyang et al., 2022): the chosen answer of a pair is to have the higher score. A
stock AutoModelForSequenceClassification: a linear layer reads one number at the last response token.

Shapes   B pairs, so 2B rows: chosen, rejected, chosen, rejected, ... T tokens of the longest row.
         Rows are [prompt | response | padding].
Masks    is_token (2B, T) no padding; is_response (2B, T) tokens of the answer, EOS included.

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
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser,
                          get_scheduler)
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging


# ---- 1. Arguments: "paper" is Appendix C, "ours" is chosen for Atlas on a laptop ----
@dataclass
class Args:
    model: str = HfArg(default="runs/atlas/sft", help="where the reward model starts: the SFT checkpoint")
    data: str = HfArg(default="runs/atlas/data", help="data folder with pairs.jsonl, or hub data set")
    output: str = HfArg(default="runs/atlas/reward_model", help="run folder to write")
    overwrite: bool = HfArg(default=False, help="replace the run that is in --output")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    max_length: int = HfArg(default=256, help="longer rows (prompt + response, tokens) are dropped (ours)")
    lr: float = HfArg(default=5e-4, help="peak learning rate, then linear decay (paper: 2e-5)")
    warmup_steps: int = HfArg(default=20, help="updates of linear warm-up before the linear decay (ours)")
    epochs: int = HfArg(default=4, help="passes over the data (paper: 2)")
    batch_size: int = HfArg(default=16, help="pairs per update, over all processes (paper: 4)")
    micro_batch_size: int = HfArg(default=16, help="most pairs per forward pass and process; the rest accumulates")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory: layers run again in the backward pass")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping (ours)")
    eval_every: int = HfArg(default=500, help="updates between two evaluations on test_pairs.jsonl")
    log_every: int = HfArg(default=10, help="updates between two lines of metrics.jsonl")
    save_steps: int = HfArg(default=0, help="updates between two checkpoints, of which two are kept; 0: none")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    log_with: Literal["none", "tensorboard", "wandb"] = HfArg(default="none", help="tracker that gets the metrics too")
    seed: int = HfArg(default=1, help="seed of everything random")


# ---- 2. Data ----
def same_tokens(row, tokenizer):
    """The fault of a pair whose answers differ as texts, but not as tokens; None if there is none."""
    chosen, rejected = (encode_response(tokenizer, row[side]) for side in ("chosen", "rejected"))
    return '"chosen" and "rejected" are the same tokens' if chosen == rejected else None


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


def read_pairs(args, tokenizer, split):
    """data/split.jsonl -> ([(prompt ids, chosen ids), (prompt ids, rejected ids), ...], number of pairs dropped).

    The two answers of a pair stand next to each other. A pair with a row longer than max_length is dropped whole. One
    whose answers are the same tokens is a bad row: its gradient would be zero.
    """
    fields = {"prompt": "prompt", "chosen": "text", "rejected": "text"}
    rows, kept = read_rows(args.data, split, fields, args.bad_rows, lambda row: same_tokens(row, tokenizer)), []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["prompt"])
        chosen, rejected = (encode_response(tokenizer, row[side]) for side in ("chosen", "rejected"))
        if len(prompt) + max(len(chosen), len(rejected)) <= args.max_length:
            kept += [(prompt, chosen), (prompt, rejected)]
    return kept, len(rows) - len(kept) // 2


# ---- 3. Loss: Bradley-Terry ----
def bradley_terry_loss(chosen, rejected):
    """-log P(chosen is better), with P = sigmoid(r(x, y_chosen) - r(x, y_rejected)). (B,) and (B,) float -> scalar,
    the mean over the pairs. Only differences of scores are learned: their zero and their scale are arbitrary."""
    assert chosen.shape == rejected.shape and chosen.dim() == 1
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


# ---- 4. Measuring: pair accuracy, and the scale of the scores ----
@torch.no_grad()
def sequence_scores(model, sequences, batch_size, pad_id):
    """The scores of N (prompt ids, response ids): (N,) float."""
    order = sorted(range(len(sequences)), key=lambda row: sum(map(len, sequences[row])))           # little padding
    parts = []
    for start in range(0, len(order), batch_size):
        ids, _, _ = collate([sequences[row] for row in order[start:start + batch_size]], pad_id, model.device)
        parts.append(model(input_ids=ids, use_cache=False).logits.squeeze(-1).float().cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def value_head(model):
    """The linear layer hidden -> 1, whatever the architecture calls it."""
    return getattr(model, "score", None) or model.classifier


def pair_accuracy(chosen, rejected):
    """Share of pairs whose better answer has the higher score; a tie counts half. (N,) and (N,) -> float."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


# ---- 5. Training ----
def main(args):
    started = time.time()
    check_numbers(args)
    accelerator = start_accelerator(args, accumulation_steps)
    set_seed(args.seed)
    tokenizer = load(AutoTokenizer, args.model)
    if tokenizer.chat_template is None:
        fail(f"{args.model}: the tokenizer has no chat template. Start from the output of sft.py")
    # Stock transformers reads the score at the last token that is not the pad token. If that is EOS, it reads the score
    # before EOS; any other token will do, since no answer ends with it.
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0 if tokenizer.eos_token_id != 0 else 1)
        accelerator.print(f"scores are read at EOS, so padding is {tokenizer.pad_token!r} in this model")

    data, dropped = read_pairs(args, tokenizer, "pairs")
    n = len(data) // 2
    accelerator.print(f"{n} pairs; {dropped} longer than {args.max_length} tokens dropped")
    if n < args.batch_size:
        fail(f"{args.data}: {n} pairs do not fill one batch: lower --batch_size {args.batch_size}, or raise "
             f"--max_length {args.max_length}")
    pairs = []
    if not Path(args.data).is_dir() or (Path(args.data) / "test_pairs.jsonl").is_file():
        pairs, _ = read_pairs(args, tokenizer, "test_pairs")
    else:
        accelerator.print(f"{args.data}: no test_pairs.jsonl, so no pair accuracy is measured")

    config = AutoConfig.from_pretrained(args.model, num_labels=1)
    config.attention_dropout, config.pad_token_id = 0.0, tokenizer.pad_token_id
    model = load(AutoModelForSequenceClassification, args.model, kind="policy", config=config, dtype=torch.float32)
    if args.max_length > getattr(config, "max_position_embeddings", math.inf):
        fail(f"--max_length {args.max_length} is more than the context of {args.model}")
    for parameter in value_head(model).parameters():
        torch.nn.init.zeros_(parameter)                                # r = 0 everywhere: no opinion before the data
    output = start_run(accelerator, args)
    model.eval()                                                       # dropout off; gradients flow all the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    lengths = torch.tensor([sum(map(len, sequence)) for sequence in data]).view(n, 2).amax(1)
    updates = update_order(n, args.batch_size, args.epochs, args.seed)
    scheduler = get_scheduler("linear", optimizer, min(args.warmup_steps, len(updates)), len(updates))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint_layers(model, args.gradient_checkpointing)
    model, optimizer = accelerator.prepare(model, optimizer)

    first, seconds = load_checkpoint(accelerator, output) if args.resume else (0, 0.0)
    # The rate is a function of the update. A scheduler's own state would be read as an unchecked pickle.
    started, scheduler.last_epoch = started - seconds, first
    progress = tqdm(total=len(updates), initial=first, desc="reward model", mininterval=1,
                    disable=not accelerator.is_main_process)
    for update, batch in enumerate(updates[first:], first + 1):
        mine = batch[accelerator.process_index::accelerator.num_processes]
        mine = mine[lengths[mine].argsort()]                                   # micro-batches with little padding
        totals = torch.zeros(2, device=accelerator.device)                     # loss, pairs ranked rightly
        for micro in mine.split(args.micro_batch_size):
            sequences = [data[2 * row + side] for row in micro for side in (0, 1)]
            ids, _, _ = collate(sequences, tokenizer.pad_token_id, accelerator.device)
            with accelerator.accumulate(model):
                score = model(input_ids=ids, use_cache=False).logits.squeeze(-1).float()
                loss = bradley_terry_loss(score[0::2], score[1::2])
                accelerator.backward(loss)     # its mean over micro-batches and processes: all hold as many pairs
            totals += torch.stack([loss.detach() * len(micro), (score[0::2] > score[1::2]).sum()])
        grad_norm = clip_grad_norm(accelerator, model.parameters(), args.max_grad_norm)
        stop_if_not_finite(accelerator, model, tokenizer, output, grad_norm, f"update {update}, pairs {batch.tolist()}")
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

        progress.update()
        last = update == len(updates)
        loss, right = (accelerator.reduce(totals) / args.batch_size).tolist()
        record = {"update": update, "loss": loss, "accuracy": right, "grad_norm": grad_norm,
                  "lr": scheduler.get_last_lr()[0], "seconds": time.time() - started}
        if pairs and (update % args.eval_every == 0 or last):
            with gathered(accelerator, model) as plain:
                score = sequence_scores(plain, pairs, args.micro_batch_size, tokenizer.pad_token_id)
            record["pair_accuracy"] = pair_accuracy(score[0::2], score[1::2])
            accelerator.print(f"\nheld-out pair accuracy: {record['pair_accuracy']:.3f}")
        if accelerator.is_main_process and (update % args.log_every == 0 or "pair_accuracy" in record or last):
            write_lines(output / "metrics.jsonl", [record])
            accelerator.log(record, step=update)
            progress.set_postfix(loss=f"{record['loss']:.3f}")
        save_if_due(accelerator, output, update, len(updates), args.save_steps)
    progress.close()
    # A Bradley-Terry score has no scale of its own. PPO and ReMax weigh it against a KL penalty, so they need one.
    some = update_order(n, min(n, 1024), 1, args.seed)[0]              # rows at random: a file may be sorted
    with gathered(accelerator, model) as plain:
        score = sequence_scores(plain, [data[2 * row + side] for row in some for side in (0, 1)],
                                args.micro_batch_size, tokenizer.pad_token_id)
    std = score.std(correction=0).item() or 1.0
    accelerator.unwrap_model(model).config.reward_model = {"reward_mean": score.mean().item(), "reward_std": std}
    save_run(accelerator, model, tokenizer, output,
             f"# Scalar reward model\n\nBradley-Terry, started from `{args.model}`, trained on {n} pairs of "
             f"`{args.data}` (pairs), {args.epochs} epochs, {len(updates)} updates.\n\n`model(input_ids=ids, "
             f"attention_mask=mask).logits.squeeze(-1)` is (B,): the score of prompt and answer, read at EOS. On "
             f"training answers its mean is {score.mean().item():.4g}, its standard deviation {std:.4g} "
             f"(config.reward_model).", {name: record[name] for name in ("loss", "accuracy", "pair_accuracy")
                                         if name in record})
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


def encode_response(tokenizer, response):
    """Token ids of an answer, ended as the chat template ends it. A control token in its text stays text."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return [*ids, end_of_answer(tokenizer)]


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
