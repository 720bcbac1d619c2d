"""Trajectory conditioning: does a value model that is shown a policy's answers know better what the policy is worth?

Hypothesis  Section 3.2: Q(tau, s, a) is told by tau, question-answer pairs "randomly sampled from the policy in
            question", whose value is asked for. Then it errs less than a value model without tau about the
            policies in its data, about one that is not in its data, and about a language model that training has
            moved; and DVPO gets further with it. The released code has no tau.
Method      One world per seed. Value models with K = 0, 1, 2, 4 pairs, one pass over the same 3,000 rows: 187
            updates, a sixth of what the GVM of other experiments gets. One behaviour policy is left out of them,
            another one for each seed (the SFT model that all start from has read its answers, with no names on
            them). Squared error against the true Q (a) of the behaviour policy that wrote a held-out answer, tau
            from its other answers; (b) of the SFT model and of DVPO's final policy at one token of their own
            held-out answers, with tau of that very model (right), or with what the other of the two answered to
            the same questions (wrong). What the Monte Carlo error of the truth adds is taken off. Centred error:
            what is left without the bias, as whitening takes a constant off DVPO's advantages. (c) DVPO with each
            value model, tau from the policy's latest rollouts. In training every tau is of one behaviour policy;
            a language model that has learned from all five mixes their manners, so its tau is of a new kind.
Command     python experiments/tau.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/tau.json, .md, .png
"""
import random
import statistics

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
import train_gvm
from claims import cell, minus, verdict

PAIRS = (0, 1, 2, 4)                                          # K; the claims are about the last, the tables about all
ROWS, ANSWERS, STATES = 3000, 40, 100                         # of training; per behaviour policy; per language model
MAX_LENGTH = 512                                              # in the default 256 tau would lose the chatty's answers
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


def read_values(gvm, k, questions, pools, pad_id):
    """claims.token_values of [(prompt, (prompt ids, response ids)), ...], each with tau from its own pool."""
    with_tau = []
    for row, ((prompt, sequence), pool) in enumerate(zip(questions, pools, strict=True)):
        tau, _ = train_gvm.draw_tau(prompt, sequence, pool, k, MAX_LENGTH, random.Random(f"tau {row}"))
        with_tau.append(([*tau, *sequence[0]], sequence[1]))
    return claims.token_values(gvm, with_tau, pad_id)


# ---- 2. Against the truth about behaviour policies, which are programs ----
def behaviour_errors(value_models, unseen, trained_on, held_out, tokenizer, scale):
    """({K, or "constant": {"seen" or "unseen": {place: mean squared error}}}, the truth's own standard error)."""
    pools, asked = {policy: [] for policy in atlas.POLICIES}, []
    n, most = max(2, round(scale * 200)), max(2, round(scale * ANSWERS))
    for row in claims.read_lines(held_out):
        sequence = claims.sequence(tokenizer, row["prompt"], row["response"])
        pools[row["policy"]].append((row["prompt"], sequence))
        if len(pools[row["policy"]]) <= most:
            said = sequence[1]
            counts = dict(zip(PLACES, (1, len(said) // 2, len(said) - 1, len(said))))
            truths = {place: (count, claims.true_value_of_program(row["policy"], row, tokenizer, said, count, n))
                      for place, count in counts.items()}
            asked.append((row, sequence, {place: x for place, x in truths.items() if x[1]}))
    questions = [(row["prompt"], sequence) for row, sequence, _ in asked]
    said = {k: read_values(gvm, k, questions, [pools[row["policy"]] for row, _, _ in asked],
                           tokenizer.pad_token_id) for k, gvm in value_models.items()}
    mean = statistics.mean(row["reward"] for row in claims.read_lines(trained_on))
    said["constant"] = [[mean] * (len(response) + 1) for _, (_, response), _ in asked]
    errors = {}
    for name, values in said.items():
        squares = {(group, place): [] for group in ("seen", "unseen") for place in PLACES}
        for (row, _, truths), line in zip(asked, values, strict=True):
            for place, (count, (truth, variance)) in truths.items():
                group = "unseen" if row["policy"] == unseen else "seen"
                squares[group, place].append((line[count] - truth) ** 2 - variance)     # line[0] is V(s_1)
        errors[str(name)] = {group: {place: statistics.mean(squares[group, place]) for place in PLACES}
                             for group in ("seen", "unseen")}
    variances = [x[1][1] for _, _, truths in asked for place, x in truths.items() if place != "last"]
    return errors, statistics.mean(variances) ** 0.5


# ---- 3. Against the truth about language models ----
def language_model_errors(value_models, policies, start, seed, scale, pad_id):
    """({policy: {tau: {K: {"error", "bias", "centred"}}, "truth": mean true Q, "constant": squared error of always
    saying that mean}}, the truth's own standard error)."""
    said, states, truths, errors = {}, {}, {}, {}
    for name, policy in policies.items():
        said[name], states[name], truths[name] = claims.own_states(
            policy, claims.prompts_of(start), max(8, round(scale * STATES)), max(2, round(scale * 16)), seed)
    for name, other in (("SFT", "DVPO"), ("DVPO", "SFT")):
        true = [truth for truth, _ in truths[name]]
        noise = statistics.mean(variance for _, variance in truths[name])
        errors[name] = {"truth": statistics.mean(true), "constant": statistics.pvariance(true) - noise}
        for tau, source in (("right", name), ("wrong", other)):
            errors[name][tau] = {}
            for k, gvm in value_models.items():
                values = read_values(gvm, k, states[name], [said[source]] * len(true), pad_id)
                gaps = minus([line[-1] for line in values], true)
                errors[name][tau][str(k)] = {"error": statistics.mean(gap ** 2 for gap in gaps) - noise,
                                             "bias": statistics.mean(gaps),
                                             "centred": statistics.pvariance(gaps) - noise}
    variances = [variance for found in truths.values() for _, variance in found]
    return errors, statistics.mean(variances) ** 0.5


def run_seed(folder, seed, scale):
    """The errors of sections 2 and 3, their truths' standard errors, and the judged scores of DVPO with each K."""
    start, sft = claims.base(folder, seed, scale)
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    moved = claims.train("train_dvpo", folder / "dvpo", model=sft, gvm=gvm, steps=claims.steps(scale), **start)
    value_models, unseen = train_value_models(folder, sft, start, seed, scale)
    runs = {k: claims.train("train_dvpo", folder / f"tau_dvpo_{k}", model=sft, gvm=value_model,
                            steps=claims.steps(scale, 30), **start) for k, value_model in value_models.items()}
    judged = claims.judge(folder / "tau.log", sft, runs.values(), start)
    _, tokenizer = claims.load_policy(sft)
    trained_on, held_out = folder / "tau_data" / "scored.jsonl", start["data"] / "test_scored.jsonl"
    behaviour, behaviour_noise = behaviour_errors(value_models, unseen, trained_on, held_out, tokenizer, scale)
    language_model, noise = language_model_errors(value_models, {"SFT": sft, "DVPO": moved}, start, seed, scale,
                                                  tokenizer.pad_token_id)
    return {"unseen": unseen, "behaviour": behaviour, "language_model": language_model,
            "truth_error": {"behaviour": behaviour_noise, "language_model": noise},
            "judged": {"SFT": judged[sft.name]} | {str(k): judged[run.name] for k, run in runs.items()}}


# ---- 4. The answer ----
def answer(seeds, per_seed):
    most, shown = PAIRS[-1], PAIRS[1:]

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
        return verdict(gains[most]), f"{what}: " + ", ".join(f"K = {k}: {cell(gain)}" for k, gain in gains.items())

    found = {}
    for group, words in (("seen", "policies in the data"), ("unseen", "a policy that is not in the data")):
        gains = {k: minus(behaviour(0, group), behaviour(k, group)) for k in shown}
        found[f"{words}: K = {most} errs less than K = 0, first token"] = claim(gains, "squared error less by")
    rise = {k: minus(model(k, "DVPO", "right", "bias"), model(k, "DVPO", "wrong", "bias")) for k in shown}
    found[f"the value follows: at the states of DVPO's policy {most} of its own answers raise it, against {most} of "
          "SFT's"] = claim(rise, "value higher by")
    true_rise = minus(truth("DVPO"), truth("SFT"))
    found[f"it follows too far: {most} raise it more than the true Q rises from SFT to DVPO"] = claim(
        {k: minus(rise[k], true_rise) for k in shown}, "value less truth, higher by")
    for what, error in (("error", "squared"), ("centred", "centred")):
        gains = {k: minus(model(0, "DVPO", what=what), model(k, "DVPO", what=what)) for k in shown}
        found[f"DVPO's policy: {most} of its own answers err less than K = 0, {error} error"] = claim(
            gains, "less by")
        for name, words in POLICIES.items():
            gains = {k: minus(model(k, name, "wrong", what), model(k, name, "right", what)) for k in shown}
            found[f"{words}: {most} of its own answers err less than {most} of the other's, {error} error"] = claim(
                gains, "less by")
    gains = {k: minus(score(k), score(0)) for k in shown}
    found[f"DVPO ends better with K = {most} than with K = 0"] = claim(gains, "score higher by")

    errs = {(k, what): f"{statistics.mean(model(k, 'DVPO', what=what)):.3f}" for k in (0, most)
            for what in ("error", "centred")}
    finding = (f"At the states of DVPO's policy {most} of its own answers as tau, in place of the SFT model's, raise "
               f"the value by {cell(rise[most])}, where the true Q has risen by {cell(true_rise)}; the squared "
               f"error there is {errs[most, 'error']} with them and {errs[0, 'error']} without any tau, once the "
               f"bias is taken off {errs[most, 'centred']} and {errs[0, 'centred']}.")
    noise = {key: statistics.mean(per_seed("truth_error", key)) for key in ("behaviour", "language_model")}
    unseen = ", ".join(f"{policy} (seed {seed})" for seed, policy in zip(seeds, per_seed("unseen")))
    means = ", ".join(f"{cell(truth(name))} at those of {name} (a constant would err by "
                      f"{cell(truth(name, 'constant'))})" for name in POLICIES)
    tables = [f"Unseen policy: {unseen}. Root mean square standard error of the truth: {noise['behaviour']:.3f} for "
              f"behaviour policies (none at the last token), {noise['language_model']:.3f} for language models; "
              "\"constant\" always says the mean reward.", "",
              "Squared error against the true Q of behaviour policies:", "",
              *claims.table(f"K | policies | {' | '.join(PLACES)}", [
                  [str(k), group, *(behaviour(k, group, place) for place in PLACES)]
                  for k in (*PAIRS, "constant") for group in ("seen", "unseen")]),
              "", f"At states of language models, against their own true Q, whose mean is {means}. Bias: value minus "
              "truth.", "",
              *claims.table("states of | K | squared error: right tau | wrong tau | bias: right tau | wrong tau | "
                            "centred error: right tau | wrong tau", [
                                [name, str(k), *(model(k, name, tau, what) for what in ("error", "bias", "centred")
                                                 for tau in ("right", "wrong"))]
                                for name in POLICIES for k in PAIRS]),
              "", *claims.table("policy | oracle score, held out | KL (nats)", [
                  ["SFT", score("SFT"), ""],
                  *([f"DVPO, K = {k}", score(k), cell(per_seed("judged", str(k), "nats"), 2)] for k in PAIRS)])]

    picture, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for i, k in enumerate(PAIRS):
        for group, line in (("seen", "-"), ("unseen", "--")):
            x = [place + 0.06 * (i - 1.5) for place in range(len(PLACES))]         # side by side
            claims.draw(left, x, [behaviour(k, group, place) for place in PLACES], fmt=f"o{line}", color=f"C{i}",
                        label=f"K = {k}, {group}")
    left.set_xticks(range(len(PLACES)), PLACES)
    left.set(xlabel="token of the answer", ylabel="squared error (score units squared)",
             title=f"Behaviour policies (seeds: {len(seeds)})")
    left.legend(fontsize=7, handlelength=3, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    for panel, what, words in ((middle, "error", "squared error (score units squared)"),
                               (right, "bias", "bias: value minus truth (score units)")):
        for i, name in enumerate(POLICIES):
            for tau, line in (("right", "-"), ("wrong", "--")):
                x = [k + 0.06 * (2 * i - 0.5 + (tau == "wrong")) for k in PAIRS]
                claims.draw(panel, x, [model(k, name, tau, what) for k in PAIRS], fmt=f"o{line}", color=f"C{i}",
                            label=f"{name}, {tau} tau")
        panel.set_xticks(PAIRS)
        panel.set(xlabel="K, pairs in tau", ylabel=words, title=f"Language models (seeds: {len(seeds)})")
        panel.legend(fontsize=7, handlelength=3)
    right.axhline(0, color="black", linewidth=0.5)
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
