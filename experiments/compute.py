"""Time, memory and efficiency of a step of DVPO, PPO, ReMax and GRPO (the paper's Tables 6 and 7).

Hypothesis  A DVPO step takes 0.57 of the time and 0.66 of the memory of a PPO step (Table 7, 3B): one model
            learns instead of two, and three are in memory instead of four.
Method      The scripts' own main() runs, with models of a shape but random weights, random prompts, and
            answers that end at a length drawn from LENGTHS: real answers differ in length. Methods take
            turns, --rounds times, in one process; the first step of each turn warms up. Memory: the most that
            tensors held at a time, weights and Adam's state included. Utilisation: floating point operations
            of the update (6 per weight and token, and attention; recomputation not counted) by time, against
            the fastest matrix product on this device. Generation: against the time it takes to read weights
            and key-value cache once per token, at the copying speed of this device.
Command     python experiments/compute.py --shape tiny                    (CPU: about 4 minutes; make compute)
            python experiments/compute.py --shape llama-3.2-1b --prompt_length 1024 --response_length 512 \\
                --batch_size 16 --mini_batch_size 8 --micro_batch_size 4 --gradient_checkpointing    (80 GB)
            python experiments/compute.py --shape llama-3.2-3b --prompt_length 1024 --response_length 1024 \\
                --batch_size 8 --mini_batch_size 4 --micro_batch_size 2 --gradient_checkpointing     (140 GB)
Result      experiments/results/compute.json and .md: a table per shape and machine, written after every turn
"""
import argparse
import gc
import importlib
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from unittest import mock

import claims                                                 # first: it finds the project's root
import atlas
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig

METHODS = {"DVPO": "train_dvpo", "PPO": "baselines.ppo", "ReMax": "baselines.remax", "GRPO": "baselines.grpo"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "head_dim", "num_key_value_heads", "tie_word_embeddings")
SHAPES = {shape: dict(zip(SIZES, sizes)) for shape, sizes in {
    "tiny": (1024, 128, 384, 3, 4, 32, 4, True),                               # the model of Atlas
    "100m": (32000, 768, 2048, 12, 12, 64, 12, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 64, 8, True),
    "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 128, 8, True),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 128, 8, False)}.items()}
PAPER = {"DVPO": (13.00, 27.50), "PPO": (23.00, 41.43), "ReMax": (44.13, 26.87), "GRPO": (22.17, 28.20)}
PARTS = ("generate", "score", "update")                       # PAPER: Table 7, 3B, seconds and GB
# Lengths of one policy's answers in words, by its 99th percentile: median over the answers of 48 policies to
# AlpacaEval of the quantiles 0.05, 0.15, ... 0.95.
LENGTHS = [(0.0, 0.01), (0.05, 0.03), (0.15, 0.09), (0.25, 0.14), (0.35, 0.20), (0.45, 0.27), (0.55, 0.32),
           (0.65, 0.37), (0.75, 0.44), (0.85, 0.52), (0.95, 0.69), (1.0, 1.0)]


# ---- 1. The stage scripts, with random weights and lengths of our choice ----
def write_inputs(folder, shape):
    """Model folders without weights: config.json and Atlas' tokenizer; and a data folder with prompts."""
    atlas.write_base_model(folder / "model", seed=1, hidden_size=32, layers=1)
    (folder / "model" / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, bos_token_id=None, num_labels=1)
    config.reward_model = {"reward_mean": 0.0, "reward_std": 1.0}
    config.gvm = config.reward_model | {"gamma": 1.0, "tau_pairs": 0, "max_length": 8192}
    for name in ("model", "gvm", "reward_model"):
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    claims.write_lines(folder / "data" / "rl.jsonl", [{"prompt": f"question {i}"} for i in range(256)])
    return config


def answer_length(share, longest):
    """The length that this share of answers stays below: LENGTHS, linear in between. At least 1."""
    (p, low), (q, high) = next(pair for pair in zip(LENGTHS, LENGTHS[1:]) if share <= pair[1][0])
    return max(1, round(longest * (low + (high - low) * (share - p) / (q - p))))


class Ends:
    """In place of rollout's stop_ids: answers end at these lengths. It is asked for each row's new token."""

    def __init__(self, lengths):
        self.left = deque(lengths)

    def __contains__(self, token):
        left = self.left.popleft() - 1
        if left > 0:
            self.left.append(left)
        return left <= 0


def turn(method, args, folder, device, steps):
    """Some steps of a method, which reads, writes and samples what it is given here. Returns its metrics."""
    script, rng = importlib.import_module(METHODS[method]), random.Random(args.seed)
    sample = script.rollout

    def load_model(auto_class, name, tokenizer, length, trained=False, dtype=torch.float32, **settings):
        with torch.device(device):
            model = auto_class.from_config(AutoConfig.from_pretrained(name, **settings), dtype=dtype)
        if model.can_generate():
            model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id])
        return model

    def rollout(policy, prompts, max_response_length, stop_ids, **greedy):
        lengths = [answer_length(rng.random(), max_response_length) for _ in prompts]
        return sample(policy, prompts, max_response_length, Ends(lengths), **greedy)

    settings = vars(args) | dict(
        model=str(folder / "model"), data=str(folder / "data"), output=str(folder / "run"), overwrite=True,
        gvm=str(folder / "gvm"), reward_model=str(folder / "reward_model"), lr=1e-6, target_kl=1e9,
        steps=steps, group_size=4, max_prompt_length=args.prompt_length,
        max_response_length=args.response_length)
    settings = {name: x for name, x in settings.items() if name in script.Args.__dataclass_fields__}
    gc.collect()
    torch.cuda.empty_cache()
    with mock.patch.multiple(
            script, load_model=load_model, rollout=rollout, save_run=lambda *rest: None,
            encode_prompt=lambda *rest: [rng.randrange(10, 500) for _ in range(args.prompt_length)]):
        script.main(script.Args(**settings))
    return claims.read_lines(folder / "run" / "metrics.jsonl")


# ---- 2. What the device can do ----
def peak_memory(function, device):
    """The most bytes that tensors made by the function hold at a time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()                                 # negative where memory is given back
        most = max(most, held)
    return most


def device_speed(device, dtype):
    """(floating point operations per second of a matrix product, bytes per second that a copy moves)."""
    n, size = (8192, 2 ** 30) if device == "cuda" else (1024, 2 ** 27)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    x, y = torch.empty(2, size, dtype=torch.uint8, device=device)
    found = []
    for function in (lambda: a @ b, lambda: y.copy_(x)):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            function().flatten()[0].item()                    # waits for the GPU
            seconds.append(time.perf_counter() - start)
        found.append(min(seconds))
    return 2 * n ** 3 / found[0], 2 * size / found[1]


def update_flops(config, lengths, prompt_length, epochs, models):
    """Floating point operations of a step's updates. lengths: response lengths of the rollouts, in tokens."""
    weights, total = body_weights(config), 0
    for length in lengths:
        tokens = prompt_length + length
        attention = 2 * config.num_hidden_layers * config.hidden_size * tokens ** 2      # causal: half of all
        total += models * (6 * weights * tokens + 3 * attention)
        total += 6 * config.vocab_size * config.hidden_size * length           # output layer, at the response
    return total * epochs


def body_weights(config):
    """Weights of the layers, without embedding and output layer."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * heads
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def generation_bound(config, args, length, bytes_per_number, bandwidth):
    """Seconds that a batch of rollouts takes at least: all weights are read once per token of the longest
    answer, the key-value cache of a row once per token of the row. length: mean answer, in tokens."""
    weights = body_weights(config) + config.vocab_size * config.hidden_size
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cache = args.batch_size * length * (args.prompt_length + length / 2) * per_token
    return bytes_per_number * (args.response_length * weights + cache) / bandwidth


# ---- 3. Run ----
def measure(args):
    """Yields the result after every turn: a limit of time then costs the last turn, not all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if device == "cuda" else "no"
    found, turns = {method: {"seconds": []} for method in args.methods}, []
    with tempfile.TemporaryDirectory() as folder:
        config = write_inputs(Path(folder), args.shape)
        speed = device_speed(device, torch.bfloat16 if device == "cuda" else torch.float32)
        for number in range(args.rounds):
            first = number % len(args.methods)                # who begins a round has no advantage of it
            for method in args.methods[first:] + args.methods[:first]:
                def work():
                    turns.append(turn(method, args, Path(folder), device, args.steps + 1))

                if device == "cuda" or number == 0:
                    found[method]["peak"] = peak_memory(work, device)
                if device == "cpu":                           # once more: the profiler takes time
                    work()
                found[method]["seconds"] += turns[-1][1:]     # the first step warms up
                yield summary(args, config, found, device, *speed) | {"rounds": number + 1}


def summary(args, config, found, device, flops, bandwidth):
    """What the turns so far have found."""
    cpu = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}"
    result = {"shape": args.shape, "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
              "torch": torch.__version__, "commit": claims.commit(), "matmul_flops": flops,
              "bandwidth": bandwidth, "methods": {},
              "settings": {name: x for name, x in vars(args).items() if name not in ("output", "shape")}}
    for method, x in [(method, x) for method, x in found.items() if x["seconds"]]:
        median = {part: statistics.median(row[f"seconds_{part}"] for row in x["seconds"]) for part in PARTS}
        length, step = statistics.mean(row["response_length"] for row in x["seconds"]), sum(median.values())
        # ReMax makes one pass over the batch, and generates twice.
        remax, models = method == "ReMax", 2 if method == "PPO" else 1
        work = update_flops(config, [length] * args.batch_size, args.prompt_length,
                            1 if remax else args.ppo_epochs, models)
        bound = generation_bound(config, args, length, 2 if device == "cuda" else 4, bandwidth) * (1 + remax)
        result["methods"][method] = median | {
            "step": step, "tokens_per_second": length * args.batch_size / step, "peak": x["peak"],
            "utilisation": work / median["update"] / flops, "generation": bound / median["generate"]}
    return result


def table(result):
    """The section of compute.md for one shape and machine."""
    methods, rows = result["methods"], []
    for method, x in methods.items():
        learning = {name: one["score"] + one["update"] for name, one in methods.items()}
        ratios = [f"{learning[method] / learning['PPO']:.2f}" if "PPO" in methods else ""]
        for column, name in enumerate(("step", "peak")):
            ours = f"{x[name] / methods['PPO'][name]:.2f}" if "PPO" in methods else ""
            paper = f" ({PAPER[method][column] / PAPER['PPO'][column]:.2f})" if method in PAPER else ""
            ratios.append(ours + paper)
        seconds = [f"{x[part]:.3f}" for part in (*PARTS, "step")]
        rows.append([method, *seconds, f"{x['tokens_per_second']:.0f}", f"{x['peak'] / 2 ** 20:.0f}",
                     f"{x['utilisation']:.0%}", f"{x['generation']:.0%}", *ratios])
    settings = ", ".join(f"{name} {x}" for name, x in result["settings"].items() if name != "methods")
    return [f"## {result['shape']}, {result['device']}", "",
            f"`python experiments/compute.py --shape {result['shape']}`, {settings}; finished "
            f"{result['rounds']}, medians; torch {result['torch']}, commit {result['commit']}. Products "
            f"{result['matmul_flops'] / 1e12:.3g} TFLOP/s, copying {result['bandwidth'] / 1e9:.3g} GB/s.", "",
            *claims.table("method | generate, s | score, s | update, s | step, s | tokens/s | peak, MiB | "
                          "utilisation, update | generation against its bound | score + update / PPO | "
                          "time / PPO (paper, 3B) | memory / PPO (paper, 3B)", rows)]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    for name, value in (("prompt_length", 64), ("response_length", 128), ("batch_size", 64), ("steps", 3),
                        ("mini_batch_size", 32), ("micro_batch_size", 8), ("ppo_epochs", 2), ("rounds", 5),
                        ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--output", default=str(claims.ROOT / "experiments/results"), help="for the result")
    args = parser.parse_args()
    file, same = Path(args.output, "compute.json"), ("shape", "device", "settings")
    head = ["# Time and memory of a step", "", "What is measured, and how: [compute.py](../compute.py). The "
            "paper's figures (Table 7) are of Llama-3.2-3B on 8 x A100 with ZeRO-1, in its own code."]
    for result in measure(args):
        kept = json.loads(file.read_text()) if file.exists() else []           # others' results stay
        kept = [old for old in kept if any(old[name] != result[name] for name in same)] + [result]
        lines = head + [line for one in kept for line in ["", *table(one)]]
        claims.write_result(args.output, "compute", kept, lines)
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
