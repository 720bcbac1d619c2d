"""Trajectory conditioning: does a value model that is shown a policy's answers know better what it is worth?

Hypothesis  Section 3.2: Q(tau, s, a) is told by tau, question-answer pairs "randomly sampled from the policy
            in question", whose value is asked for. Then it errs less than a value model without tau about the
            policies in its data, about one that is not, and about a language model that training has moved;
            and DVPO gets further with it. The released code has no tau.
Method      One world per seed. Value models with K = 0, 1, 2, 4 pairs, one pass over the same 3,000 rows, a
            sixth of the updates of other experiments' GVM. One behaviour policy is left out of them, another
            one for each seed (the SFT model has read its answers, with no names on them). Squared error
            against the true Q (a) of the behaviour policy that wrote a held-out answer, tau from its other
            answers; (b) of the SFT model and of DVPO's final policy at one token of their own held-out
            answers, with tau of that very model (right), or with what the other of the two answered to the
            same questions (wrong). What the Monte Carlo error of the truth adds is taken off. Centred error:
            what is left without the bias. (c) DVPO with each value model, tau from the policy's latest
            rollouts. In training every tau is of one behaviour policy; a language model mixes the manners of
            all five, so its tau is of a new kind.
Command     python experiments/tau.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/tau.json, .md, .png
"""
import random
from statistics import mean, pvariance

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
import train_gvm
from claims import cell, minus, verdict

PAIRS = (0, 1, 2, 4)                                          # K; the claims are about the last
ROWS, ANSWERS, STATES = 3000, 40, 100                         # of training; per program; per language model
MAX_LENGTH = 512                                              # with 256 tau would lose the chatty's answers
PLACES = ("first", "middle", "before last", "last")
POLICIES = {"SFT": "the SFT model", "DVPO": "DVPO's policy"}


# ---- 1. Value models, all with the same rows, one behaviour policy unseen ----
def train_value_models(folder, sft, start, seed, scale):
    """{K: run folder}, and the name of the behaviour policy that they have not seen."""
    unseen, data = list(atlas.POLICIES)[seed % len(atlas.POLICIES)], folder / "tau_data"
    rows = [row for row in claims.read_lines(start["data"] / "scored.jsonl") if row["policy"] != unseen]
    pairs = [row for row in claims.read_lines(start["data"] / "test_pairs.jsonl")
             if unseen not in (row["policy_chosen"], row["policy_rejected"])]
    claims.write_lines(data / "scored.jsonl", rows[:max(64, round(scale * ROWS))])
    claims.write_lines(data / "test_pairs.jsonl", pairs[:200])       # for the log only: all would take long
    return {k: claims.train_gvm(folder / f"tau_gvm_{k}", sft, start, data=data, tau_pairs=k, epochs=1,
                                max_length=MAX_LENGTH) for k in PAIRS}, unseen


def read_values(gvm, k, questions, pools):
    """claims.token_values of [(prompt, (prompt ids, response ids)), ...], each with tau from its own pool."""
    with_tau = []
    for row, ((prompt, sequence), pool) in enumerate(zip(questions, pools, strict=True)):
        tau, _ = train_gvm.draw_tau(prompt, sequence, pool, k, MAX_LENGTH, random.Random(f"tau {row}"))
        with_tau.append(([*tau, *sequence[0]], sequence[1]))
    return claims.token_values(gvm, with_tau)


# ---- 2. Against the truth about behaviour policies, which are programs ----
def behaviour_errors(value_models, unseen, trained_on, held_out, tokenizer, scale):
    """({K or "constant": {"seen", "unseen": {place: mean squared error}}}, standard error of the truth)."""
    pools, questions, truths = {policy: [] for policy in atlas.POLICIES}, [], []
    n, most = max(2, round(scale * 200)), max(2, round(scale * ANSWERS))
    for row in claims.read_lines(held_out):
        _, said = sequence = claims.sequence(tokenizer, row["prompt"], row["response"])
        pools[row["policy"]].append((row["prompt"], sequence))
        if len(pools[row["policy"]]) <= most:
            for place, count in zip(PLACES, (1, len(said) // 2, len(said) - 1, len(said))):
                truth = claims.true_value_of_program(row["policy"], row, tokenizer, said, count, n)
                if truth:
                    truths.append((len(questions), row["policy"], place, count, *truth))
            questions.append((row["policy"], row["prompt"], sequence))
    of_policy = [pools[policy] for policy, *_ in questions]
    said = {k: read_values(gvm, k, [question[1:] for question in questions], of_policy)
            for k, gvm in value_models.items()}
    average = mean(row["reward"] for row in claims.read_lines(trained_on))
    said["constant"] = [[average] * len(line) for line in said[0]]
    errors = {}
    for k, lines in said.items():
        squares = {group: {place: [] for place in PLACES} for group in ("seen", "unseen")}
        for i, policy, place, count, truth, variance in truths:                # lines[i][0] is V(s_1)
            group = "unseen" if policy == unseen else "seen"
            squares[group][place].append((lines[i][count] - truth) ** 2 - variance)
        errors[str(k)] = {group: {place: mean(found) for place, found in places.items()}
                          for group, places in squares.items()}
    return errors, mean(variance for *_, place, _, _, variance in truths if place != "last") ** 0.5


# ---- 3. Against the truth about language models ----
def language_model_errors(value_models, policies, start, seed, scale):
    """({policy: {tau: {K: {"error", "bias", "centred"}}, "truth": mean true Q, "constant": squared error of
    always saying that mean}}, the truth's own standard error)."""
    said, states, truths, errors = {}, {}, {}, {}
    most, n = max(8, round(scale * STATES)), max(2, round(scale * 16))
    for name, policy in policies.items():
        said[name], states[name], truths[name] = claims.own_states(
            policy, claims.prompts_of(start), most, n, seed)
    for name, other in (("SFT", "DVPO"), ("DVPO", "SFT")):
        true = [truth for truth, _ in truths[name]]
        noise = mean(variance for _, variance in truths[name])
        errors[name] = {"truth": mean(true), "constant": pvariance(true) - noise}
        for tau, source in (("right", name), ("wrong", other)):
            errors[name][tau] = {}
            for k, gvm in value_models.items():
                values = read_values(gvm, k, states[name], [said[source]] * len(true))
                gaps = minus([line[-1] for line in values], true)
                errors[name][tau][str(k)] = {"error": mean(gap ** 2 for gap in gaps) - noise,
                                             "bias": mean(gaps), "centred": pvariance(gaps) - noise}
    return errors, mean(variance for found in truths.values() for _, variance in found) ** 0.5


def run_seed(folder, seed, scale):
    """The errors of sections 2 and 3, their truths' standard errors, the scores of DVPO with each K."""
    sft, start, online = claims.base(folder, seed, scale)
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    moved = claims.train("train_dvpo", folder / "dvpo", gvm=gvm, **online)
    value_models, unseen = train_value_models(folder, sft, start, seed, scale)
    online["steps"] = claims.steps(scale, 30)
    runs = {k: claims.train("train_dvpo", folder / f"tau_dvpo_{k}", gvm=value_model, **online)
            for k, value_model in value_models.items()}
    judged = claims.judge(folder / "tau.log", sft, runs.values(), start)
    _, tokenizer = claims.load_policy(sft)
    trained_on, held_out = folder / "tau_data" / "scored.jsonl", start["data"] / "test_scored.jsonl"
    behaviour, noise = behaviour_errors(value_models, unseen, trained_on, held_out, tokenizer, scale)
    policies = {"SFT": sft, "DVPO": moved}
    language_model, noise_2 = language_model_errors(value_models, policies, start, seed, scale)
    return {"unseen": unseen, "behaviour": behaviour, "language_model": language_model,
            "truth_error": {"behaviour": noise, "language_model": noise_2},
            "judged": {"SFT": judged[sft.name]} | {str(k): judged[run.name] for k, run in runs.items()}}


# ---- 4. The answer ----
def answer(seeds, per_seed):
    most, shown, found = PAIRS[-1], PAIRS[1:], {}

    def behaviour(k, group, place="first"):
        return per_seed("behaviour", str(k), group, place)

    def model(k, policy, tau="right", what="error"):
        return per_seed("language_model", policy, tau, str(k), what)

    def truth(policy, what="truth"):
        return per_seed("language_model", policy, what)

    def score(k):
        return per_seed("judged", str(k), "score")

    def claim(gains, what):
        """gains: {K: by how much each seed is better}. The verdict is on the largest K."""
        return verdict(gains[most]), f"{what}: " + ", ".join(f"K = {k}: {cell(x)}" for k, x in gains.items())

    for group, words in (("seen", "policies in the data"), ("unseen", "a policy that is not in the data")):
        found[f"{words}: K = {most} errs less than K = 0, first token"] = claim(
            {k: minus(behaviour(0, group), behaviour(k, group)) for k in shown}, "squared error less by")
    rise = {k: minus(model(k, "DVPO", "right", "bias"), model(k, "DVPO", "wrong", "bias")) for k in shown}
    found[f"the value follows: at the states of DVPO's policy {most} of its own answers raise it, against "
          f"{most} of SFT's"] = claim(rise, "value higher by")
    true_rise = minus(truth("DVPO"), truth("SFT"))
    found[f"it follows too far: {most} raise it more than the true Q rises from SFT to DVPO"] = claim(
        {k: minus(rise[k], true_rise) for k in shown}, "value less truth, higher by")
    for what, error in (("error", "squared"), ("centred", "centred")):
        found[f"DVPO's policy: {most} of its own answers err less than K = 0, {error} error"] = claim(
            {k: minus(model(0, "DVPO", what=what), model(k, "DVPO", what=what)) for k in shown}, "less by")
        for name, words in POLICIES.items():
            gains = {k: minus(model(k, name, "wrong", what), model(k, name, "right", what)) for k in shown}
            found[f"{words}: {most} of its own answers err less than {most} of the other's, {error} error"
                  ] = claim(gains, "less by")
    found[f"DVPO ends better with K = {most} than with K = 0"] = claim(
        {k: minus(score(k), score(0)) for k in shown}, "score higher by")

    errs = {(k, what): f"{mean(model(k, 'DVPO', what=what)):.3f}" for k in (0, most)
            for what in ("error", "centred")}
    finding = (f"At the states of DVPO's policy {most} of its own answers as tau, in place of SFT's, raise "
               f"the value by {cell(rise[most])}, while DVPO's mean true Q, at its own states, is above "
               f"SFT's by {cell(true_rise)}; the squared error there is {errs[most, 'error']} with them and "
               f"{errs[0, 'error']} without any tau, once the bias is taken off {errs[most, 'centred']} and "
               f"{errs[0, 'centred']}.")
    unseen = ", ".join(f"{policy} (seed {seed})" for seed, policy in zip(seeds, per_seed("unseen")))
    noise, noise_2 = (mean(per_seed("truth_error", key)) for key in ("behaviour", "language_model"))
    means = ", ".join(f"{cell(truth(name))} at those of {name} (a constant would err by "
                      f"{cell(truth(name, 'constant'))})" for name in POLICIES)
    tables = [f"Unseen policy: {unseen}. Root mean square standard error of the truth: {noise:.3f} for "
              f"behaviour policies (none at the last token), {noise_2:.3f} for language models; \"constant\" "
              "always says the mean reward.", "", "Squared error against the true Q of programs:", ""]
    tables += claims.table(f"K | policies | {' | '.join(PLACES)}", [
        [str(k), group, *(behaviour(k, group, place) for place in PLACES)]
        for k in (*PAIRS, "constant") for group in ("seen", "unseen")])
    tables += ["", f"At states of language models, against their own true Q, whose mean is {means}. Bias: "
               "value minus truth.", ""]
    tables += claims.table("states of | K | squared error: right tau | wrong tau | bias: right tau | wrong "
                           "tau | centred error: right tau | wrong tau", [
        [name, str(k), *(model(k, name, tau, what) for what in ("error", "bias", "centred")
                         for tau in ("right", "wrong"))] for name in POLICIES for k in PAIRS])
    tables += ["", *claims.table("policy | oracle score, held out | KL (nats)", [
        [f"DVPO, K = {k}" if k != "SFT" else k, score(k), per_seed("judged", str(k), "nats")]
        for k in ("SFT", *PAIRS)])]

    picture, panels = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for i, k in enumerate(PAIRS):
        for group, line in (("seen", "-"), ("unseen", "--")):
            x = [place + 0.06 * (i - 1.5) for place in range(len(PLACES))]     # side by side
            claims.draw(panels[0], x, [behaviour(k, group, place) for place in PLACES], fmt=f"o{line}",
                        color=f"C{i}", label=f"K = {k}, {group}")
    panels[0].set_xticks(range(len(PLACES)), PLACES)
    claims.label(panels[0], f"Behaviour policies (seeds: {len(seeds)})", "token of answer", "squared error")
    for panel, what in zip(panels[1:], ("error", "bias")):
        for i, (name, tau) in enumerate((name, tau) for name in POLICIES for tau in ("right", "wrong")):
            x = [k + 0.06 * (i - 1.5) for k in PAIRS]
            claims.draw(panel, x, [model(k, name, tau, what) for k in PAIRS], color=f"C{i // 2}",
                        fmt="o-" if tau == "right" else "o--", label=f"{name}, {tau} tau")
        panel.set_xticks(PAIRS)
        claims.label(panel, f"Language models (seeds: {len(seeds)})", "K, pairs in tau",
                     "squared error" if what == "error" else "bias: value minus truth")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
