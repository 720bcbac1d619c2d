"""Stage 1, Instruction setting: an existing reward model scores answers of one or more policies, for the GVM to learn.

    python label_rollouts.py                    # Atlas, with the reward model of baselines/reward_model.py
    accelerate launch label_rollouts.py --models sft=runs/7b/sft base=ORG/BASE --reward_model ORG/RM --samples 4

Section 5.2: "An existing UltraRM reward model was used to collect labeled data for training the value model, value
model also initialized from SFT model." Prompts -> answers of every policy -> scored.jsonl and test_scored.jsonl, rows
{"prompt", "response", "reward", "policy"}: what train_gvm.py reads, --tau_pairs too, for the policy is named.

Answers and scores are kept in OUTPUT.part as they come, batch by batch: the same command goes on where it was stopped,
on another number of processes too, and writes what it would have written.
"""
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, HfArgumentParser)
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging


# ---- 1. Arguments ----
@dataclass
class Args:
    models: list[str] = HfArg(default_factory=lambda: ["runs/atlas/sft"], help="FOLDER or NAME=FOLDER of each policy "
                              "that answers; NAME is the row's \"policy\"")
    reward_model: str = HfArg(default="runs/atlas/reward_model", help="scalar reward model: folder or hub name")
    data: str = HfArg(default="runs/atlas/data", help="data folder, or hub data set, with prompts")
    split: str = HfArg(default="scored", help="whose prompts are answered, each once; not rl, on which the policy is "
                       "trained with what is learned here (section 4.1: \"To prevent data leakage\")")
    output: str = HfArg(default="runs/atlas/labels", help="data folder to write")
    overwrite: bool = HfArg(default=False, help="replace the data folder that is there")
    bad_rows: Literal["error", "skip"] = HfArg(default="error", help="stop at a bad row, or drop and count bad rows")
    samples: int = HfArg(default=4, help="answers per prompt and policy")
    test_share: float = HfArg(default=0.1, help="share of the prompts whose answers go to test_scored.jsonl")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens)")
    max_response_length: int = HfArg(default=64, help="answers that do not end within it are dropped and counted")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="of policies and reward model (bfloat16 "
                                                          "has three digits); auto: bfloat16 on a GPU, else float32")
    batch_size: int = HfArg(default=64, help="answers sampled, and scored, at a time and process")
    seed: int = HfArg(default=1, help="seed of the answers and of the held-out prompts")


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


def named(models, flag="--models"):
    """["runs/a/gvm", "large=runs/b/gvm"] -> {"gvm": "runs/a/gvm", "large": "runs/b/gvm"}."""
    names = {}
    for entry in models:
        name, separator, folder = entry.partition("=")
        if not separator or Path(entry).exists():
            path = Path(entry).resolve()
            name, folder = path.stem if path.is_file() else path.name, entry
        if not name:
            fail(f"{flag} {entry}: no name before the =")
        if name in names:
            fail(f"{flag}: {names[name]} and {folder} are both called {name!r}. Name one of them: OTHER={folder}")
        names[name] = folder
    return names


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


def read_prompts(args, tokenizers):
    """(prompts, Counter of what was dropped): each prompt once, and only those that every policy can read."""
    rows = read_rows(args.data, args.split, {"prompt": "prompt"}, args.bad_rows)
    prompts = list({json.dumps(row["prompt"]): row["prompt"] for row in rows}.values())
    fit = [prompt for prompt in prompts
           if all(len(encode_prompt(tokenizer, prompt)) <= args.max_prompt_length for tokenizer in tokenizers)]
    counts = Counter({"rows with an earlier row's prompt": len(rows) - len(prompts),
                      f"dropped: prompt longer than {args.max_prompt_length} tokens": len(prompts) - len(fit)})
    return fit or fail(f"{args.data}: no prompt fits into --max_prompt_length {args.max_prompt_length}"), counts


# ---- 3. Answers ----
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


def load_tokenizer(folder):
    """The tokenizer of a model that takes part in a chat, with a pad token."""
    tokenizer = load(AutoTokenizer, folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.chat_template is None:
        fail(f"{folder}: the tokenizer has no chat template, so the model cannot be asked a question")
    return tokenizer


def context_length(model):
    """How many tokens the model can read and write together."""
    return getattr(model.config, "max_position_embeddings", math.inf)


def weights_stamp(folder):
    """What tells other weights in the same folder: names, sizes and times of its files. [] for a model of the hub."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, stop, temperature=1.0):
    """One response to each prompt, lists of ids: sampled from the model, no top-k, no top-p, no repetition penalty.

    stop         ids that end a response; it contains the one that did
    temperature  0: the likeliest token each time
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    is_token = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=model.device)
    # generate() fills what a GenerationConfig leaves open from the model's own (top_k = 50, a repetition penalty, ...).
    own, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    try:
        written = model.generate(input_ids=ids, attention_mask=is_token)[:, width:].tolist()
    except RuntimeError as problem:
        if "probability tensor" not in str(problem):
            raise
        fail(f"{model.config.name_or_path}: gives probabilities that are no numbers. Its training has failed")
    finally:
        model.generation_config = own
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in written]
    return [row[:end] for row, end in zip(written, ends)]


@torch.no_grad()
def sample_answers(model, tokenizer, prompts, max_response_length):
    """[(text, whether it ended by itself), ...], one answer to each prompt, sampled from the policy exactly."""
    stop = model.generation_config.eos_token_id               # a chat model may have several, <|eot_id|> and more
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    written = generate(model, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], max_response_length,
                       sorted(stop))
    return [(tokenizer.decode(ids, skip_special_tokens=True), ids[-1] in stop) for ids in written]


def fault(text, ended):
    """Why an answer is no training data; None if it is. As text, a cut answer would look like one that ends there: the
    value model would learn its score as that of stopping in mid-sentence."""
    return "cut at --max_response_length" if not ended else "empty answer" if not text.strip() else None


# ---- 4. Scores ----
def read_scorer(name, prompts):
    """The reward model's tokenizer. What can be wrong with that model is said now, not after hours of answers."""
    config = load(AutoConfig, name)
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification") or config.num_labels != 1:
        fail(f"{name}: holds a {(config.architectures or ['?'])[0]} with {config.num_labels} labels; a "
             f"reward model for AutoModelForSequenceClassification, with one label, is wanted (docs/scaling.md)")
    tokenizer = load_tokenizer(name)
    for prompt in prompts:
        try:
            encode_conversation(config, tokenizer, prompt, "An answer.")
        except Exception as problem:                          # some templates take no system prompt
            fail(f"{name}: its chat template does not take {prompt!r:.80} ({problem})")
    return tokenizer


def encode_conversation(config, tokenizer, prompt, response):
    """Token ids of prompt and answer as the reward model read them in its training, in its own chat template.

    Others' reward models are trained on the whole of their chat template, ours (baselines/reward_model.py) up to EOS,
    behind which a template may write a line end.
    """
    if hasattr(config, "reward_model"):
        return encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=True,
                                         return_dict=False)


@torch.no_grad()
def scores(model, sequences, batch_size):
    """The reward model's own score of each sequence of ids; None where it is longer than the model's context.

    The class reads its score at the last token that is not config.pad_token_id: that one has to pad, on the right, and
    nothing is changed for one sequence alone. Where pad is EOS too, that is the token before EOS: so it was trained.
    """
    pad_id, found = model.config.get_text_config().pad_token_id, [None] * len(sequences)
    order = sorted((row for row, ids in enumerate(sequences) if len(ids) <= context_length(model)),
                   key=lambda row: len(sequences[row]))                                            # little padding
    size = batch_size if pad_id is not None else 1            # without a pad token the class takes one at a time
    for start in range(0, len(order), size):
        rows = order[start:start + size]
        ids, is_token, _ = collate([(sequences[row], []) for row in rows], pad_id or 0, model.device)
        for row, score in zip(rows, model(input_ids=ids, attention_mask=is_token).logits.squeeze(-1).tolist()):
            found[row] = score
    return found


# ---- 5. Files ----
def kept_lines(content):
    """The lines of a log (bytes). A last line without an end counts if it is whole; if not, its writer was stopped."""
    *lines, rest = content.split(b"\n")
    try:
        json.loads(rest)
        return [*lines, rest]
    except ValueError:
        return lines


def open_log(path):
    """Opens a file that grows line by line, for this process alone: two would do, and pay, everything twice. Returns
    (file, its lines)."""
    import fcntl
    file = open(path, "a+b")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)      # the lock ends with the process, however it ends
    except OSError:
        fail(f"{path}: another process is writing it. Wait for it, or choose another --output")
    file.seek(0)
    content = file.read()
    lines = kept_lines(content)
    if content and not content.endswith(b"\n"):                # what is appended must begin a new line
        rest = content.rpartition(b"\n")[2]
        file.write(b"\n") if rest in lines[-1:] else file.truncate(len(content) - len(rest))
    return file, lines


def append(file, record):
    """One more line, on the disk at once."""
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()


def begin(folder, settings, state, overwrite):
    """Makes the folder of an unfinished run, or takes it up if it was begun with the same settings. Returns this
    process's log, open."""
    begun = folder / "settings.json"
    if state.is_main_process:
        try:
            was = dict(json.loads(begun.read_text())) if begun.is_file() else settings
        except (ValueError, TypeError):
            fail(f"{begun}: is not what was written here. Delete {folder}, the answers in it too, to begin anew")
        differ = [name for name, value in settings.items() if was.get(name) != value]
        if differ and not overwrite:
            fail(f"{folder}: was begun with other {differ[0]}: {was.get(differ[0])}. Go on with that, or pass "
                 f"--overwrite to begin anew")
        if differ:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        begun.write_text(json.dumps(settings))
    state.wait_for_everyone()
    return open_log(folder / f"answers_{state.process_index}.log")[0]


def read_logs(folder):
    """What all processes have written, in this run and before: {("answers" or "rewards", policy, batch): list}."""
    done = {}
    for file in sorted(folder.glob("answers_*.log")):
        for number, line in enumerate(kept_lines(file.read_bytes()), 1):
            try:
                kind, policy, batch, values = json.loads(line)
                done[kind, policy, batch] = values
            except (ValueError, TypeError):
                fail(f"{file}:{number}: was not written here. Delete the line: that batch is done again")
    return done


def write_files(folder, files, manifest):
    """The files of a data folder, and the manifest that names them."""
    manifest["files"] = {}
    for name, rows in files.items():
        if not rows:
            continue
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        manifest["files"][f"{name}.jsonl"] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


# ---- 6. Main ----
def check_output(args):
    """The output folder, which holds nothing that is not to be replaced, and nothing that is read."""
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        fail(f"{output}: exists already. Choose another --output, or pass --overwrite")
    if output.exists() and not (output / "manifest.json").is_file():
        fail(f"{output}: is not a data folder (no manifest.json), so --overwrite will not delete it")
    for source in (args.data, args.reward_model, *named(args.models).values()):
        if Path(source).resolve().is_relative_to(output.resolve()):
            fail(f"{output}: holds {source}, which is read here. Choose another --output")
    return output


def write_answers(args, models, tokenizers, prompts, batches, dtype, state, done, record):
    """Has every policy answer this process's batches that nobody has answered yet; one model in memory at a time."""
    for policy, folder in models.items():
        missing = [i for i in batches if ("answers", policy, i) not in done]
        if not missing:
            continue
        model = load(AutoModelForCausalLM, folder, kind="policy", dtype=dtype).eval().to(state.device)
        if args.max_prompt_length + args.max_response_length > context_length(model):
            fail(f"--max_prompt_length + --max_response_length is more than the context of {folder}, "
                 f"{context_length(model)} tokens")
        for i in tqdm(missing, desc=f"answers of {policy}", mininterval=1, disable=not state.is_main_process):
            # A batch has a seed of its own: what it holds does not depend on where a run was stopped, nor on processes.
            torch.manual_seed(random.Random(f"{args.seed} {policy} {i}").getrandbits(63))
            record("answers", policy, i, sample_answers(
                model, tokenizers[policy], [prompts[number] for number in batches[i]], args.max_response_length))
        del model


def write_scores(args, models, tokenizer, prompts, batches, dtype, state, done, record):
    """Has the reward model score the answers of this process's batches that have no scores yet."""
    missing = [(policy, i) for policy in models for i in batches if ("rewards", policy, i) not in done]
    if not missing:
        return
    model = load(AutoModelForSequenceClassification, args.reward_model, kind="value", dtype=dtype)
    model = model.eval().to(state.device)
    for policy, i in tqdm(missing, desc="scores", mininterval=1, disable=not state.is_main_process):
        answers = done["answers", policy, i]
        usable = [j for j, (text, ended) in enumerate(answers) if not fault(text, ended)]
        rewards = dict(zip(usable, scores(model, [
            encode_conversation(model.config, tokenizer, prompts[batches[i][j]], answers[j][0]) for j in usable],
            args.batch_size)))
        for j, reward in rewards.items():
            if reward is not None and not math.isfinite(reward):
                fail(f"{args.reward_model}: gives {reward} to {answers[j][0]!r:.80}. Another --dtype may help")
        record("rewards", policy, i, [rewards.get(j) for j in range(len(answers))])


def labelled_rows(prompts, models, batches, done, counts):
    """{number of a prompt: its rows, by policy}. What is no training data is counted."""
    rows = {number: [] for number in range(len(prompts))}
    for policy in models:
        for i, batch in batches.items():
            for number, (text, ended), reward in zip(batch, done["answers", policy, i], done["rewards", policy, i]):
                problem = fault(text, ended) or (reward is None and "longer than the reward model's context")
                counts[f"dropped: {problem}" if problem else f"answers of {policy}"] += 1
                if not problem:
                    rows[number].append({"prompt": prompts[number], "response": text, "reward": reward,
                                         "policy": policy})
    return rows


def main(args):
    check_numbers(args)
    if args.test_share >= 1:
        fail(f"--test_share {args.test_share}: it has to be less than 1")
    models, output = named(args.models), check_output(args)
    torch.backends.cuda.enable_cudnn_sdp(False)               # it prepares a plan for every new length of a row
    # A process that is done waits for those that are not. (Without cpu, processes on a CPU would not know each other.)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=30))
    dtype = {"auto": torch.float32 if state.device.type == "cpu" else torch.bfloat16, "float32": torch.float32,
             "bfloat16": torch.bfloat16}[args.dtype]
    tokenizers = {name: load_tokenizer(folder) for name, folder in models.items()}
    prompts, counts = read_prompts(args, tokenizers.values())
    scorer_tokenizer = read_scorer(args.reward_model, prompts)
    asked = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = {"models": models, "reward_model": args.reward_model, "prompts": asked, "dtype": str(dtype),
                "weights": [weights_stamp(folder) for folder in (*models.values(), args.reward_model)]}
    settings |= {name: getattr(args, name) for name in ("samples", "max_response_length", "batch_size", "seed")}
    building = output.with_name(output.name + ".part")
    log = begin(building, settings, state, args.overwrite)
    done = read_logs(building)

    # The longest prompts first, so that memory runs out at once or never.
    order = sorted(range(len(prompts)), key=lambda number: -len(json.dumps(prompts[number])))
    order = [number for number in order for _ in range(args.samples)]
    batches = dict(enumerate(order[start:start + args.batch_size] for start in range(0, len(order), args.batch_size)))
    mine = {i: batches[i] for i in list(batches)[state.process_index::state.num_processes]}
    if state.is_main_process:
        there = sum(kind == "answers" for kind, _, _ in done)
        print(f"{len(prompts)} prompts, {len(models)} policies, {state.num_processes} processes: {there} of "
              f"{len(batches) * len(models)} batches of answers are there")

    def record(kind, policy, i, values):
        done[kind, policy, i] = values
        append(log, [kind, policy, i, values])

    write_answers(args, models, tokenizers, prompts, mine, dtype, state, done, record)
    write_scores(args, models, scorer_tokenizer, prompts, mine, dtype, state, done, record)
    log.close()
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    rows = labelled_rows(prompts, models, batches, read_logs(building), counts)
    held_out = set(random.Random(args.seed).sample(list(rows), round(args.test_share * len(rows))))
    files = {"scored": [row for number in rows if number not in held_out for row in rows[number]],
             "test_scored": [row for number in rows if number in held_out for row in rows[number]]}
    if not files["scored"]:
        fail(f"{args.data}: no answer to learn from ({dict(counts)}). A larger --max_response_length may help")
    write_files(building, files, {
        "source": f"label_rollouts: {args.data} ({args.split}), scored by {args.reward_model}", "models": models,
        "seed": args.seed, "samples": args.samples, "prompts": len(prompts), "counts": dict(counts)})
    if output.exists():
        shutil.rmtree(output)
    building.rename(output)
    for file in [output / "settings.json", *output.glob("answers_*.log")]:
        file.unlink()
    print(f"{output}: " + ", ".join(f"{len(lines)} rows in {name}.jsonl" for name, lines in files.items()))
    for reason, count in counts.items():
        print(f"  {reason}: {count}")


if __name__ == "__main__":
    try:
        main(parse_args(Args, sys.argv[1:]))
    except KeyboardInterrupt:
        fail("stopped. The same command goes on")
