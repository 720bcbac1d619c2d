"""Distribution shift: how far a frozen value model can be trusted off its data, and what DVPO gains there.

Hypothesis  On questions unlike those of its training, and on answers of policies unlike those in its data,
            the GVM's values are worse. DVPO still gains over SFT with such a GVM, but less than with one that
            knows them.
Method      One world per seed. Questions: a GVM is trained without one of the four kinds of question (kind
            number seed modulo 4); another without a quarter of the countries, asked or named; a control on as
            many rows of all questions. (The SFT model, from which all three start, has seen everything.)
            DVPO, 30 steps, on new prompts of the unseen sort only, with the GVM that never saw it and with
            the control; judged on held-out prompts of that sort. Policies: the GVM of all data meets answers
            of the behaviour policies' mixture, which wrote its data; of SFT; of DVPO's final policy; of SFT
            at temperature 2; and of a "stranger", a program that is rude and chatty at once, right half of
            the time, also held against how the mixture would go on from there (what is left is due to unlike
            text). Values are compared with the true Q of the policy that wrote the answer (200 completions of
            a program, 16 of a language model) at random prefixes of answers to held-out prompts. The squared
            standard error of the truth is taken off both the squared error and the variance of Q, which is
            what a constant would err. Explained = 1 - error / variance.
Command     python experiments/shift.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/shift.json, .md, .png
"""
import random
from statistics import mean, variance
from unittest.mock import patch

import claims                                                 # first: it finds the project's root
import atlas
import evaluate
import matplotlib.pyplot as plt
import torch
from claims import cell, claim, minus, verdict

ROWS = 3000                                                   # of training data for each of the three GVMs
PREFIXES, BY_PROGRAM, BY_MODEL = 120, 200, 16                 # prefixes per policy; completions of each
STRANGER = atlas.Behaviour(.5, .5, extra=1, extra_right=.5, polite=0, rude=1, ramble=.6, closing=.9)
SORTS = {"kind": "an unseen kind of question", "countries": "unseen countries"}


# ---- 1. Truth at random prefixes: [((prompt ids, response ids), tokens read, true Q, squared error)] ----
def of_program(policy, rows, tokenizer, n, rng):
    """At one random prefix of each {"prompt", "response"}, from no token (V(s_1)) to all (the reward)."""
    points = []
    for row in rows:
        _, response = sequence = claims.sequence(tokenizer, row["prompt"], row["response"])
        count = rng.randint(0, len(response))
        truth = claims.true_value_of_program(policy, row, tokenizer, response, count, n)
        if truth:
            points.append((sequence, count, *truth))
    return points


def of_model(policy, tokenizer, prompts, n, rng):
    """The same of a language model's own answers."""
    sequences = claims.answers(policy, tokenizer, prompts)
    counts = [rng.randint(0, len(response)) for _, response in sequences]
    prefixes = [(prompt, response[:count]) for (prompt, response), count in zip(sequences, counts)]
    truths = claims.true_values(prompts, tokenizer, claims.completions(policy, prefixes, n))
    return [(sequence, count, *truth) for sequence, count, truth in zip(sequences, counts, truths)]


def value_error(gvm, points):
    """{"error" of values, "variance" of the true Q, "explained" of it, "noise" of the truth}."""
    lines = claims.token_values(gvm, [sequence for sequence, *_ in points])
    noise = mean(error for *_, error in points)
    error = mean((line[count] - truth) ** 2 for line, (_, count, truth, _) in zip(lines, points)) - noise
    spread = variance(truth for _, _, truth, _ in points) - noise
    # In a trial a few bad answers may be equally bad; the floor keeps that from being a division by 0.
    explained = 1 - error / max(spread, 1e-3)
    return {"error": error, "variance": spread, "explained": explained, "noise": noise ** 0.5}


# ---- 2. One seed ----
def questions_shift(folder, seed, scale, start, online, tokenizer):
    """{sort of question: {"score" of SFT, "without" and "control": {"score", "nats", "length", "pairs",
    "explained", ...}}}, all on held-out questions of that sort."""
    rng, data = random.Random(f"shift {seed}"), start["data"]
    kind = list(atlas.WORDINGS)[seed % len(atlas.WORDINGS)]
    countries = set(rng.sample([country.name for country in atlas.COUNTRIES], len(atlas.COUNTRIES) // 4))

    def is_new(sort, row):
        asks, country = atlas.QUESTIONS[row["prompt"]]
        return asks == kind if sort == "kind" else country.name in countries

    def unseen(sort, name):
        rows = claims.read_lines(data / f"{name}.jsonl")
        return [row for row in rows if is_new(sort, row)] or rows              # a trial may have none

    names = [name for country in atlas.COUNTRIES if country.name in countries
             for name in (country.name, country.capital)]
    scored = claims.read_lines(data / "scored.jsonl")
    known = {"control": scored} | {sort: [row for row in scored if not is_new(sort, row)] for sort in SORTS}
    known["countries"] = [row for row in known["countries"]
                          if not any(name in row["response"] for name in names)]
    rows = min(max(64, round(scale * ROWS)), *map(len, known.values()))        # for all three the same number
    gvms, sft = {}, online["model"]
    for name, some in known.items():
        place = folder / f"shift_data_{name}"
        claims.write_lines(place / "scored.jsonl", some[:rows])                # the file is in random order
        for file in ("rl", "test_prompts", "test_pairs") if name in SORTS else ():
            claims.write_lines(place / f"{file}.jsonl", unseen(name, file))
        gvms[name] = claims.train_gvm(folder / f"shift_gvm_{name}", sft, start | {"data": place})

    found = {}
    for sort in SORTS:
        place, prompts = folder / f"shift_data_{sort}", unseen(sort, "rl")
        flags = online | {"data": place, "batch_size": 64 if len(prompts) >= 64 else 32}
        answers = unseen(sort, "test_scored")[:max(8, round(scale * PREFIXES))]
        points = of_program("any", answers, tokenizer, max(2, round(scale * BY_PROGRAM)), rng)
        which_gvm = {"without": gvms[sort], "control": gvms["control"]}
        runs = {which: claims.train("train_dvpo", folder / f"shift_dvpo_{sort}_{which}", gvm=gvm, **flags)
                for which, gvm in which_gvm.items()}
        judged = claims.judge(folder / f"shift_{sort}.log", sft, runs.values(), start | {"data": place},
                              samples=max(2, round(scale * 6)))
        found[sort] = {"unseen": kind if sort == "kind" else sorted(countries), "prompts": len(prompts),
                       "score": judged[sft.name]["score"]}
        with claims.words_to(folder / f"shift_{sort}_pairs.log"):
            pairs = evaluate.evaluate_values(evaluate.ValuesArgs(
                models=[f"{which}={gvm}" for which, gvm in which_gvm.items()], data=str(place)))["models"]
        for which, gvm in which_gvm.items():
            found[sort][which] = judged[runs[which].name] | value_error(gvm, points)
            found[sort][which]["pairs"] = pairs[which]["pair_accuracy"]["mean"]["mean"]
    return found


def policies_shift(seed, scale, start, sft, gvm, dvpo):
    """{policy: what value_error says of the GVM on its answers}."""
    rng, prompts = random.Random(f"policies {seed}"), claims.prompts_of(start)
    prompts = rng.sample(prompts, min(len(prompts), max(8, round(scale * PREFIXES))))
    by_program, by_model = (max(2, round(scale * n)) for n in (BY_PROGRAM, BY_MODEL))
    policy, tokenizer = claims.load_policy(sft)

    def answers(name):
        return [{"prompt": x, "response": atlas.complete(name, x, "", 1, rng)[0]} for x in prompts]

    points = {"the data's mixture": of_program("any", answers("any"), tokenizer, by_program, rng)}
    torch.manual_seed(seed)
    points["SFT"] = of_model(policy, tokenizer, prompts, by_model, rng)
    points["DVPO"] = of_model(claims.load_policy(dvpo)[0], tokenizer, prompts, by_model, rng)
    # A temperature is a division of the logits; `rollout` has none.
    policy.get_output_embeddings().register_forward_hook(lambda layer, states, logits: logits / 2)
    points["SFT, temperature 2"] = of_model(policy, tokenizer, prompts, by_model, rng)
    with patch.dict(atlas.POLICIES, stranger=STRANGER):       # not for longer: "any" is all that are in there
        strange, state = answers("stranger"), rng.getstate()
        points["stranger"] = of_program("stranger", strange, tokenizer, by_program, rng)
    rng.setstate(state)                                       # the same prefixes once more
    points["stranger, mixture goes on"] = of_program("any", strange, tokenizer, by_program, rng)
    return {name: value_error(gvm, found) for name, found in points.items()}


def run_seed(folder, seed, scale):
    """{"questions": see questions_shift, "policies": see policies_shift}."""
    sft, start, online = claims.base(folder, seed, scale)
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    dvpo = claims.train("train_dvpo", folder / "dvpo", gvm=gvm, **online)
    online, (_, tokenizer) = online | {"steps": claims.steps(scale, 30)}, claims.load_policy(sft)
    return {"questions": questions_shift(folder, seed, scale, start, online, tokenizer),
            "policies": policies_shift(seed, scale, start, sft, gvm, dvpo)}


# ---- 3. The answer ----
def answer(seeds, per_seed):
    policies, found = list(per_seed("policies")[0]), {}

    def question(sort, which, key):
        return per_seed("questions", sort, which, key)

    sft = {sort: per_seed("questions", sort, "score") for sort in SORTS}
    gains = {(sort, which): minus(question(sort, which, "score"), sft[sort])
             for sort in SORTS for which in ("without", "control")}
    errors, variances = ({name: per_seed("policies", name, key) for name in policies}
                         for key in ("error", "variance"))
    for sort, words in SORTS.items():
        lost, pairs = (minus(question(sort, "control", key), question(sort, "without", key))
                       for key in ("explained", "pairs"))
        found[f"on {words} the GVM explains less of the true Q than the control"] = (
            verdict(lost), f"explained, control minus without {cell(lost)}; pair accuracy {cell(pairs)}")
        found[f"on {words} DVPO still gains over SFT"] = claim(gains[sort, "without"])
        found[f"on {words} DVPO gains less than with the control"] = claim(
            minus(gains[sort, "control"], gains[sort, "without"]), "gain, control minus without")
    for name in ("DVPO", "SFT, temperature 2", "stranger"):
        found[f"the GVM errs more on answers of {name} than on those of the data's mixture"] = claim(
            minus(errors[name], errors["the data's mixture"]), f"squared error {cell(errors[name])}, more by")
        found[f"on answers of {name} it errs more than a constant would"] = claim(
            minus(errors[name], variances[name]), f"variance {cell(variances[name])}; error more by")

    told = {name: f"{mean(errors[name]):.3f} ({mean(variances[name]):.3f})" for name in policies}
    gained = "; on ".join(f"{words} DVPO gained {cell(gains[sort, 'without'])} over SFT (with the control GVM"
                          f" {cell(gains[sort, 'control'])})" for sort, words in SORTS.items())
    finding = (f"On {gained}; the squared error of the GVM (of a constant) is {told[policies[0]]} on answers "
               f"like its data's, {told['SFT']} on those of SFT, {told['DVPO']} on those of DVPO, "
               f"{told['stranger']} on those of the stranger.")
    tables = ["## Questions: values and policies where the GVM was not trained", ""]
    rows, keys = [], ("explained", "error", "noise", "pairs", "score")
    for sort, words in SORTS.items():
        rows += [[f"SFT, on {words}", *[""] * 4, sft[sort], "", ""]] + [
            [f"{which}, on {words}", *(question(sort, which, key) for key in keys), gains[sort, which],
             question(sort, which, "nats")] for which in ("without", "control")]
    tables += claims.table("GVM | explained | squared error | standard error of the truth | pair accuracy | "
                           "DVPO's score | gain over SFT | KL (nats)", rows)
    tables += ["", "## Policies: the GVM of all data on their answers", ""]
    tables += claims.table("answers of | squared error | variance of the true Q | error of the truth", [
        [name, errors[name], variances[name], per_seed("policies", name, "noise")] for name in policies])

    picture, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    for offset, which, name in ((-0.18, "without", "GVM never saw them"), (0.18, "control", "GVM saw all")):
        claims.draw(left, [x + offset for x in range(len(SORTS))], [gains[sort, which] for sort in SORTS],
                    width=0.34, label=name)
    left.set_xticks(range(len(SORTS)), SORTS.values())
    claims.label(left, f"DVPO on unseen questions ({len(seeds)} seeds, 95 %)", "", "gain over SFT")
    x = range(len(policies))
    claims.draw(right, x, errors.values(), width=0.6, label="the GVM")
    right.plot(x, [mean(variances[name]) for name in policies], "k_", markersize=30,
               label="a constant: the variance of the true Q")
    right.set_xticks(x, [name.replace(", ", ",\n") for name in policies], fontsize=7, rotation=20)
    claims.label(right, f"The frozen GVM ({len(seeds)} seeds)", "answers of", "squared error")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
