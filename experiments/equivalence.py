"""Lemma 3.1: is a GVM pretrained on preferences worth the same as a reward model and a critic trained on it?

Hypothesis  From the same fixed pairs D, the policy gradient with a pretrained GVM and the one with a value
            derived from a reward model differ by at most kappa(epsilon_R, epsilon_Q), "with kappa -> 0 as
            epsilon_R, epsilon_Q -> 0" (Lemma 3.1). With more pairs the errors shrink, and so does the gap
            between the gradients.
Method      One world per seed, and 0.05, 0.2, 0.5 or all of its pairs. Of each share a ScalarRM and a GVM
            (pairs as +1/-1); the small shares are gone over until they have had a quarter of the updates of
            all pairs, or they would be underfit. The RM becomes a value in two ways. Critic: 4,096 answers of
            pi_SFT, labelled by the RM, train a value model for 1 epoch (all pairs: also 2). Backup: the
            Bellman equation of appendix B solved by sampling, the mean RM score over completions by pi_SFT.
            RM and GVM are put on the oracle's scale by the straight line that best predicts its rewards of
            1,000 training answers from the last token. Truth: Q of pi_SFT at two tokens each of 150 held-out
            answers, 16 completions each scored by the oracle; the backup uses the same ones. Monte Carlo
            errors are taken off mean squared errors, but cannot be off the largest ones. Gradient: mean of
            grad log pi(a|s) (Q - mean Q) at pi_SFT over those tokens. Bound (appendix B): (largest error of
            the reward's value + of the GVM) x mean norm of grad log pi; sharper, by Cauchy and Schwarz: root
            mean squares of both. Neither can fail, but for the truth's own noise: what can be learned is how
            loose they are.
Command     python experiments/equivalence.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/equivalence.json, .md, .png
"""
import math
import random
from statistics import linear_regression, mean, median, variance

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
import torch
from claims import cell, claim, minus, verdict

SHARES = ("0.05", "0.2", "0.5", "1")                          # of the pairs
PROMPTS, PLACES, COMPLETIONS = 150, 2, 16                     # of the truth
ROLLOUTS, AT_ONCE, KNOWN = 4096, 256, 1000                    # for the critics; answers that set a scale
DERIVED = ("critic", "backup")                                # the two values that a reward model implies
COLOURS = {"critic": "tab:orange", "backup": "tab:green", "GVM": "tab:blue"}


# ---- 1. The models of one share ----
def train_on_pairs(folder, sft, start, share):
    """(ScalarRM, GVM) of one share of the pairs."""
    if share == "1":
        return (claims.train_reward_model(folder / "reward_model", sft, start),
                claims.train_gvm(folder / "gvm_pairs", sft, start, supervision="pairs"))
    rows, data = claims.read_lines(start["data"] / "pairs.jsonl"), folder / f"equivalence_data_{share}"
    some = rows[:max(round(float(share) * len(rows)), 16)]
    claims.write_lines(data / "pairs.jsonl", some)
    quarter = 2 * (len(rows) // 16) // 4                      # two passes, 16 pairs an update
    flags = {"data": data, "epochs": math.ceil(quarter / (len(some) // 16))}
    return (claims.train_reward_model(folder / f"equivalence_reward_model_{share}", sft, start, **flags),
            claims.train_gvm(folder / f"equivalence_gvm_{share}", sft, start, supervision="pairs", **flags))


def last_values(folder, sequences):
    """A GVM's value of whole answers; of a reward model the score itself, of a scale of its own."""
    return [values[-1] for values in claims.token_values(folder, sequences)]


def on_line(line, values):
    return [line.slope * value + line.intercept for value in values]


# ---- 2. Errors and gradients ----
def error(differences, noise):
    """Root mean square and largest of Q - truth. noise: the squared standard error of each difference."""
    square = mean(d * d for d in differences) - mean(noise)
    return {"rms": max(square, 0.0) ** 0.5, "max": max(map(abs, differences))}


def policy_gradients(policy, places, values):
    """For each row of values (K, N) the policy gradient, (K, parameters); and the N norms of grad log pi.

    places  N of (prompt ids, response ids up to and with a_t)
    A constant b in Q - b leaves the expected gradient alone: sum_a pi(a|s) grad log pi(a|s) = grad 1 = 0. In
    a finite sample it does not vanish, and would drown what Q says of the actions.
    """
    parameters = list(policy.parameters())
    weights = (values - values.mean(1, keepdim=True)) / values.shape[1]                  # (K, N)
    gradients, norms = torch.zeros(len(values), sum(p.numel() for p in parameters)), []
    for (prompt, said), weight in zip(places, weights.T, strict=True):
        logits = policy(torch.tensor([[*prompt, *said[:-1]]])).logits[0, -1]             # a_t is not yet seen
        score = torch.autograd.grad(logits.log_softmax(-1)[said[-1]], parameters)
        score = torch.cat([part.flatten() for part in score])
        gradients.addr_(weight, score)                        # every Q's sum at once; no gradient is kept
        norms.append(score.norm().item())
    return gradients, norms


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# ---- 3. One seed ----
def own_answers(policy, tokenizer, start, count):
    """What the critics learn from: rows of pi_SFT's own answers to the prompts of rl.jsonl, in turn."""
    questions = [row["prompt"] for row in claims.read_lines(start["data"] / "rl.jsonl")]
    questions, rows = (questions * math.ceil(count / len(questions)))[:count], []
    for first in range(0, count, AT_ONCE):
        some = questions[first:first + AT_ONCE]
        rows += [{"prompt": prompt, "response": claims.text(tokenizer, response)}
                 for prompt, (_, response) in zip(some, claims.answers(policy, tokenizer, some))]
    return [row for row in rows if row["response"].strip()]   # an empty answer is not a row


def run_seed(folder, seed, scale):
    """{share: {"epsilon_R", value: {errors; norm, gap and cosines of its gradient}}, "truth"}."""
    sft, start, _ = claims.base(folder, seed, scale)
    (policy, tokenizer), rng = claims.load_policy(sft), random.Random(seed)
    known, held_out = (claims.read_lines(start["data"] / f"{name}.jsonl")[:KNOWN]
                       for name in ("scored", "test_scored"))
    known_ids, held_out_ids = (claims.sequences(tokenizer, rows) for rows in (known, held_out))
    known, held_out = ([row["reward"] for row in rows] for rows in (known, held_out))

    # The truth. Seeds are set where we sample: what was trained in this process must not change the draws.
    torch.manual_seed(seed)
    prompts = claims.prompts_of(start)[:max(2, round(scale * PROMPTS))]
    said = claims.answers(policy, tokenizer, prompts)
    places = [(row, count) for row, (_, response) in enumerate(said)           # count: tokens read, not all
              for count in rng.sample(range(1, len(response)), min(PLACES, len(response) - 1))]
    prefixes = [(said[row][0], said[row][1][:count]) for row, count in places]
    completed = claims.completions(policy, prefixes, max(4, round(scale * COMPLETIONS)))
    true = [[atlas.oracle(prompts[row], claims.text(tokenizer, response)) for response in responses]
            for (row, _), responses in zip(places, completed)]
    truth, noise = [mean(scores) for scores in true], [variance(scores) / len(scores) for scores in true]
    whole = [[(tuple(prompt), tuple(response)) for response in responses]
             for (prompt, _), responses in zip(prefixes, completed)]
    unique = list({answer for answers in whole for answer in answers})         # late ones are often the same
    torch.manual_seed(seed + 1000)
    rollouts = own_answers(policy, tokenizer, start, max(32, round(scale * ROLLOUTS)))

    def at_places(values):
        return [values[row][count] for row, count in places]                   # values[row][0] is V(s_1)

    values, found = {"truth": truth, "shuffled truth": rng.sample(truth, len(truth))}, {}
    for share in SHARES:
        judge, gvm = train_on_pairs(folder, sft, start, share)
        line = linear_regression(last_values(judge, known_ids), known)
        off = minus(on_line(line, last_values(judge, held_out_ids)), held_out)
        found[share] = {"epsilon_R": error(off, [0.0])}       # the oracle's reward has no Monte Carlo error

        labels = on_line(line, last_values(judge, claims.sequences(tokenizer, rollouts)))
        data = folder / f"equivalence_rollouts_{share}"
        claims.write_lines(data / "scored.jsonl", [row | {"reward": y} for row, y in zip(rollouts, labels)])
        for epochs, name in ((1, "critic"), (2, "critic, 2 epochs"))[:2 if share == "1" else 1]:
            critic = claims.train_gvm(folder / f"equivalence_critic_{share}_{epochs}", sft, start, data=data,
                                      epochs=epochs)
            values[share, name] = at_places(claims.token_values(critic, said))
        scores = dict(zip(unique, on_line(line, last_values(judge, unique))))
        believed = [[scores[answer] for answer in answers] for answers in whole]
        values[share, "backup"] = [mean(row) for row in believed]
        line = linear_regression(last_values(gvm, known_ids), known)
        values[share, "GVM"] = on_line(line, at_places(claims.token_values(gvm, said)))

        # The backup shares the truth's completions, and most of its luck: its noise is that of R - r.
        paired = [variance(minus(*both)) / len(both[0]) for both in zip(believed, true)]
        for key in [key for key in values if key[0] == share]:
            found[share][key[1]] = error(minus(values[key], truth), paired if key[1] == "backup" else noise)

    gradients, norms = policy_gradients(policy, prefixes, torch.tensor(list(values.values())))
    gradient, average = dict(zip(values, gradients)), mean(truth)
    norm = {"max": mean(norms), "rms": mean(n * n for n in norms) ** 0.5}      # with which error
    for share, name in [key for key in values if len(key) == 2]:
        g, own, result = gradient[share, name], gradient[share, "GVM"], found[share][name]
        result |= {"norm": g.norm().item(), "cosine with truth": cosine(g, gradient["truth"])}
        if name != "GVM":
            gap, to_gvm = (g - own).norm().item(), found[share]["GVM"]
            result |= {f"bound, {kind}": (result[kind] + to_gvm[kind]) * norm[kind] for kind in norm}
            result |= {"gap": gap, "relative gap": gap / own.norm().item(), "cosine with GVM": cosine(g, own)}
    return found | {"truth": {"rms standard error": mean(noise) ** 0.5, "places": len(places),
                              "rms error of a constant": error([q - average for q in truth], noise)["rms"],
                              "norm": gradient["truth"].norm().item(),
                              "norm, shuffled": gradient["shuffled truth"].norm().item(),
                              "norm of grad log pi, mean": norm["max"], "the same, rms": norm["rms"]}}


# ---- 4. The answer ----
def answer(seeds, per_seed):
    few, every, found = SHARES[0], SHARES[-1], {}

    def shrinks(name, key):
        before, after = per_seed(few, name, key), per_seed(every, name, key)
        return claim(minus(before, after), f"{cell(before)} to {cell(after)}; less by")

    for name, of in (("epsilon_R", "reward model"), *((name, name) for name in COLOURS)):
        found[f"the {of}'s error shrinks from {few} of the pairs to all"] = shrinks(name, "rms")
    for name in DERIVED:
        for key, of in (("gap", ""), ("relative gap", ", as a share of the GVM's gradient,")):
            found[f"the gradient gap{of} between {name} and GVM shrinks from {few} of the pairs to all"] = (
                shrinks(name, key))
    loose, cases = {}, [seed[share][name] for seed in seeds.values() for share in SHARES for name in DERIVED]
    for kind, lemma in (("rms", "sharper than Lemma 3.1 (root mean square errors)"), ("max", "Lemma 3.1")):
        held = sum(x["gap"] <= x[f"bound, {kind}"] for x in cases)
        loose[kind] = median(x[f"bound, {kind}"] / x["gap"] for x in cases)
        found[f"{lemma}: the gap is under the bound, every seed, share, critic and backup"] = (
            "confirmed" if held == len(cases) else "not confirmed",
            f"{held} of {len(cases)}; the bound is {loose[kind]:.1f} times the gap (median)")
    norm, bound = per_seed(every, "GVM", "norm"), per_seed(every, "critic", "bound, rms")
    found["with all pairs the sharper bound says something: it is below the GVM's gradient"] = (
        verdict(minus(norm, bound)), f"gradient {cell(norm)}, bound {cell(bound)}")
    own = per_seed(every, "GVM", "cosine with truth")
    for name in ("critic", "critic, 2 epochs", "backup"):
        other = per_seed(every, name, "cosine with truth")
        found[f"with all pairs the GVM's gradient is nearer to the true one than that of the {name}"] = claim(
            minus(own, other), f"cosine {cell(own)} and {cell(other)}; ahead by")
    found["the critic still improves from 1 to 2 epochs"] = claim(
        minus(per_seed(every, "critic", "rms"), per_seed(every, "critic, 2 epochs", "rms")), "error less by")

    gaps = {share: mean(per_seed(share, "critic", "gap")) for share in (few, every)}
    cosine, critic = (mean(per_seed(every, "critic", f"cosine with {x}")) for x in ("GVM", "truth"))
    finding = (f"The gradients of critic and GVM are {gaps[few]:.3f} apart with {few} of the pairs and "
               f"{gaps[every]:.3f} with all, the lemma's bound {loose['max']:.0f} times as large as the gap "
               f"(median); with all pairs their cosine is {cosine:.2f}, and that with the true gradient "
               f"{mean(own):.2f} for the GVM and {critic:.2f} for the critic.")
    tables = ["The shuffled norm is this sample's noise. The noise of the truth lowers cosines with it, of "
              "critic and GVM alike; less so of the backup, which shares the completions.", ""]
    tables += claims.table("of the truth | ", [[key, per_seed("truth", key)] for key in per_seed("truth")[0]])
    tables += ["", *claims.table("pairs | epsilon_R: rms | largest", [
        [share, *(per_seed(share, "epsilon_R", key) for key in ("rms", "max"))] for share in SHARES]), ""]
    keys = ("rms", "max", "norm", "cosine with truth", "cosine with GVM", "gap", "bound, rms", "bound, max")
    tables += claims.table(f"pairs | value | error: {' | '.join(keys)}", [
        [share, name, *(per_seed(share, name, key) if key in seeds[min(seeds)][share][name] else ""
                        for key in keys)]
        for share in SHARES for name in seeds[min(seeds)][share] if name != "epsilon_R"])

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, name, key, colour, line, words in (
            (left, "epsilon_R", "rms", "tab:gray", "-", "reward model, whole answers"),
            *((left, name, "rms", colour, "-", name) for name, colour in COLOURS.items()),
            (right, "critic", "bound, max", "tab:orange", ":", "bound, critic and GVM (largest)"),
            (right, "critic", "bound, rms", "tab:orange", "--", "bound, critic and GVM (rms)"),
            *((right, name, "gap", COLOURS[name], "-", f"gap, {name} and GVM") for name in DERIVED),
            (right, "GVM", "norm", "tab:blue", "-", "the GVM's gradient itself")):
        values = [per_seed(share, name, key) for share in SHARES]
        claims.draw(panel, [float(share) for share in SHARES], values, marker="o", color=colour,
                    linestyle=line, label=words)
    claims.label(left, f"Errors against the truth ({len(seeds)} seeds)", "share of the pairs", "error (rms)")
    claims.label(right, f"Policy gradients and bounds ({len(seeds)} seeds)", "share of the pairs", "norm")
    right.set_yscale("log")
    for panel in (left, right):
        panel.set_xscale("log")
        panel.set_xticks([float(share) for share in SHARES], SHARES)
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
