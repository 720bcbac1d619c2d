"""Who knows best which answer is better: the GVM, the scalar reward model, or PPO's critic?

Hypothesis  The GVM ranks answers as well as the reward model trained on the same data (Table 3), and better
            than PPO's critic (Table 4: +7 points), also answers and questions unlike those of training (Table
            5). Its token values are nearer to the true Q than the critic's, which learns from a reward model
            and few rollouts.
Method      The models of experiments/compare.py: GVM of scores, GVM of pairs (+1/-1), reward model, and the
            critic that PPO ends with, started from that reward model. Three sets of held-out pairs: Atlas's
            own; the trained policies' answers to the same questions; Atlas's own with words in front of every
            question. An answer's score is an aggregate of its token values. The critic says V(s_t), the value
            before a token: at the last, END, it has none. Against the true Q of the behaviour policy that
            wrote the answer: mean squared error at the first, middle and last token, without what the truth's
            Monte Carlo error adds; every model's values are first mapped by the straight line that best
            predicts the rewards of 1,000 training answers from the last token's values. (The critic learned
            the values of PPO's own policy, KL costs included.)
Command     python experiments/value_models.py --seeds 11 12 13 14 15    (after compare.py)
Result      experiments/results/value_models.json and .md
"""
import random
from functools import partial
from statistics import linear_regression, mean

import claims                                                 # first: it finds the project's root
import evaluate
import torch
from claims import read_lines

MODELS = {"GVM": "gvm", "GVM, pairs": "gvm_pairs", "ScalarRM": "reward_model", "PPO's critic": "ppo/critic"}
AGGREGATES = ("mean", "last", "p1", "p5", "p10", "p90", "p95", "p99")
PLACES = ("first", "middle", "before last", "last")
IN_FRONT = "I have a question before my trip. "
TRUTHS, COMPLETIONS = 400, 200                                # answers with a known truth; of each prefix


# ---- 1. Answers and scores ----
def pairs_of_policies(folder, rng):
    """Pairs of answers that the trained policies gave to the same held-out question, the better one first."""
    by_prompt, pairs = {}, []
    for row in read_lines(folder / "eval" / "answers.jsonl"):
        by_prompt.setdefault(row["prompt"], []).append(row)
    for prompt, rows in by_prompt.items():
        for _ in range(10):
            worse, better = sorted(rng.sample(rows, 2), key=lambda row: row["score"])
            if better["score"] > worse["score"] and better["response"] and worse["response"]:
                pairs.append({"prompt": prompt, "chosen": better["response"], "rejected": worse["response"]})
    return pairs


def accuracies(values):
    """{aggregate: pair accuracy} of the token values of [chosen, rejected, chosen, rejected, ...]."""
    q = torch.nn.utils.rnn.pad_sequence([torch.tensor(line) for line in values], batch_first=True)
    is_response = torch.arange(q.shape[1]) < torch.tensor([[len(line)] for line in values])
    return {name: ((x[0::2] - x[1::2]).sign() / 2 + 0.5).mean().item()                   # a tie: 1/2
            for name, x in evaluate.response_scores(q, is_response).items()}


# ---- 2. One seed ----
def run_seed(folder, seed, scale):
    """{model: {"pairs": {set: {aggregate: accuracy}}, "mse": {place: error}}} of one seed."""
    (_, tokenizer), rng = claims.load_policy(folder / "sft"), random.Random(0)
    own = read_lines(folder / "data" / "test_pairs.jsonl")
    sets = {"own": own, "answers of trained policies": pairs_of_policies(folder, rng),
            "words in front of the question": [row | {"prompt": IN_FRONT + row["prompt"]} for row in own]}
    train = rng.sample(read_lines(folder / "data" / "scored.jsonl"), round(scale * 1000))
    known, rewards = read_lines(folder / "data" / "test_scored.jsonl"), [row["reward"] for row in train]
    known, truths = rng.sample(known, round(scale * TRUTHS)), []
    for i, row in enumerate(known):
        said = evaluate.encode_response(tokenizer, row["response"])
        for place, count in zip(PLACES, (1, len(said) // 2, len(said) - 1, len(said))):
            truth = claims.true_value_of_program(row["policy"], row, tokenizer, said, count, COMPLETIONS)
            if truth:
                truths.append((i, place, count, *truth))

    def values(name, rows, *sides):
        """The values at the response's tokens, [[Q_1, ...], ...]; a critic's without the last token's."""
        lines = claims.token_values(folder / MODELS[name], claims.sequences(tokenizer, rows, *sides))
        return [line[1:-1] if name == "PPO's critic" else line[1:] for line in lines]

    average = mean(rewards)                                   # what a model would get that always says this
    results = {"the mean reward": {"mse": {place: mean(
        (average - truth) ** 2 - variance for _, where, _, truth, variance in truths if where == place)
        for place in PLACES}}}
    for name in MODELS:
        line = linear_regression([v[-1] for v in values(name, train)], rewards)
        said, errors = values(name, known), {}
        for i, place, count, truth, variance in truths:
            if count <= len(said[i]):
                error = line.slope * said[i][count - 1] + line.intercept - truth
                errors.setdefault(place, []).append(error ** 2 - variance)
        pairs = {which: accuracies(values(name, rows, "chosen", "rejected")) for which, rows in sets.items()}
        results[name] = {"mse": {place: mean(found) for place, found in errors.items()}, "pairs": pairs}
    return results


# ---- 3. The answer ----
def main():
    args = claims.parser(__doc__, [11, 12, 13, 14, 15], "runs/compare").parse_args()
    seeds = claims.over_seeds(run_seed, args)
    per_seed = partial(claims.per_seed, seeds)
    made = f"python experiments/value_models.py --seeds {' '.join(seeds)}"
    lines = ["# Value models: GVM, ScalarRM, PPO's critic", "",
             f"`{made}`, commit {claims.commit()}. Mean over the seeds, 95 % interval (Student's t).", "",
             "## Pair accuracy on held-out pairs (Tables 3, 4, 5 and 8 in kind)"]
    for which in per_seed("GVM", "pairs")[0]:
        lines += ["", f"### {'Atlas: as in training' if which == 'own' else f'Shifted: {which}'}", ""]
        lines += [*claims.table(f"model | {' | '.join(AGGREGATES)}", [
            [name, *(per_seed(name, "pairs", which, key) for key in AGGREGATES)] for name in MODELS])]
    critic = per_seed("PPO's critic", "pairs", "own", "mean")
    gaps = [f"{name} {claims.cell(claims.minus(per_seed(name, 'pairs', 'own', 'mean'), critic))}"
            for name in ("GVM", "GVM, pairs")]
    lines += ["", f"Minus PPO's critic, mean value, Atlas's own pairs: {'; '.join(gaps)}.", "",
              "## Mean squared error against the true Q", "",
              f"{TRUTHS} held-out answers per seed, {COMPLETIONS} completions of each. The critic is silent "
              "about the last token: it speaks before a token, and nothing follows END.", "",
              *claims.table(f"model | {' | '.join(PLACES)}", [
                  [name, *(per_seed(name, "mse", place) if place in per_seed(name, "mse")[0] else ""
                           for place in PLACES)] for name in [*MODELS, "the mean reward"]])]
    found = {"command": made, "commit": claims.commit(), "seeds": seeds}
    claims.write_result(args.output, "value_models", found, lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
