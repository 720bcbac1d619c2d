"""The comparison, with equal information: every arm learns from the same pairs of the same answers, in Atlas.

Hypothesis  DVPO's policies are not worse than PPO's (section 5), at about 3/5 of its time and memory.
            Margin, fixed before the run: 0.03 of the oracle's score.
Method      A world per seed, and in it one SFT model, one set of scored answers, and pairs of them. From the
            pairs: a reward model (PPO, GRPO, ReMax), a GVM ("DVPO, pairs"), DPO. From the reward model's
            scores of these answers: a GVM ("DVPO", the paper's own arm). "PPO, critic from the GVM": its
            critic starts as the pairs' GVM. "GRPO, GVM's last value": the pairs' GVM as a reward model, its
            knowledge without token-level credit. Apart, for it knows more: "DVPO, oracle", whose GVM has the
            oracle's scores of the same answers (and whose settings are those of "DVPO").
            Tuning, in worlds of its own, alike for each arm, one knob after the other: four learning rates,
            three KL coefficients (DPO: beta), three values of another knob; where the best of the first two
            is at its edge, up to two values beyond. These in runs of a third of the steps; the best two
            settings in runs of all. From the better one the search goes on, up to three times, to a third of
            the learning rate or three times the KL coefficient, where that is better: what suits a short run
            goes too far in a long one. Then the third knob once more. Chosen by the oracle there. DPO has no
            steps: all its tries are whole runs, its third knob is their length, and its rate falls to 0.
            The reward model makes two passes over the pairs there; four (PASSES), as it makes later, then
            ranked more of the held-out pairs of these worlds correctly. GVMs make two: four are no better.
            Then other worlds: final score of 32 answers per held-out question; the rollouts' score after the
            five steps whose mean own signal (reward or value) was highest; score against KL, rollouts and
            seconds, the training of reward model and GVM and its labels included.
            Verdicts: "better" or "worse" where Holm's correction of the exact sign-flip test, over all rows
            of both tables, leaves p below 0.05; else by the margin and the 95 % interval of the differences
            (Student's t over worlds, not corrected). Times: one world, all threads, an idle machine; per
            step, arms taking turns.
Command     python experiments/compare.py             (make compare; hours, and it can be stopped)
Result      experiments/results/compare.json, .md and .png
"""
import argparse
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev

import claims                                                 # first: it finds the project's root
import evaluate
import matplotlib.pyplot as plt
import torch
import train_dvpo
from claims import minus
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

MARGIN, ROLLOUTS, WINDOW, CLIMBS, PASSES = 0.03, 40, 5, 3, 4  # rollouts of a step: 8 groups of 5
# {knob: values tried}; the first value is the script's own, but for lr.
BASE = {"lr": [1e-5, 3e-5, 1e-4, 3e-4], "kl_coef": [0.05, 0.02, 0.15]}
DVPO, PPO = BASE | {"gae_lambda": [0.95, 0.8, 1.0]}, BASE | {"critic_lr": [5e-4, 1.5e-4, 1.5e-3]}
GRPO = BASE | {"clip_range": [0.2, 0.1, 0.4]}
ARMS = {   # name: (script, {flag: folder of the world}, knobs)
    "DVPO": ("train_dvpo", {"gvm": "gvm_labelled"}, DVPO),
    "DVPO, pairs": ("train_dvpo", {"gvm": "gvm_pairs"}, DVPO),
    "PPO": ("baselines.ppo", {"reward_model": "reward_model"}, PPO),
    "PPO, critic from the GVM": ("baselines.ppo", {
        "reward_model": "reward_model", "critic_init": "gvm_pairs"}, PPO),
    "GRPO": ("baselines.grpo", {"reward_model": "reward_model"}, GRPO),
    "GRPO, GVM's last value": ("baselines.grpo", {"reward_model": "gvm_as_reward"}, GRPO),
    # ReMax makes one update per step, the others four. It has no third knob: more KL coefficients.
    "ReMax": ("baselines.remax", {"reward_model": "reward_model"}, {
        "lr": [3e-5, 1e-4, 3e-4, 1e-3], "kl_coef": [0.05, 0.01, 0.02, 0.15, 0.3]}),
    "DPO": ("baselines.dpo", {}, {"lr": BASE["lr"], "beta": [0.1, 0.03, 0.3], "epochs": [1, 2, 3]}),
    "DVPO, oracle": ("train_dvpo", {"gvm": "gvm_oracle"}, {})}
EQUAL = [arm for arm in ARMS if arm != "DVPO, oracle"]
TRAINED = {"DVPO": ["reward_model", "labelled", "gvm_labelled"], "DVPO, pairs": ["gvm_pairs"],
           "PPO": ["reward_model"], "PPO, critic from the GVM": ["reward_model", "gvm_pairs"],
           "GRPO": ["reward_model"], "GRPO, GVM's last value": ["gvm_pairs"], "ReMax": ["reward_model"],
           "DPO": [], "DVPO, oracle": ["gvm_oracle"]}
PARTS = ("generate", "score", "update")
GVMS = {"gvm_labelled": "the reward model's scores", "gvm_pairs": "pairs",
        "gvm_oracle": "the oracle's scores"}


# ---- 1. A world and its runs ----
def newer(made, source):
    return made.exists() and made.stat().st_mtime >= source.stat().st_mtime


def scorer(folder):
    """The score of a row by the reward model in this folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = train_dvpo.load_tokenizer(str(folder))

    def score(row):
        ids = evaluate.encode_conversation(model.config, tokenizer, row["prompt"], row["response"])
        return model(torch.tensor([ids])).logits.item()
    return score


@torch.no_grad()
def label(output, start, source, score):
    """A data folder in which the answers of the pairs have these scores; kept if newer than the source."""
    if newer(output / "metrics.jsonl", source):
        return output
    began, pairs = time.time(), claims.read_lines(start["data"] / "pairs.jsonl")
    rows = [{"prompt": prompt, "response": response} for prompt, response in dict.fromkeys(
        (row["prompt"], row[side]) for row in pairs for side in ("chosen", "rejected"))]
    for row in rows:
        row["reward"] = score(row)
    claims.write_lines(output / "scored.jsonl", rows)
    claims.write_lines(output / "test_pairs.jsonl", claims.read_lines(start["data"] / "test_pairs.jsonl"))
    claims.write_lines(output / "metrics.jsonl", [{"seconds_label": time.time() - began}])
    return output


def as_reward_model(folder, output):
    """The pairs' GVM as a reward model: its value at the last token, without the head's bias."""
    if not newer(output / "model.safetensors", folder / "model.safetensors"):
        gvm = AutoModelForTokenClassification.from_pretrained(folder)
        gvm.config.reward_model = {"reward_mean": 0.0, "reward_std": 1.0}
        model = AutoModelForSequenceClassification.from_config(gvm.config)
        model.base_model.load_state_dict(gvm.base_model.state_dict())
        model.score.weight.data.copy_(gvm.score.weight)
        train_dvpo.load_tokenizer(str(folder)).save_pretrained(output)
        model.save_pretrained(output)


def prepare(folder, seed, scale, passes):
    """What the arms of a world need. Returns the flags that all have."""
    sft, start, _ = claims.base(folder, seed, scale)
    claims.train_reward_model(folder / "reward_model", sft, start, epochs=passes)
    claims.train_gvm(folder / "gvm_pairs", sft, start, supervision="pairs")
    by_model = label(folder / "labelled", start, folder / "reward_model" / "model.safetensors",
                     scorer(folder / "reward_model"))
    by_oracle = label(folder / "oracle_labelled", start, start["data"] / "pairs.jsonl", claims.score)
    claims.train_gvm(folder / "gvm_labelled", sft, start | {"data": by_model})
    claims.train_gvm(folder / "gvm_oracle", sft, start | {"data": by_oracle})
    as_reward_model(folder / "gvm_pairs", folder / "gvm_as_reward")
    return start | {"model": sft}


def train(output, arm, folder, start, settings):
    script, inputs, _ = ARMS[arm]
    flags = start | {flag: folder / name for flag, name in inputs.items()} | settings
    if script != "baselines.dpo":
        flags |= {"batch_size": ROLLOUTS, "micro_batch_size": 10}
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


def run_seed(folder, seed, scale, steps, jobs, samples, passes):
    """{"SFT": numbers, arm: [numbers with each of its settings]} of a world. jobs: {arm: [settings]}."""
    start = prepare(folder, seed, scale, passes)
    sft, data = start["model"], start["data"]
    found = {"SFT": measure(sft, sft, data, samples, seed),
             "ranked": {gvm: claims.pair_accuracy(folder / gvm)["last"] for gvm in GVMS}}
    measured = claims.read_lines(folder / "reward_model" / "metrics.jsonl")[-1]
    found["ranked"]["reward_model"] = measured["pair_accuracy"]
    for arm, tries in jobs.items():
        for settings in tries:
            settings = settings if arm == "DPO" else {"steps": steps} | settings
            words = "_".join(f"{name}{value:g}" for name, value in settings.items())
            try:
                run = train(folder / f"{claims.file_name(arm)}_{words}", arm, folder, start, settings)
            except SystemExit as error:                       # diverged: the lowest score
                if "gradient norm" not in str(error):
                    raise
                found.setdefault(arm, []).append({"oracle": -1.0})
                continue
            record = measure(run, sft, data, samples, seed)
            if arm != "DPO":
                rows = claims.read_lines(run / "metrics.jsonl")
                record |= {"curve": [round(mean(x), 4) for x in claims.by_step(run, claims.score)],
                           "signal": [round(row.get("reward", row.get("value")), 4) for row in rows],
                           "curve_kl": [round(row["kl"], 3) for row in rows]}
            found.setdefault(arm, []).append(record)
    return found


# ---- 2. Tuning ----
def tune(args, sweep_steps, steps):
    """{arm: its best settings}, {arm: [[settings, steps, the oracle's score in each world], ...]}."""
    worlds, tried = argparse.Namespace(**vars(args) | {"seeds": args.sweep_seeds}), {arm: [] for arm in EQUAL}

    def try_all(jobs, steps):
        found = claims.over_seeds(run_seed, worlds, steps, jobs, 4, 2) if any(jobs.values()) else {}
        for arm, tries in jobs.items():
            for i, settings in enumerate(tries):
                tried[arm].append([settings, steps, [seed[arm][i]["oracle"] for seed in found.values()]])

    def knob(arm, number):                                    # (name, values); ReMax has no third
        return [*ARMS[arm][2].items(), (None, []), (None, [])][number]

    def ranked(arm, steps):
        tries = [x for x in tried[arm] if x[1] == steps]
        return [settings for settings, *_ in sorted(tries, key=lambda x: -mean(x[2]))]

    for number in range(3):                                   # a knob after the other
        for beyond in range(3 if number < 2 else 1):          # and beyond the edge, where that is best
            jobs = {}
            for arm in EQUAL:
                name, values = knob(arm, number)
                so_far = ranked(arm, sweep_steps)
                best = so_far[0] if so_far else {knob: x[0] for knob, x in ARMS[arm][2].items()}
                if beyond and name:
                    seen = [settings[name] for settings in so_far]
                    values = {min(seen): [min(seen) / 3], max(seen): [max(seen) * 3]}.get(best[name], [])
                tries = [best | {name: value} for value in values]
                jobs[arm] = [settings for settings in tries if settings not in so_far]
            try_all(jobs, sweep_steps)
    try_all({arm: ranked(arm, sweep_steps)[:2] for arm in EQUAL}, steps)
    for _ in range(CLIMBS):                                   # more steps: a smaller rate or a larger penalty
        jobs = {}
        for arm in EQUAL:
            best = ranked(arm, steps)[0]
            tries = [best | {name: float(f"{best[name] * factor:.2g}")}
                     for name, factor in (("lr", 1 / 3), ("kl_coef", 3), ("beta", 3)) if name in best]
            jobs[arm] = [settings for settings in tries if settings not in ranked(arm, steps)]
        try_all(jobs, steps)
    jobs = {}
    for arm in EQUAL:                                         # and the third knob, as it is in a long run
        best, (name, values) = ranked(arm, steps)[0], knob(arm, 2)
        jobs[arm] = [best | {name: x} for x in values if best | {name: x} not in ranked(arm, steps)]
    try_all(jobs, steps)
    args.made_with = worlds.made_with
    chosen = {arm: ranked(arm, steps)[0] for arm in EQUAL}
    return chosen | {"DVPO, oracle": chosen["DVPO"]}, tried


# ---- 3. Times ----
def take_times(args, chosen, steps):
    """{arm: {"before", "step", "all": seconds; of a step "generate", "score", "update"}} in a world of the
    first seed that is made anew. before: reward model, labels, GVM. A step: the median, arms taking turns."""
    torch.set_num_threads(os.cpu_count())
    shutil.rmtree(Path(args.runs, "times"), ignore_errors=True)
    folder, rows = Path(args.runs, "times", f"seed{args.seeds[0]}"), {}
    start = prepare(folder, args.seeds[0], args.scale, PASSES)
    for number, arm in itertools.product(range(args.rounds), ARMS):
        if arm != "DPO":
            output = train(folder / f"{claims.file_name(arm)}_{number}", arm, folder, start | {
                "seed": number}, chosen[arm] | {"steps": 8})
            rows.setdefault(arm, []).extend(claims.read_lines(output / "metrics.jsonl")[1:])    # 1 warms up
    dpo = train(folder / "DPO", "DPO", folder, start, chosen["DPO"])
    found = {"DPO": {"all": sum(claims.step_seconds(dpo))}}
    for arm, steps_of in rows.items():
        parts = [[row[f"seconds_{part}"] for part in PARTS] for row in steps_of]
        found[arm] = dict(zip(PARTS, map(median, zip(*parts)))) | {
            "before": sum(sum(claims.step_seconds(folder / x)) for x in TRAINED[arm]),
            "step": median(map(sum, parts))}
        found[arm]["all"] = found[arm]["before"] + steps * found[arm]["step"]
    return found


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


def verdict(differences, p):
    """In words, by the 95 % interval, the corrected p-value and the margin."""
    average, low, high = claims.interval(differences)
    if p < 0.05:
        within = f", by less than {MARGIN}" if low > -MARGIN and high < MARGIN else ""
        return ("better" if average > 0 else "worse") + within
    if low > -MARGIN:
        return f"equal within {MARGIN}" if high < MARGIN else f"not worse by more than {MARGIN}"
    return f"not better by more than {MARGIN}" if high < MARGIN else "not decided"


def smooth(x):
    return [mean(x[i - WINDOW:i]) for i in range(WINDOW, len(x) + 1)]


def drawdown(record):
    """The deepest fall of the curve, mean of WINDOW steps, below its best so far (Appendix F: stability)."""
    curve = smooth(record["curve"])
    return max(best - x for best, x in zip(itertools.accumulate(curve, max), curve))


def stopped(record):
    """(step where the arm's own signal, mean of WINDOW steps, was highest; score of the WINDOW steps after
    it: luck has had a part in choosing those)."""
    signal, curve = smooth(record["signal"])[:-WINDOW], smooth(record["curve"])
    best = max(range(len(signal)), key=signal.__getitem__)
    return best + WINDOW, curve[best + WINDOW]


def report(results, per_seed):
    """Lines of compare.md."""
    sft, rows, lines = per_seed("SFT", "oracle"), [], []
    for arm in ARMS:
        scores, early = per_seed(arm, "oracle"), [""] * 2
        if arm != "DPO":
            early = [list(x) for x in zip(*(stopped(seed[arm]) for seed in results["seeds"].values()))]
            early = [f"{mean(early[0]):.0f}", early[1]]
        settings = ", ".join(f"{name} {value:g}" for name, value in results["chosen"][arm].items())
        rows.append([arm, settings, scores, minus(scores, sft), per_seed(arm, "wins"), per_seed(arm, "kl"),
                     per_seed(arm, "length"), *early])
    lines += claims.table("arm | settings | oracle score | gain over SFT | win rate over SFT | KL, nats | "
                          "length | own signal's best step | rollouts' score after it", [
                              ["SFT", "", sft, "", "", "0", per_seed("SFT", "length"), "", ""], *rows])
    lines += ["", "Scores and KL are of held-out questions; the last column is of training questions. ReMax "
              "makes one update per step, the others four; it also writes a greedy answer to each prompt, "
              "which counts as time, not as a rollout.", "", "## Seconds (Tables 6 and 7)", "",
              "Before: reward model, labels, GVM. Memory: [compute.md](compute.md).", ""]
    ppo = results["seconds"]["PPO"]
    lines += claims.table("arm | before | a step | generate | score | update | all | "
                          "a step, of PPO's | all, of PPO's", [
                              [arm, *(f"{x[name]:.2f}" if name in x else "" for name in (
                                  "before", "step", *PARTS)), f"{x['all']:.0f}",
                               f"{x['step'] / ppo['step']:.2f}" if "step" in x else "",
                               f"{x['all'] / ppo['all']:.2f}"] for arm, x in results["seconds"].items()])
    lines += ["", "## Stability (Appendix F)", "", "The rollouts of GRPO's steps are of 8 "
              "prompts, the other arms' of 40: part of its falls is the prompts'.", "", *claims.table(
        "arm | deepest fall of the rollouts' score | deviation of the gain over worlds", [
            [arm, [drawdown(seed[arm]) for seed in results["seeds"].values()] if arm != "DPO" else "",
             f"{stdev(minus(per_seed(arm, 'oracle'), sft)):.3f}" if len(sft) > 1 else ""] for arm in ARMS])]
    lines += ["", "## Value models (Table 9)", "", *claims.table(
        "learns from | held-out pairs ranked correctly, last value", [
            *([f"GVM, {words}", per_seed("ranked", gvm)] for gvm, words in GVMS.items()),
            ["reward model, pairs", per_seed("ranked", "reward_model")]])]
    differences = {(arm, rival): minus(per_seed(arm, "oracle"), per_seed(rival, "oracle"))
                   for rival in ("PPO", "DVPO, pairs") for arm in EQUAL
                   if arm != rival and (arm, rival) != ("PPO", "DVPO, pairs")}
    corrected = holm({rows: sign_flips(x) for rows, x in differences.items()})
    for rival in ("PPO", "DVPO, pairs"):
        lines += ["", f"## Minus {rival}, world by world", "", *claims.table(
            "arm | difference | verdict | p, Holm's correction", [
                [rows[0], x, f"**{verdict(x, corrected[rows])}**", f"{corrected[rows]:.3f}"]
                for rows, x in differences.items() if rows[1] == rival])]
    tries = [[arm, *("; ".join(", ".join(f"{name} {value:g}" for name, value in settings.items())
                               + f": {mean(scores):.3f}" for settings, n, scores in tries
                               if n == steps and (arm != "DPO" or steps == results["steps"]))
                     for steps in (results["sweep_steps"], results["steps"]))]
             for arm, tries in results["tried"].items()]
    lines += ["", "## Tuning", "", f"Worlds {results['sweep_seeds']}; mean of the oracle's scores there.", "",
              *claims.table(f"arm | {results['sweep_steps']} steps | {results['steps']} steps", tries)]
    return lines


def draw(seeds, steps, seconds):
    """Score against rollouts, KL and total seconds; means over worlds of WINDOW steps."""
    picture, panels = plt.subplots(1, 3, figsize=(15, 4.5))
    for arm in ARMS:
        records = [seed[arm] for seed in seeds.values()]
        if arm == "DPO":
            x = [mean(record["kl"] for record in records), seconds[arm]["all"]]
            for panel, value in zip(panels[1:], x):
                panel.plot(value, mean(record["oracle"] for record in records), "k*", label="DPO, held out")
            continue
        ends = range(WINDOW, steps + 1, WINDOW)
        score, kl = ([mean(sum((record[name][end - WINDOW:end] for record in records), [])) for end in ends]
                     for name in ("curve", "curve_kl"))
        time = [seconds[arm]["before"] + seconds[arm]["step"] * end for end in ends]
        for panel, x in zip(panels, ([end * ROLLOUTS for end in ends], kl, time)):
            panel.plot(x, score, label=arm, linewidth=1)
    for panel, x in zip(panels, ("rollouts", "KL to SFT (nats per answer)", "seconds, all training")):
        claims.label(panel, "Oracle score of the rollouts", x, "oracle score")
    return picture


def main():
    parser = claims.parser(__doc__, range(31, 41), "runs/compare")
    parser.add_argument("--sweep_seeds", type=int, nargs="*", default=[6, 7, 8, 9], help="none: no tuning")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sweep_steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=32, help="answers per held-out question")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method when steps are timed")
    args = parser.parse_args()
    if len({*args.seeds, *args.sweep_seeds}) < len(args.seeds) + len(args.sweep_seeds):
        parser.error("--seeds and --sweep_seeds must all differ: settings were chosen on the latter")
    steps, sweep_steps = claims.steps(args.scale, args.steps), claims.steps(args.scale, args.sweep_steps)
    chosen, tried = {arm: {"lr": 1e-4} for arm in ARMS}, {}
    if args.sweep_seeds:
        chosen, tried = tune(args, sweep_steps, steps)
    tuned_with, jobs = getattr(args, "made_with", ""), {arm: [settings] for arm, settings in chosen.items()}
    seeds = {seed: {name: x[0] if name in ARMS else x for name, x in found.items()}
             for seed, found in claims.over_seeds(run_seed, args, steps, jobs, args.samples, PASSES).items()}
    command = " ".join(["python experiments/compare.py", *sys.argv[1:]])
    results = {"command": command, "tuned with": tuned_with, "made with": args.made_with, "steps": steps,
               "chosen": chosen, "sweep_steps": sweep_steps, "sweep_seeds": args.sweep_seeds, "tried": tried,
               "seeds": seeds, "times with": f"commit {claims.commit()}, {claims.machine()}",
               "seconds": take_times(args, chosen, steps)}
    about = __doc__[__doc__.index("Hypothesis"):__doc__.index("Command")].rstrip().splitlines()
    lines = [f"# {__doc__.splitlines()[0]}", "", *(f"    {line}" for line in about), "",
             f"`{results['command']}`, {results['made with']}; tuned with {tuned_with or 'nothing'}; times "
             f"with {results['times with']}. {steps} steps of {ROLLOUTS} rollouts. Mean over the "
             "worlds and its 95 % interval (Student's t).", "",
             *report(results, lambda *keys: claims.per_seed(seeds, *keys)), "", "![compare](compare.png)"]
    claims.write_result(args.output, "compare", results, lines)
    picture = draw(seeds, steps, results["seconds"])
    picture.savefig(Path(args.output, "compare.png"), dpi=110, bbox_inches="tight")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
