"""The KL penalty (Table 10), and what a frozen value model is worth once the policy goes where it was not trained.

Hypothesis  The paper's beta = 0.05 is better than 0.01 and 0.10 (Table 10). Without a penalty the policy finds what the
            frozen GVM wrongly likes: its value goes on rising, the true score does not (over-optimisation). PPO, whose
            critic follows the policy, does the same to its frozen reward model.
Method      One world per seed. DVPO with beta 0, 0.01, 0.05, 0.1 and 0.3, and PPO with beta 0, all from the same SFT
            model, as many steps of 64 rollouts each. What the method believes (GVM value of the answer; score of the
            reward model) is put on the oracle's scale by the straight line that fits the rollouts of the first five
            steps. Over-optimisation is the belief minus the oracle's score over the last ten steps.
Command     python experiments/kl.py --seeds 21 22 23 24 25        (part of make claims)
Result      results/kl.json, results/kl.md, results/kl.png
"""
import argparse
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import atlas  # noqa: E402
import evaluate  # noqa: E402

BETAS = (0.0, 0.01, 0.05, 0.1, 0.3)
STEPS, LAST = 40, 10                                          # steps of training; the last ones, which are averaged
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


# ---- 1. Runs: the same text in every experiment of `make claims` ----
@contextmanager
def words_to(path):
    """What is printed goes to a file: several runs at a time would talk at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def world(folder, seed, scale):
    """The data and the base model of one seed; at a scale below 1, that share of the rows. Returns the data folder."""
    data = folder / "data"
    if not (data / "manifest.json").exists():
        with words_to(folder / "world.log"):
            atlas.write_world(folder, seed, overwrite=True)
    if scale < 1:
        for name in ("sft", "scored", "pairs", "test_scored", "test_pairs", "test_prompts"):
            lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            rows = max(round(scale * json.loads((data / "manifest.json").read_text())["files"][f"{name}.jsonl"]["rows"]),
                       16 if name == "test_prompts" else 96)
            (data / f"{name}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    return data


def train(script, output, **flags):
    """Runs a training script with these flags, unless `output` holds that very run already. Returns `output`."""
    stage = importlib.import_module(script)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    args = stage.Args(output=str(output), overwrite=True, **flags)
    stage.accumulation_steps(args, 1)                         # sets what follows from the others, as the script does
    finished = (output / "model.safetensors").exists()
    if not finished or json.loads((output / "args.json").read_text()) != asdict(args):
        with words_to(output.with_name(f"{output.name}.log")):
            stage.main(args)
    return output


def over_seeds(run_seed, args):
    """{seed: run_seed(folder, seed, scale)}, --jobs seeds at a time, one thread each; shared runs are made once."""
    torch.set_num_threads(1)
    jobs = [(Path(args.runs) / f"seed{seed}", seed, args.scale) for seed in args.seeds]
    if args.jobs == 1:
        found = [run_seed(*job) for job in jobs]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) as pool:
            found = list(pool.map(run_seed, *zip(*jobs)))
    return dict(zip(map(str, args.seeds), found))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interval(values):
    """Mean and 95 % interval (Student's t over the seeds): (mean, low, high)."""
    mean = statistics.mean(values)
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean, mean - half, mean + half


def cell(values, digits=3):
    mean, low, high = interval(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def verdict(differences):
    """What the seeds' differences say of the claim that they are above 0, by the 95 % interval of their mean."""
    _, low, high = interval(differences)
    return "confirmed" if low > 0 else "not confirmed: the reverse" if high < 0 else "not decided by these seeds"


def parse(description):
    """The command line, the same for every experiment."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23, 24, 25], help="a world each")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    parser.add_argument("--scale", type=float, default=1.0, help="share of data, steps and answers: below 1, a trial")
    parser.add_argument("--runs", default="runs/claims", help="folder for the runs, shared by all experiments")
    parser.add_argument("--output", default="results", help="folder for the result")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds) or not (len(args.seeds) == 1 or len(args.seeds) in T_95):
        parser.error("--seeds must be 1 to 10 different numbers")
    os.chdir(ROOT)
    return args


def report(name, args, seeds, claims, tables, finding, caption, picture):
    """results/NAME.json, .md and .png.

    claims   {claim in words: (verdict, numbers in words)}
    finding  the one sentence that the experiment ends with; caption: of the picture, a matplotlib figure
    """
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    made = {"command": f"python experiments/{name}.py --seeds {' '.join(map(str, args.seeds))}"
            + (f" --scale {args.scale}" if args.scale != 1 else ""), "commit": commit.stdout.strip(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    lines = [f"# {name}", "", sys.modules[report.__module__].__doc__.split("Command ")[0].strip(), "",
             f"`{made['command']}`, commit {made['commit']}, {made['machine']}. Mean over the seeds (95 % interval, "
             "Student's t over seeds).", "", "| claim | verdict | numbers |", "|---|---|---|"]
    lines += [f"| {claim} | {word} | {numbers} |" for claim, (word, numbers) in claims.items()]
    lines += ["", f"**{finding}**", "", f"![{caption}]({name}.png)", "", f"*{caption}*", "", *tables]
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    picture.savefig(output / f"{name}.png", dpi=110, bbox_inches="tight")
    (output / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / f"{name}.json").write_text(json.dumps(made | {
        "claims": {claim: {"verdict": word, "numbers": numbers} for claim, (word, numbers) in claims.items()},
        "finding": finding, "seeds": seeds}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines[7:]))


# ---- 2. One seed ----
def over_optimisation(rows, belief):
    """Per step, from a run's rollouts: the oracle's mean score, and the method's belief on the oracle's scale."""
    steps = {}
    for row in rows:
        steps.setdefault(row["step"], []).append((row[belief], atlas.oracle(row["prompt"], row["response"])))
    first = [point for step in sorted(steps)[:5] for point in steps[step]]
    slope, offset = statistics.linear_regression(*zip(*first))
    return {"oracle": [statistics.mean(y for _, y in steps[step]) for step in sorted(steps)],
            "belief": [statistics.mean(slope * x + offset for x, _ in steps[step]) for step in sorted(steps)]}


def run_seed(folder, seed, scale):
    """{run: {"score", "nats" of KL, "length" on held-out prompts, and the curves of over_optimisation}}."""
    steps = max(5, round(scale * STEPS))
    start = {"data": world(folder, seed, scale), "seed": seed}
    sft = train("sft", folder / "sft", model=folder / "base", **start)
    gvm = train("train_gvm", folder / "gvm", model=sft, epochs=2, **start)
    reward_model = train("baselines.reward_model", folder / "reward_model", model=sft, epochs=2, **start)
    runs = {f"DVPO {beta:g}": train("train_dvpo", folder / f"kl_{beta:g}", model=sft, gvm=gvm, steps=steps,
                                    kl_coef=beta, **start) for beta in BETAS}
    runs["PPO 0"] = train("baselines.ppo", folder / "kl_ppo", model=sft, reward_model=reward_model, steps=steps,
                          kl_coef=0.0, **start)
    with words_to(folder / "kl_eval.log"):
        judged = evaluate.evaluate_policy(evaluate.PolicyArgs(
            models=[str(sft), *map(str, runs.values())], data=str(start["data"]), seed=seed))["models"]
    found = {"SFT": {"score": judged[sft.name]["score"]["mean"], "nats": 0.0,
                     "length": judged[sft.name]["response_length"]}}
    for name, output in runs.items():
        x = judged[output.name]
        found[name] = {"score": x["score"]["mean"], "nats": x["kl"]["mean"], "length": x["response_length"]}
        found[name] |= over_optimisation(read_lines(output / "rollouts.jsonl"),
                                         "reward" if name.startswith("PPO") else "value")
    return found


# ---- 3. The answer ----
def main():
    args, started = parse(__doc__), time.time()
    seeds = over_seeds(run_seed, args)
    names = list(next(iter(seeds.values())))

    def per_seed(name, key, last=None):
        return [statistics.mean(seed[name][key][-last:]) if last else seed[name][key] for seed in seeds.values()]

    def minus(a, b):
        return [x - y for x, y in zip(a, b)]

    claims = {}
    for other in ("0.01", "0.1"):
        gap = minus(per_seed("DVPO 0.05", "score"), per_seed(f"DVPO {other}", "score"))
        claims[f"Table 10: beta 0.05 gives a better policy than {other}"] = verdict(gap), f"score {cell(gap)}"
    gap = minus(per_seed("DVPO 0.05", "score"), per_seed("DVPO 0", "score"))
    claims["a penalty is needed: beta 0.05 gives a better policy than 0"] = verdict(gap), f"score {cell(gap)}"
    excess = {name: minus(per_seed(name, "belief", LAST), per_seed(name, "oracle", LAST)) for name in names[1:]}
    more = minus(excess["DVPO 0"], excess["DVPO 0.1"])
    claims["without a penalty the frozen GVM is over-optimised more than with 0.1"] = (
        verdict(more), f"belief minus oracle {cell(excess['DVPO 0'])} against {cell(excess['DVPO 0.1'])}")
    less = minus(excess["PPO 0"], excess["DVPO 0"])
    claims["PPO over-optimises its reward model more than DVPO its GVM, both without a penalty"] = (
        verdict(less), f"belief minus oracle {cell(excess['PPO 0'])} against {cell(excess['DVPO 0'])}")
    fallen = minus([max(statistics.mean(seed["DVPO 0"]["oracle"][i:i + LAST]) for i in
                        range(max(1, len(seed["DVPO 0"]["oracle"]) - LAST + 1))) for seed in seeds.values()],
                   per_seed("DVPO 0", "oracle", LAST))

    best = max(names[1:-1], key=lambda name: statistics.mean(per_seed(name, "score")))
    finding = (f"Of the penalties tried, {best.split()[1]} gave the best score ({cell(per_seed(best, 'score'))}); "
               f"without one DVPO ends at {cell(per_seed('DVPO 0', 'score'))}, {statistics.mean(fallen):.3f} below the "
               f"best ten steps of its own run, while its GVM believes {statistics.mean(excess['DVPO 0']):+.3f} too "
               f"much (PPO's reward model {statistics.mean(excess['PPO 0']):+.3f}).")
    tables = ["| run | oracle score, held out | KL (nats) | length | belief minus oracle, last steps |", "|---" * 5 + "|"]
    for name in names:
        tables.append(f"| {name} | {cell(per_seed(name, 'score'))} | {cell(per_seed(name, 'nats'), 2)} | "
                      f"{cell(per_seed(name, 'length'), 1)} | {cell(excess[name]) if name in excess else ''} |")

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, colour in (("DVPO 0", "tab:red"), ("DVPO 0.05", "tab:blue"), ("PPO 0", "tab:gray")):
        curves = {key: [statistics.mean(values) for values in zip(*(seed[name][key] for seed in seeds.values()))]
                  for key in ("oracle", "belief")}
        smooth = {key: [statistics.mean(curve[max(0, i - 4):i + 1]) for i in range(len(curve))]
                  for key, curve in curves.items()}
        left.plot(smooth["oracle"], color=colour, label=f"{name}: true")
        left.plot(smooth["belief"], color=colour, linestyle="--", label=f"{name}: believed")
    left.set(xlabel="step (64 rollouts each)", ylabel="score of the rollouts (-1 to 1)",
             title=f"True and believed score (mean of {len(seeds)} seeds)")
    left.legend(fontsize=7)
    for name in names:
        mean, low, high = interval(per_seed(name, "score"))
        right.errorbar(statistics.mean(per_seed(name, "nats")), mean, [[mean - low], [high - mean]], fmt="o", label=name)
    right.set(xlabel="KL to the reference (nats per answer)", ylabel="oracle score, held-out questions")
    right.legend(fontsize=7)
    report("kl", args, seeds, claims, tables, finding, finding, picture)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
