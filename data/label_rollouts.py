"""Stage 0, Instruction setting: an existing reward model scores answers of one or more policies.

    python data/label_rollouts.py                # Atlas, with the reward model of baselines/reward_model.py
    accelerate launch data/label_rollouts.py --models sft=runs/7b/sft base=ORG/BASE --reward_model ORG/RM

Section 5.2: "An existing UltraRM reward model was used to collect labeled data for training the value model,
value model also initialized from SFT model." Prompts -> answers of every policy -> scored.jsonl and
test_scored.jsonl, rows {"prompt", "response", "reward", "policy"}: what train_gvm.py reads.

Each batch of answers is kept in OUTPUT.answers as it comes. The same command goes on where it was stopped,
with any number of processes, and writes what it would have written.
"""
import hashlib
import json
import math
import random
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import (encode_conversation, fail, load_model, load_tokenizer, named, parse_args,  # noqa: E402
                      read_rows, rollout)
from prepare_data import check_output, write_folder  # noqa: E402


# ---- 1. Arguments ----
@dataclass
class Args:
    models: list[str] = HfArg(default_factory=lambda: ["runs/atlas/sft"], help="FOLDER or NAME=FOLDER of "
                              "each policy that answers; NAME is the row's \"policy\"")
    reward_model: str = HfArg(default="runs/atlas/reward_model", help="folder or hub name, one label")
    data: str = HfArg(default="runs/atlas/data", help="data folder, or hub data set, with prompts")
    split: str = HfArg(default="scored", help="whose prompts are answered, each once; not rl, on which "
                       "the policy is trained (section 4.1: \"To prevent data leakage\")")
    output: str = HfArg(default="runs/atlas/labels", help="data folder to write")
    overwrite: bool = HfArg(default=False, help="replace the data folder that is there")
    samples: int = HfArg(default=4, help="answers per prompt and policy")
    test_share: float = HfArg(default=0.1, help="share of the prompts that go to test_scored.jsonl")
    max_prompt_length: int = HfArg(default=128, help="longer prompts are dropped and counted (tokens)")
    max_response_length: int = HfArg(default=64, help="answers that do not end within it are left out")
    batch_size: int = HfArg(default=64, help="answers sampled at a time, per process")
    seed: int = HfArg(default=1, help="seed of the answers and of the held-out prompts")


# ---- 2. Prompts, answers, scores ----
def read_prompts(args, tokenizers):
    """{prompt as JSON: {policy: prompt ids}}: each prompt once, the longest first, so that memory runs out at
    once or never. And the number of those that are too long for a policy."""
    prompts = {}
    for policy, tokenizer in tokenizers.items():
        for row in read_rows(args.data, args.split, "prompt", tokenizer=tokenizer):
            prompt = row["prompt"]            # a single user message is the same prompt as its text
            alone = not isinstance(prompt, str) and len(prompt) == 1 and prompt[0]["role"] == "user"
            key = json.dumps(prompt[0]["content"] if alone else prompt)
            prompts.setdefault(key, {})[policy] = row["prompt_ids"]
    lengths = {key: max(map(len, ids.values())) for key, ids in prompts.items()}
    fit = {key: prompts[key] for key in sorted(lengths, key=lengths.get, reverse=True)
           if lengths[key] <= args.max_prompt_length}
    if not fit:
        fail(f"{args.data}: no prompt fits into --max_prompt_length {args.max_prompt_length}")
    return fit, len(prompts) - len(fit)


@torch.no_grad()
def score(model, tokenizer, prompt, response):
    """The reward model's score of an answer; None if it is longer than the model can read."""
    ids = encode_conversation(model.config, tokenizer, prompt, response)
    if len(ids) > getattr(model.config.get_text_config(), "max_position_embeddings", math.inf):
        return None
    # One row at a time: no padding, in which the class would look for the end of the answer.
    reward = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits.item()
    return reward if math.isfinite(reward) else fail(f"a reward of {reward} for {response!r:.80}")


def answer_batch(policy, tokenizer, scorer, scorer_tokenizer, prompts, prompt_ids, max_response_length):
    """One answer to each prompt: [(response, reward, None or why it is left out), ...]."""
    stop_ids, answers = policy.generation_config.eos_token_id, []
    for prompt, ids in zip(prompts, rollout(policy, prompt_ids, max_response_length, stop_ids)):
        said, reward, problem = ids[:-1] if ids[-1] in stop_ids else ids, None, None
        response = tokenizer.decode(said, skip_special_tokens=True)
        if ids[-1] not in stop_ids:                           # as text it would look like one that ends there
            problem = "answer cut at --max_response_length"
        elif not response.strip():
            problem = "empty answer"
        else:
            reward = score(scorer, scorer_tokenizer, prompt, response)
            problem = "answer longer than the reward model's context" if reward is None else None
        answers.append((response, reward, problem))
    return answers


# ---- 3. The folder of answers: a log per process, a line per batch ----
def begin(folder, settings, overwrite):
    """Makes the folder, or takes it up if it was begun with the same settings."""
    begun = folder / "settings.json"
    was = json.loads(begun.read_text()) if begun.is_file() else settings
    different = [name for name in settings if was.get(name) != settings[name]]
    if different and not overwrite:
        fail(f"{folder}: was begun with another {different[0]}. Go on with that; --overwrite begins anew")
    if different:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(settings))


def read_answers(folder):
    """What all processes have written, in this run and before: {(policy, batch): answers}."""
    done = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().split("\n"):
            try:
                policy, batch, answers = json.loads(line)
                done[policy, batch] = answers
            except ValueError:                                # empty, or cut off when a run was stopped
                pass
    return done


# ---- 4. Main ----
def write_rows(args, prompts, batches, done, too_long):
    """Writes the data folder."""
    held_out = set(random.Random(args.seed).sample(list(prompts), round(args.test_share * len(prompts))))
    files, left_out = {"scored": [], "test_scored": []}, Counter()
    left_out.update({"prompt longer than --max_prompt_length": too_long} if too_long else {})
    for policy in named(args.models):
        for i, batch in enumerate(batches):
            for key, (response, reward, problem) in zip(batch, done[policy, i]):
                if problem:
                    left_out[problem] += 1
                    continue
                row = {"prompt": json.loads(key), "response": response, "reward": reward, "policy": policy}
                files["test_scored" if key in held_out else "scored"].append(row)
    if not files["scored"]:
        fail(f"no answer to learn from ({dict(left_out)})")
    write_folder(Path(args.output), files, {
        "source": f"label_rollouts.py: {args.data} ({args.split}), scored by {args.reward_model}",
        "models": named(args.models), "seed": args.seed, "samples": args.samples, "prompts": len(prompts),
        "left_out": left_out})


def main(args):
    models, output = named(args.models), Path(args.output)
    check_output(output, args.overwrite, args.data, args.reward_model, *models.values())
    torch.backends.cuda.enable_cudnn_sdp(False)               # it prepares a plan for each length of a row
    # A process that is done waits for the others, perhaps for hours.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    dtype = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
    tokenizers = {name: load_tokenizer(folder) for name, folder in models.items()}
    prompts, too_long = read_prompts(args, tokenizers)
    scorer_tokenizer = load_tokenizer(args.reward_model)
    scorer = load_model(AutoModelForSequenceClassification, args.reward_model, scorer_tokenizer, length=0,
                        trained=True, dtype=dtype).eval().to(accelerator.device)
    if scorer.config.num_labels != 1:
        fail(f"{args.reward_model}: has {scorer.config.num_labels} labels, not one")
    for key in prompts:                                       # a template that refuses one does so now
        encode_conversation(scorer.config, scorer_tokenizer, json.loads(key), "An answer.")

    folder = output.with_name(output.name + ".answers")
    settings = asdict(args) | {"prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()}
    del settings["overwrite"]
    if accelerator.is_main_process:
        begin(folder, settings, args.overwrite)
    accelerator.wait_for_everyone()
    done = read_answers(folder)
    accelerator.wait_for_everyone()                           # all have read what is there before one writes
    order = [key for key in prompts for _ in range(args.samples)]
    batches = [order[start:start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    accelerator.print(f"{len(prompts)} prompts, {len(models)} policies, {accelerator.num_processes} "
                      f"processes: {len(done)} of {len(batches) * len(models)} batches are there")
    for name in models:
        missing = [i for i in range(len(batches)) if (name, i) not in done]
        mine = missing[accelerator.process_index::accelerator.num_processes]
        if not mine:
            continue
        length = args.max_prompt_length + args.max_response_length
        policy = load_model(AutoModelForCausalLM, models[name], tokenizers[name], length, dtype=dtype)
        policy = policy.eval().to(accelerator.device)
        for i in tqdm(mine, f"answers of {name}", disable=not accelerator.is_main_process):
            # A seed for each batch: its answers depend neither on where a run was stopped nor on processes.
            torch.manual_seed(random.Random(f"{args.seed} {name} {i}").getrandbits(62))
            prompt_ids = [prompts[key][name] for key in batches[i]]
            answers = answer_batch(policy, tokenizers[name], scorer, scorer_tokenizer,
                                   map(json.loads, batches[i]), prompt_ids, args.max_response_length)
            with open(folder / f"{accelerator.process_index}.jsonl", "a") as log:
                log.write("\n" + json.dumps([name, i, answers]))               # the last may be half written
        del policy                                            # room for the next
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_rows(args, prompts, batches, read_answers(folder), too_long)
        shutil.rmtree(folder)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args(Args, sys.argv[1:]))
