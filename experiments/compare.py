"""The paper's comparison in Atlas: SFT, DVPO, PPO, GRPO, ReMax and DPO from the same SFT model and answers.

Hypothesis  DVPO's policies are as good as PPO's or better, at about 3/5 of its time per step and memory
            (section 5).
Method      A world per seed; SFT, GVM and reward model are trained once per seed, from the same answers:
            "DVPO" from their scores (the default), "DVPO, pairs" from pairs of them as +1/-1, just what the
            reward model (so PPO, GRPO, ReMax) and DPO see. All online methods learn from as many rollouts,
            with the scripts' own defaults otherwise. Learning rates: four per method, tried in two worlds of
            their own (--sweep_seeds), chosen by the oracle there. Times per step are measured apart, methods
            taking turns on an idle machine. (Memory: experiments/compute.py --shape 100m.)
Command     python experiments/compare.py --seeds 11 12 13 14 15        (make compare; about 90 minutes)
Result      experiments/results/compare.json and .md
"""
import argparse
import os
import platform
import sys
from pathlib import Path
from statistics import mean, median

import claims                                                 # first: it finds the project's root
import evaluate
import torch
from claims import cell, minus

STEPS, ROLLOUTS = 50, 60                                      # steps; rollouts per step: 60 is 12 groups of 5
ONLINE = [5e-5, 1e-4, 2e-4, 4e-4]
METHODS = {   # name: (script, its flag for what it learns from, its folder, learning rates to try)
    "DVPO": ("train_dvpo", "gvm", "gvm", ONLINE),
    "DVPO, pairs": ("train_dvpo", "gvm", "gvm_pairs", ONLINE),
    "PPO": ("baselines.ppo", "reward_model", "reward_model", ONLINE),
    "GRPO": ("baselines.grpo", "reward_model", "reward_model", ONLINE),
    # ReMax makes one update per step, the others four.
    "ReMax": ("baselines.remax", "reward_model", "reward_model", [2e-4, 4e-4, 8e-4, 1.6e-3]),
    "DPO": ("baselines.dpo", None, None, [3e-5, 1e-4, 3e-4, 1e-3]),
}
PARTS = ("generate", "score", "update")


# ---- 1. Runs ----
def train(output, method, folder, start, steps, lr):
    """One policy, from what is in a seed's folder; lr None: the script's default. Returns output."""
    script, flag, name, _ = METHODS[method]
    flags = start | {"model": folder / "sft"} | ({"lr": lr} if lr else {})
    if flag:
        half = ROLLOUTS // 2
        flags |= {flag: folder / name, "steps": steps, "batch_size": ROLLOUTS, "micro_batch_size": half}
        flags |= {} if method == "ReMax" else {"mini_batch_size": half}
    return claims.train(script, output, **flags)


def run_seed(folder, seed, scale, steps, rates):
    """Everything measured of a seed's policies: {"SFT" or method: [{...} of each of its rates]}."""
    sft, start, _ = claims.base(folder, seed, scale)
    claims.train("train_gvm", folder / "gvm", model=sft, **start)
    claims.train("train_gvm", folder / "gvm_pairs", model=sft, supervision="pairs", **start)
    claims.train("baselines.reward_model", folder / "reward_model", model=sft, **start)
    runs = {}
    for method, rate in [(method, rate) for method in METHODS for rate in rates[method]]:
        name = file_name(method) + (f"_{rate:g}" if len(rates[method]) > 1 else "")
        runs[train(folder / name, method, folder, start, steps, rate)] = method
    args = evaluate.PolicyArgs(models=[str(sft), *map(str, runs)], data=str(start["data"]), seed=seed,
                               output=str(folder / "eval"), overwrite=True)
    with claims.words_to(folder / "compare.log"):
        result = evaluate.evaluate_policy(args)
    found = {}
    for run, method in {sft: "SFT", **runs}.items():
        x, won = result["models"][run.name], result["win_rate"][run.name]
        record = {"oracle": x["score"]["mean"], "kl": x["kl"]["mean"], "length": x["response_length"],
                  "win_rate": {other: rate["mean"] for other, rate in won.items()},
                  "answers": x["prompts"] * result["samples"]}
        if method not in ("SFT", "DPO"):
            record["curve"] = [mean(scores) for scores in claims.by_step(run, claims.score)]
        found.setdefault(method, []).append(record)
    return found


def file_name(method):
    return method.lower().replace(", ", "_")


def step_times(folder, runs, rounds, chosen):
    """{method: {"generate", "score", "update", "total": median seconds of a step}}, methods taking turns."""
    torch.set_num_threads(os.cpu_count())
    times = {method: [] for method in METHODS if method not in ("DPO", "DVPO, pairs")}
    for number in range(rounds):
        for method in times:
            output = train(runs / f"{file_name(method)}_{number}", method, folder,
                           {"data": folder / "data", "seed": number}, 8, chosen[method])
            times[method] += claims.read_lines(output / "metrics.jsonl")[1:]   # the first step warms up
    return {method: {part: median(row[f"seconds_{part}"] for row in rows) for part in PARTS} |
            {"total": median(sum(row[f"seconds_{part}"] for part in PARTS) for row in rows)}
            for method, rows in times.items()}


# ---- 2. The answer ----
def steps_to_reach(curve, score, window=5):
    """The first step at which the mean of the last `window` steps is at least the score; or None."""
    return next((step for step in range(window, len(curve) + 1)
                 if mean(curve[step - window:step]) >= score), None)


def against_ppo(results, per_seed):
    """The targets of the comparison, in words with numbers."""
    ppo, dvpo, pairs = (per_seed(method, "oracle") for method in ("PPO", "DVPO", "DVPO, pairs"))
    last = [mean(curve[-5:]) for curve in per_seed("PPO", "curve")]
    reached = {method: [steps_to_reach(curve, score) for curve, score in zip(per_seed(method, "curve"), last)]
               for method in ("DVPO", "DVPO, pairs", "PPO")}
    ours, theirs = (results["step_seconds"][method]["total"] for method in ("DVPO", "PPO"))
    return {"oracle score": f"DVPO {cell(dvpo)}, PPO {cell(ppo)}; seed by seed {cell(minus(dvpo, ppo))}",
            "the same pairs for both": f"DVPO {cell(pairs)}; seed by seed {cell(minus(pairs, ppo))}",
            "time per step": f"{ours:.2f} s / {theirs:.2f} s = {ours / theirs:.2f}",
            "steps to reach PPO's score of its last 5 steps (mean of 5 steps; one number per seed)":
                "; ".join(f"{method} {found}" for method, found in reached.items())}


def report(results, per_seed):
    """Lines of compare.md."""
    methods, sft, rows = results["methods"], per_seed("SFT", "oracle"), []
    for method in methods:
        seconds = results["step_seconds"].get(method)
        took = "{total:.2f}: {generate:.2f} + {score:.2f} + {update:.2f}".format(**seconds) if seconds else ""
        scores, won = per_seed(method, "oracle"), per_seed(method, "win_rate", "sft")
        rows.append([method, f"{methods[method]['lr'] or 'default'}", scores, minus(scores, sft), won,
                     per_seed(method, "kl"), per_seed(method, "length"), took])
    online, others = [method for method in methods if method != "DPO"], ["SFT", *methods]
    made = f"`{results['command']}`, commit {results['commit']}, {results['machine']}."
    lines = ["# The comparison", "",
             f"{made} Mean over the seeds and its 95 % interval (Student's t over seeds).", "",
             "## The analogue of Tables 1 and 2", "",
             f"Oracle score of {per_seed('SFT', 'answers')[0]} answers per seed to held-out prompts. Online "
             f"methods: {results['steps']} steps of {ROLLOUTS} rollouts. Time per step: median, methods take "
             "turns on an idle machine. ReMax also answers every prompt greedily: timed, not counted.", "",
             *claims.table("method | learning rate | oracle score | gain over SFT | win rate over SFT | KL | "
                           "length | s per step: generate + score + update", [
                               ["SFT", "", sft, "", "", "0", per_seed("SFT", "length"), ""], *rows]),
             "", "## Win rates: the row's method over the column's", "",
             *claims.table(f" | {' | '.join(others)}", [
                 [row, *("" if row == x else per_seed(row, "win_rate", file_name(x)) for x in others)]
                 for row in methods]),
             "", "## DVPO against PPO", "", *(f"* {name}: {x}" for name, x in results["against_ppo"].items()),
             "", "## The analogue of Figure 4", "", "Oracle score of the rollouts (training prompts), mean "
             "over seeds and over the five steps up to the one named.", ""]
    lines += claims.table(f"step | {' | '.join(online)}", [
        [str(step), *(f"{mean(sum((curve[step - 5:step] for curve in per_seed(method, 'curve')), [])):.3f}"
                      for method in online)] for step in range(5, results["steps"] + 1, 5)])
    lines += ["", "## Learning rates", "", "Oracle scores on held-out prompts of the sweep's worlds, seeds "
              f"{results['sweep_seeds']}. The best mean was used.", ""]
    return lines + claims.table("method | rate: scores", [
        [method, "; ".join(f"{rate}: " + ", ".join(f"{x:.3f}" for x in xs) for rate, xs in found.items())]
        for method, found in results["sweep"].items()])


def main():
    parser = claims.parser(__doc__, [11, 12, 13, 14, 15], "runs/compare")
    parser.add_argument("--sweep_seeds", type=int, nargs="*", default=[9, 10], help="none: default rates")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method when steps are timed")
    args = parser.parse_args()
    if len({*args.seeds, *args.sweep_seeds}) < len(args.seeds) + len(args.sweep_seeds):
        parser.error("--seeds and --sweep_seeds must all differ: rates were chosen on the latter")
    steps, rates, sweep = claims.steps(args.scale, args.steps), {method: [None] for method in METHODS}, {}
    if args.sweep_seeds:
        worlds = argparse.Namespace(**vars(args) | {"seeds": args.sweep_seeds})
        tried = claims.over_seeds(run_seed, worlds, steps, {method: METHODS[method][3] for method in METHODS})
        sweep = {method: {rate: [seed[method][i]["oracle"] for seed in tried.values()]
                          for i, rate in enumerate(METHODS[method][3])} for method in METHODS}
        rates = {method: [max(found, key=lambda rate: mean(found[rate]))] for method, found in sweep.items()}
    seeds = {seed: {name: x[0] for name, x in found.items()}
             for seed, found in claims.over_seeds(run_seed, args, steps, rates).items()}
    chosen, runs = {method: rates[method][0] for method in METHODS}, Path(args.runs)
    results = {"command": " ".join(["python experiments/compare.py", *sys.argv[1:]]),
               "commit": claims.commit(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
               "rollouts_per_step": ROLLOUTS, "steps": steps, "sweep_seeds": args.sweep_seeds, "sweep": sweep,
               "seeds": seeds, "methods": {method: {"lr": rate} for method, rate in chosen.items()},
               "step_seconds": step_times(runs / f"seed{args.seeds[0]}", runs / "times", args.rounds, chosen)}

    def per_seed(*keys):
        return claims.per_seed(seeds, *keys)

    results["against_ppo"] = against_ppo(results, per_seed)
    lines = report(results, per_seed)
    claims.write_result(args.output, "compare", results, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
