"""What do our departures from the paper cost or gain, and does the value model really do the work?

Hypothesis  (1) The policy improves because the GVM guides it: with shuffled training rewards the gain vanishes.
            (2) The defaults that depart from the paper's letter (docs/deviations.md) are at least as good as it.
Method      Per seed one Atlas world and one SFT model. GVMs that differ in one setting, then DVPO runs that differ in
            one setting, all with the scripts' own defaults otherwise. Judged by the oracle on held-out prompts.
Command     python experiments/deviations.py --seeds 1 2          (about 10 minutes a seed on two cores; resumable:
            finished runs under runs/deviations/ are kept)
Result      results/deviations.json and results/deviations.md
"""
import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import atlas  # noqa: E402
import evaluate  # noqa: E402
import sft  # noqa: E402
import train_dvpo  # noqa: E402
import train_gvm  # noqa: E402


def q_with_kl_sum(q, reward_kl, is_response):
    """A_t = Q_t + the sum of this and all later KL rewards, where the default adds the token's own only."""
    later = torch.where(is_response, reward_kl, 0.0).flip(-1).cumsum(-1).flip(-1)
    return torch.where(is_response, q + later, 0.0)


GVMS = {                                                      # name: settings; the first is the default
    "lambda 0.95": {},
    "shuffled rewards": {"data": "shuffled"},
}
POLICIES = {                                                  # name: (GVM, settings, {function: what stands in for it})
    "gae 0.95": ("lambda 0.95", {}, {}),
    "gae 0": ("lambda 0.95", {"gae_lambda": 0.0}, {}),
    "q": ("lambda 0.95", {"advantage": "q"}, {}),
    "q, sum of later KL": ("lambda 0.95", {"advantage": "q"}, {"advantage_q": q_with_kl_sum}),
    "released": ("lambda 0.95", {"advantage": "released"}, {}),
    "gae 0.95, GVM of shuffled rewards": ("shuffled rewards", {}, {}),
}


def shuffle_rewards(source, target, seed):
    """A copy of the data folder in which scored.jsonl's rewards have changed places."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    rows = [json.loads(line) for line in (source / "scored.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows]
    random.Random(seed).shuffle(rewards)
    lines = [json.dumps(row | {"reward": reward}) + "\n" for row, reward in zip(rows, rewards)]
    (target / "scored.jsonl").write_text("".join(lines), encoding="utf-8")


def run_stage(script, replacements, **settings):
    """Runs a stage unless it is finished; `replacements` stand in for functions of the script while it runs."""
    if not (Path(settings["output"]) / "model.safetensors").exists():
        with mock.patch.multiple(script, **replacements) if replacements else mock.MagicMock():
            script.main(script.Args(overwrite=True, **settings))


def run_seed(folder, seed):
    """Everything for one seed: {"gvm": {name: {aggregate: accuracy}}, "policy": {name: {"oracle": ..., ...}}}."""
    if not (folder / "data").exists():
        atlas.write_world(folder, seed, overwrite=False)
    if not (folder / "shuffled").exists():
        shuffle_rewards(folder / "data", folder / "shuffled", seed)
    run_stage(sft, {}, model=f"{folder}/base", data=f"{folder}/data", output=f"{folder}/sft", seed=seed)
    paths = {name: folder / name.replace(" ", "_").replace(",", "") for name in [*GVMS, *POLICIES]}
    results = {"gvm": {}, "policy": {}}
    for name, settings in GVMS.items():
        settings = settings | {"data": str(folder / settings.get("data", "data"))}
        run_stage(train_gvm, {}, model=f"{folder}/sft", output=str(paths[name]), seed=seed, **settings)
        last = (paths[name] / "metrics.jsonl").read_text().splitlines()[-1]
        results["gvm"][name] = json.loads(last)["pair_accuracy"]
    for name, (gvm, settings, replacements) in POLICIES.items():
        run_stage(train_dvpo, replacements, model=f"{folder}/sft", gvm=str(paths[gvm]), data=f"{folder}/data",
                  output=str(paths[name]), seed=seed, **settings)
        measured = paths[name] / "eval" / "policy.json"
        if not measured.exists():
            evaluate.evaluate_policy(evaluate.PolicyArgs(
                models=[f"{folder}/sft", str(paths[name])], data=f"{folder}/data", judge=str(ROOT / "atlas.py:oracle"),
                output=str(measured.parent), seed=seed))
        result = json.loads(measured.read_text())
        before, after = result["models"]["sft"], result["models"][paths[name].name]
        results["policy"][name] = {
            "oracle": after["score"]["mean"], "gain": after["score"]["mean"] - before["score"]["mean"],
            "win_rate": result["win_rate"][paths[name].name]["sft"]["mean"], "kl": after["kl"]["mean"],
            "length": after["response_length"], "sft_oracle": before["score"]["mean"]}
    return results


def cell(values, digits=3):
    """The mean over the seeds, and each seed's own number: "0.43 (0.40, 0.46)"."""
    return f"{statistics.mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", default="runs/deviations", help="folder for the runs")
    parser.add_argument("--output", default=str(ROOT / "results"), help="folder for deviations.json and .md")
    args = parser.parse_args()
    seeds = {str(seed): run_seed(Path(args.runs) / f"seed{seed}", seed) for seed in args.seeds}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    made = f"python experiments/deviations.py --seeds {' '.join(map(str, args.seeds))}"
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "deviations.json").write_text(json.dumps(
        {"command": made, "commit": commit.strip(), "machine": f"{platform.machine()}, two CPU cores",
         "seeds": seeds}, indent=2) + "\n")
    lines = ["# Departures from the paper, measured", "", f"`{made}`, commit {commit.strip()}, two CPU cores. Mean "
             f"over seeds {', '.join(seeds)}, and each seed's number.", "",
             "| GVM | pair accuracy, mean value | last value |", "|---|---|---|"]
    for name in GVMS:
        rows = [seed["gvm"][name] for seed in seeds.values()]
        lines.append(f"| {name} | {cell([r['mean'] for r in rows])} | {cell([r['last'] for r in rows])} |")
    lines += ["", "| DVPO | oracle score | gain over SFT | win rate over SFT | KL (nats per answer) | answer length |",
              "|---|---|---|---|---|---|"]
    start = cell([seed["policy"]["q"]["sft_oracle"] for seed in seeds.values()])
    lines.append(f"| (SFT) | {start} | | | | |")
    for name in POLICIES:
        rows = [seed["policy"][name] for seed in seeds.values()]
        cells = [cell([r[key] for r in rows], digits) for key, digits in
                 (("oracle", 3), ("gain", 3), ("win_rate", 3), ("kl", 2), ("length", 1))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (output / "deviations.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
