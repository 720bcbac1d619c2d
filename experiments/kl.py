"""The KL penalty (Table 10), and what a frozen value model is worth where the policy has left its data.

Hypothesis  In Table 10 beta = 0.05 leads on Arena-Hard and AlpacaEval, 0.01 on MT-Bench: 0.05 is better than
            0.01 and 0.10. Without a penalty the policy finds what the frozen GVM wrongly likes: its value
            goes on rising, the true score does not (over-optimisation). PPO, whose critic follows the policy,
            does the same to its frozen reward model.
Method      One world per seed. DVPO with beta 0, 0.01, 0.05, 0.1 and 0.3 from the same SFT model, 40 steps of
            64 rollouts; and 60 steps with beta 0, DVPO and PPO. What the method believes (GVM value of the
            answer; score of the reward model) is put on the oracle's scale by the straight line that fits the
            rollouts of the first five steps. Over-optimisation is the belief minus the oracle's score in the
            last ten steps.
Command     python experiments/kl.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/kl.json, .md, .png
"""
from statistics import linear_regression, mean

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
from claims import cell, claim, minus

BETAS = (0.0, 0.01, 0.05, 0.1, 0.3)
LAST = 10                                                     # steps over which beliefs are averaged


# ---- 1. One seed ----
def over_optimisation(run, belief):
    """Per step of a run: the oracle's mean score, and the method's belief on the oracle's scale."""
    steps = claims.by_step(run, lambda row: (row[belief], claims.score(row)))
    slope, offset = linear_regression(*zip(*sum(steps[:5], [])))
    return {"oracle": [mean(y for _, y in step) for step in steps],
            "belief": [mean(slope * x + offset for x, _ in step) for step in steps]}


def run_seed(folder, seed, scale):
    """{run: {"score", "nats" of KL, "length" on held-out prompts, and the curves of over_optimisation}}."""
    sft, start, online = claims.base(folder, seed, scale)
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    runs = {}
    for beta in BETAS:
        output = folder / ("dvpo" if beta == 0.05 else f"dvpo_kl_{beta:g}")
        runs[f"DVPO {beta:g}"] = claims.train("train_dvpo", output, gvm=gvm, kl_coef=beta, **online)
    online |= {"steps": claims.steps(scale, 60), "kl_coef": 0.0}
    runs["DVPO 0, long"] = claims.train("train_dvpo", folder / "dvpo_kl_0_long", gvm=gvm, **online)
    runs["PPO 0, long"] = claims.train("baselines.ppo", folder / "ppo_kl_0_long", reward_model=reward_model,
                                       **online)
    judged = claims.judge(folder / "kl.log", sft, runs.values(), start)
    return {"SFT": judged[sft.name]} | {
        name: judged[run.name] | over_optimisation(run, "reward" if name.startswith("PPO") else "value")
        for name, run in runs.items()}


# ---- 2. The answer ----
def answer(seeds, per_seed):
    names, found = list(seeds[min(seeds)]), {}

    def last(name, key):
        return [mean(curve[-LAST:]) for curve in per_seed(name, key)]

    for other, words in (("0.01", "Table 10: beta 0.05 gives a better policy than 0.01"),
                         ("0.1", "Table 10: beta 0.05 gives a better policy than 0.1"),
                         ("0", "a penalty is needed: beta 0.05 gives a better policy than 0")):
        found[words] = claim(minus(per_seed("DVPO 0.05", "score"), per_seed(f"DVPO {other}", "score")))
    excess = {name: minus(last(name, "belief"), last(name, "oracle")) for name in names[1:]}
    dvpo, ppo = excess["DVPO 0, long"], excess["PPO 0, long"]
    found["without a penalty the frozen GVM is over-optimised: it believes more than is true"] = claim(
        dvpo, "belief minus oracle")
    found["PPO over-optimises its reward model more than DVPO its GVM, both without a penalty"] = claim(
        minus(ppo, dvpo), f"belief minus oracle {cell(ppo)}; PPO's minus DVPO's")
    fallen = {}
    for name in ("DVPO", "PPO"):
        best = [max(mean(curve[i:i + LAST]) for i in range(max(1, len(curve) - LAST + 1)))
                for curve in per_seed(f"{name} 0, long", "oracle")]
        fallen[name] = mean(minus(best, last(f"{name} 0, long", "oracle")))

    best = max(names[1:-2], key=lambda name: mean(per_seed(name, "score")))
    finding = (f"Of these penalties {best.split()[1]} gave the best score, {cell(per_seed(best, 'score'))}. "
               f"Without any, and for half as long again, the true score ends {fallen['DVPO']:.3f} below the "
               f"run's best ten steps, and the GVM believes {mean(dvpo):.3f} too much (PPO: "
               f"{fallen['PPO']:.3f} below, {mean(ppo):.3f} too much).")
    tables = claims.table("run | oracle score, held out | KL (nats) | length | belief minus oracle", [
        [name, *(per_seed(name, key) for key in ("score", "nats", "length")), excess.get(name, "")]
        for name in names])

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, colour in (("DVPO 0, long", "tab:red"), ("DVPO 0.05", "tab:blue"), ("PPO 0, long", "tab:gray")):
        for key, words, line in (("oracle", "true", "-"), ("belief", "believed", "--")):
            curve = [mean(values) for values in zip(*per_seed(name, key))]
            left.plot([mean(curve[max(0, i - 4):i + 1]) for i in range(len(curve))], color=colour,
                      linestyle=line, label=f"{name}: {words}")
    claims.label(left, f"True and believed score (mean of {len(seeds)} seeds)", "step (64 rollouts each)",
                 "score of the rollouts (-1 to 1)")
    for name in names:
        claims.draw(right, [mean(per_seed(name, "nats"))], [per_seed(name, "score")], fmt="o", label=name)
    right.set_xscale("symlog", linthresh=1)                    # SFT is at 0, and 30 is not far from 20
    claims.label(right, f"Score and KL at the end ({len(seeds)} seeds, 95 %)",
                 "KL to the reference (nats per answer)", "oracle score, held out", loc="upper left")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
