"""Lemma 3.1: is a value model pretrained on preferences worth the same as a reward model and a critic trained on it?

Hypothesis  From the same fixed pairs D, the policy gradient with a pretrained GVM and the one with a value derived
            from a reward model differ by at most kappa(epsilon_R, epsilon_Q), "with kappa -> 0 as epsilon_R,
            epsilon_Q -> 0" (Lemma 3.1). With more pairs the errors shrink, and so does the gap between the two
            gradients.
Method      One world per seed, and 0.05, 0.2, 0.5 or all of its pairs. Of each share a ScalarRM and a GVM (pairs as
            +1/-1). The small shares are gone over until they have had a quarter of the updates of all pairs (11, 3
            and 1 passes; all pairs: 2), or they would just be underfit: more pairs still mean more updates, too.
            The RM becomes a value in two ways. Critic: 4,096 answers of pi_SFT, labelled by the RM, train a value
            model for 1 epoch (all pairs: also 2, to see if it still improves). Backup: the Bellman equation of
            appendix B solved by sampling, the mean RM score over completions by pi_SFT. RM and GVM are put on the
            oracle's scale by the straight line that best predicts its rewards of 1,000 training answers from the
            last token.
            Truth: Q of pi_SFT at two tokens each of 150 answers to held-out questions, 16 completions each scored
            by the oracle; the backup uses the same completions. Monte Carlo errors are taken off the mean squared
            errors, but cannot be off the largest ones. Gradient: mean of grad log pi(a|s) (Q - mean Q) at pi_SFT
            over those tokens, the same for every Q. It holds what a state is worth, too, which an advantage would
            take off; how much of its norm is this sample's noise is seen once the true values are shuffled among
            the tokens. Bound (appendix B): (largest error of the reward's value + of the GVM) x mean norm of grad
            log pi; or, as sharp as Cauchy and Schwarz allow, root mean squares of both. Neither can fail, but for
            the truth's own noise: what can be learned is how loose they are.
Command     python experiments/equivalence.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/equivalence.json, .md, .png
"""
import math
import random
import statistics

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
import torch
from claims import cell, minus, verdict

SHARES = ("0.05", "0.2", "0.5", "1")                          # of the pairs
PROMPTS, PLACES, COMPLETIONS = 150, 2, 16                     # of the truth
ROLLOUTS, AT_ONCE, KNOWN = 4096, 256, 1000                    # for the critics; answers that set a scale
DERIVED = ("critic", "backup")                                # the two values that a reward model implies
COLOURS = {"critic": "tab:orange", "backup": "tab:green", "GVM": "tab:blue"}


# ---- 1. The models of one share ----
def first_pairs(folder, start, share):
    """(folder with the first pairs alone, passes over them that make a quarter of the updates of the full share)."""
    rows = claims.read_lines(start["data"] / "pairs.jsonl")
    some = rows[:max(round(float(share) * len(rows)), 16)]
    quarter = 2 * (len(rows) // 16) // 4                      # two passes, 16 pairs an update
    claims.write_lines(folder / f"equivalence_data_{share}" / "pairs.jsonl", some)
    return folder / f"equivalence_data_{share}", math.ceil(quarter / (len(some) // 16))


def train_on_pairs(folder, sft, start, share):
    """(ScalarRM, GVM) of one share of the pairs."""
    if share == "1":
        return (claims.train_reward_model(folder / "reward_model", sft, start),
                claims.train_gvm(folder / "gvm_pairs", sft, start, supervision="pairs"))
    data, epochs = first_pairs(folder, start, share)
    flags = {"data": data, "epochs": epochs}
    return (claims.train_reward_model(folder / f"equivalence_reward_model_{share}", sft, start, **flags),
            claims.train_gvm(folder / f"equivalence_gvm_{share}", sft, start, supervision="pairs", **flags))


def last_values(folder, sequences, pad_id):
    """A GVM's value of whole answers; of a reward model the score itself, of a scale of its own."""
    return [values[-1] for values in claims.token_values(folder, sequences, pad_id)]


def on_line(line, values):
    return [line.slope * value + line.intercept for value in values]


# ---- 2. Errors and gradients ----
def error(differences, noise):
    """Root mean square and largest of Q - truth. noise: the squared standard error of each difference."""
    square = statistics.mean(d * d for d in differences) - statistics.mean(noise)
    return {"rms": max(square, 0.0) ** 0.5, "max": max(map(abs, differences))}


def policy_gradients(policy, places, values):
    """For each row of values (K, N) the policy gradient, (K, parameters); and the N norms of grad log pi.

    places  N of (prompt ids, response ids up to and with a_t)
    A constant b in Q - b leaves the expected gradient alone: sum_a pi(a|s) grad log pi(a|s) = grad sum_a pi(a|s) =
    grad 1 = 0. In a finite sample it does not vanish; without it the mean of Q would drown what Q says of the actions.
    """
    parameters = list(policy.parameters())
    weights = (values - values.mean(1, keepdim=True)) / values.shape[1]                            # (K, N)
    gradients, norms = torch.zeros(len(values), sum(p.numel() for p in parameters)), []
    for (prompt, said), weight in zip(places, weights.T, strict=True):
        logits = policy(input_ids=torch.tensor([[*prompt, *said[:-1]]])).logits[0, -1]             # a_t not yet seen
        score = torch.autograd.grad(logits.log_softmax(-1)[said[-1]], parameters)
        score = torch.cat([part.flatten() for part in score])
        gradients.addr_(weight, score)                        # every Q's sum at once; no gradient is kept
        norms.append(score.norm().item())
    return gradients, norms


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# ---- 3. One seed ----
def run_seed(folder, seed, scale):
    """{share: {"epsilon_R" and each value: {errors; norm, gap and cosines of its gradient}}, "truth": {its error}}."""
    start, sft = claims.base(folder, seed, scale)
    policy, tokenizer = claims.load_policy(sft)
    pad_id, stop_ids, rng = tokenizer.pad_token_id, policy.generation_config.eos_token_id, random.Random(seed)

    def encoded(rows):
        return [claims.sequence(tokenizer, row["prompt"], row["response"]) for row in rows]

    known, held_out = (claims.read_lines(start["data"] / f"{name}.jsonl")[:KNOWN] for name in ("scored", "test_scored"))
    rewards = [row["reward"] for row in known]

    # The truth. Seeds are set where we sample: what was trained in this process must not change the draws.
    torch.manual_seed(seed)
    prompts = claims.prompts_of(start)[:max(2, round(scale * PROMPTS))]
    said = claims.answers(policy, tokenizer, prompts)
    places = [(row, count) for row, (_, response) in enumerate(said)            # tokens read; not the last, END
              for count in rng.sample(range(1, len(response)), min(PLACES, len(response) - 1))]
    prefixes = [(said[row][0], said[row][1][:count]) for row, count in places]
    completed = claims.completions(policy, prefixes, max(4, round(scale * COMPLETIONS)))
    true = [[atlas.oracle(prompts[row], claims.text(tokenizer, response)) for response in responses]
            for (row, _), responses in zip(places, completed)]
    truth = [statistics.mean(scores) for scores in true]
    noise = [statistics.variance(scores) / len(scores) for scores in true]
    unique = list(dict.fromkeys(                              # late in an answer most completions are the same
        (tuple(prefix[0]), tuple(response)) for prefix, responses in zip(prefixes, completed) for response in responses))

    # What the critics learn from: pi_SFT's own answers.
    torch.manual_seed(seed + 1000)
    questions = [row["prompt"] for row in claims.read_lines(start["data"] / "rl.jsonl")]
    count = max(32, round(scale * ROLLOUTS))
    questions = (questions * math.ceil(count / len(questions)))[:count]
    rollouts = []
    for first in range(0, count, AT_ONCE):
        some = questions[first:first + AT_ONCE]
        rollouts += [{"prompt": prompt, "response": claims.text(tokenizer, response)}
                     for prompt, (_, response) in zip(some, claims.answers(policy, tokenizer, some))]
    rollouts = [row for row in rollouts if row["response"].strip()]             # an empty answer is not a row

    def at_places(values):
        return [values[row][count] for row, count in places]                    # values[row][0] is V(s_1)

    values, found = {"truth": truth, "shuffled truth": rng.sample(truth, len(truth))}, {}
    for share in SHARES:
        judge, gvm = train_on_pairs(folder, sft, start, share)
        line = statistics.linear_regression(last_values(judge, encoded(known), pad_id), rewards)
        off = minus(on_line(line, last_values(judge, encoded(held_out), pad_id)), [row["reward"] for row in held_out])
        found[share] = {"epsilon_R": error(off, [0.0])}       # the oracle's reward has no Monte Carlo error

        labels = on_line(line, last_values(judge, encoded(rollouts), pad_id))
        data = folder / f"equivalence_rollouts_{share}"
        claims.write_lines(data / "scored.jsonl", [row | {"reward": y} for row, y in zip(rollouts, labels)])
        for epochs in (1, 2) if share == "1" else (1,):
            name = "critic" if epochs == 1 else "critic, 2 epochs"
            critic = claims.train_gvm(folder / f"equivalence_critic_{share}_{epochs}", sft, start, data=data,
                                      epochs=epochs)
            values[share, name] = at_places(claims.token_values(critic, said, pad_id))
        scores = dict(zip(unique, on_line(line, last_values(judge, unique, pad_id))))
        believed = [[scores[tuple(prefix[0]), tuple(response)] for response in responses]
                    for prefix, responses in zip(prefixes, completed)]
        values[share, "backup"] = [statistics.mean(row) for row in believed]
        line = statistics.linear_regression(last_values(gvm, encoded(known), pad_id), rewards)
        values[share, "GVM"] = on_line(line, at_places(claims.token_values(gvm, said, pad_id)))

        # The backup shares the truth's completions, and most of its luck. Its noise is that of R - r, not that of r.
        paired = [statistics.variance(minus(*both)) / len(both[0]) for both in zip(believed, true)]
        for key in [key for key in values if key[0] == share]:
            found[share][key[1]] = error(minus(values[key], truth), paired if key[1] == "backup" else noise)

    gradients, norms = policy_gradients(policy, prefixes, torch.tensor(list(values.values())))
    gradient = dict(zip(values, gradients))
    average = statistics.mean(truth)
    norm = {"max": statistics.mean(norms), "rms": statistics.mean(n * n for n in norms) ** 0.5}  # with which error
    for share in SHARES:
        own = gradient[share, "GVM"]
        for name in [key[1] for key in values if key[0] == share]:
            g, result = gradient[share, name], found[share][name]
            result |= {"norm": g.norm().item(), "cosine with truth": cosine(g, gradient["truth"])}
            if name != "GVM":
                gap, to_gvm = (g - own).norm().item(), found[share]["GVM"]
                result |= {"gap": gap, "relative gap": gap / own.norm().item(), "cosine with GVM": cosine(g, own)}
                result |= {f"bound, {kind}": (result[kind] + to_gvm[kind]) * norm[kind] for kind in norm}
    return found | {"truth": {"rms standard error": statistics.mean(noise) ** 0.5, "places": len(places),
                              "rms error of a constant": error([q - average for q in truth], noise)["rms"],
                              "norm": gradient["truth"].norm().item(),
                              "norm, shuffled": gradient["shuffled truth"].norm().item(),
                              "mean norm of grad log pi": norm["max"], "rms norm of grad log pi": norm["rms"],
                              "ended": statistics.mean(response[-1] in stop_ids for _, response in said)}}


# ---- 4. The answer ----
def answer(seeds, per_seed):
    few, every, found = SHARES[0], SHARES[-1], {}

    def less(name, key):
        return minus(per_seed(few, name, key), per_seed(every, name, key))

    def words(name, key):
        return (f"{cell(per_seed(few, name, key))} to {cell(per_seed(every, name, key))}; less by "
                f"{cell(less(name, key))}")

    for name, of in (("epsilon_R", "reward model"), ("critic", "critic"), ("backup", "backup"), ("GVM", "GVM")):
        found[f"the {of}'s error shrinks from {few} of the pairs to all"] = verdict(less(name, "rms")), words(name, "rms")
    for name in DERIVED:
        for key, of in (("gap", ""), ("relative gap", ", as a share of the GVM's gradient,")):
            found[f"the gradient gap{of} between {name} and GVM shrinks from {few} of the pairs to all"] = (
                verdict(less(name, key)), words(name, key))
    loose, cases = {}, [seed[share][name] for seed in seeds.values() for share in SHARES for name in DERIVED]
    for kind, errors in (("rms", "root mean square"), ("max", "largest")):
        held = sum(x["gap"] <= x[f"bound, {kind}"] for x in cases)
        loose[kind] = statistics.median(x[f"bound, {kind}"] / x["gap"] for x in cases)
        lemma = "Lemma 3.1" if kind == "max" else "sharper than Lemma 3.1"
        found[f"{lemma}: the gap is under the bound of the {errors} errors, every seed, share, critic and backup"] = (
            "confirmed" if held == len(cases) else "not confirmed",
            f"{held} of {len(cases)}; the bound is {loose[kind]:.1f} times the gap (median)")
    norm, bound = per_seed(every, "GVM", "norm"), per_seed(every, "critic", "bound, rms")
    found["with all pairs the bound of the root mean square errors says something: it is below the GVM's gradient"] = (
        verdict(minus(norm, bound)), f"gradient {cell(norm)}, bound {cell(bound)}")
    own = per_seed(every, "GVM", "cosine with truth")
    for name in ("critic", "critic, 2 epochs", "backup"):
        other = per_seed(every, name, "cosine with truth")
        found[f"with all pairs the GVM's gradient is nearer to the true one than the gradient of the {name}"] = (
            verdict(minus(own, other)), f"cosine {cell(own)} and {cell(other)}; ahead by {cell(minus(own, other))}")
    still = minus(per_seed(every, "critic", "rms"), per_seed(every, "critic, 2 epochs", "rms"))
    found["the critic still improves from 1 to 2 epochs"] = verdict(still), f"error less by {cell(still)}"

    gaps = {share: statistics.mean(per_seed(share, "critic", "gap")) for share in (few, every)}
    cosine, critic = (statistics.mean(per_seed(every, "critic", f"cosine with {x}")) for x in ("GVM", "truth"))
    finding = (f"The gradients of critic and GVM are {gaps[few]:.3f} apart with {few} of the pairs and "
               f"{gaps[every]:.3f} with all, the lemma's bound {loose['max']:.0f} times as large as the gap (median); "
               f"with all pairs their cosine is {cosine:.2f}, and that with the true gradient "
               f"{statistics.mean(own):.2f} for the GVM and {critic:.2f} for the critic.")

    def truth(key, digits=3):
        return cell(per_seed("truth", key), digits)

    tables = [f"Truth: {truth('places', 0)} (state, action) pairs per seed, root mean square standard error "
              f"{truth('rms standard error')}; a constant would have an error of {truth('rms error of a constant')} "
              f"(rms). The true gradient has norm {truth('norm')}, and {truth('norm, shuffled')} with the values "
              "shuffled: so much is this sample's noise. grad log pi: mean norm "
              f"{truth('mean norm of grad log pi', 2)}, root mean square {truth('rms norm of grad log pi', 2)}. The "
              "noise of the truth lowers its cosines with critic and GVM alike; less so with the backup, which "
              "shares the completions.", "",
              *claims.table("pairs | epsilon_R: rms | largest", [
                  [share, *(per_seed(share, "epsilon_R", key) for key in ("rms", "max"))] for share in SHARES]), ""]
    keys = ("rms", "max", "norm", "cosine with truth", "cosine with GVM", "gap", "bound, rms", "bound, max")
    tables += claims.table(
        "pairs | value | error, rms | largest | norm of gradient | cosine with truth | cosine with GVM | gap to GVM | "
        "bound, rms | bound, largest", [
            [share, name, *("" if name == "GVM" and key in keys[4:] else per_seed(share, name, key) for key in keys)]
            for share in SHARES for name in ("critic", "critic, 2 epochs", "backup", "GVM")
            if name in seeds[min(seeds)][share]])

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for panel, name, key, colour, line, label in (
            (left, "epsilon_R", "rms", "tab:gray", "-", "reward model, whole answers"),
            *((left, name, "rms", colour, "-", name) for name, colour in COLOURS.items()),
            (right, "critic", "bound, max", "tab:orange", ":", "bound, critic and GVM (largest)"),
            (right, "critic", "bound, rms", "tab:orange", "--", "bound, critic and GVM (rms)"),
            *((right, name, "gap", COLOURS[name], "-", f"gap, {name} and GVM") for name in DERIVED),
            (right, "GVM", "norm", "tab:blue", "-", "the GVM's gradient itself")):
        claims.draw(panel, [float(share) for share in SHARES], [per_seed(share, name, key) for share in SHARES],
                    marker="o", color=colour, linestyle=line, label=label)
    left.set(xlabel="share of the pairs", ylabel="error (score units, rms)", xscale="log", ylim=(0, None),
             title=f"Errors against the truth ({len(seeds)} seeds)")
    right.set(xlabel="share of the pairs", ylabel="norm (score units per unit of weight)", xscale="log", yscale="log",
              title=f"Policy gradients and their bounds ({len(seeds)} seeds)")
    for panel in (left, right):
        panel.set_xticks([float(share) for share in SHARES], SHARES)
        panel.minorticks_off()
    left.legend(fontsize=7)
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)      # inside it hides curves
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
