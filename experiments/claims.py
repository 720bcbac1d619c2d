"""What the experiments of `make claims` share: runs that are made once, the truth about a policy, the report.

An experiment is a script of its own; it imports this file and the stages, never another experiment. The
world, models and policies of one seed are side by side in runs/claims/seedN. An experiment asks `train` for a
run; one that is there is not made again, so that a stopped `make claims` goes on.
"""
import argparse
import gc
import hashlib
import importlib
import itertools
import json
import multiprocessing.connection
import operator
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
matplotlib.use("Agg")
transformers_logging.set_verbosity_error()
import atlas  # noqa: E402
import evaluate  # noqa: E402
import train_dvpo  # noqa: E402

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LONGEST = 64                                                  # tokens of an answer, as in the scripts


# ---- 1. Runs ----
@contextmanager
def words_to(path):
    """What is printed goes to a file: several seeds at a time would talk at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def world(folder, seed, scale):
    """Data and base model of one seed; below scale 1, that share of the rows. Returns the data folder."""
    data = folder / "data"
    if not (data / "manifest.json").exists():
        with words_to(folder / "world.log"):
            atlas.write_world(folder, seed, overwrite=True)
    if scale < 1:
        files = json.loads((data / "manifest.json").read_text())["files"]
        for name in ("sft", "scored", "pairs", "test_scored", "test_pairs", "test_prompts"):
            rows = max(round(scale * files[f"{name}.jsonl"]["rows"]), 16 if name == "test_prompts" else 96)
            write_lines(data / f"{name}.jsonl", read_lines(data / f"{name}.jsonl")[:rows])
    return data


def train(script, output, **flags):
    """Runs a training script with these flags, unless `output` holds that very run. Returns `output`.
    Like make, it runs again if the data or the weights that the run has read are newer than the run."""
    stage = importlib.import_module(script)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    args = stage.Args(output=str(output), overwrite=True, **flags)
    made = output / "model.safetensors"
    inputs = [file for value in flags.values() if isinstance(value, str) for file in Path(value).glob("*")
              if file.suffix in (".jsonl", ".safetensors")]
    if not made.exists() or json.loads((output / "args.json").read_text()) != asdict(args) or any(
            file.stat().st_mtime_ns > made.stat().st_mtime_ns for file in inputs):
        with words_to(output.with_name(f"{output.name}.log")):
            stage.main(args)
        gc.collect()
        torch.cuda.empty_cache()                              # nothing, without CUDA
    return output


def base(folder, seed, scale, most=40):
    """What all experiments start from: SFT model, flags for all stages, flags of an online method with up to
    this many steps of 64 rollouts."""
    start = {"data": world(folder, seed, scale), "seed": seed}
    sft = train("sft", folder / "sft", model=folder / "base", **start)
    return sft, start, start | {"model": sft, "steps": steps(scale, most)}


def file_name(words):
    return "".join(c if c.isalnum() else "_" for c in words)


def steps(scale, most):
    return max(2, round(scale * most))


def train_gvm(output, sft, start, **flags):
    """A GVM. Two passes over the data: four, as in the demo, rank held-out pairs no better."""
    return train("train_gvm", output, model=sft, **({"epochs": 2} | start | flags))


def train_reward_model(output, sft, start, **flags):
    return train("baselines.reward_model", output, model=sft, **({"epochs": 2} | start | flags))


def judge(log, sft, policies, start, **flags):
    """Answers to held-out questions: {name of run folder: {"score", "nats" of KL to sft, "length"}}."""
    models = [str(sft), *map(str, dict.fromkeys(policies))]
    args = evaluate.PolicyArgs(models=models, data=str(start["data"]), seed=start["seed"], **flags)
    with words_to(log):
        found = evaluate.evaluate_policy(args)["models"]
    return {name: {"score": x["score"]["mean"], "nats": x["kl"]["mean"], "length": x["response_length"]}
            for name, x in found.items()}


# ---- 2. Values and truth ----
def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    """Writes the rows, unless the file holds them: then the runs made of them are still good."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def prompts_of(start):
    """The held-out prompts."""
    return [row["prompt"] for row in read_lines(start["data"] / "test_prompts.jsonl")]


def pair_accuracy(gvm):
    """What train_gvm.py measured at its end on held-out pairs: {"mean" value: share, "last" value: share}."""
    measured = read_lines(gvm / "metrics.jsonl")[-1]
    return {name: measured[f"pair_accuracy/{name}"] for name in ("mean", "last")}


def step_seconds(run):
    """Seconds of each step of a run."""
    return [sum(x for name, x in row.items() if name.startswith("seconds"))
            for row in read_lines(Path(run) / "metrics.jsonl")]


def by_step(run, measure):
    """[[measure(rollout) for the rollouts of a step] for each step of a run]."""
    found = {}
    for row in read_lines(run / "rollouts.jsonl"):
        found.setdefault(row["step"], []).append(measure(row))
    return [found[step] for step in sorted(found)]


def score(row):
    return atlas.oracle(row["prompt"], row["response"])


def load_policy(folder):
    """(model, tokenizer)."""
    tokenizer = train_dvpo.load_tokenizer(str(folder))
    return train_dvpo.load_model(AutoModelForCausalLM, str(folder), tokenizer, LONGEST).eval(), tokenizer


def sequence(tokenizer, prompt, response):
    """(prompt ids, response ids with the end) of a finished answer."""
    return evaluate.encode_prompt(tokenizer, prompt), evaluate.encode_response(tokenizer, response)


def sequences(tokenizer, rows, *sides):
    return [sequence(tokenizer, row["prompt"], row[side]) for row in rows for side in sides or ["response"]]


def answers(policy, tokenizer, prompts):
    """One sampled answer to each prompt, as (prompt ids, response ids)."""
    ids = [evaluate.encode_prompt(tokenizer, prompt) for prompt in prompts]
    return list(zip(ids, train_dvpo.rollout(policy, ids, LONGEST, policy.generation_config.eos_token_id)))


def text(tokenizer, response):
    return tokenizer.decode(response, skip_special_tokens=True)


def completions(policy, prefixes, n):
    """n full responses (id lists) to each (prompt ids, first response ids), sampled from a language model; an
    answer that has ended, or is as long as an answer may be, is its only one."""
    stop_ids = policy.generation_config.eos_token_id
    finished = [bool(said) and (said[-1] in stop_ids or len(said) >= LONGEST) for _, said in prefixes]
    rows = [i for i, done in enumerate(finished) if not done for _ in range(n)]
    found = [[list(said)] if done else [] for (_, said), done in zip(prefixes, finished)]
    for start in range(0, len(rows), 2048):
        some = rows[start:start + 2048]
        longest = LONGEST - min(len(prefixes[i][1]) for i in some)
        asked = [[*prefixes[i][0], *prefixes[i][1]] for i in some]
        for i, tail in zip(some, train_dvpo.rollout(policy, asked, longest, stop_ids)):
            found[i].append([*prefixes[i][1], *tail][:LONGEST])
    return found


def true_values(prompts, tokenizer, completed):
    """Q^pi of each prefix from its completions and the oracle: [(mean, squared standard error), ...]."""
    found = []
    for prompt, responses in zip(prompts, completed, strict=True):
        scores = [atlas.oracle(prompt, text(tokenizer, response)) for response in responses]
        noise = statistics.variance(scores) / len(scores) if len(scores) > 1 else 0.0
        found.append((statistics.mean(scores), noise))
    return found


def own_states(folder, prompts, most, n, seed):
    """A language model's answers, [(prompt, (prompt ids, response ids)), ...]; in the same form, of the first
    `most` of them, prefixes that end at a random token (never the last); the true values of these."""
    policy, tokenizer = load_policy(folder)
    torch.manual_seed(seed)                           # the same draws whether the runs were there or not
    rng, said, states = random.Random(seed), list(zip(prompts, answers(policy, tokenizer, prompts))), []
    for prompt, (question, response) in said[:most]:
        share = rng.random()                          # of a prompt: the same place in every policy's answer
        if len(response) > 1:
            states.append((prompt, (question, response[:1 + int(share * (len(response) - 1))])))
    completed = completions(policy, [sequence for _, sequence in states], n)
    return said, states, true_values([prompt for prompt, _ in states], tokenizer, completed)


def true_value_of_program(policy, row, tokenizer, response, count, n):
    """Q of a behaviour policy after the first `count` tokens of an answer, from n completions: (mean, squared
    standard error). None where these tokens end inside a character."""
    prefix = text(tokenizer, response[:count])
    if not row["response"].startswith(prefix):
        return None
    end = atlas.END if count == len(response) else ""
    mean, error = atlas.true_value(policy, row["prompt"], prefix + end, n)
    return mean, error ** 2


@torch.no_grad()
def token_values(folder, sequences):
    """Of [(prompt ids, response ids), ...] the values at the last prompt token and each response token,
    [[V(s_1), Q_1, ...], ...]; a GVM's in units of its scores. A critic's V(s_{t+1}), read at a_t, is its
    Q(s_t, a_t); at the end it has none. A reward model is read as if the answer ended at each token."""
    model = AutoModelForTokenClassification.from_pretrained(folder).eval().to(evaluate.DEVICE)
    values = []
    scale = getattr(model.config, "gvm", {"reward_mean": 0.0, "reward_std": 1.0})
    for prompt, response in sequences:
        q = model(torch.tensor([[*prompt, *response]], device=model.device)).logits[0, len(prompt) - 1:, 0]
        values.append((q * scale["reward_std"] + scale["reward_mean"]).tolist())
    return values


# ---- 3. Seeds ----
def parser(doc, seeds=(21, 22, 23, 24, 25), runs="runs/claims"):
    """The command line of all experiments."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="a world each, at most 10")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--scale", type=float, default=1.0, help="share of data, steps, answers: a trial")
    parser.add_argument("--runs", default=runs, help="folder for the runs")
    parser.add_argument("--output", default=str(ROOT / "experiments/results"), help="folder for the result")
    return parser


def start_worker():
    """One thread; and an end with the parent: the workers of an experiment that is killed would go on."""
    def end():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    torch.set_num_threads(1)
    threading.Thread(target=end, daemon=True).start()


@contextmanager
def workers(jobs):
    """Like itertools.starmap (a list of calls), with `jobs` calls at a time, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    pools = ProcessPoolExecutor(jobs, spawn, start_worker) if jobs > 1 else nullcontext()
    with pools as pool:
        yield lambda function, calls: (pool.map(function, *zip(*calls)) if pool and calls
                                       else itertools.starmap(function, calls))


def keep(file, run_seed, *call):
    made_with, half = f"commit {commit()}, {machine()}", file.with_suffix(".half")
    found = run_seed(*call)
    half.write_text(json.dumps({"made with": made_with, "found": found}), encoding="utf-8")
    half.replace(file)                                        # a stop leaves no half of it


def over_seeds(run_seed, args, *more):
    """{seed: run_seed(folder, seed, scale, *more)}; args.made_with: the commits and machines of these. What a
    seed found is kept until the arguments change, or the script does, up to the section that puts the answer
    together: in a file of its own, which another machine takes for its own run of that seed."""
    assert len(set(args.seeds)) == len(args.seeds) in (1, *T_95), "--seeds: 1 to 10 different ones"
    os.chdir(ROOT)
    torch.set_num_threads(1)
    script = Path(run_seed.__code__.co_filename)
    source = script.read_text(encoding="utf-8")
    source = source[source.index("\nimport "):source.index("The answer ----")]
    made_by = hashlib.sha256(json.dumps([source, args.scale, *more]).encode()).hexdigest()[:12]
    files = {seed: Path(args.runs, f"seed{seed}", f"{script.stem}_{made_by}.json") for seed in args.seeds}
    new = [seed for seed, file in files.items() if not file.exists()]
    with workers(args.jobs) as at_once:
        list(at_once(keep, [(files[seed], run_seed, files[seed].parent, seed, args.scale, *more)
                            for seed in new]))
    kept = {str(seed): json.loads(file.read_text()) for seed, file in files.items()}
    args.made_with = "; ".join(sorted({x["made with"] for x in kept.values()}))
    return {seed: x["found"] for seed, x in kept.items()}


def per_seed(seeds, *keys):
    return [reduce(operator.getitem, keys, seed) for seed in seeds.values()]


# ---- 4. Statistics and report ----
def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def interval(values):
    """Mean and 95 % interval (Student's t over the seeds): (mean, low, high)."""
    mean, n = statistics.mean(values), len(values)
    half = T_95[n] * statistics.stdev(values) / n ** 0.5 if n > 1 else float("nan")
    return mean, mean - half, mean + half


def cell(values, digits=3):
    mean, low, high = interval(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


def verdict(differences):
    """What the seeds' differences say of the claim that they are above 0, by their mean's 95 % interval."""
    _, low, high = interval(differences)
    return "confirmed" if low > 0 else "not confirmed: the reverse" if high < 0 else "not decided"


def claim(differences, what="score"):
    return verdict(differences), f"{what} {cell(differences)}"


def table(header, rows):
    """Lines of a markdown table. header "a | b"; a cell is a text, or the numbers of the seeds."""
    columns = header.split(" | ")
    return ["| " + " | ".join(x if isinstance(x, str) else cell(x) for x in row) + " |"
            for row in (columns, ["---"] * len(columns), *rows)]


def draw(panel, x, values, width=None, **style):
    """Means and 95 % intervals of values, [the numbers of the seeds, ...], at x: points, or bars."""
    means, lows, highs = zip(*map(interval, values))
    style = {"yerr": [minus(means, lows), minus(highs, means)], "capsize": 3} | style
    panel.bar(x, means, width, **style) if width else panel.errorbar(x, means, **style)


def label(panel, title, x, y, **legend):
    panel.set(title=title, xlabel=x, ylabel=y)
    panel.legend(**({"fontsize": 7} | legend))


def commit():
    """The commit that is checked out, with a + if files differ from it."""
    git = "git describe --always --dirty=+ 2>/dev/null || echo unknown"
    return subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine():
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *gpu])


def write_result(folder, name, numbers, lines):
    """NAME.json, a list of numbers to a line, and NAME.md."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = re.sub(r"(?<=[\[,\d])\n +(?=-?\d|])", " ", json.dumps(numbers, indent=1))
    Path(folder, f"{name}.json").write_text(text + "\n", encoding="utf-8")
    Path(folder, f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(doc, run_seed, answer):
    """An experiment, from the command line to experiments/results/NAME.json, .md and .png.

    doc       its docstring               run_seed(folder, seed, scale) -> what one seed found, for JSON
    answer(seeds, per_seed) -> {claim: (verdict, numbers)}, lines of markdown, a sentence, a picture; seeds is
              {seed: what it found}, per_seed("a", "b") is [found["a"]["b"] of every seed]
    """
    args, started = parser(doc).parse_args(), time.time()
    seeds, name = over_seeds(run_seed, args), Path(run_seed.__code__.co_filename).stem
    claims, tables, finding, picture = answer(seeds, partial(per_seed, seeds))
    command = f"python experiments/{name}.py --seeds {' '.join(seeds)} --scale {args.scale:g}"
    method = doc[doc.index("Hypothesis"):doc.index("Command")].rstrip().splitlines()
    lines = [f"# {doc.splitlines()[0]}", "", *(f"    {line}" for line in method), "",
             f"`{command}`, {args.made_with}. Mean over the seeds and its 95 % interval (Student's t over "
             "seeds).", "",
             *table("claim | verdict | numbers", [
                 (claim, f"**{word}**", numbers) for claim, (word, numbers) in claims.items()]),
             "", f"![{name}]({name}.png)", "", f"*{finding}*", "", *tables]
    claims = {claim: {"verdict": word, "numbers": numbers} for claim, (word, numbers) in claims.items()}
    found = {"command": command, "made with": args.made_with, "claims": claims, "finding": finding,
             "seeds": seeds}
    write_result(args.output, name, found, lines)
    picture.savefig(Path(args.output, f"{name}.png"), dpi=110, bbox_inches="tight")
    print("\n".join(lines), f"{time.time() - started:.0f} s", sep="\n")
