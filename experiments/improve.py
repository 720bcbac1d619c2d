"""Two improvements that the evidence points to, with no more labels; and where DPO's lead comes from.

Hypothesis  A frozen GVM errs most on the policy's own answers (shift.py). So the same number of labels is
            worth more if some are of the start policy's own answers. And a frozen GVM is believed for too
            long (kl.py): a larger KL coefficient, or a stop where three GVMs no longer agree that answers get
            better, keeps what was gained. DPO leads in compare.py because its pairs hold better answers than
            the policy's own: supervised learning of the chosen ones gets there, too, and DPO of pairs of the
            policy's own answers leads no more.
Method      A world per seed. Labels are preferences, the same for all: "data" is its pairs; in "own" a third
            of them are replaced with pairs of the SFT model's own answers to the same prompts, which the
            oracle labels; in both, answers of equal score make no pair. From each: a GVM (--supervision
            pairs) for DVPO, a reward model for PPO; steps, rollouts and settings as compare.py chose them in
            other worlds, with the KL coefficient that it chose ("KL 1") or six times as large. Two more GVMs
            of the data's pairs, in other orders. DPO with compare.py's settings from "data" and from "own
            only", as many pairs, none of the data's answers; sft.py goes on from the SFT model with the
            data's chosen answers (its defaults, the passes of DPO).
            Stops: after the five steps whose rollouts have the highest mean last value: by the GVM that
            guides, or by the mean of three GVMs minus their standard deviation. The true score of the five
            steps after them (luck has a part in choosing the five) is compared with that of the last five.
Command     python experiments/improve.py --seeds 21 22 23 24 25
Result      experiments/results/improve.json, .md, .png
"""
import json
import random
from itertools import combinations
from statistics import mean, pstdev

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
import torch
from claims import claim, minus

KL, WIDTH = (1, 6), 5                                         # KL: times the coefficient of compare.py
NAMES = [f"{method}, {labels}, KL {kl}"
         for method in ("DVPO", "PPO") for labels in ("data", "own") for kl in KL]
OTHERS = ["DPO, data", "DPO, own only", "SFT of the chosen answers"]
COMPARED = json.loads((claims.ROOT / "experiments" / "results" / "compare.json").read_text())


# ---- 1. One seed ----
def own_pairs(sft, pairs, seed):
    """As many pairs of the policy's own answers, eight to each of the prompts of these pairs; drawn at random
    from all that differ in score, as those are."""
    torch.manual_seed(seed)
    policy, tokenizer = claims.load_policy(sft)
    prompts, found = sorted({row["prompt"] for row in pairs}), []
    said = [claims.text(tokenizer, y) for _, y in claims.answers(policy, tokenizer, prompts * 8)]
    for i, prompt in enumerate(prompts):
        scored = sorted({(claims.score({"prompt": prompt, "response": text}), text)
                         for text in said[i::len(prompts)] if text})
        found += [{"prompt": prompt, "chosen": good, "rejected": bad, "policy_chosen": "sft",
                   "policy_rejected": "sft"}
                  for (low, bad), (high, good) in combinations(scored, 2) if low < high]
    return random.Random(seed).sample(found, min(len(found), len(pairs)))


def signals(run, gvms):
    """Two lists over steps: the first GVM's mean last value of the rollouts; mean - deviation of all GVMs."""
    _, tokenizer = claims.load_policy(run)
    sequences = claims.sequences(tokenizer, claims.read_lines(run / "rollouts.jsonl"))
    last = zip(*([line[-1] for line in claims.token_values(gvm, sequences)] for gvm in gvms))
    steps = claims.by_step(run, lambda row: next(last))
    return ([mean(values[0] for values in step) for step in steps],
            [mean(mean(values) - pstdev(values) for values in step) for step in steps])


def stop(curve, signal):
    """(last of the WIDTH steps whose mean signal is highest, true score of the WIDTH steps after them)."""
    first = min(WIDTH, len(curve) - 1)
    ends = range(first, max(first, len(curve) - WIDTH) + 1)
    end = max(ends, key=lambda end: mean(signal[max(0, end - WIDTH):end]))
    return end, mean(curve[end:end + WIDTH])


def run_seed(folder, seed, scale):
    """{arm: {"score", "nats", "length" on held-out prompts, "curve", for DVPO of the data "stops"}}."""
    sft, start, online = claims.base(folder, seed, scale, COMPARED["steps"])
    online |= {"batch_size": 40, "mini_batch_size": 20, "micro_batch_size": 10}   # as in compare.py
    pairs = claims.read_lines(start["data"] / "pairs.jsonl")
    third = len(pairs) // 3
    data = {"data": start["data"], "own": folder / "improve_own"}
    own, only = own_pairs(sft, pairs[:third], seed), own_pairs(sft, pairs, seed)
    claims.write_lines(data["own"] / "pairs.jsonl", pairs[len(own):] + own)
    claims.write_lines(folder / "improve_only" / "pairs.jsonl", only)
    claims.write_lines(folder / "improve_only" / "sft.jsonl", [
        {"prompt": row["prompt"], "response": row["chosen"]} for row in pairs])
    for name in ("rl", "test_pairs", "test_scored", "test_prompts"):
        claims.write_lines(data["own"] / f"{name}.jsonl", claims.read_lines(start["data"] / f"{name}.jsonl"))
    runs, found, guides = {}, {}, {}
    for labels, pairs_of in data.items():
        flags = start | {"data": pairs_of}
        which = "" if labels == "data" else "_own"
        guides[labels] = claims.train_gvm(folder / f"gvm_pairs{which}", sft, flags, supervision="pairs")
        reward_model = claims.train_reward_model(folder / f"reward_model{which}_4", sft, flags, epochs=4)
        for kl in KL:
            for method, script, arm, judge in (
                    ("DVPO", "train_dvpo", "DVPO, pairs", {"gvm": guides[labels]}),
                    ("PPO", "baselines.ppo", "PPO", {"reward_model": reward_model})):
                name, chosen = f"{method}, {labels}, KL {kl}", COMPARED["chosen"][arm]
                runs[name] = claims.train(script, folder / f"improve_{claims.file_name(name)}",
                                          **online | chosen | {"kl_coef": kl * chosen["kl_coef"]} | judge)
    others, dpo = start | {"model": sft, "data": folder / "improve_only"}, COMPARED["chosen"]["DPO"]
    for name, script, flags in zip(OTHERS, ("baselines.dpo", "baselines.dpo", "sft"), (
            dpo | {"data": start["data"]}, dpo, {"epochs": dpo["epochs"]})):
        runs[name] = claims.train(script, folder / f"improve_{claims.file_name(name)}", **others | flags)
    gvms = [guides["data"]] + [claims.train_gvm(folder / f"improve_gvm_{n}", sft, start | {"seed": seed + n},
                                                supervision="pairs") for n in (1000, 2000)]
    judged = claims.judge(folder / "improve.log", sft, runs.values(), start)
    for name, run in runs.items():
        if name in OTHERS:
            found[name] = judged[run.name]
            continue
        curve = [mean(x) for x in claims.by_step(run, claims.score)]
        found[name] = judged[run.name] | {"curve": curve, "last": mean(curve[-WIDTH:])}
        if name == "DVPO, data, KL 1":
            found[name]["stops"] = [stop(curve, signal) for signal in signals(run, gvms)]
    chosen, said = ([claims.score({"prompt": row["prompt"], "response": row["chosen"]}) for row in rows]
                    for rows in (pairs, only))
    return found | {"SFT": judged[sft.name], "own pairs": len(own) / third,
                    "own only": len(only) / len(pairs), "chosen": mean(chosen), "own chosen": mean(said)}


# ---- 2. The answer ----
def answer(seeds, per_seed):
    def more(better, worse):
        return minus(per_seed(better, "score"), per_seed(worse, "score"))

    found = {}
    for better, worse, words in (
            ("DVPO, own, KL 1", "DVPO, data, KL 1", "DVPO: labels of the start's own answers are worth more"),
            ("PPO, own, KL 1", "PPO, data, KL 1", "PPO: labels of the start's own answers are worth more"),
            ("DVPO, data, KL 1", "PPO, data, KL 1", "DVPO is better than PPO of the same labels, data"),
            ("DVPO, own, KL 1", "PPO, own, KL 1", "DVPO is better than PPO of the same labels, own"),
            ("DVPO, own, KL 6", "PPO, own, KL 6", "DVPO is better than PPO of the same labels, own, KL 6"),
            ("DVPO, data, KL 6", "DVPO, data, KL 1", "DVPO: six times the KL coefficient is better, data"),
            ("DVPO, own, KL 6", "DVPO, own, KL 1", "DVPO: six times the KL coefficient is better, own"),
            ("DPO, data", "DPO, own only", "DPO: the data's pairs are worth more than the policy's own"),
            ("DPO, own only", "PPO, data, KL 1", "DPO of the policy's own pairs is better than PPO"),
            ("DPO, data", OTHERS[2], "DPO is better than supervised learning of the chosen answers"),
            (OTHERS[2], "PPO, data, KL 1", "Supervised learning of the chosen answers is better than PPO")):
        found[words] = claim(more(better, worse))
    stops, guided = [], "DVPO, data, KL 1"
    for i, words in enumerate(("the GVM's own value", "three GVMs, mean - deviation")):
        steps, scores = zip(*(x[i] for x in per_seed(guided, "stops")))
        found[f"stopped by {words}, DVPO is better than at the end"] = claim(
            minus(scores, per_seed(guided, "last")), "rollouts' score")
        stops.append([words, list(steps), list(scores)])
    tables = claims.table("arm, labels, KL coefficient | oracle score, held out | KL (nats) | length", [
        [name, *(per_seed(name, key) for key in ("score", "nats", "length"))]
        for name in ["SFT", *NAMES, *OTHERS]])
    tables += ["", f"Stops of {guided}; the last steps' rollouts score "
               f"{claims.cell(per_seed(guided, 'last'))}.", "",
               *claims.table("stop by | last step | rollouts' score", stops), "",
               f"Own pairs found, as a share of those asked for: {claims.cell(per_seed('own pairs'), 2)}; "
               f"own only: {claims.cell(per_seed('own only'), 2)}. Scores of chosen answers: the data's "
               f"{claims.cell(per_seed('chosen'))}, the policy's own {claims.cell(per_seed('own chosen'))}."]
    finding = ("A third of the labels on the start's own answers changes DVPO's score by "
               f"{claims.cell(more('DVPO, own, KL 1', 'DVPO, data, KL 1'))}, PPO's by "
               f"{claims.cell(more('PPO, own, KL 1', 'PPO, data, KL 1'))}.")
    picture, panel = plt.subplots(figsize=(6, 4))
    for i, name in enumerate(NAMES + OTHERS):
        claims.draw(panel, [mean(per_seed(name, "nats"))], [per_seed(name, "score")], fmt="os*"[i // 4],
                    label=name)
    claims.label(panel, f"Score and KL at the end ({len(seeds)} seeds, 95 %)", "KL (nats per answer)",
                 "oracle score, held out", loc="center left", bbox_to_anchor=(1, 0.5))
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
