"""The paper's comparison in Atlas: SFT, DVPO, PPO, GRPO, ReMax and DPO from the same SFT model and the same answers.

Hypothesis  DVPO's policies are as good as PPO's or better, at about 3/5 of its time per step and memory (section 5).
Method      A world per seed; SFT, GVM and reward model are trained once per seed, from the same answers: "DVPO" from
            their scores (the default), "DVPO, pairs" from pairs of them as +1/-1, just what the reward model (so PPO,
            GRPO, ReMax) and DPO see. All online methods learn from as many rollouts, with the scripts' own defaults
            otherwise. Learning rates: four per method, tried in two worlds of their own (--sweep_seeds), chosen by the
            oracle there, then used for all seeds. Runs are processes of one thread, --jobs at a time; times per step
            are measured apart, methods taking turns on an idle machine; peak memory is measured with models of 100
            million parameters, where models and not the interpreter fill it.
Command     python experiments/compare.py --seeds 11 12 13 14 15        (make compare; about 90 minutes on two cores;
            resumable: what is finished under runs/compare/ is kept)
Result      results/compare.json and results/compare.md
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS, ROLLOUTS = 50, 60                                       # steps, and rollouts per step: 60 is 12 groups of 5
ONLINE = [5e-5, 1e-4, 2e-4, 4e-4]
METHODS = {   # name: (script, its flags for what it learns from, learning rates to try)
    "DVPO": ("train_dvpo.py", {"gvm": "gvm"}, ONLINE),
    "DVPO, pairs": ("train_dvpo.py", {"gvm": "gvm_pairs"}, ONLINE),
    "PPO": ("baselines/ppo.py", {"reward_model": "reward_model"}, ONLINE),
    "GRPO": ("baselines/grpo.py", {"reward_model": "reward_model"}, ONLINE),
    # ReMax makes one update per step, the others four.
    "ReMax": ("baselines/remax.py", {"reward_model": "reward_model"}, [2e-4, 4e-4, 8e-4, 1.6e-3]),
    "DPO": ("baselines/dpo.py", {}, [3e-5, 1e-4, 3e-4, 1e-3]),
}
LARGE = ("DVPO", "PPO", "GRPO", "ReMax")                       # measured with 100 million parameters, too
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


# ---- 1. Runs: each is a process; what is finished is not done again ----
def head():
    """The commit that is checked out, with a + if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return commit + ("+" if subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode else "")


def is_current(output, flags):
    """True if this run is finished, was made with these flags, and nothing it has read was made after it."""
    measured = output / "process.json"
    if not measured.exists() or json.loads(measured.read_text())["flags"] != {k: str(v) for k, v in flags.items()}:
        return False
    inputs = [Path(str(value)) / "process.json" for value in flags.values()]
    return all(path.stat().st_mtime <= measured.stat().st_mtime for path in inputs if path.exists())


def run(output, script, threads=1, **flags):
    """python script --flags --output output, unless it is_current. Returns {"seconds", "peak_mib", ...} of the process.

    This process must stay small: the peak memory that Linux reports of a child includes its parent's at the start.
    """
    measured = output / "process.json"
    if not is_current(output, flags):
        words = [word for name, value in flags.items() for word in
                 ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
        output.parent.mkdir(parents=True, exist_ok=True)
        log, started = output.with_name(f"{output.name}.log"), time.time()
        with open(log, "w") as file:
            process = subprocess.Popen(
                [sys.executable, script, *words, "--output", str(output), "--overwrite"], cwd=ROOT, stdout=file,
                stderr=file, env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"})
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"error: {script} ended with status {status}. Its last words, from {log}:\n"
                             f"{log.read_text()[-2000:]}")
        measured.write_text(json.dumps({
            "seconds": time.time() - started, "peak_mib": usage.ru_maxrss / 1024, "commit": head(),
            "flags": {name: str(value) for name, value in flags.items()}}))
        print(f"{time.strftime('%H:%M:%S')}  {time.time() - started:5.0f} s  {output}", flush=True)
    return json.loads(measured.read_text())


def world_and_sft(folder, seed):
    """Data and base model of one seed, and its SFT model."""
    if not (folder / "data" / "manifest.json").exists():
        subprocess.run([sys.executable, "atlas.py", "world", "--output", str(folder), "--seed", str(seed),
                        "--overwrite"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run(folder / "sft", "sft.py", model=folder / "base", data=folder / "data", seed=seed)


def value_model(folder, name, seed):
    """What the policies learn from: "gvm", of scores; "gvm_pairs" and "reward_model", of pairs of the same answers."""
    script = "baselines/reward_model.py" if name == "reward_model" else "train_gvm.py"
    run(folder / name, script, model=folder / "sft", data=folder / "data", seed=seed,
        **({"supervision": "pairs"} if name == "gvm_pairs" else {}))


def flags_of(method, folder, steps, lr=None):
    """What a method reads in a seed's folder, and how much of it; lr None is the script's default."""
    flags = {"model": folder / "sft", "data": folder / "data"}
    flags |= {flag: folder / name for flag, name in METHODS[method][1].items()}
    if method != "DPO":
        flags |= {"steps": steps, "batch_size": ROLLOUTS, "micro_batch_size": ROLLOUTS // 2}
    flags |= {"mini_batch_size": ROLLOUTS // 2} if method not in ("DPO", "ReMax") else {}
    return flags | ({"lr": lr} if lr else {})


def file_name(method):
    return method.lower().replace(", ", "_")


def train(output, method, folder, seed, steps, lr):
    """One policy. Returns its folder, output."""
    run(output, METHODS[method][0], seed=seed, **flags_of(method, folder, steps, lr))
    return output


def evaluate(output, folder, policies, seed):
    """Oracle scores, win rates, KL, length of the SFT model and the policies on held-out prompts."""
    newest = max((policy / "process.json").stat().st_mtime for policy in policies)
    if not (output / "policy.json").exists() or (output / "policy.json").stat().st_mtime < newest:
        models = [str(folder / "sft"), *map(str, policies)]
        subprocess.run([sys.executable, "evaluate.py", "policy", "--models", *models, "--data", str(folder / "data"),
                        "--judge", "atlas.py:oracle", "--output", str(output), "--seed", str(seed), "--overwrite"],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((output / "policy.json").read_text())


# ---- 2. Measuring time and memory ----
def step_times(folder, runs, rounds, steps, chosen):
    """{method: {"generate", "score", "update", "total": median seconds per step}}, methods taking turns, both cores."""
    times = {method: [] for method in METHODS if method not in ("DPO", "DVPO, pairs")}
    for number in range(rounds):
        for method in times:
            output = runs / f"{file_name(method)}_{number}"
            run(output, METHODS[method][0], threads=os.cpu_count(), seed=number,
                **flags_of(method, folder, steps, chosen[method]))
            times[method] += read_lines(output / "metrics.jsonl")[1:]          # the first step warms up
    parts = ("generate", "score", "update")
    return {method: {part: statistics.median(row[f"seconds_{part}"] for row in rows) for part in parts} |
            {"total": statistics.median(sum(row[f"seconds_{part}"] for part in parts) for row in rows)}
            for method, rows in times.items()}


def peak_memory(folder, runs):
    """{method: {"peak_mib", "seconds"}} of three steps of ten rollouts, randomly initialised models of 100 million
    parameters: the process's peak memory, and the median time per step without the first."""
    models = runs / "models"
    if not all((runs / file_name(method) / "process.json").exists() for method in LARGE):
        subprocess.run([sys.executable, __file__, "--write_large_models", str(models)], cwd=ROOT, check=True)
    peaks = {}
    for method in LARGE:
        flags = flags_of(method, models, 3) | {"data": folder / "data", "micro_batch_size": 5, "batch_size": 10}
        flags |= {"mini_batch_size": 10} if "mini_batch_size" in flags else {}
        peak = run(runs / file_name(method), METHODS[method][0], threads=os.cpu_count(), max_response_length=32,
                   **flags)["peak_mib"]
        steps = read_lines(runs / file_name(method) / "metrics.jsonl")[1:]
        peaks[method] = {"peak_mib": peak, "seconds": statistics.median(
            sum(row[f"seconds_{part}"] for part in ("generate", "score", "update")) for row in steps)}
    shutil.rmtree(models, ignore_errors=True)
    for method in peaks:                                       # 400 MB of weights each; the measurement stays
        for weights in (runs / file_name(method)).glob("**/*.safetensors"):
            weights.unlink()
    return peaks


def write_large_models(folder):
    """SFT model, GVM and reward model of 100 million parameters; random, for memory does not ask what they know."""
    import torch
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
                              AutoTokenizer)
    sys.path.insert(0, str(ROOT))
    import atlas
    count = atlas.write_base_model(folder / "sft", seed=1, hidden_size=768, layers=14)
    print(f"{count / 1e6:.0f} million parameters")
    tokenizer, config = AutoTokenizer.from_pretrained(folder / "sft"), AutoModelForCausalLM.from_pretrained(
        folder / "sft").config
    config.num_labels = 1
    config.gvm = {"gamma": 1.0, "td_lambda": 0.95, "tau_pairs": 0, "max_length": 256, "supervision": "scores",
                  "reward_mean": 0.0, "reward_std": 1.0}
    for name, kind in (("gvm", AutoModelForTokenClassification), ("reward_model", AutoModelForSequenceClassification)):
        torch.manual_seed(1)
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---- 3. Numbers ----
def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interval(values):
    """Mean and 95 % interval (Student's t over the seeds): {"mean", "low", "high", "seeds": [...]}."""
    mean = statistics.mean(values)
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": values}


def learning_curve(output, oracle):
    """The oracle's mean score of each step's rollouts: [float, ...]. The rollouts are on training prompts."""
    scores = {}
    for row in read_lines(output / "rollouts.jsonl"):
        scores.setdefault(row["step"], []).append(oracle(row["prompt"], row["response"]))
    return [statistics.mean(scores[step]) for step in sorted(scores)]


def steps_to_reach(curve, score, window=5):
    """The first step at which the mean of the last `window` steps is at least the score; None if it never is."""
    return next((step for step in range(window, len(curve) + 1)
                 if statistics.mean(curve[step - window:step]) >= score), None)


def per_seed(folder, method, result, oracle):
    """Everything measured of one policy."""
    output = folder / file_name(method)
    x = result["models"][file_name(method)]
    process = json.loads((output / "process.json").read_text())
    record = {"oracle": x["score"]["mean"], "kl": x["kl"]["mean"], "length": x["response_length"],
              "win_rate": {other: rate["mean"] for other, rate in result["win_rate"][file_name(method)].items()},
              "seconds": process["seconds"], "peak_mib": process["peak_mib"]}
    if method != "DPO":
        rows = read_lines(output / "metrics.jsonl")
        record |= {f"seconds_{part}": statistics.median(row[f"seconds_{part}"] for row in rows)
                   for part in ("generate", "score", "update")}
        record["wall_clock"] = [row["seconds"] for row in rows]
        record["curve"] = learning_curve(output, oracle)
    return record


def table(results, made, commit, steps):
    """results/compare.md."""
    def cell(values, digits=3):
        x = interval(values)
        return f"{x['mean']:.{digits}f} ({x['low']:.{digits}f} to {x['high']:.{digits}f})"

    seeds, methods = results["seeds"], results["methods"]
    lines = ["# The comparison", "", f"`{made}`, runs made at commits {commit}, {results['machine']}. Mean over the "
             f"seeds {', '.join(seeds)}, and its 95 % interval (Student's t over seeds).", "",
             "## The analogue of Tables 1 and 2", "",
             f"Oracle score of {results['answers']} answers per seed to held-out prompts. Every online method: {steps} "
             f"steps of {ROLLOUTS} rollouts. Time per step: median, methods taking turns on two otherwise idle cores. "
             "The last column: models of 100 million parameters, batches of 10; time per step, and peak memory of the "
             "process. ReMax also answers every prompt greedily: not counted as a rollout, but it takes its time.", "",
             "| method | learning rate | oracle score | gain over SFT | win rate over SFT | KL (nats) | length | "
             "s per step: generate + score + update | 100 M: s per step, MiB |", "|---" * 9 + "|"]
    sft = [seed["SFT"]["oracle"] for seed in seeds.values()]
    lines.append(f"| SFT | | {cell(sft)} | | | 0 | {cell([s['SFT']['length'] for s in seeds.values()], 1)} | | |")
    for method in methods:
        rows = [seed[method] for seed in seeds.values()]
        gain = [row["oracle"] - before for row, before in zip(rows, sft)]
        time_ = results["step_seconds"].get(method)
        took = "{total:.2f}: {generate:.2f} + {score:.2f} + {update:.2f}".format(**time_) if time_ else ""
        large = results["large"].get(method)
        cells = [cell([r["oracle"] for r in rows]), cell(gain), cell([r["win_rate"]["sft"] for r in rows]),
                 cell([r["kl"] for r in rows], 2), cell([r["length"] for r in rows], 1), took,
                 f"{large['seconds']:.1f}, {large['peak_mib']:.0f}" if large else ""]
        lines.append(f"| {method} | {methods[method]['lr'] or 'default'} | {' | '.join(cells)} |")
    lines += ["", "## Win rates: the row's method over the column's", "", f"| | {' | '.join(['SFT', *methods])} |",
              "|---" * (len(methods) + 2) + "|"]
    for method in methods:
        cells = [f"{statistics.mean(seed[method]['win_rate'][file_name(other)] for seed in seeds.values()):.3f}"
                 if other != method else "" for other in ["SFT", *methods]]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "## DVPO against PPO", ""]
    for name, x in results["against_ppo"].items():
        lines.append(f"* {name}: {x}")
    online = [method for method in methods if method != "DPO"]
    lines += ["", "## The analogue of Figure 4", "", "Oracle score of the rollouts (training prompts), mean over seeds "
              "and over the five steps up to the one named.", "", f"| step | {' | '.join(online)} |",
              "|---" * (len(online) + 1) + "|"]
    for step in range(5, steps + 1, 5):
        cells = [f"{statistics.mean(v for seed in seeds.values() for v in seed[m]['curve'][step - 5:step]):.3f}"
                 for m in online]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    if results["sweep"]:
        lines += ["", "## Learning rates", "", f"Oracle score on the held-out prompts of the worlds of seeds "
                  f"{results['sweep_seeds']}, none of the seeds above. The best mean of each row was used.", "",
                  "| method | " + " | ".join("lr: score" for _ in ONLINE) + " |", "|---" * 5 + "|"]
        for method, scores in results["sweep"].items():
            cells = [f"{lr}: {', '.join(f'{x:.3f}' for x in found)}" for lr, found in scores.items()]
            cells = [f"**{text}**" if lr == methods[method]["lr"] else text for lr, text in zip(scores, cells)]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def against_ppo(results):
    """The targets of the comparison, in words with numbers."""
    seeds = results["seeds"].values()
    ppo, dvpo, pairs = ([seed[m]["oracle"] for seed in seeds] for m in ("PPO", "DVPO", "DVPO, pairs"))

    def versus(name, scores):
        x, y, gap = interval(ppo), interval(scores), interval([b - a for a, b in zip(ppo, scores)])
        return (f"{name} {y['mean']:.3f} ({y['low']:.3f} to {y['high']:.3f}), PPO {x['mean']:.3f} ({x['low']:.3f} to "
                f"{x['high']:.3f}); difference seed by seed {gap['mean']:+.3f} ({gap['low']:+.3f} to "
                f"{gap['high']:+.3f})")

    steps = {m: [steps_to_reach(seed[m]["curve"], statistics.mean(seed["PPO"]["curve"][-5:])) for seed in seeds]
             for m in ("DVPO", "DVPO, pairs", "PPO")}
    time_ = {m: results["step_seconds"][m]["total"] for m in ("DVPO", "PPO")}
    large = results["large"]
    return {"oracle score": versus("DVPO", dvpo),
            "oracle score, the same pairs for both": versus("DVPO, pairs", pairs),
            "time per step": f"{time_['DVPO']:.2f} s / {time_['PPO']:.2f} s = {time_['DVPO'] / time_['PPO']:.2f}",
            "time per step, 100 million parameters": "{:.1f} s / {:.1f} s = {:.2f}".format(
                *(pair := [large[m]["seconds"] for m in ("DVPO", "PPO")]), pair[0] / pair[1]),
            "peak memory, 100 million parameters": "{:.0f} MiB / {:.0f} MiB = {:.2f}".format(
                *(pair := [large[m]["peak_mib"] for m in ("DVPO", "PPO")]), pair[0] / pair[1]),
            "steps to reach PPO's score of its last 5 steps (mean of 5 steps; one number per seed)":
                "; ".join(f"{method} {found}" for method, found in steps.items())}


# ---- 4. Main ----
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--sweep_seeds", type=int, nargs="*", default=[9, 10], help="worlds of the sweep; "
                        "none: the scripts' defaults")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method when time per step is measured")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", default="runs/compare", help="folder for the runs")
    parser.add_argument("--output", default=str(ROOT / "results"), help="folder for compare.json and .md")
    parser.add_argument("--write_large_models", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_large_models:
        return write_large_models(Path(args.write_large_models))
    if len({*args.seeds, *args.sweep_seeds}) < len(args.seeds) + len(args.sweep_seeds) or not (
            len(args.seeds) == 1 or len(args.seeds) in T_95):
        raise SystemExit("error: --seeds and --sweep_seeds must all differ (what was chosen on a world says nothing "
                         "there), and --seeds be 1 to 10")
    runs, pool = Path(args.runs).resolve(), ThreadPoolExecutor(args.jobs)
    started, folder = time.time(), {seed: runs / f"seed{seed}" for seed in [*args.sweep_seeds, *args.seeds]}
    list(pool.map(lambda seed: world_and_sft(folder[seed], seed), folder))
    list(pool.map(lambda job: value_model(folder[job[0]], job[1], job[0]),
                  [(seed, name) for seed in folder for name in ("reward_model", "gvm", "gvm_pairs")]))

    chosen, sweep = dict.fromkeys(METHODS), {}
    jobs = [(seed, method, lr) for seed in args.sweep_seeds for method in METHODS for lr in METHODS[method][2]]
    tried = list(pool.map(lambda job: train(folder[job[0]] / "sweep" / f"{file_name(job[1])}_{job[2]:g}", job[1],
                                            folder[job[0]], job[0], args.steps, job[2]), jobs))
    scores = dict(zip(args.sweep_seeds, pool.map(lambda seed: evaluate(
        folder[seed] / "sweep" / "eval", folder[seed], [output for job, output in zip(jobs, tried) if job[0] == seed],
        seed), args.sweep_seeds)))
    for (seed, method, lr), output in zip(jobs, tried):
        score = scores[seed]["models"][output.name]["score"]["mean"]
        sweep.setdefault(method, {}).setdefault(f"{lr:g}", []).append(score)
    if sweep:
        chosen = {method: max(sweep[method], key=lambda lr: sum(sweep[method][lr])) for method in METHODS}

    list(pool.map(lambda job: train(folder[job[0]] / file_name(job[1]), job[1], folder[job[0]], job[0], args.steps,
                                    chosen[job[1]]), [(seed, method) for seed in args.seeds for method in METHODS]))
    evaluated = dict(zip(args.seeds, pool.map(lambda seed: evaluate(
        folder[seed] / "eval", folder[seed], [folder[seed] / file_name(m) for m in METHODS], seed), args.seeds)))
    first = folder[args.seeds[0]]
    seconds = step_times(first, runs / "times", args.rounds, 8, chosen)
    memory = peak_memory(first, runs / "memory")

    sys.path.insert(0, str(ROOT))
    import atlas
    commits = {json.loads(path.read_text())["commit"] for path in runs.glob("**/process.json")}
    commit = ", ".join(sorted(commits))
    made = " ".join(["python experiments/compare.py", *sys.argv[1:]])
    results = {"command": made, "commits": sorted(commits), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
               "rollouts_per_step": ROLLOUTS, "sweep_seeds": args.sweep_seeds, "sweep": sweep,
               "step_seconds": seconds, "large": memory, "seeds": {},
               "methods": {method: {"lr": chosen[method]} for method in METHODS}}
    for seed, result in evaluated.items():
        x = result["models"]["sft"]
        results["answers"] = x["prompts"] * result["samples"]
        results["seeds"][str(seed)] = {"SFT": {"oracle": x["score"]["mean"], "length": x["response_length"]}} | {
            method: per_seed(folder[seed], method, result, atlas.oracle) for method in METHODS}
    results["against_ppo"] = against_ppo(results)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "compare.md").write_text(table(results, made, commit, args.steps))
    print((output / "compare.md").read_text(), f"\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
