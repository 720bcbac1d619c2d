"""Credit for single tokens (section 6.1, Figure 3): which value model sees where an answer goes wrong?

Hypothesis  The GVM says at which token an answer goes wrong (Figure 3), better than PPO's critic, and better
            than the reward model read at every token as if each prefix were an answer ("finer-grained and
            more accurate supervision at the token level", section 6.1). td_lambda 0.95 gives better credit
            than 0 and than 1.
Method      One world per seed. At most 150 held-out answers with exactly one wrong fact and at least one
            right one. The wrong token is the first at which the wrong sentence parts from every right one
            that could be there. An estimator's advantage of a token is A_t = Q_t - Q_{t-1}; its largest drop
            is where A_t is lowest. END is left out: the critic has no value there. The true Q is that of the
            mixture of all behaviour policies (what a GVM without tau models), from 200 completions of every
            prefix. The largest true drop need not be at the wrong token (a rude opening costs, and gives its
            writer away): the truth's own rate is what one can ask of an estimator. PPO's critic learned the
            values of PPO's policy, KL costs included, and not the mixture's.
Command     python experiments/credit.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/credit.json, .md, .png
"""
import os
import re
from statistics import correlation, mean, pstdev, pvariance

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
from claims import cell, claim, minus

ANSWERS, COMPLETIONS = 150, 200                               # per seed; of every prefix
ESTIMATORS = ("GVM, lambda 0.95", "GVM, lambda 0", "GVM, lambda 1", "PPO's critic", "token-wise RM")
OURS, *RIVALS = ESTIMATORS
MEASURES = ("exact", "near", "correlation")


# ---- 1. Where an answer goes wrong ----
def counted_claims(prompt, response):
    """The claims that the oracle counts (each attribute once): [(sentence, where it starts, is it true?)]."""
    kind, country = atlas.QUESTIONS[prompt]
    found, seen = [], set()
    for match in re.finditer(r"[^.!?]*[.!?]", response):
        sentence = match[0].strip()
        said = atlas.claims(kind, country, sentence) or {}
        start = match.end() - len(sentence)
        found += [(sentence, start, true) for name, true in said.items() if name not in seen]
        seen |= set(said)
    return found


def first_wrong_character(prompt, sentence):
    """Up to which character a wrong sentence could still become a right one, by the sentences of its slot."""
    kind, country = atlas.QUESTIONS[prompt]
    about_city = re.search(rf"\b{country.capital}\b", prompt)                  # as in atlas.slots
    subject = country.capital if about_city else country.name
    (right_full, right_short), (wrong_full, wrong_short) = atlas.answers(kind, country, subject)
    groups = [(right_full + right_short, wrong_full + wrong_short)]
    groups += [([right], wrong) for right, wrong in atlas.extras(kind, country, subject)]
    rights = next(rights for rights, wrongs in groups if sentence in wrongs)
    return max(len(os.path.commonprefix([sentence, right])) for right in rights)


def with_one_wrong_fact(rows):
    """The rows with one wrong fact and at least one right one, each with the place of the wrong character."""
    chosen = []
    for row in rows:
        found = counted_claims(row["prompt"], row["response"])
        wrong = [(sentence, start) for sentence, start, true in found if not true]
        if len(wrong) == 1 and len(found) > 1:
            sentence, start = wrong[0]
            chosen.append(row | {"wrong_character": start + first_wrong_character(row["prompt"], sentence)})
    return chosen


def differences(values):
    return minus(values[1:], values[:-1])


def truth_of(tokenizer, row, ids, n):
    """Of an answer's tokens, without END: places, true advantages, which of them is the wrong one."""
    texts = [tokenizer.decode(ids[:count]) for count in range(len(ids))]
    # A prefix may end inside a character: then its token is taken together with the next.
    places = [count for count, text in enumerate(texts) if row["response"].startswith(text)]
    texts = [texts[count] for count in places]
    known = [claims.true_value_of_program("any", row, tokenizer, ids, count, n) for count in places]
    return {"places": places, "advantages": differences([value for value, _ in known]),
            "variances": [a + b for (_, a), (_, b) in zip(known, known[1:])],  # of A: of both its ends
            "wrong": next(i for i, text in enumerate(texts[1:]) if len(text) > row["wrong_character"])}


# ---- 2. One seed ----
def compare(advantages, truths):
    """How often the largest drop is at the wrong token, or within one token of it; and the correlation."""
    misses = [abs(line.index(min(line)) - truth["wrong"]) for line, truth in zip(advantages, truths)]
    true = [a for truth in truths for a in truth["advantages"]]
    return {"exact": mean(miss == 0 for miss in misses), "near": mean(miss <= 1 for miss in misses),
            "correlation": correlation([a for line in advantages for a in line], true)}


def rates_by_chance(truths):
    """What a drop at a random token would find: one token of T, or the wrong one and its neighbours."""
    tokens = [(len(truth["advantages"]), truth["wrong"]) for truth in truths]
    near = mean((min(wrong + 1, T - 1) - max(wrong - 1, 0) + 1) / T for T, wrong in tokens)
    return {"exact": mean(1 / T for T, _ in tokens), "near": near, "correlation": 0.0}


def run_seed(folder, seed, scale):
    """{"truth", "chance", estimator: {measure: number}}, and about the answers and the truth's error."""
    sft, start, online = claims.base(folder, seed, scale)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    ppo = claims.train("baselines.ppo", folder / "ppo", reward_model=reward_model, **online)
    gvms = [claims.train_gvm(folder / "gvm", sft, start)]
    gvms += [claims.train_gvm(folder / f"gvm_td_{x:.0f}", sft, start, td_lambda=x) for x in (0.0, 1.0)]

    _, tokenizer = claims.load_policy(sft)
    rows = with_one_wrong_fact(claims.read_lines(start["data"] / "test_scored.jsonl"))
    rows, n = rows[:max(4, round(scale * ANSWERS))], max(4, round(scale * COMPLETIONS))
    sequences = claims.sequences(tokenizer, rows)
    truths = [truth_of(tokenizer, row, ids, n) for row, (_, ids) in zip(rows, sequences)]
    found = {}
    for name, model in zip(ESTIMATORS, (*gvms, ppo / "critic", reward_model), strict=True):
        lines = claims.token_values(model, sequences)
        found[name] = compare([differences([line[place] for place in truth["places"]])
                               for line, truth in zip(lines, truths)], truths)
    true = [a for truth in truths for a in truth["advantages"]]
    noise = mean(variance for truth in truths for variance in truth["variances"])
    measured = compare([truth["advantages"] for truth in truths], truths)
    # A perfect estimator's correlation with a truth that is only known up to its Monte Carlo error.
    measured["correlation"] = max(0.0, 1 - noise / pvariance(true)) ** 0.5
    return found | {"truth": measured, "chance": rates_by_chance(truths), "answers": len(rows),
                    "tokens": len(true) / len(rows), "error of the truth": noise ** 0.5,
                    "spread of the truth": pstdev(true)}


# ---- 3. The answer ----
def answer(seeds, per_seed):
    found = {}
    for rival in RIVALS:
        for key, words in (("exact", "finds the wrong token more often than"),
                           ("correlation", "has advantages nearer to the true ones (correlation) than")):
            ours, theirs = per_seed(OURS, key), per_seed(rival, key)
            found[f"the GVM (lambda 0.95) {words} {rival}"] = claim(
                minus(ours, theirs), f"{cell(ours)} and {cell(theirs)}; difference")
    share = {name: f"{name}: {mean(per_seed(name, 'exact')):.3f}" for name in (*RIVALS, "chance", "truth")}
    finding = (f"In answers with one wrong fact the GVM's largest drop is exactly at the wrong token in "
               f"{mean(per_seed(OURS, 'exact')):.3f} of the cases ({', '.join(share.values())}).")
    tables = claims.table(
        "advantages from | largest drop at the wrong token | within one token | correlation with the truth",
        [[name, *(per_seed(name, key) for key in MEASURES)] for name in (*ESTIMATORS, "truth", "chance")])
    tables += ["", f"{mean(per_seed('answers')):.0f} answers per seed, of {mean(per_seed('tokens')):.1f} "
               f"tokens. True advantages: standard error {cell(per_seed('error of the truth'))} (root mean "
               f"square), spread {cell(per_seed('spread of the truth'))}. The truth's correlation is that of "
               "a perfect estimator with a truth of that error."]

    picture, panel = plt.subplots(figsize=(8, 4.2), layout="constrained")
    x = range(len(ESTIMATORS))
    for shift, key, colour in ((-0.2, "exact", "tab:blue"), (0.2, "near", "tab:orange")):
        claims.draw(panel, [i + shift for i in x], [per_seed(name, key) for name in ESTIMATORS], width=0.4,
                    color=colour, label="at the wrong token" if key == "exact" else "within one token of it")
        for name, line in (("truth", "--"), ("chance", ":")):
            panel.axhline(mean(per_seed(name, key)), color=colour, linestyle=line, label=f"the same, {name}")
    panel.set_xticks(x, ESTIMATORS)
    claims.label(panel, f"Where the largest drop is ({len(seeds)} seeds, 95 %)", "", "share of answers")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
