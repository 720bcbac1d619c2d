"""Lambda and the length of answers: which td_lambda is right for 20 tokens, which for 200?

Hypothesis  With lambda < 1 a reward reaches about 1 / (1 - lambda) tokens back in a pass over the data: at
            0.95, twenty. So 0.95 is right for short answers, and the longer they are, the nearer to 1 lambda
            has to be. VAPO (arXiv 2504.05118) pretrains with 1 and takes 1 - 1 / (0.05 T) for the policy.
Method      One world per seed. Longer answers: 1, 4 or 10 questions of Atlas in one prompt, answered in turn
            by the same behaviour policy (about 20, 80 and 200 tokens); the score is the mean of their
            scores, all of it at the last token. GVMs from the SFT model of single questions, two passes over
            about as many tokens of each length, in about as many updates, with each lambda. The true Q of a
            prefix is known: what is answered has its score, the half-written answer and those to come have
            their true values under the policy that writes. Measured on held-out prompts: squared error in
            thirds of the answer, as a share of the true Q's variance there, and pair accuracy of the mean
            value (random pairs of answers to one prompt). Policy: DVPO on four questions a prompt, from an
            SFT model of such answers, with two of the GVMs and three gae_lambda; mean true score of the
            rollouts of the last five steps.
Command     python experiments/horizon.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/horizon.json, .md, .png
"""
import random
from functools import lru_cache
from statistics import mean, pvariance

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
from claims import minus

QUESTIONS = (1, 4, 10)                                        # in a prompt: answers of 20, 80, 200 tokens
LAMBDAS, BETWEEN = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0, "1 - 1/(0.05 T)"), "\n"
ROWS, PROMPTS, ANSWERS = 4000, 60, 2                          # answers to learn from; held out
PLACES, GAE = ("first third", "second third", "last third"), (0.8, 0.95, 1.0)


# ---- 1. Several questions in one prompt ----
def score(prompt, response):
    """Mean of the oracle's scores. An answer that is missing is a wrong one; what is too much is ignored."""
    questions, said = prompt.split(BETWEEN), response.split(BETWEEN)
    return mean(atlas.oracle(q, a) for q, a in zip(questions, said + [""] * len(questions)))


def row(questions, policy, rng):
    said = [atlas.complete(policy, question, "", 1, rng)[0] for question in questions]
    prompt, response = BETWEEN.join(questions), BETWEEN.join(said)
    return {"prompt": prompt, "response": response, "reward": score(prompt, response), "policy": policy}


@lru_cache(maxsize=None)
def true_value(policy, question, prefix):
    return atlas.true_value(policy, question, prefix, 200)[0]


def true_q(row, prefix):
    """Q of the row's policy after a prefix of its answer."""
    questions, said = row["prompt"].split(BETWEEN), prefix.split(BETWEEN)
    known = [atlas.oracle(q, a) for q, a in zip(questions, said[:-1])]
    current = true_value(row["policy"], questions[len(said) - 1], said[-1])
    return mean([*known, current, *(true_value(row["policy"], q, "") for q in questions[len(said):])])


def write_data(folder, data, k, seed, scale):
    """Scored answers and RL prompts with k questions each, SFT answers of the expert. Returns the folder."""
    rng, output = random.Random(f"{seed} {k}"), folder / f"horizon_data_{k}"
    files = {"sft": "sft", "value": "scored", "rl": "rl", "test": "test_prompts"}
    prompts = {part: sorted({x["prompt"] for x in claims.read_lines(data / f"{name}.jsonl")})
               for part, name in files.items()}

    def several(part, n, policies):
        return [row(rng.sample(prompts[part], k), policy, rng) for _ in range(n) for policy in policies]

    n = max(16, round(scale * ROWS / k / len(atlas.POLICIES)))
    asked = [rng.sample(prompts["test"], k) for _ in range(max(4, round(scale * PROMPTS)))]
    held_out = [row(questions, policy, rng) for questions in asked
                for policy in rng.sample(list(atlas.POLICIES), ANSWERS)]
    claims.write_lines(output / "scored.jsonl", several("value", n, atlas.POLICIES))
    claims.write_lines(output / "sft.jsonl", several("sft", 2 * n, ["expert", "novice"]))
    claims.write_lines(output / "rl.jsonl", [{"prompt": x["prompt"]} for x in several("rl", 200, ["terse"])])
    claims.write_lines(output / "held_out.jsonl", held_out)
    return output


# ---- 2. One seed ----
def measure(gvm, held_out, tokenizer):
    """{place: squared error as a share of the variance of the true Q, "accuracy": of the mean value}."""
    (errors, truths), means = ({place: [] for place in PLACES} for _ in range(2)), []
    sequences = claims.sequences(tokenizer, held_out)
    for x, (_, response), values in zip(held_out, sequences, claims.token_values(gvm, sequences)):
        means.append(mean(values[1:]))
        rng, last = random.Random(x["response"]), len(response) - 1
        for third, place in enumerate(PLACES):                # a token of each third, never END
            first = third * last // 3 + 1
            t = rng.randint(first, max(first, (third + 1) * last // 3))
            prefix = claims.text(tokenizer, response[:t])
            if x["response"].startswith(prefix):              # else they end inside a character
                truths[place].append(true_q(x, prefix))
                errors[place].append((values[t] - truths[place][-1]) ** 2)
    right = [(a > b) == (x["reward"] > y["reward"]) for x, y, a, b in zip(
        held_out[0::2], held_out[1::2], means[0::2], means[1::2]) if x["reward"] != y["reward"]]
    shares = {place: mean(errors[place]) / pvariance(truths[place]) for place in PLACES}
    return shares | {"accuracy": mean(right)}


def run_seed(folder, seed, scale):
    """{"values": {questions: {lambda: numbers}}, "policy": {"td_lambda, gae_lambda": score}, "tokens"}."""
    sft, start, online = claims.base(folder, seed, scale)
    tokenizer, found, tokens, gvms = claims.load_policy(sft)[1], {}, {}, {}
    for k in QUESTIONS:
        data = write_data(folder, start["data"], k, seed, scale)
        held_out = claims.read_lines(data / "held_out.jsonl")
        tokens[k] = mean(len(response) for _, response in claims.sequences(tokenizer, held_out))
        for td_lambda in LAMBDAS:
            value = td_lambda if td_lambda in LAMBDAS[:-1] else max(0.0, 1 - 1 / (0.05 * tokens[k]))
            gvm = claims.train_gvm(folder / f"horizon_gvm_{k}_{value:.3g}", sft, start, data=data,
                                   td_lambda=value, max_length=512, batch_size=max(2, 16 // k))
            gvms[k, td_lambda] = gvm
            found.setdefault(str(k), {})[str(td_lambda)] = measure(gvm, held_out, tokenizer)
    data, policy = folder / "horizon_data_4", {}
    sft = claims.train("sft", folder / "horizon_sft", model=sft, **start | {
        "data": data, "epochs": 2, "lr": 1e-3, "max_length": 512})
    for td_lambda in (0.95, 1.0):
        for gae_lambda in GAE:
            flags = online | {"model": sft, "gvm": gvms[4, td_lambda], "data": data, "gae_lambda": gae_lambda,
                              "batch_size": 32, "mini_batch_size": 16, "max_response_length": 192}
            run = claims.train("train_dvpo", folder / f"horizon_dvpo_{td_lambda:g}_{gae_lambda:g}", **flags)
            scores = claims.by_step(run, lambda x: score(x["prompt"], x["response"]))
            policy[f"{td_lambda:g}, {gae_lambda:g}"] = mean(map(mean, scores[-5:]))
    policy["SFT"] = mean(scores[0])                           # the first step's rollouts are the SFT model's
    return {"values": found, "policy": policy, "tokens": {str(k): x for k, x in tokens.items()}}


# ---- 3. The answer ----
def answer(seeds, per_seed):
    found, tables, lambdas = {}, [], list(map(str, LAMBDAS))

    def error(k, td_lambda):                                  # of the places together
        return [mean(x) for x in zip(*(per_seed("values", str(k), td_lambda, place) for place in PLACES))]

    for k in QUESTIONS:
        best = min(lambdas, key=lambda x: mean(error(k, x)))
        words = f"answers of {mean(per_seed('tokens', str(k))):.0f} tokens: 1 errs less than 0.95"
        found[words] = claims.claim(minus(error(k, "0.95"), error(k, "1.0")),
                                    f"best {best}; share of the variance, less by")
        tables += [f"{k} question(s), {mean(per_seed('tokens', str(k))):.0f} tokens:", "", *claims.table(
            "td_lambda | " + " | ".join(PLACES) + " | all | pair accuracy", [
                [x, *(per_seed("values", str(k), x, place) for place in PLACES), error(k, x),
                 per_seed("values", str(k), x, "accuracy")] for x in lambdas]), ""]
    policies, usual = list(per_seed("policy")[0]), per_seed("policy", "0.95, 0.95")
    found["policy: a GVM with td_lambda 1 is better than one with 0.95"] = claims.claim(
        minus(per_seed("policy", "1, 0.95"), usual))
    found["policy: gae_lambda 1 is better than 0.95"] = claims.claim(
        minus(per_seed("policy", "0.95, 1"), usual))
    tables += ["DVPO on four questions: mean true score of the last five steps' rollouts.", "", *claims.table(
        "td_lambda, gae_lambda | true score", [[name, per_seed("policy", name)] for name in policies])]
    picture, panel = plt.subplots(figsize=(6.5, 4))
    for k in QUESTIONS:
        claims.draw(panel, range(len(lambdas)), [error(k, x) for x in lambdas], fmt="o-",
                    label=f"{mean(per_seed('tokens', str(k))):.0f} tokens")
    panel.set_xticks(range(len(lambdas)), lambdas)
    claims.label(panel, "Error of the value model", "td_lambda", "squared error / variance of the true Q")
    best = {k: min(lambdas, key=lambda x: mean(error(k, x))) for k in QUESTIONS}
    finding = "The least error has " + "; ".join(
        f"lambda {best[k]} with {mean(per_seed('tokens', str(k))):.0f} tokens" for k in QUESTIONS) + "."
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
