"""Critic drift: who knows better what the policy is worth, a critic that learns with it or a frozen GVM?

Hypothesis  Sections 1 and 3.3: a critic that learns online drifts during joint training, a GVM that is
            pretrained and frozen is stable. But a better policy makes a state worth more, and what is frozen
            cannot follow: the GVM may become stale, saying too little where PPO's critic keeps up.
Method      One world per seed. DVPO and PPO from the same SFT model, and PPO with its critic frozen at its
            start, 40 steps of 64 rollouts each. The GVM has learned the oracle's scores, PPO's reward model
            pairs: this compares value models, not methods. Every 10 steps policy and critic are set aside.
            There the policy answers held-out questions, and at one random token of each answer it finishes
            the answer many times: the true Q of the policy as it is then. Error is value minus truth; its
            mean is the bias; what is left of the squared error without it is the centred error. What the
            Monte Carlo error of the truth adds is taken off. The critic speaks in units of the reward model:
            mapped by the best straight line from its scores of 1,000 training answers to the oracle's. Its
            target repeats the reward model's mistakes and holds the KL costs still to come: a part of its
            error is not its own. The initial critic is the reward model, read at every prefix.
Command     python experiments/drift.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/drift.json, .md, .png
"""
import importlib
import random
from statistics import covariance, linear_regression, mean, pvariance
from unittest import mock

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
from claims import cell, claim, minus, verdict

PARTS = 4                                                     # of a run; policies are set aside in between
QUESTIONS, COMPLETIONS = 120, 32                              # for each policy; for each of its answers
LINES = ("GVM, DVPO's policy", "GVM, PPO's policy", "live critic, PPO's policy",
         "initial critic, PPO's policy")


# ---- 1. Runs whose policies are set aside on the way ----
def train_and_set_aside(script, output, marks, **flags):
    """claims.train that also leaves output/stepN, and output/stepN/critic, for each N of marks."""
    stage = importlib.import_module(script)
    log_step = stage.log_step

    def log_and_set_aside(accelerator, folder, record, rollouts=()):
        """Called after every step. (Of the script's own checkpoints only the newest two are kept.)"""
        log_step(accelerator, folder, record, rollouts)
        if record["step"] in marks:
            model, place = accelerator.unwrap_model(accelerator._models[0]), folder / f"step{record['step']}"
            getattr(model, "policy", model).save_pretrained(place)             # PPO's is an ActorCritic
            stage.load_tokenizer(str(flags["model"])).save_pretrained(place)
            if hasattr(model, "critic"):
                model.critic.save_pretrained(place / "critic")

    if not all((output / f"step{mark}" / "model.safetensors").exists() for mark in marks):
        (output / "model.safetensors").unlink(missing_ok=True)                 # unfinished for claims.train
    with mock.patch.object(stage, "log_step", log_and_set_aside):
        return claims.train(script, output, **flags)


# ---- 2. What a value model's errors are ----
def errors_of(values, truths):
    """Squared error = bias squared + centred error. And the correlation of values and truth."""
    truth, noise = [truth for truth, _ in truths], mean(variance for _, variance in truths)
    gaps = minus(values, truth)
    bias, centred = mean(gaps), pvariance(gaps) - noise
    # Of the truth itself, not of its estimate, which varies by the noise, too. 0 where nothing varies.
    spread = (pvariance(truth) - noise) * pvariance(values)
    together = covariance(values, truth) * (len(truth) - 1) / len(truth)
    return {"error": bias ** 2 + centred, "bias": bias, "centred": centred,
            "correlation": together / spread ** 0.5 if spread > 0 else 0.0}


def run_seed(folder, seed, scale):
    """{"steps", "lines": {line: [errors_of each step]}, "truth": {method: mean true Q per step}, ...}."""
    sft, start, online = claims.base(folder, seed, scale)
    marks = sorted({round(part * online["steps"] / PARTS) for part in range(PARTS + 1)} - {0})
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    dvpo = train_and_set_aside("train_dvpo", folder / "drift_dvpo", marks, gvm=gvm, **online)
    online["reward_model"] = reward_model
    ppo = train_and_set_aside("baselines.ppo", folder / "drift_ppo", marks, **online)
    frozen = train_and_set_aside("baselines.ppo", folder / "drift_ppo_frozen", marks, critic_lr=0.0, **online)
    initial = frozen / "critic"                               # it has never learned

    _, tokenizer = claims.load_policy(sft)
    rows = claims.read_lines(start["data"] / "scored.jsonl")
    rows = random.Random(0).sample(rows, min(1000, len(rows)))
    said = claims.token_values(initial, claims.sequences(tokenizer, rows))
    # At the last token the initial critic says what the reward model says, in PPO's units.
    line = linear_regression([values[-1] for values in said], [row["reward"] for row in rows])

    def errors(model, states, truths):
        values = claims.token_values(model, [sequence for _, sequence in states])
        slope, offset = (1.0, 0.0) if model == gvm else line
        return errors_of([slope * row[-1] + offset for row in values], truths)

    prompts = claims.prompts_of(start)[:max(8, round(scale * QUESTIONS))]
    n = max(2, round(scale * COMPLETIONS))
    lines, mean_truth, variances = {name: [] for name in LINES}, {"DVPO": [], "PPO": []}, []
    for mark in (0, *marks):
        live = ppo / f"step{mark}" / "critic" if mark else initial
        for method, run in (("DVPO", dvpo), ("PPO", ppo)):
            place = run / f"step{mark}" if mark else sft
            _, states, truths = claims.own_states(place, prompts, len(prompts), n, seed)
            mean_truth[method].append(mean(truth for truth, _ in truths))
            variances += [variance for _, variance in truths]
            for name, model in (("GVM", gvm), ("live critic", live), ("initial critic", initial)):
                if f"{name}, {method}'s policy" in lines:
                    lines[f"{name}, {method}'s policy"].append(errors(model, states, truths))
    return {"steps": [0, *marks], "lines": lines, "truth": mean_truth, "truth_error": mean(variances) ** 0.5,
            "judged": claims.judge(folder / "drift.log", sft, [dvpo, ppo, frozen], start)}


# ---- 3. The answer ----
def answer(seeds, per_seed):
    steps, found = per_seed("steps")[0], {}
    gvm, gvm_ppo, live, initial = LINES
    end, errors = f"at step {steps[-1]}", {"error": "squared error", "centred": "centred error"}

    def at(line, what, index):
        return per_seed("lines", line, index, what)

    def score(name):
        return per_seed("judged", name, "score")

    def from_to(line, what):
        return f"{cell(at(line, what, 0))} at step 0, {cell(at(line, what, -1))} {end}"

    for words, line in (("the GVM goes stale along DVPO", gvm), ("the critic drifts along PPO", live)):
        for what, name in errors.items():
            grown = minus(at(line, what, -1), at(line, what, 0))
            found[f"{words}: its {name} grows"] = verdict(grown), f"{from_to(line, what)}; by {cell(grown)}"
    grown = minus(map(abs, at(gvm, "bias", -1)), map(abs, at(gvm, "bias", 0)))
    found["the GVM goes stale along DVPO: its bias grows, either way"] = (
        verdict(grown), f"bias {from_to(gvm, 'bias')}; its size by {cell(grown)}")
    for line, name in ((gvm_ppo, "the GVM"), (initial, "the initial one")):
        for what, words in errors.items():
            found[f"{end} of PPO the live critic is nearer to the truth than {name}: {words}"] = claim(
                minus(at(line, what, -1), at(live, what, -1)), f"that of {name} minus the critic's")
    found["PPO ends better with its live critic than with a frozen one"] = claim(
        minus(score("drift_ppo"), score("drift_ppo_frozen")))
    found["DVPO ends better than PPO"] = claim(minus(score("drift_dvpo"), score("drift_ppo")))

    (of_gvm, centred), (of_critic, critic_centred) = (
        [f"{mean(at(line, what, 0)):.3f} to {mean(at(line, what, -1)):.3f}" for what in errors]
        for line in (gvm, live))
    finding = (f"From step 0 to {steps[-1]} the squared error goes from {of_gvm} for the frozen GVM along "
               f"DVPO (without its bias {centred}), from {of_critic} for PPO's critic ({critic_centred}).")
    tables = [f"Root mean square standard error of the truth: {mean(per_seed('truth_error')):.3f}.", ""]
    keys = ("error", "bias", "centred", "correlation")
    tables += claims.table("value model, states and truth of | step | mean true Q | squared error | bias | "
                           "centred error | correlation", [
        [line, str(step), per_seed("truth", "DVPO" if line == gvm else "PPO", index),
         *(at(line, what, index) for what in keys)] for line in LINES for index, step in enumerate(steps)])
    tables += ["", *claims.table("policy | oracle score, held out | KL (nats)", [
        [name, score(name), per_seed("judged", name, "nats")] for name in per_seed("judged")[0]])]

    picture, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, what in zip(panels, ("error", "bias")):
        for i, line in enumerate(LINES):
            x = [step + (i - 1.5) * steps[-1] / 150 for step in steps]         # side by side
            values = [at(line, what, index) for index in range(len(steps))]
            claims.draw(panel, x, values, fmt="o-", label=line)
        claims.label(panel, f"{what.capitalize()} (seeds: {len(seeds)})", "step (64 rollouts each)",
                     "squared error" if what == "error" else "value minus truth")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
