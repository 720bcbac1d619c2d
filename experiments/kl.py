"""The KL penalty (Table 10), and what a frozen value model is worth once the policy goes where it was not trained.

Hypothesis  In Table 10 beta = 0.05 leads on Arena-Hard and AlpacaEval, 0.01 on MT-Bench: 0.05 is better than 0.01
            and 0.10. Without a penalty the policy finds what the frozen GVM wrongly likes: its value goes on
            rising, the true score does not (over-optimisation). PPO, whose critic follows the policy, does the
            same to its frozen reward model.
Method      One world per seed. DVPO with beta 0, 0.01, 0.05, 0.1 and 0.3 from the same SFT model, 40 steps of 64
            rollouts; and 60 steps with beta 0, DVPO and PPO. What the method believes (GVM value of the answer;
            score of the reward model) is put on the oracle's scale by the straight line that fits the rollouts of
            the first five steps. Over-optimisation is the belief minus the oracle's score in the last ten steps.
Command     python experiments/kl.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/kl.json, .md, .png
"""
import statistics

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
from claims import cell, minus, verdict

BETAS = (0.0, 0.01, 0.05, 0.1, 0.3)
LAST = 10                                                     # the last steps, over which beliefs are averaged


# ---- 1. One seed ----
def over_optimisation(rows, belief):
    """Per step, from a run's rollouts: the oracle's mean score, and the belief on the oracle's scale."""
    steps = {}
    for row in rows:
        steps.setdefault(row["step"], []).append((row[belief], atlas.oracle(row["prompt"], row["response"])))
    first = [point for step in sorted(steps)[:5] for point in steps[step]]
    slope, offset = statistics.linear_regression(*zip(*first))
    return {"oracle": [statistics.mean(y for _, y in steps[step]) for step in sorted(steps)],
            "belief": [statistics.mean(slope * x + offset for x, _ in steps[step]) for step in sorted(steps)]}


def run_seed(folder, seed, scale):
    """{run: {"score", "nats" of KL, "length" on held-out prompts, and the curves of over_optimisation}}."""
    start, sft = claims.base(folder, seed, scale)
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    online = {"model": sft, "steps": claims.steps(scale)} | start
    runs = {f"DVPO {beta:g}": claims.train("train_dvpo", folder / ("dvpo" if beta == 0.05 else f"dvpo_kl_{beta:g}"),
                                           gvm=gvm, kl_coef=beta, **online) for beta in BETAS}
    online |= {"steps": claims.steps(scale, 60), "kl_coef": 0.0}
    runs["DVPO 0, long"] = claims.train("train_dvpo", folder / "dvpo_kl_0_long", gvm=gvm, **online)
    runs["PPO 0, long"] = claims.train("baselines.ppo", folder / "ppo_kl_0_long", reward_model=reward_model,
                                       **online)
    judged = claims.judge(folder / "kl.log", sft, runs.values(), start)
    found = {"SFT": judged[sft.name]}
    for name, output in runs.items():
        found[name] = judged[output.name] | over_optimisation(
            claims.read_lines(output / "rollouts.jsonl"), "reward" if name.startswith("PPO") else "value")
    return found


# ---- 2. The answer ----
def answer(seeds, per_seed):
    names, long = list(next(iter(seeds.values()))), ("DVPO 0, long", "PPO 0, long")

    def last(name, key):
        return [statistics.mean(curve[-LAST:]) for curve in per_seed(name, key)]

    found = {}
    for other, claim in (("0.01", "Table 10: beta 0.05 gives a better policy than 0.01"),
                         ("0.1", "Table 10: beta 0.05 gives a better policy than 0.1"),
                         ("0", "a penalty is needed: beta 0.05 gives a better policy than 0")):
        gap = minus(per_seed("DVPO 0.05", "score"), per_seed(f"DVPO {other}", "score"))
        found[claim] = verdict(gap), f"score {cell(gap)}"
    excess = {name: minus(last(name, "belief"), last(name, "oracle")) for name in names[1:]}
    more, less = excess["DVPO 0, long"], minus(excess["PPO 0, long"], excess["DVPO 0, long"])
    found["without a penalty the frozen GVM is over-optimised: it believes more than is true"] = (
        verdict(more), f"belief minus oracle {cell(more)}")
    found["PPO over-optimises its reward model more than DVPO its GVM, both without a penalty"] = (
        verdict(less), f"belief minus oracle {cell(excess['PPO 0, long'])}; PPO's minus DVPO's {cell(less)}")
    fallen = {name: minus([max(statistics.mean(curve[i:i + LAST]) for i in range(max(1, len(curve) - LAST + 1)))
                           for curve in per_seed(name, "oracle")], last(name, "oracle")) for name in long}

    best = max(names[1:-2], key=lambda name: statistics.mean(per_seed(name, "score")))
    finding = (f"Of the penalties tried, {best.split()[1]} gave the best score, {cell(per_seed(best, 'score'))}; "
               f"without any and for half as long again the true score ends "
               f"{statistics.mean(fallen['DVPO 0, long']):.3f} below the run's best ten steps, and the GVM believes "
               f"{statistics.mean(more):.3f} too much (PPO: {statistics.mean(fallen['PPO 0, long']):.3f} below, "
               f"{statistics.mean(excess['PPO 0, long']):.3f} too much).")
    tables = ["The oracle's scores of answers are exact: there is no Monte Carlo error of a truth here.", "",
              *claims.table("run | oracle score, held out | KL (nats) | length | belief minus oracle", [
                  [name, per_seed(name, "score"), cell(per_seed(name, "nats"), 2),
                   cell(per_seed(name, "length"), 1), excess.get(name, "")] for name in names])]

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, colour in (("DVPO 0, long", "tab:red"), ("DVPO 0.05", "tab:blue"), ("PPO 0, long", "tab:gray")):
        for key, words, line in (("oracle", "true", "-"), ("belief", "believed", "--")):
            curve = [statistics.mean(values) for values in zip(*per_seed(name, key))]
            left.plot([statistics.mean(curve[max(0, i - 4):i + 1]) for i in range(len(curve))], color=colour,
                      linestyle=line, label=f"{name}: {words}")
    left.set(xlabel="step (64 rollouts each)", ylabel="score of the rollouts (-1 to 1)",
             title=f"True and believed score (mean of {len(seeds)} seeds)")
    left.legend(fontsize=7)
    for name in names:
        nats = statistics.mean(per_seed(name, "nats"))
        claims.draw(right, [nats], [per_seed(name, "score")], fmt="o", label=name)
    right.set_xscale("symlog", linthresh=1)                    # SFT is at 0, and 30 is not far from 20
    right.set(xlabel="KL to the reference (nats per answer)", ylabel="oracle score, held-out questions (-1 to 1)",
              title=f"Score and KL at the end ({len(seeds)} seeds, 95 %)")
    right.legend(fontsize=7, loc="lower left")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
