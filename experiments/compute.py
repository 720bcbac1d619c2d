"""Time, memory and efficiency of a step of DVPO, PPO, ReMax and GRPO (the paper's Tables 6 and 7).

Hypothesis  A DVPO step takes 0.57 of the time and 0.66 of the memory of a PPO step (Table 7, 3B): one model learns
            instead of two, and three are in memory instead of four.
Method      The scripts' own main() runs, with models of a shape but random weights (no weights are needed), prompts of
            --prompt_length random tokens, and answers that end at a length drawn from LENGTHS: real answers differ in
            length. Methods take turns, --rounds times, in one process; the first step of each turn warms up. Every
            method gets as many rollouts. Memory: the most that tensors held at a time in a step, weights and Adam's
            state included (the process's own memory is mostly the libraries').
            Utilisation: floating point operations of the update (6 per weight and token, and attention; recomputation
            not counted) by time, against the fastest matrix product on this device. Generation: against the time it
            takes to read weights and key-value cache once per token, at the copying speed measured on this device.
Command     python experiments/compute.py --shape tiny                     (CPU: about 4 minutes; make compute)
            python experiments/compute.py --shape llama-3.2-1b --prompt_length 1024 --response_length 512 \\
                --batch_size 16 --mini_batch_size 8 --micro_batch_size 4 --gradient_checkpointing   (one GPU of 80 GB)
            python experiments/compute.py --shape llama-3.2-3b --prompt_length 1024 --response_length 1024 \\
                --batch_size 8 --mini_batch_size 4 --micro_batch_size 2 --gradient_checkpointing   (one GPU of 140 GB)
Result      experiments/results/compute.json and compute.md: one table per shape and machine
"""
import argparse
import gc
import importlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
METHODS = {"DVPO": "train_dvpo", "PPO": "baselines.ppo", "ReMax": "baselines.remax", "GRPO": "baselines.grpo"}
# Published configurations of the Llama models; "tiny" is the model of Atlas.
SHAPES = {
    "tiny": dict(vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=4, tie_word_embeddings=True),
    "100m": dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                 num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True),
    "llama-3.2-1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                         num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
    "llama-3-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)}
PAPER = {"PPO": (41.43, 23.00), "ReMax": (26.87, 44.13), "GRPO": (28.20, 22.17), "DVPO": (27.50, 13.00)}  # GB, s; 3B
PARTS = ("generate", "score", "update")
# Lengths of the answers of one policy, in words, by the policy's 99th percentile: median over 48 policies' answers to
# AlpacaEval of the quantiles 0.05, 0.15, ... 0.95. Rows as long as the longest would be padding for the most part.
LENGTHS = [(0.0, 0.01), (0.05, 0.03), (0.15, 0.09), (0.25, 0.14), (0.35, 0.20), (0.45, 0.27), (0.55, 0.32),
           (0.65, 0.37), (0.75, 0.44), (0.85, 0.52), (0.95, 0.69), (1.0, 1.0)]


# ---- 1. The stage scripts, with random weights and lengths of our choice ----
def write_inputs(folder, shape):
    """A model folder without weights: config.json and Atlas' tokenizer; and a data folder with prompts."""
    import atlas
    atlas.write_base_model(folder / "model", seed=1, hidden_size=32, layers=1)
    (folder / "model" / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, bos_token_id=None, num_labels=1)
    for name, kind in (("model", "CausalLM"), ("gvm", "TokenClassification"),
                       ("reward_model", "SequenceClassification")):
        config.architectures = [f"LlamaFor{kind}"]
        config.gvm = {"gamma": 1.0, "tau_pairs": 0, "max_length": 8192, "reward_mean": 0.0, "reward_std": 1.0}
        config.reward_model = {"reward_mean": 0.0, "reward_std": 1.0}
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    rows = [json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(256)]
    (folder / "data" / "rl.jsonl").write_text("".join(rows))
    return config


def answer_length(share, longest):
    """The length that this share of answers stays below: LENGTHS, linear in between. At least 1."""
    (p, low), (q, high) = next(pair for pair in zip(LENGTHS, LENGTHS[1:]) if share <= pair[1][0])
    return max(1, round(longest * (low + (high - low) * (share - p) / (q - p))))


class Ends:
    """In place of rollout's stop_ids: answers end at these lengths. It is asked once per token, row after row."""

    def __init__(self, lengths):
        self.left = deque(lengths)

    def __contains__(self, token):
        left = self.left.popleft() - 1
        if left > 0:
            self.left.append(left)
        return left <= 0


def set_up(script, args, device):
    """Replaces what a script reads, writes and samples; not what it computes."""
    names = "load_model", "rollout", "score_rollouts", "ppo_update", "remax_update", "encode_prompt", "save_run"
    real = {name: getattr(script, name) for name in names if hasattr(script, name)}
    rng = random.Random(args.seed)

    def load_model(auto_class, name, tokenizer, length, trained=False, dtype=torch.float32, **settings):
        with torch.device(device):
            model = auto_class.from_config(AutoConfig.from_pretrained(name, **settings), dtype=dtype)
        if model.can_generate():
            model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id])
        return model

    def rollout(policy, prompts, max_response_length, stop_ids, **greedy):
        lengths = [answer_length(rng.random(), max_response_length) for _ in prompts]
        return real["rollout"](policy, prompts, max_response_length, Ends(lengths), **greedy)

    def finished(function):
        """The function, which returns when the GPU has done its work, too: so that each part has its own time."""
        def call(*rest):
            result = function(*rest)
            if device == "cuda":
                torch.cuda.synchronize()
            return result
        return call

    script.load_model, script.rollout = load_model, rollout
    for name in ("score_rollouts", "ppo_update", "remax_update"):
        if name in real:
            setattr(script, name, finished(real[name]))
    script.encode_prompt = lambda tokenizer, prompt: [rng.randrange(10, 500) for _ in range(args.prompt_length)]
    script.save_run = lambda *rest: None
    return real


def turn(method, args, folder, device, steps):
    """Some steps of a method. Returns its metrics per step."""
    script = importlib.import_module(METHODS[method])
    real = set_up(script, args, device)
    settings = dict(model=str(folder / "model"), data=str(folder / "data"), output=str(folder / "run"), overwrite=True,
                    max_prompt_length=args.prompt_length, max_response_length=args.response_length, lr=1e-6,
                    steps=steps, batch_size=args.batch_size, micro_batch_size=args.micro_batch_size,
                    seed=args.seed, target_kl=1e9,
                    ppo_epochs=args.ppo_epochs, mini_batch_size=args.mini_batch_size,
                    gradient_checkpointing=args.gradient_checkpointing, group_size=4,
                    gvm=str(folder / "gvm"), reward_model=str(folder / "reward_model"))
    fields = script.Args.__dataclass_fields__
    try:
        script.main(script.Args(**{name: value for name, value in settings.items() if name in fields}))
    finally:
        for name, function in real.items():
            setattr(script, name, function)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


# ---- 2. What the device can do ----
def peak_memory(function, device):
    """The most bytes that tensors made by the function hold at a time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()                                 # negative where memory is given back
        most = max(most, held)
    return most


def fastest(function, device, tries=5):
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def device_speed(device, dtype):
    """(floating point operations per second of a matrix product, bytes per second of a copy: read and written)."""
    n, size = (8192, 2 ** 30) if device == "cuda" else (1024, 2 ** 27)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * n ** 3 / fastest(lambda: a @ b, device), 2 * size / fastest(lambda: y.copy_(x), device)


def update_flops(config, lengths, prompt_length, epochs, models):
    """Floating point operations of a step's updates. lengths: response lengths of the rollouts, in tokens."""
    weights = body_weights(config)
    total = 0
    for length in lengths:
        tokens = prompt_length + length
        attention = config.num_hidden_layers * config.hidden_size * tokens ** 2    # causal: half of 2 x 2 x L x H x T^2
        total += models * (6 * weights * tokens + 3 * 2 * attention)
        total += 6 * config.vocab_size * config.hidden_size * length           # the output layer, at response positions
    return total * epochs


def body_weights(config):
    """Weights of the layers, without embedding and output layer."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_attention_heads)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def generation_bound(config, args, length, bytes_per_number, bandwidth):
    """Seconds that a batch of rollouts takes at least: all weights are read once per token of the longest answer, and
    the key-value cache of a row once per token of the row. length: mean answer, in tokens."""
    weights = body_weights(config) + config.vocab_size * config.hidden_size
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = args.batch_size * length * (args.prompt_length + length / 2) * per_token
    return bytes_per_number * (args.response_length * weights + cache) / bandwidth


# ---- 3. Run ----
def measure(args):
    """Yields the result after every round: a limit of time then costs the last round, not all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if device == "cuda" else "no"
    found = {method: {"seconds": []} for method in args.methods}
    with tempfile.TemporaryDirectory() as folder:
        config = write_inputs(Path(folder), args.shape)
        flops, bandwidth = device_speed(device, dtype)
        for method in args.methods:                           # the second step has Adam's state from its beginning
            found[method]["peak"] = peak_memory(lambda: turn(method, args, Path(folder), device, 2), device)
        for number in range(args.rounds):
            first = number % len(args.methods)                 # whoever begins a round has no advantage of it
            for method in args.methods[first:] + args.methods[:first]:
                rows = turn(method, args, Path(folder), device, args.steps + 1)[1:]            # the first warms up
                found[method]["seconds"] += [{part: row[f"seconds_{part}"] for part in PARTS} |
                                             {"tokens": row["response_length"] * args.batch_size} for row in rows]
                print(f"round {number + 1}: {method} {sum(rows[-1][f'seconds_{part}'] for part in PARTS):.3f} s",
                      file=sys.stderr)
            yield summary(args, config, found, device, flops, bandwidth) | {"rounds": number + 1}


def summary(args, config, found, device, flops, bandwidth):
    """What the rounds so far have found."""
    result = {"shape": args.shape, "device": torch.cuda.get_device_name() if device == "cuda" else
              f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}",
              "torch": torch.__version__, "matmul_flops": flops, "bandwidth": bandwidth, "methods": {}, "settings": {
                  name: x for name, x in vars(args).items() if name not in ("output", "shape")}}
    for method, x in found.items():
        median = {part: statistics.median(row[part] for row in x["seconds"]) for part in PARTS}
        tokens = statistics.mean(row["tokens"] for row in x["seconds"])
        # ReMax makes one pass over the batch; GRPO and the others make --ppo_epochs.
        work = update_flops(config, [tokens / args.batch_size] * args.batch_size, args.prompt_length,
                            1 if method == "ReMax" else args.ppo_epochs, 2 if method == "PPO" else 1)
        step = sum(median.values())
        bound = generation_bound(config, args, tokens / args.batch_size, 2 if device == "cuda" else 4, bandwidth)
        result["methods"][method] = median | {
            "step": step, "tokens_per_second": tokens / step,
            "peak": x["peak"], "utilisation": work / median["update"] / flops,
            "generation": (2 if method == "ReMax" else 1) * bound / median["generate"]}
    return result


def table(result):
    """The section of results/compute.md for one shape and machine."""
    s, methods = result["settings"], result["methods"]
    lines = [f"## {result['shape']}, {result['device']}", "",
             f"`python experiments/compute.py --shape {result['shape']}` with {s['batch_size']} rollouts a step, "
             f"prompts of {s['prompt_length']} and answers of at most {s['response_length']} "
             f"tokens, mini-batches of {s['mini_batch_size']}, micro-batches of {s['micro_batch_size']}, "
             f"{s['ppo_epochs']} epochs, gradient checkpointing "
             f"{s['gradient_checkpointing']}; {result['rounds']} rounds of {s['steps']} steps, medians; "
             f"seed {s['seed']}, torch {result['torch']}, commit {result['commit']}. Matrix product "
             f"{result['matmul_flops'] / 1e12:.3g} TFLOP/s, copying {result['bandwidth'] / 1e9:.3g} GB/s.", "",
             "| | generate, s | score, s | update, s | step, s | tokens/s | peak memory, MiB | utilisation, update | "
             "generation against its bound | time / PPO (paper, 3B) | memory / PPO (paper, 3B) |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for method, x in methods.items():
        ratios = []
        for name, column in (("step", 1), ("peak", 0)):
            ours = f"{x[name] / methods['PPO'][name]:.2f}" if "PPO" in methods else ""
            paper = f" ({PAPER[method][column] / PAPER['PPO'][column]:.2f})" if method in PAPER else ""
            ratios.append(ours + paper)
        lines.append(f"| {method} | {x['generate']:.3f} | {x['score']:.3f} | {x['update']:.3f} | {x['step']:.3f} | "
                     f"{x['tokens_per_second']:.0f} | {x['peak'] / 2 ** 20:.0f} | {x['utilisation']:.0%} | "
                     f"{x['generation']:.0%} | {ratios[0]} | {ratios[1]} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    for name, value in (("prompt_length", 64), ("response_length", 128), ("batch_size", 64), ("mini_batch_size", 32),
                        ("micro_batch_size", 8), ("ppo_epochs", 2), ("rounds", 5), ("steps", 3), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--output", default=str(ROOT / "experiments" / "results"), help="folder of compute.json and compute.md")
    args = parser.parse_args()
    file = Path(args.output) / "compute.json"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else "unknown"
    for result in measure(args):
        kept = json.loads(file.read_text()) if file.exists() else []
        same = ("shape", "device", "settings")                 # a measurement is only replaced by its repetition
        kept = [old for old in kept if any(old[name] != result[name] for name in same)] + [result | {"commit": commit}]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=2) + "\n")
        head = ["# Time and memory of a step", "", "What is measured, and how: "
                "[experiments/compute.py](../compute.py). The paper's figures (Table 7) are of "
                "Llama-3.2-3B on 8 x A100 with ZeRO-1, in its own code."]
        (Path(args.output) / "compute.md").write_text("\n".join(
            head + [line for one in kept for line in ["", *table(one)]]) + "\n", encoding="utf-8")
    print("\n".join(table(kept[-1])))


if __name__ == "__main__":
    main()
