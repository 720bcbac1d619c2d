"""Credit for single tokens (section 6.1, Figure 3): which value model sees where an answer goes wrong?

Hypothesis  The GVM says at which token an answer goes wrong (Figure 3), better than PPO's critic, and better than the
            reward model read at every token as if each prefix were an answer ("finer-grained and more accurate
            supervision at the token level", section 6.1). td_lambda 0.95 gives better credit than 0 and than 1.
Method      One world per seed. Held-out answers with exactly one wrong fact and at least one right one, at most 150.
            The wrong token is the first at which the wrong sentence parts from every right one that could stand there.
            An estimator's advantage of a token is A_t = Q_t - Q_{t-1}; its largest drop is where A_t is lowest. EOS is
            left out: the critic has no value there. The true Q is that of the mixture of all behaviour policies (what
            a GVM without tau models), from 200 completions of every prefix. Neither the place of the drop nor Pearson's
            correlation of estimated and true advantages, over all tokens of all answers, depends on an estimator's
            scale, so none is mapped to the oracle's. The largest true drop need not be at the wrong token (a rude
            opening costs, and gives its writer away): the truth's own rate is what one can ask of an estimator. PPO's
            critic learned the values of PPO's policy, KL costs included, and not the mixture's.
Command     python experiments/credit.py --seeds 21 22 23 24 25        (part of make claims)
Result      results/credit.json, results/credit.md, results/credit.png
"""
import os
import re
import statistics
import time

import claims                                                 # first: it finds the project's root
import atlas
import evaluate
import matplotlib.pyplot as plt
import torch
from claims import cell, interval, verdict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ANSWERS, COMPLETIONS = 150, 200                               # answers per seed, and completions of every prefix
ESTIMATORS = ("GVM, lambda 0.95", "GVM, lambda 0", "GVM, lambda 1", "PPO's critic", "token-wise RM")
OURS, *RIVALS = ESTIMATORS
MEASURES = {"exact": "at the wrong token", "near": "within one token", "correlation": "correlation with the truth"}


# ---- 1. Where an answer goes wrong ----
def counted_claims(prompt, response):
    """The claims that the oracle counts (each attribute once): [(sentence, where it starts, is it true?), ...]."""
    kind, country = atlas.QUESTIONS[prompt]
    found, seen = [], set()
    for match in re.finditer(r"[^.!?]*[.!?]", response):
        sentence = match[0].strip()
        said = atlas.claims(kind, country, sentence) or {}
        found += [(sentence, match.end() - len(sentence), true) for name, true in said.items() if name not in seen]
        seen |= set(said)
    return found


def first_wrong_character(prompt, sentence):
    """Up to which character a wrong sentence could still become a right one, by the sentences of its slot."""
    kind, country = atlas.QUESTIONS[prompt]
    subject = country.capital if re.search(rf"\b{country.capital}\b", prompt) else country.name     # as in atlas.slots
    (right_full, right_short), (wrong_full, wrong_short) = atlas.answers(kind, country, subject)
    groups = [(right_full + right_short, wrong_full + wrong_short)]
    groups += [([right], wrong) for right, wrong in atlas.extras(kind, country, subject)]
    rights = next(rights for rights, wrongs in groups if sentence in wrongs)
    return max(len(os.path.commonprefix([sentence, right])) for right in rights)


def with_one_wrong_fact(rows):
    """The rows with exactly one wrong fact and at least one right one, and in each the place of the wrong character."""
    chosen = []
    for row in rows:
        found = counted_claims(row["prompt"], row["response"])
        wrong = [(sentence, start) for sentence, start, true in found if not true]
        if len(wrong) == 1 and len(found) > 1:
            sentence, start = wrong[0]
            chosen.append(row | {"wrong_character": start + first_wrong_character(row["prompt"], sentence)})
    return chosen


def truth_of(tokenizer, row, n):
    """An answer's tokens without EOS, their true advantages, and which of them is the wrong one."""
    ids = evaluate.encode_response(tokenizer, row["response"])[:-1]
    prefixes = [(count, tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]
    # A prefix may end inside a character: then its token is taken together with the next.
    prefixes = [(count, text) for count, text in prefixes if row["response"].startswith(text)]
    texts = [text for _, text in prefixes]
    known = [atlas.true_value("any", row["prompt"], text, n) for text in texts]
    return {"places": [count for count, _ in prefixes],
            "tokens": [after[len(before):] for before, after in zip(texts, texts[1:])],
            "advantages": differences([value for value, _ in known]),
            "variances": [a ** 2 + b ** 2 for (_, a), (_, b) in zip(known, known[1:])],       # of A: of both its ends
            "wrong": next(i for i, text in enumerate(texts[1:]) if len(text) > row["wrong_character"])}


def differences(values):
    return [after - before for before, after in zip(values, values[1:])]


# ---- 2. One seed ----
@torch.no_grad()
def rewards_of_prefixes(folder, sequences):
    """The reward model's score at every token, as if the answer ended there: [[at the prompt's end, 1st, ...], ...]."""
    model, values = AutoModelForSequenceClassification.from_pretrained(folder).eval(), []
    for prompt, response in sequences:
        hidden = model.base_model(input_ids=torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        values.append(evaluate.value_head(model)(hidden[len(prompt) - 1:]).squeeze(-1).tolist())
    return values


def compare(advantages, truths):
    """How often the largest drop is at the wrong token, how often within one token of it; and the correlation."""
    misses = [abs(line.index(min(line)) - truth["wrong"]) for line, truth in zip(advantages, truths, strict=True)]
    estimated = [a for line in advantages for a in line]
    true = [a for truth in truths for a in truth["advantages"]]
    return {"exact": statistics.mean(miss == 0 for miss in misses),
            "near": statistics.mean(miss <= 1 for miss in misses),
            "correlation": statistics.correlation(estimated, true)}


def rates_by_chance(truths):
    """What a drop at a random token would find: one token of T, or the wrong one and its neighbours."""
    return {"exact": statistics.mean(1 / len(truth["tokens"]) for truth in truths),
            "near": statistics.mean(sum(abs(i - truth["wrong"]) <= 1 for i in range(len(truth["tokens"])))
                                    / len(truth["tokens"]) for truth in truths)}


def worth_showing(prompt, response):
    """Sorts answers that fall for a false premise behind all others, Figure 3's question last; then by shortness."""
    return (", and it is in" in response, prompt == "As an island, is Beijing located in Asia?", "Beijing" in prompt,
            -len(response))


def run_seed(folder, seed, scale):
    """{"truth", "chance", estimator: {measure: number}}, the truth's error, and a worked example."""
    start, sft = claims.base(folder, seed, scale)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    ppo = claims.train("baselines.ppo", folder / "ppo", model=sft, reward_model=reward_model,
                       steps=claims.steps(scale), **start)
    folders = dict(zip(ESTIMATORS, (
        claims.train_gvm(folder / "gvm", sft, start), claims.train_gvm(folder / "gvm_td_0", sft, start, td_lambda=0.0),
        claims.train_gvm(folder / "gvm_td_1", sft, start, td_lambda=1.0), ppo / "critic", reward_model), strict=True))

    tokenizer = AutoTokenizer.from_pretrained(sft)
    usable = with_one_wrong_fact(claims.read_lines(start["data"] / "test_scored.jsonl"))
    rows = usable[:max(4, round(scale * ANSWERS))]
    # The example is measured like the others, but not counted with them: it was not drawn at random.
    example = max(usable, key=lambda row: worth_showing(row["prompt"], row["response"]))
    shown = [*rows, example]
    truths = [truth_of(tokenizer, row, max(4, round(scale * COMPLETIONS))) for row in shown]
    sequences = [claims.sequence(tokenizer, row["prompt"], row["response"]) for row in shown]
    advantages = {}
    for name in ESTIMATORS:
        values = (rewards_of_prefixes(folders[name], sequences) if name == "token-wise RM" else
                  claims.token_values(folders[name], sequences, tokenizer.pad_token_id))
        advantages[name] = [differences([line[place] for place in truth["places"]])     # the places leave out EOS
                            for line, truth in zip(values, truths, strict=True)]

    *truths, truth = truths
    true = [a for truth in truths for a in truth["advantages"]]
    noise = statistics.mean(variance for truth in truths for variance in truth["variances"])
    measured = compare([truth["advantages"] for truth in truths], truths)
    # What a perfect estimator's correlation would be with a truth that is only known up to its Monte Carlo error.
    measured["correlation"] = max(0.0, 1 - noise / statistics.pvariance(true)) ** 0.5
    return {"answers": len(rows), "tokens": len(true) / len(rows), "error of the true advantage": noise ** 0.5,
            "spread of the true advantage": statistics.pstdev(true),
            "truth": measured, "chance": rates_by_chance(truths) | {"correlation": 0.0},
            **{name: compare(lines[:-1], truths) for name, lines in advantages.items()},
            "example": {"prompt": example["prompt"], "tokens": truth["tokens"], "wrong": truth["wrong"],
                        "true": truth["advantages"], "GVM": advantages[OURS][-1]}}


# ---- 3. The answer ----
def main():
    args, started = claims.parse(__doc__), time.time()
    seeds = claims.over_seeds(run_seed, args)

    def per_seed(name, key):
        return [seed[name][key] for seed in seeds.values()]

    found = {}
    for rival in RIVALS:
        for key, claim in (("exact", "finds the wrong token more often than"),
                           ("correlation", "has advantages nearer to the true ones (correlation) than")):
            gap = [a - b for a, b in zip(per_seed(OURS, key), per_seed(rival, key))]
            found[f"the GVM (lambda 0.95) {claim} {rival}"] = (
                verdict(gap), f"{cell(per_seed(OURS, key))} and {cell(per_seed(rival, key))}; difference {cell(gap)}")
    share = {name: f"{statistics.mean(per_seed(name, 'exact')):.3f}" for name in (OURS, *RIVALS, "truth", "chance")}
    finding = (f"In answers with one wrong fact the GVM's largest drop is exactly at the wrong token in {share[OURS]} "
               f"of the cases ({', '.join(f'{name}: {share[name]}' for name in RIVALS)}; chance: "
               f"{share['chance']}, the true values' own: {share['truth']}).")

    tables = ["| advantages from | largest drop at the wrong token | within one token | correlation with the truth |",
              "|---" * 4 + "|"]
    tables += [f"| {name} | " + " | ".join(cell(per_seed(name, key)) for key in MEASURES) + " |"
               for name in (*ESTIMATORS, "truth", "chance")]
    answers, tokens, error, spread = ([seed[key] for seed in seeds.values()] for key in (
        "answers", "tokens", "error of the true advantage", "spread of the true advantage"))
    tables += ["", f"{statistics.mean(answers):.0f} answers per seed, of {statistics.mean(tokens):.1f} tokens. Root "
               f"mean square standard error of the true advantages {cell(error)}, their spread {cell(spread)}. "
               "The truth's correlation is that of a perfect estimator with a truth of that error."]
    examples = {seed: found["example"] for seed, found in seeds.items()}
    best = max(examples, key=lambda seed: worth_showing(examples[seed]["prompt"], "".join(examples[seed]["tokens"])))
    example = examples[best]
    tables += ["", f"A worked example (seed {best}): \"{example['prompt']}\" The wrong token is bold.", "",
               "| token | true advantage | GVM's advantage |", "|---" * 3 + "|"]
    tables += [f"| {f'**{token}**' if i == example['wrong'] else token} | {true:+.3f} | {estimate:+.3f} |"
               for i, (token, true, estimate) in enumerate(zip(
                   map(str.strip, example["tokens"]), example["true"], example["GVM"]))]

    picture, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for shift, key, colour in ((-0.2, "exact", "tab:blue"), (0.2, "near", "tab:orange")):
        for i, name in enumerate(ESTIMATORS):
            mean, low, high = interval(per_seed(name, key))
            left.bar(i + shift, mean, 0.4, color=colour, yerr=[[mean - low], [high - mean]], capsize=3,
                     label=MEASURES[key] if i == 0 else None)
        left.axhline(statistics.mean(per_seed("truth", key)), color=colour, linestyle="--",
                     label=f"the truth's own, {MEASURES[key]}")
        left.axhline(statistics.mean(per_seed("chance", key)), color=colour, linestyle=":",
                     label=f"chance, {MEASURES[key]}")
    left.set_xticks(range(len(ESTIMATORS)), [name.replace(" ", "\n", 1) for name in ESTIMATORS])
    left.set(ylabel="share of answers", ylim=(0, 1.25), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
             title=f"Where the largest drop is (mean of {len(seeds)} seeds, 95 %)")
    left.legend(fontsize=7, ncols=2, loc="upper right")
    places = range(len(example["tokens"]))
    right.bar([i - 0.2 for i in places], example["true"], 0.4, color="tab:gray", label="true")
    right.bar([i + 0.2 for i in places], example["GVM"], 0.4, color="tab:blue", label=OURS)
    right.axvspan(example["wrong"] - 0.5, example["wrong"] + 0.5, color="tab:red", alpha=0.15, label="the wrong token")
    right.axhline(0, color="black", linewidth=0.5)
    right.set_xticks(places, map(str.strip, example["tokens"]), rotation=60, ha="right", fontsize=8)
    right.set(xlabel="token", ylabel="advantage (units of the oracle's score)",
              title=f"{example['prompt']} (seed {best})")
    right.legend(fontsize=7)
    claims.report("credit", args, __doc__, seeds, found, tables, finding, picture)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
