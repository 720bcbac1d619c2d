"""Critic drift: who knows better what the policy is worth now, a critic that learns along with it or a frozen GVM?

Hypothesis  Sections 1 and 3.3: a critic that learns online drifts during joint training, a GVM that is pretrained and
            frozen is stable. There is another side to it: a better policy makes a state worth more, and what is frozen
            cannot follow. So the GVM may become stale, saying too little where PPO's critic keeps up.
Method      One world per seed. DVPO and PPO from the same SFT model, and PPO with its critic frozen at its start, 40
            steps of 64 rollouts each. Every 10 steps policy and critic are set aside. There the policy answers held-out
            questions, and at one random token of each answer (never the last) it finishes the answer many times: the
            true Q of the policy as it is then. Error is value minus truth; its mean is the bias; what is left of the
            squared error without it (centred error) is what DVPO's policy feels, as whitening takes off a constant.
            What the Monte Carlo error of the truth adds is taken off squares and correlations. The critic speaks in
            units of the reward model: mapped by the straight line that best predicts the oracle's rewards of 1,000
            training answers from the reward model's scores. Its target repeats the reward model's mistakes and holds
            the KL costs still to come, which the oracle does not charge: a part of its error is not its own. The
            initial critic is the reward model, read at every prefix.
Command     python experiments/drift.py --seeds 21 22 23 24 25        (part of make claims)
Result      results/drift.json, results/drift.md, results/drift.png
"""
import importlib
import random
import statistics
import time
from unittest import mock

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
import torch
from claims import cell, interval, verdict

PARTS = 4                                                     # of a run, between the policies that are set aside
QUESTIONS, COMPLETIONS = 120, 32                              # for each policy; for each of its answers
LINES = {"GVM, DVPO's policy": "tab:blue", "GVM, PPO's policy": "tab:cyan", "live critic, PPO's policy": "tab:red",
         "initial critic, PPO's policy": "tab:gray"}


# ---- 1. Runs whose policies are set aside on the way ----
def train_and_set_aside(script, output, marks, **flags):
    """claims.train that also leaves output/stepN, and output/stepN/critic, for each N of marks."""
    stage = importlib.import_module(script)
    save_if_due = stage.save_if_due

    def save_if_marked(accelerator, folder, step, last, save_steps):
        """Called after every step. (Of the script's own checkpoints only the newest two are kept.)"""
        save_if_due(accelerator, folder, step, last, save_steps)
        if step in marks:
            prepared = [accelerator.unwrap_model(model) for model in accelerator._models]
            model = next(model for model in prepared if hasattr(model, "policy"))  # DVPO: TokenLogp; PPO: ActorCritic
            model.policy.save_pretrained(folder / f"step{step}")
            if hasattr(model, "critic"):
                model.critic.save_pretrained(folder / f"step{step}" / "critic")

    if not all((output / f"step{mark}" / "model.safetensors").exists() for mark in marks):
        (output / "model.safetensors").unlink(missing_ok=True)         # then claims.train takes it for unfinished
    with mock.patch.object(stage, "save_if_due", save_if_marked):
        return claims.train(script, output, **flags)


# ---- 2. The truth about a policy, and what a value model's errors are ----
def own_states(folder, tokenizer, prompts, n, seed):
    """One prefix of a policy's own answer to each prompt: [(prompt ids, response ids), ...]; and for each the true Q
    of this policy with its squared standard error."""
    policy, rng, states = claims.AutoModelForCausalLM.from_pretrained(folder).eval(), random.Random(seed), []
    torch.manual_seed(seed)                                   # the same numbers whether the runs were there or not
    for prompt, (question, response) in zip(prompts, claims.answers(policy, tokenizer, prompts), strict=True):
        share = rng.random()                                  # of a prompt: the same place in every policy's answer
        if len(response) > 1:
            states.append((prompt, (question, response[:1 + int(share * (len(response) - 1))])))
    completed = claims.completions(policy, tokenizer, [sequence for _, sequence in states], n)
    truths = claims.true_values([prompt for prompt, _ in states], tokenizer, completed)
    return [sequence for _, sequence in states], truths


def errors_of(values, truths):
    """Squared error = bias squared + centred error. And the correlation of values and truth."""
    gaps = [value - truth for value, (truth, _) in zip(values, truths, strict=True)]
    noise = statistics.mean(variance for _, variance in truths)
    bias, centred = statistics.mean(gaps), statistics.pvariance(gaps) - noise
    truth = [truth for truth, _ in truths]
    # Of the truth itself, not of its estimate, which varies by the noise, too. 0 where nothing varies.
    spread = (statistics.pvariance(truth) - noise) * statistics.pvariance(values)
    covariance = statistics.covariance(values, truth) * (len(truth) - 1) / len(truth)
    return {"error": bias ** 2 + centred, "bias": bias, "centred": centred,
            "correlation": covariance / spread ** 0.5 if spread > 0 else 0.0}


def run_seed(folder, seed, scale):
    """{"steps", "lines": {line: one dict of errors_of per step}, "truth": {method: mean true Q per step}, ...}."""
    start, sft = claims.base(folder, seed, scale)
    online = {"model": sft, "steps": claims.steps(scale)} | start
    marks = sorted({round(part * online["steps"] / PARTS) for part in range(PARTS + 1)} - {0})
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    dvpo = train_and_set_aside("train_dvpo", folder / "drift_dvpo", marks, gvm=gvm, **online)
    ppo = train_and_set_aside("baselines.ppo", folder / "drift_ppo", marks, reward_model=reward_model, **online)
    frozen = train_and_set_aside("baselines.ppo", folder / "drift_ppo_frozen", marks, reward_model=reward_model,
                                 critic_lr=0.0, **online)
    initial = frozen / "critic"                               # it has never learned

    tokenizer = claims.load_policy(sft)[1]
    rows = claims.read_lines(start["data"] / "scored.jsonl")
    rows = random.Random(0).sample(rows, min(1000, len(rows)))
    said = claims.token_values(initial, [claims.sequence(tokenizer, row["prompt"], row["response"]) for row in rows],
                               tokenizer.pad_token_id)
    # At the last token the initial critic says what the reward model says, in PPO's units.
    slope, offset = statistics.linear_regression([line[-1] for line in said], [row["reward"] for row in rows])

    def errors(model, states, truths, scale=(1.0, 0.0)):
        lines = claims.token_values(model, states, tokenizer.pad_token_id)
        return errors_of([scale[0] * line[-1] + scale[1] for line in lines], truths)

    prompts = [row["prompt"] for row in claims.read_lines(start["data"] / "test_prompts.jsonl")]
    prompts, n = prompts[:max(8, round(scale * QUESTIONS))], max(2, round(scale * COMPLETIONS))
    lines, mean_truth, variances = {name: [] for name in LINES}, {"DVPO": [], "PPO": []}, []
    at_start = own_states(sft, tokenizer, prompts, n, seed)
    for mark in (0, *marks):
        states, truths = own_states(dvpo / f"step{mark}", tokenizer, prompts, n, seed) if mark else at_start
        lines["GVM, DVPO's policy"].append(errors(gvm, states, truths))
        mean_truth["DVPO"].append(statistics.mean(truth for truth, _ in truths))
        variances += [variance for _, variance in truths]
        states, truths = own_states(ppo / f"step{mark}", tokenizer, prompts, n, seed) if mark else at_start
        live = ppo / f"step{mark}" / "critic" if mark else initial
        lines["GVM, PPO's policy"].append(errors(gvm, states, truths))
        lines["live critic, PPO's policy"].append(errors(live, states, truths, (slope, offset)))
        lines["initial critic, PPO's policy"].append(errors(initial, states, truths, (slope, offset)))
        mean_truth["PPO"].append(statistics.mean(truth for truth, _ in truths))
        variances += [variance for _, variance in truths]
    return {"steps": [0, *marks], "lines": lines, "truth": mean_truth, "truth_error": statistics.mean(variances) ** 0.5,
            "judged": claims.judge(folder / "drift.log", sft, [dvpo, ppo, frozen], start)}


# ---- 3. The answer ----
def main():
    args, started = claims.parse(__doc__), time.time()
    seeds = claims.over_seeds(run_seed, args)
    steps = next(iter(seeds.values()))["steps"]
    gvm, gvm_ppo, live, initial = LINES

    def at(line, what, index):
        return [seed["lines"][line][index][what] for seed in seeds.values()]

    def score(name):
        return [seed["judged"][name]["score"] for seed in seeds.values()]

    def minus(a, b):
        return [x - y for x, y in zip(a, b, strict=True)]

    def from_to(line, what):
        return f"{cell(at(line, what, 0))} at step 0, {cell(at(line, what, -1))} at step {steps[-1]}"

    found, end = {}, f"at step {steps[-1]}"
    errors = {"error": "squared error", "centred": "centred error"}
    for words, line in (("the GVM goes stale along DVPO", gvm), ("the critic drifts along PPO", live)):
        for what, name in errors.items():
            grown = minus(at(line, what, -1), at(line, what, 0))
            found[f"{words}: its {name} grows"] = verdict(grown), f"{from_to(line, what)}; by {cell(grown)}"
    grown = minus(map(abs, at(gvm, "bias", -1)), map(abs, at(gvm, "bias", 0)))
    found["the GVM goes stale along DVPO: its bias grows, either way"] = (
        verdict(grown), f"bias {from_to(gvm, 'bias')}; its size by {cell(grown)}")
    for line, name, whose in ((gvm_ppo, "the GVM", "GVM's"), (initial, "the initial one", "initial's")):
        for what, words in errors.items():
            gap = minus(at(line, what, -1), at(live, what, -1))
            found[f"{end} of PPO the live critic is nearer to the truth than {name}: {words}"] = (
                verdict(gap), f"{whose} minus critic's {cell(gap)}")
    live_gap = minus(score("drift_ppo"), score("drift_ppo_frozen"))
    found["PPO ends better with its live critic than with a frozen one"] = verdict(live_gap), f"score {cell(live_gap)}"
    gap = minus(score("drift_dvpo"), score("drift_ppo"))
    found["DVPO ends better than PPO"] = verdict(gap), f"score {cell(gap)}"

    grew = {line: [statistics.mean(at(line, what, index)) for what in errors for index in (0, -1)]
            for line in (gvm, live)}
    finding = (f"From step 0 to {steps[-1]} the squared error goes from {grew[gvm][0]:.3f} to {grew[gvm][1]:.3f} for "
               f"the frozen GVM along DVPO (without its bias {grew[gvm][2]:.3f} to {grew[gvm][3]:.3f}) and from "
               f"{grew[live][0]:.3f} to {grew[live][1]:.3f} for PPO's live critic ({grew[live][2]:.3f} to "
               f"{grew[live][3]:.3f}).")
    noise = statistics.mean(seed["truth_error"] for seed in seeds.values())
    tables = [f"Root mean square standard error of the truth: {noise:.3f} (score units).", "",
              "| value model, states and truth of | step | mean true Q | squared error | bias | centred error | "
              "correlation |", "|---" * 7 + "|"]
    for line in LINES:
        for index, step in enumerate(steps):
            method = "DVPO" if line == gvm else "PPO"
            truth = cell([seed["truth"][method][index] for seed in seeds.values()])
            cells = [cell(at(line, what, index)) for what in ("error", "bias", "centred", "correlation")]
            tables.append(f"| {line} | {step} | {truth} | {' | '.join(cells)} |")
    tables += ["", "| policy | oracle score, held out | KL (nats) |", "|---|---|---|"]
    for name in next(iter(seeds.values()))["judged"]:
        nats = cell([seed["judged"][name]["nats"] for seed in seeds.values()], 2)
        tables.append(f"| {name} | {cell(score(name))} | {nats} |")

    picture, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, what, label in zip(panels, ("error", "bias"), ("squared error (score units squared)",
                                                              "bias: value minus truth (score units)")):
        for line, colour in LINES.items():
            means, lows, highs = zip(*(interval(at(line, what, index)) for index in range(len(steps))))
            shift = (list(LINES).index(line) - 1.5) * steps[-1] / 150                  # side by side, not on each other
            panel.errorbar([step + shift for step in steps], means, [minus(means, lows), minus(highs, means)],
                           fmt="o-", markersize=4, capsize=2, color=colour, label=line)
        panel.set_xticks(steps)
        panel.set(xlabel="step (64 rollouts each)", ylabel=label, title=f"{what.capitalize()} (seeds: {len(seeds)})")
    panels[0].legend(fontsize=7, handlelength=3)
    panels[1].axhline(0, color="black", linewidth=0.5)
    claims.report("drift", args, __doc__, seeds, found, tables, finding, picture)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
