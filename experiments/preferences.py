"""Human preferences on real text: what does a value model know that the length of an answer does not say?

Hypothesis  A GVM trained on human preferences ranks held-out answers better than chance and better than the
            length rule, as well as a scalar reward model of the same pairs (Tables 3 and 4 of the paper).
Method      SmolLM2-135M-Instruct is the start of a GVM (--supervision pairs) and of a ScalarRM, two passes
            each, on HH-RLHF harmless pairs (people's choices) and on pairs of AlpacaEval answers (by GPT-4's
            scores). Held out by prompt. Each also on the half of the training pairs most alike in length.
            An answer's score is an aggregate of its token values (Table 8). "Longer wins" and "shorter wins"
            are the length rules. "Like length": held-out pairs whose shorter answer has at least 0.8 of the
            longer one's tokens, where a length rule knows little.
Command     python data/smollm2.py; python experiments/preferences.py --hh FILE --alpaca FILE --prompts FILE
            (HH-RLHF harmless-base test.jsonl.gz; AlpacaEval answers with scores, and their prompts)
"""
import argparse
import os
import time
from pathlib import Path

import torch

import claims
import evaluate
import prepare_data

LONGEST, ALIKE = 320, 0.8                                     # tokens of a row; shorter / longer


def write_data(folder, args):
    """{name: data folder}: both data sets, and of each the half of the pairs most alike in length."""
    tokenizer, folders = evaluate.load_tokenizer(args.model), {}
    split = {"split": [0.0, 0.8, 0.0, 0.2], "tokenizer": args.model, "pairs_per_prompt": 2}
    sources = {"HH harmless": {"format": "hh", "input": args.hh},
               "AlpacaEval": {"format": "alpaca_eval", "input": args.alpaca, "prompts": args.prompts}}
    for name, given in sources.items():
        folders[name] = folder / name.replace(" ", "_") / "data"
        if not folders[name].exists():
            prepare_data.main(prepare_data.Args(output=str(folders[name]), **split, **given))
            for file in ("pairs", "test_pairs"):              # too long is too long for all models
                rows = [row for row in claims.read_lines(folders[name] / f"{file}.jsonl")
                        if max(map(sum, lengths(tokenizer, row))) <= LONGEST]
                claims.write_lines(folders[name] / f"{file}.jsonl", rows[:round(args.scale * len(rows))])
        rows = sorted(claims.read_lines(folders[name] / "pairs.jsonl"),
                      key=lambda row: -alike(tokenizer, row))
        alike_folder = folders[name].with_name("alike")
        claims.write_lines(alike_folder / "pairs.jsonl", rows[:len(rows) // 2])
        folders[f"{name}, like lengths"] = alike_folder
    return folders


def lengths(tokenizer, row):
    """[(tokens of the prompt, of the answer)] of chosen and rejected."""
    both = claims.sequences(tokenizer, [row], "chosen", "rejected")
    return [tuple(map(len, sequence)) for sequence in both]


def alike(tokenizer, row):
    (_, a), (_, b) = lengths(tokenizer, row)
    return min(a, b) / max(a, b)


def accuracies(scores, rows, tokenizer, seed):
    """{group of held-out pairs: {aggregate: {"mean", "low", "high"}}}, with the number of its pairs."""
    length = torch.tensor([n for row in rows for _, n in lengths(tokenizer, row)], dtype=torch.float64)
    scores = scores | {"longer wins": length, "shorter wins": -length}
    groups = {"all": range(len(rows)),
              "like length": [i for i, row in enumerate(rows) if alike(tokenizer, row) >= ALIKE]}
    prompts = [str(row["prompt"]) for row in rows]
    return {group: {"pairs": len(numbers)} | {
        name: evaluate.bootstrap((((x[0::2] - x[1::2]).sign() + 1) / 2)[list(numbers)], seed,
                                 [prompts[i] for i in numbers]) for name, x in scores.items()}
            for group, numbers in groups.items() if len(numbers)}


def rank(script, run, flags):
    """accuracies() of a model that is trained with these flags, on the held-out pairs of its data."""
    began = time.time()
    claims.train(script, run, **flags)
    held_out = evaluate.ValuesArgs(data=str(flags["data"].with_name("data")), max_length=LONGEST)
    kept, _, scores = evaluate.score_pairs(str(run), held_out)
    print(f"{run}: {time.time() - began:.0f} s", flush=True)
    return accuracies(scores, kept, evaluate.load_tokenizer(flags["model"]), 1)


# ---- The answer ----
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/smollm2/base")
    parser.add_argument("--hh", required=True)
    parser.add_argument("--alpaca", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pairs: a trial")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, one thread each")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--runs", default="runs/preferences")
    parser.add_argument("--output", default=str(claims.ROOT / "experiments/results"))
    args = parser.parse_args()
    os.environ["ACCELERATE_MIXED_PRECISION"] = args.precision
    models = {"GVM": ("train_gvm", {"supervision": "pairs"}), "ScalarRM": ("baselines.reward_model", {})}
    calls, rows = {}, []
    for name, data in write_data(Path(args.runs), args).items():
        for model, (script, flags) in models.items():
            calls[f"{name}: {model}"] = (script, data.parent / f"{data.name}_{model}", flags | {
                "model": args.model, "data": data, "epochs": 2, "batch_size": 16, "micro_batch_size": 16,
                "max_length": LONGEST, "lr": 3e-5, "warmup_steps": 10})
    with claims.workers(args.jobs) as at_once:
        found = dict(zip(calls, at_once(rank, list(calls.values()))))

    def number(x):
        return f"{x['mean']:.3f} ({x['low']:.3f} to {x['high']:.3f})" if x else ""

    for name, groups in found.items():
        for group, x in groups.items():
            rows.append([name, group, str(x["pairs"]), *(number(x.get(key)) for key in (
                "mean", "last", "p10", "p90", "longer wins", "shorter wins"))])
    about = __doc__[__doc__.index("Hypothesis"):__doc__.index("Command")].rstrip().splitlines()
    lines = [f"# {__doc__.splitlines()[0]}", "", *(f"    {line}" for line in about), "",
             f"`python experiments/preferences.py --scale {args.scale:g}`, model {args.model}, precision "
             f"{args.precision}, commit {claims.commit()}, {claims.machine()}. "
             "Accuracy on held-out pairs and its 95 % interval (bootstrap over prompts).", "",
             *claims.table("trained on: model | held-out pairs | number | mean | last | p10 | p90 | "
                           "longer wins | shorter wins", rows)]
    claims.write_result(args.output, "preferences", found, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
