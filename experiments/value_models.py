"""Who knows best which answer is better: the GVM, the scalar reward model, or PPO's critic?

Hypothesis  The GVM ranks answers as well as the reward model trained on the same data (Table 3), and better than PPO's
            critic (Table 4: +7 points), also answers and questions unlike those of training (Table 5). Its token values
            are nearer to the true Q than the critic's, which learns from a reward model and few rollouts.
Method      The models of experiments/compare.py: GVM of scores, GVM of pairs (+1/-1), reward model, and the critic that
            PPO ends with, started from that reward model. Three sets of held-out pairs: Atlas's own; the trained
            policies' answers to the same questions (a shift of the answers); Atlas's own with words in front of every
            question (a shift of the questions). An answer's score is an aggregate of its token values. The critic says
            V(s_t), the value before a token: its tokens end one before EOS, whose state it never saw.
            Against the true Q of the behaviour policy that wrote the answer (atlas.true_value): mean squared error at
            the first, middle and last token. Reward model and critic have no scale of their own, so every model's
            values are first mapped by the straight line that best predicts the rewards of 1,000 training answers from
            the last token's values. What the Monte Carlo error of the truth adds is taken off. (The critic learned the
            values of PPO's own policy, KL costs included: its error here says how far those are from the truth about
            the data, not how well it learned.)
Command     python experiments/value_models.py --seeds 11 12 13 14 15      (after compare.py; five minutes on two cores)
Result      results/value_models.json and results/value_models.md
"""
import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import atlas  # noqa: E402
import evaluate  # noqa: E402

MODELS = {   # name: (folder in the seed's folder, class)
    "GVM": ("gvm", AutoModelForTokenClassification),
    "GVM, pairs": ("gvm_pairs", AutoModelForTokenClassification),
    "ScalarRM": ("reward_model", AutoModelForSequenceClassification),
    "PPO's critic": ("ppo/critic", AutoModelForTokenClassification),
}
AGGREGATES = ("mean", "last", "p1", "p5", "p10", "p90", "p95", "p99")
IN_FRONT = "I have a question before my trip. "
TRUTHS, COMPLETIONS = 400, 200                                # answers with a known truth, and completions for each
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_of_policies(folder, rng):
    """Pairs of answers that the trained policies gave to the same held-out question, the better one first."""
    by_prompt = {}
    for row in read_lines(folder / "eval" / "answers.jsonl"):
        by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = []
    for prompt, rows in by_prompt.items():
        for a, b in (rng.sample(rows, 2) for _ in range(10)):
            if a["score"] != b["score"] and a["response"] and b["response"]:
                better, worse = (a, b) if a["score"] > b["score"] else (b, a)
                pairs.append({"prompt": prompt, "chosen": better["response"], "rejected": worse["response"]})
    return pairs


@torch.no_grad()
def token_values(model, sequences, pad_id, is_critic):
    """[(values of the response's tokens), ...] of (prompt ids, response ids); a critic's without the last token's."""
    head, values = evaluate.value_head(model), [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda row: sum(map(len, sequences[row])))
    for start in range(0, len(order), 64):
        rows = order[start:start + 64]
        ids, is_token, is_response = evaluate.collate([sequences[row] for row in rows], pad_id, "cpu")
        q = head(model.base_model(input_ids=ids, attention_mask=is_token).last_hidden_state).squeeze(-1)
        if is_critic:
            is_response = is_response & ~evaluate.last_token(is_response)
        for row, line, mask in zip(rows, q, is_response):
            values[row] = line[mask].tolist()
    return values


def accuracies(values):
    """{aggregate: pair accuracy} of the token values of [chosen, rejected, chosen, rejected, ...]."""
    width = max(map(len, values))
    q = torch.tensor([line + [0.0] * (width - len(line)) for line in values])
    mask = torch.tensor([[True] * len(line) + [False] * (width - len(line)) for line in values])
    return {name: evaluate.wins(score[0::2], score[1::2]).mean().item()
            for name, score in evaluate.response_scores(q, mask).items()}


def true_values(rows, tokenizer):
    """For each row {place: (response tokens read, true Q, squared standard error)}, of the policy that wrote it."""
    truths = []
    for row in rows:
        ids = evaluate.encode_response(tokenizer, row["response"])
        places = {"first": 1, "middle": len(ids) // 2, "before last": len(ids) - 1, "last": len(ids)}
        found = {}
        for place, count in places.items():
            prefix = tokenizer.decode(ids[:count]).removesuffix(tokenizer.eos_token)
            if not row["response"].startswith(prefix):             # half a character
                continue
            prefix += atlas.END if count == len(ids) else ""
            mean, error = atlas.true_value(row["policy"], row["prompt"], prefix, n=COMPLETIONS)
            found[place] = count, mean, error ** 2
        truths.append(found)
    return truths


def run_seed(folder):
    """Everything of one seed: {model: {"pairs": {set: {aggregate: accuracy}}, "mse": {place: error}}}."""
    tokenizer, rng = AutoTokenizer.from_pretrained(folder / "sft"), random.Random(0)
    own = read_lines(folder / "data" / "test_pairs.jsonl")
    sets = {"own": own, "answers of trained policies": pairs_of_policies(folder, rng),
            "words in front of the question": [row | {"prompt": IN_FRONT + row["prompt"]} for row in own]}
    train = random.Random(0).sample(read_lines(folder / "data" / "scored.jsonl"), 1000)
    known = random.Random(0).sample(read_lines(folder / "data" / "test_scored.jsonl"), TRUTHS)
    truths = true_values(known, tokenizer)

    def sequence(prompt, response):
        return evaluate.encode_prompt(tokenizer, prompt), evaluate.encode_response(tokenizer, response)

    results = {}
    for name, (model_folder, auto_class) in MODELS.items():
        model, critic = auto_class.from_pretrained(folder / model_folder).eval(), name == "PPO's critic"

        def values(sequences):
            return token_values(model, sequences, tokenizer.pad_token_id, critic)

        results[name] = {"pairs": {which: accuracies(values([sequence(row["prompt"], row[side]) for row in rows
                                                             for side in ("chosen", "rejected")]))
                                   for which, rows in sets.items()}}
        last = torch.tensor([v[-1] for v in values([sequence(row["prompt"], row["response"]) for row in train])])
        reward = torch.tensor([row["reward"] for row in train])
        slope = ((last - last.mean()) * (reward - reward.mean())).mean() / last.var(correction=0)
        offset = reward.mean() - slope * last.mean()
        errors = {}
        for line, found in zip(values([sequence(row["prompt"], row["response"]) for row in known]), truths):
            for place, (count, truth, variance) in found.items():
                if count <= len(line):
                    error = (slope.item() * line[count - 1] + offset.item() - truth) ** 2 - variance
                    errors.setdefault(place, []).append(error)
        results[name]["mse"] = {place: statistics.mean(found) for place, found in errors.items()}
    # What a model would get that always says the mean reward.
    mean = statistics.mean(row["reward"] for row in train)
    results["the mean reward"] = {"mse": {
        place: statistics.mean((mean - t[place][1]) ** 2 - t[place][2] for t in truths if place in t)
        for place in ("first", "middle", "before last", "last")}}
    return results


def cell(values, digits=3):
    """Mean and 95 % interval over the seeds."""
    mean = statistics.mean(values)
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--runs", default="runs/compare", help="the runs of experiments/compare.py")
    parser.add_argument("--output", default=str(ROOT / "results"), help="folder for value_models.json and .md")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds) or not (len(args.seeds) == 1 or len(args.seeds) in T_95):
        raise SystemExit("error: --seeds must be 1 to 10 different numbers")
    started, seeds = time.time(), {}
    for seed in args.seeds:
        folder = Path(args.runs) / f"seed{seed}"
        if not (folder / "eval" / "answers.jsonl").exists():
            raise SystemExit(f"error: {folder}: not finished. Run experiments/compare.py first (make compare)")
        seeds[str(seed)] = run_seed(folder)
        print(f"seed {seed}: {time.time() - started:.0f} s", flush=True)
    gaps = {name: [seed[name]["pairs"]["own"]["mean"] - seed["PPO's critic"]["pairs"]["own"]["mean"]
                   for seed in seeds.values()] for name in ("GVM", "GVM, pairs")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    made = f"python experiments/value_models.py --seeds {' '.join(map(str, args.seeds))}"
    lines = ["# Value models: GVM, ScalarRM, PPO's critic", "",
             f"`{made}`, commit {commit.strip()}, {platform.machine()}, two cores. Mean over the seeds "
             f"{', '.join(seeds)} ± half the 95 % interval (Student's t over seeds).", "",
             "## Pair accuracy on held-out pairs (Tables 3, 4, 5 and 8 in kind)"]
    for which in seeds[str(args.seeds[0])]["GVM"]["pairs"]:
        lines += ["", f"### {'Atlas: the distribution of training' if which == 'own' else f'Shifted: {which}'}", "",
                  f"| model | {' | '.join(AGGREGATES)} |", "|---" * (len(AGGREGATES) + 1) + "|"]
        for name in MODELS:
            cells = [cell([seed[name]["pairs"][which][aggregate] for seed in seeds.values()])
                     for aggregate in AGGREGATES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    gaps = "; ".join(f"{name} {', '.join(f'{gap:+.3f}' for gap in found)}" for name, found in gaps.items())
    lines += ["", f"GVM minus PPO's critic, mean value, Atlas's own pairs, seed by seed: {gaps}.", "",
              "## Mean squared error against the true Q", "",
              f"{TRUTHS} held-out answers per seed; truth by {COMPLETIONS} completions, its Monte Carlo error taken "
              "off. Every model's values mapped to rewards by one straight line (see the script). The critic has no "
              "value for the last token: it speaks before a token, and nothing follows EOS.", "",
              "| model | first token | middle token | before the last | last token (EOS) |", "|---|---|---|---|---|"]
    for name in [*MODELS, "the mean reward"]:
        errors = [seed[name]["mse"] for seed in seeds.values()]
        cells = [cell([error[place] for error in errors]) if place in errors[0] else ""
                 for place in ("first", "middle", "before last", "last")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "value_models.json").write_text(json.dumps({"command": made, "commit": commit.strip(), "seeds": seeds},
                                                         indent=1) + "\n")
    (output / "value_models.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
