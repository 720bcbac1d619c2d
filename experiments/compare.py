"""The comparison, with equal information: every arm learns from the same pairs of the same answers, in Atlas.

Hypothesis  DVPO's policies are not worse than PPO's (section 5), at about 3/5 of its time and memory.
            Margin, fixed before the run: 0.03 of the oracle's score.
Method      A world per seed, and in it one SFT model, one set of scored answers, and pairs of them. From the
            pairs: a reward model (PPO, GRPO, ReMax), a GVM ("DVPO, pairs"), DPO. From the reward model's
            scores of the same answers: a GVM ("DVPO", the paper's own arm). "PPO, critic from the GVM": its
            critic starts as the pairs' GVM. "GRPO, GVM's last value": the pairs' GVM as a reward model:
            "DVPO, pairs" minus this arm is what token-level credit is worth. Apart, for it knows more:
            "DVPO, oracle", whose GVM has the oracle's scores.
            Tuning, in worlds of its own, as many tries for each arm: four learning rates, two more KL
            coefficients (DPO: beta), two more values of another knob; a best rate at the edge of its grid
            gets up to two more. Chosen by the oracle there. Then other worlds: final score of 32 answers per
            held-out question; the rollouts' score where the arm's own signal (its reward or value, mean of
            five steps) was highest; score against KL, rollouts and seconds, the training of reward model and
            GVM included.
            Verdicts: by the 95 % interval of the differences (Student's t over worlds) and the margin.
            p-values are exact sign-flip tests, with Holm's correction. Times per step: arms taking turns.
Command     python experiments/compare.py             (make compare; hours, and it can be stopped)
Result      experiments/results/compare.json, .md and .png
"""
import argparse
import itertools
import json
import os
import platform
import sys
from pathlib import Path
from statistics import mean, median, stdev

import claims                                                 # first: it finds the project's root
import evaluate
import matplotlib.pyplot as plt
import torch
import train_dvpo
from claims import minus
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

MARGIN, ROLLOUTS, WINDOW = 0.03, 60, 5                        # rollouts of a step: 12 groups of 5
RATES, KL = [1e-5, 3e-5, 1e-4, 3e-4], {"kl_coef": [0.02, 0.15]}
DVPO, PPO, CLIP = {"gae_lambda": [0.8, 1.0]}, {"critic_lr": [1.5e-4, 1.5e-3]}, {"clip_range": [0.1, 0.4]}
ARMS = {   # name: (script, {flag: folder of the world}, learning rates, two knobs and their other values)
    "DVPO": ("train_dvpo", {"gvm": "gvm_labelled"}, RATES, KL | DVPO),
    "DVPO, pairs": ("train_dvpo", {"gvm": "gvm_pairs"}, RATES, KL | DVPO),
    "PPO": ("baselines.ppo", {"reward_model": "reward_model"}, RATES, KL | PPO),
    "PPO, critic from the GVM": ("baselines.ppo", {
        "reward_model": "reward_model", "critic_init": "gvm_pairs"}, RATES, KL | PPO),
    "GRPO": ("baselines.grpo", {"reward_model": "reward_model"}, RATES, KL | CLIP),
    "GRPO, GVM's last value": ("baselines.grpo", {"reward_model": "gvm_as_reward"}, RATES, KL | CLIP),
    # ReMax makes one update per step, the others four.
    "ReMax": ("baselines.remax", {"reward_model": "reward_model"}, [3e-5, 1e-4, 3e-4, 1e-3],
              {"kl_coef": [0.02, 0.15, 0.01, 0.3]}),
    "DPO": ("baselines.dpo", {}, RATES, {"beta": [0.03, 0.3], "epochs": [2, 3]}),
    "DVPO, oracle": ("train_dvpo", {"gvm": "gvm"}, RATES, KL | DVPO)}
EQUAL = [arm for arm in ARMS if arm != "DVPO, oracle"]
TRAINED = {"DVPO": ["reward_model", "gvm_labelled"], "DVPO, pairs": ["gvm_pairs"], "PPO": ["reward_model"],
           "PPO, critic from the GVM": ["reward_model", "gvm_pairs"], "GRPO": ["reward_model"],
           "GRPO, GVM's last value": ["gvm_pairs"], "ReMax": ["reward_model"], "DPO": [],
           "DVPO, oracle": ["gvm"]}
PARTS = ("generate", "score", "update")


# ---- 1. A world and its runs ----
@torch.no_grad()
def label(folder, start):
    """A data folder whose scored answers have the reward model's scores."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model").eval()
    tokenizer, rows = train_dvpo.load_tokenizer(str(folder / "reward_model")), []
    for row in claims.read_lines(start["data"] / "scored.jsonl"):
        ids = evaluate.encode_conversation(model.config, tokenizer, row["prompt"], row["response"])
        rows.append(row | {"reward": model(torch.tensor([ids])).logits.item()})
    claims.write_lines(folder / "labelled" / "scored.jsonl", rows)
    return folder / "labelled"


def as_reward_model(folder, output):
    """The pairs' GVM as a reward model: its value at the last token, without the head's bias."""
    if not (output / "model.safetensors").exists():
        gvm = AutoModelForTokenClassification.from_pretrained(folder)
        gvm.config.reward_model = {"reward_mean": 0.0, "reward_std": 1.0}
        model = AutoModelForSequenceClassification.from_config(gvm.config)
        model.base_model.load_state_dict(gvm.base_model.state_dict())
        model.score.weight.data.copy_(gvm.score.weight)
        model.save_pretrained(output)
        train_dvpo.load_tokenizer(str(folder)).save_pretrained(output)


def prepare(folder, seed, scale):
    """What the arms of a world need. Returns the flags that all have."""
    sft, start, _ = claims.base(folder, seed, scale)
    claims.train("baselines.reward_model", folder / "reward_model", model=sft, **start)
    claims.train("train_gvm", folder / "gvm_pairs", model=sft, supervision="pairs", **start)
    claims.train("train_gvm", folder / "gvm_labelled", model=sft, **start | {"data": label(folder, start)})
    claims.train("train_gvm", folder / "gvm", model=sft, **start)
    as_reward_model(folder / "gvm_pairs", folder / "gvm_as_reward")
    return start | {"model": sft}


def train(output, arm, folder, start, steps, settings):
    script, inputs, _, _ = ARMS[arm]
    flags = start | {flag: folder / name for flag, name in inputs.items()} | settings
    if script != "baselines.dpo":
        flags |= {"steps": steps, "batch_size": ROLLOUTS, "micro_batch_size": 10}
        flags |= {} if arm == "ReMax" else {"mini_batch_size": ROLLOUTS // 2}
    return claims.train(script, output, **flags)


@torch.no_grad()
def measure(run, sft, data, samples, seed):
    """{"oracle", "kl", "length", "wins": over SFT} of a policy on held-out questions, kept beside it."""
    file = run / f"measured_{samples}.json"
    if not file.exists() or file.stat().st_mtime < (run / "model.safetensors").stat().st_mtime:
        (policy, tokenizer), (reference, _) = claims.load_policy(run), claims.load_policy(sft)
        prompts = claims.prompts_of({"data": data})
        torch.manual_seed(seed)
        said = claims.answers(policy, tokenizer, [prompt for prompt in prompts for _ in range(samples)])
        texts = [claims.text(tokenizer, response) for _, response in said]
        scores = [claims.score({"prompt": prompts[i // samples], "response": x}) for i, x in enumerate(texts)]
        groups = [said[i:i + samples] for i in range(0, len(said), samples)]
        kl = [evaluate.log_ratios(policy, reference, group[0][0], [y for _, y in group]).mean().item()
              for group in groups]
        file.write_text(json.dumps({"oracle": mean(scores), "kl": mean(kl), "scores": scores,
                                    "length": mean(len(response) for _, response in said)}))
    found = json.loads(file.read_text())
    scores, rival = found.pop("scores"), json.loads((sft / file.name).read_text())["scores"]
    return found | {"wins": mean((a > b) + (a == b) / 2 for a, b in zip(scores, rival))}


def run_seed(folder, seed, scale, steps, jobs, samples):
    """{"SFT": numbers, arm: [numbers with each of its settings]} of a world. jobs: {arm: [settings]}."""
    start = prepare(folder, seed, scale)
    sft, data = start["model"], start["data"]
    found = {"SFT": measure(sft, sft, data, samples, seed)}
    for arm, tries in jobs.items():
        for settings in tries:
            words = "_".join(f"{name}{value:g}" for name, value in settings.items())
            run = train(folder / f"{file_name(arm)}_{steps}_{words}", arm, folder, start, steps, settings)
            record = measure(run, sft, data, samples, seed)
            record |= {"seconds": seconds(run), "before": sum(seconds(folder / x) for x in TRAINED[arm])}
            if arm != "DPO":
                rows = claims.read_lines(run / "metrics.jsonl")
                record |= {"curve": [mean(x) for x in claims.by_step(run, claims.score)],
                           "signal": [row.get("reward", row.get("value")) for row in rows],
                           "curve_kl": [row["kl"] for row in rows]}
            found.setdefault(arm, []).append(record)
    return found


def seconds(run):
    """Of all steps of a run."""
    return sum(x for row in claims.read_lines(run / "metrics.jsonl") for name, x in row.items()
               if name.startswith("seconds"))


def file_name(arm):
    return "".join(c if c.isalnum() else "_" for c in arm.lower())


# ---- 2. Tuning ----
def tune(args, steps):
    """{arm: its best settings}, {arm: [[settings, the oracle's score in each world], ...]}."""
    worlds, tried = argparse.Namespace(**vars(args) | {"seeds": args.sweep_seeds}), {arm: [] for arm in ARMS}

    def try_all(jobs):
        found = claims.over_seeds(run_seed, worlds, steps, jobs, 4)
        for arm, tries in jobs.items():
            for i, settings in enumerate(tries):
                tried[arm].append([settings, [seed[arm][i]["oracle"] for seed in found.values()]])

    def best(arm):
        return max(tried[arm], key=lambda x: mean(x[1]))[0]

    try_all({arm: [{"lr": rate} for rate in rates] for arm, (_, _, rates, _) in ARMS.items()})
    for _ in range(2):                                        # no best rate at the edge, if more can help it
        rates = {arm: sorted(settings["lr"] for settings, _ in tries) for arm, tries in tried.items()}
        more = {arm: [{"lr": best(arm)["lr"] * (3 if best(arm)["lr"] == rates[arm][-1] else 1 / 3)}]
                for arm in ARMS if best(arm)["lr"] in (rates[arm][0], rates[arm][-1])}
        if more:
            try_all(more)
    for number in (0, 1):                                     # then the first knob, then the second
        pairs = {arm: [(name, value) for name, values in knobs.items() for value in values]
                 for arm, (_, _, _, knobs) in ARMS.items()}
        try_all({arm: [best(arm) | {name: value} for name, value in each[2 * number:2 * number + 2]]
                 for arm, each in pairs.items()})
    return {arm: best(arm) for arm in ARMS}, tried


# ---- 3. Times ----
def step_times(folder, runs, rounds, chosen):
    """{arm: {"generate", "score", "update", "total": median seconds of a step}}, arms taking turns."""
    torch.set_num_threads(os.cpu_count())
    times = {arm: [] for arm in ("DVPO, pairs", "PPO", "GRPO", "ReMax")}
    for number in range(rounds):
        for arm in times:
            output = train(runs / f"{file_name(arm)}_{number}", arm, folder,
                           {"data": folder / "data", "model": folder / "sft", "seed": number}, 8, chosen[arm])
            times[arm] += claims.read_lines(output / "metrics.jsonl")[1:]      # the first step warms up
    return {arm: {part: median(row[f"seconds_{part}"] for row in rows) for part in PARTS} |
            {"total": median(sum(row[f"seconds_{part}"] for part in PARTS) for row in rows)}
            for arm, rows in times.items()}


# ---- 4. The answer ----
def sign_flips(differences):
    """Exact two-sided p-value: the share of sign patterns whose mean is at least as far from 0."""
    seen, flips = abs(sum(differences)), list(itertools.product((1, -1), repeat=len(differences)))
    return mean(abs(sum(s * d for s, d in zip(signs, differences))) >= seen - 1e-12 for signs in flips)


def holm(ps):
    """Holm's corrected p-values of {name: p}."""
    corrected, running = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=ps.get)):
        running = max(running, min(1.0, (len(ps) - rank) * ps[name]))
        corrected[name] = running
    return corrected


def verdict(differences):
    """In words, by the 95 % interval and the margin."""
    _, low, high = claims.interval(differences)
    if low > 0 or high < 0:
        return "better" if low > 0 else "worse"
    if low > -MARGIN:
        return f"equal within {MARGIN}" if high < MARGIN else f"not worse by more than {MARGIN}"
    return "not decided"


def smooth(x):
    return [mean(x[i - WINDOW:i]) for i in range(WINDOW, len(x) + 1)]


def drawdown(record):
    """The deepest fall of the curve, mean of WINDOW steps, below its best so far (Appendix F: stability)."""
    curve = smooth(record["curve"])
    return max(best - x for best, x in zip(itertools.accumulate(curve, max), curve))


def stopped(record):
    """The curve where the arm's own signal, mean of WINDOW steps, was highest: (step, score)."""
    signal, curve = smooth(record["signal"]), smooth(record["curve"])
    step = max(range(len(signal)), key=signal.__getitem__)
    return step + WINDOW, curve[step]


def report(results, per_seed):
    """Lines of compare.md."""
    sft, rows, lines = per_seed("SFT", "oracle"), [], []
    for arm in ARMS:
        step, scores = results["step_seconds"].get(arm), per_seed(arm, "oracle")
        total = mean(per_seed(arm, "seconds")) + mean(per_seed(arm, "before"))
        early = [""] * 2
        if arm != "DPO":
            early = [list(x) for x in zip(*(stopped(seed[arm]) for seed in results["seeds"].values()))]
            early = [f"{mean(early[0]):.0f}", early[1]]
        settings = ", ".join(f"{name} {value:g}" for name, value in results["chosen"][arm].items())
        rows.append([arm, settings, scores, minus(scores, sft), per_seed(arm, "wins"), per_seed(arm, "kl"),
                     per_seed(arm, "length"), *early, f"{total:.0f}", f"{step['total']:.2f}" if step else ""])
    lines += claims.table("arm | settings | oracle score | gain over SFT | win rate over SFT | KL, nats | "
                          "length | own signal's best step | rollouts' score there | seconds in all | "
                          "seconds a step", [
                              ["SFT", "", sft, "", "", "0", per_seed("SFT", "length"), *[""] * 4], *rows])
    lines += ["", "## Stability (Appendix F)", "", *claims.table(
        "arm | deepest fall of the rollouts' score | deviation of the final score over worlds", [
            [arm, [drawdown(seed[arm]) for seed in results["seeds"].values()],
             f"{stdev(per_seed(arm, 'oracle')):.3f}" if len(sft) > 1 else ""]
            for arm in ARMS if arm != "DPO"])]
    for rival in ("PPO", "DVPO, pairs"):
        others = [arm for arm in EQUAL if arm != rival]
        differences = {arm: minus(per_seed(arm, "oracle"), per_seed(rival, "oracle")) for arm in others}
        corrected = holm({arm: sign_flips(x) for arm, x in differences.items()})
        lines += ["", f"## Minus {rival}, world by world", "", *claims.table(
            "arm | difference | verdict | p, Holm's correction", [
                [arm, x, f"**{verdict(x)}**", f"{corrected[arm]:.3f}"] for arm, x in differences.items()])]
    lines += ["", "## Tuning", "", f"Worlds {results['sweep_seeds']}, {results['sweep_steps']} steps; mean "
              "of the oracle's scores there.", "", *claims.table("arm | tries", [
                  [arm, "; ".join(", ".join(f"{name} {value:g}" for name, value in settings.items())
                                  + f": {mean(scores):.3f}" for settings, scores in tries)]
                  for arm, tries in results["tried"].items()])]
    return lines


def draw(seeds, steps):
    """Score against rollouts, KL and total seconds; means over worlds of WINDOW steps."""
    picture, panels = plt.subplots(1, 3, figsize=(15, 4.5))
    for arm in ARMS:
        records = [seed[arm] for seed in seeds.values()]
        if arm == "DPO":
            x = [mean(record[name] for record in records) for name in ("kl", "seconds")]
            for panel, value in zip(panels[1:], x):
                panel.plot(value, mean(record["oracle"] for record in records), "k*", label="DPO, held out")
            continue
        ends = range(WINDOW, steps + 1, WINDOW)
        score, kl = ([mean(sum((record[name][end - WINDOW:end] for record in records), [])) for end in ends]
                     for name in ("curve", "curve_kl"))
        before, online = (mean(record[name] for record in records) for name in ("before", "seconds"))
        time = [before + online * end / steps for end in ends]
        for panel, x in zip(panels, ([end * ROLLOUTS for end in ends], kl, time)):
            panel.plot(x, score, label=arm, linewidth=1)
    for panel, x in zip(panels, ("rollouts", "KL to SFT (nats per answer)", "seconds, all training")):
        claims.label(panel, "Oracle score of the rollouts", x, "oracle score")
    return picture


def main():
    parser = claims.parser(__doc__, range(11, 21), "runs/compare")
    parser.add_argument("--sweep_seeds", type=int, nargs="*", default=[6, 7, 8, 9], help="none: no tuning")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sweep_steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=32, help="answers per held-out question")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method when steps are timed")
    args = parser.parse_args()
    if len({*args.seeds, *args.sweep_seeds}) < len(args.seeds) + len(args.sweep_seeds):
        parser.error("--seeds and --sweep_seeds must all differ: settings were chosen on the latter")
    steps, sweep_steps = claims.steps(args.scale, args.steps), claims.steps(args.scale, args.sweep_steps)
    chosen, tried = {arm: {"lr": 1e-4} for arm in ARMS}, {}
    if args.sweep_seeds:
        chosen, tried = tune(args, sweep_steps)
    jobs = {arm: [settings] for arm, settings in chosen.items()}
    seeds = {seed: {name: x[0] if name in ARMS else x for name, x in found.items()}
             for seed, found in claims.over_seeds(run_seed, args, steps, jobs, args.samples).items()}
    runs = Path(args.runs)
    command = " ".join(["python experiments/compare.py", *sys.argv[1:]])
    results = {"command": command, "commit": claims.commit(),
               "machine": f"{platform.machine()}, {os.cpu_count()} cores", "steps": steps, "chosen": chosen,
               "sweep_steps": sweep_steps, "sweep_seeds": args.sweep_seeds, "tried": tried, "seeds": seeds,
               "step_seconds": step_times(runs / f"seed{args.seeds[0]}", runs / "times", args.rounds, chosen)}
    about = __doc__[__doc__.index("Hypothesis"):__doc__.index("Command")].rstrip().splitlines()
    lines = [f"# {__doc__.splitlines()[0]}", "", *(f"    {line}" for line in about), "",
             f"`{results['command']}`, commit {results['commit']}, {results['machine']}. {steps} steps of "
             f"{ROLLOUTS} rollouts. Mean over the worlds and its 95 % interval (Student's t).", "",
             *report(results, lambda *keys: claims.per_seed(seeds, *keys)), "", "![compare](compare.png)"]
    claims.write_result(args.output, "compare", results, lines)
    draw(seeds, steps).savefig(Path(args.output, "compare.png"), dpi=110, bbox_inches="tight")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
