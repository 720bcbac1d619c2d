"""Which advantage, and from which GVM (Table 9, section 3.3 and Eq. (1); deviations 1, 4 and 5).

Hypothesis  A = Q - V accumulated by GAE (lambda 0.95) gives a better policy than A = Q (section 3.3), than
            other lambdas, and than the released code's formula. A GVM with td_lambda 0.95 ranks held-out
            answers better than one by Eq. (1) to the letter (0), by 0.5 or by Monte Carlo returns (1), and
            gives a better policy. Supervision by pairs is as good as by scores (Table 9 has pairs 2.6 to 5.5
            points ahead; its scores are a reward model's that learned from these pairs).
Method      One world per seed. DVPO, 40 steps of 64 rollouts from the same SFT model: five advantages from
            one GVM; and one advantage from five GVMs that differ in td_lambda or in their supervision (pairs:
            +1 for the better answer, -1 for the worse; scores: the oracle's, of half as many answers again).
            Every GVM makes two passes over its data, every policy has the same learning rate: a setting that
            only learns more slowly loses by it. Policies are judged by the oracle on held-out questions, GVMs
            by how often they give the better answer of a held-out pair the higher mean value. The best
            setting is chosen and compared on the same seeds, and no interval is widened for the number of
            comparisons: a lead that is barely decided is weak evidence.
Command     python experiments/advantage.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/advantage.json, .md, .png
"""
from statistics import mean

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
from claims import cell, claim, minus, verdict

# Setting: (run folder, flags). Other experiments use runs with the scripts' defaults, too, by these names.
ADVANTAGES = {
    "q": ("advantage_q", {"advantage": "q"}),
    "gae 0": ("advantage_gae_0", {"advantage": "gae", "gae_lambda": 0.0}),
    "gae 0.95": ("dvpo", {"advantage": "gae", "gae_lambda": 0.95}),
    "gae 1": ("advantage_gae_1", {"advantage": "gae", "gae_lambda": 1.0}),
    "released": ("advantage_released", {"advantage": "released"}),
}
GVMS = {
    "td 0": ("gvm_td_0", {"supervision": "scores", "td_lambda": 0.0}),
    "td 0.5": ("gvm_td_0.5", {"supervision": "scores", "td_lambda": 0.5}),
    "td 0.95": ("gvm", {"supervision": "scores", "td_lambda": 0.95}),
    "td 1": ("gvm_td_1", {"supervision": "scores", "td_lambda": 1.0}),
    "pairs": ("gvm_pairs", {"supervision": "pairs"}),
}
USED, SCORES = "gae 0.95", "td 0.95"                          # the scripts' defaults: what claims are about


# ---- 1. One seed ----
def run_seed(folder, seed, scale):
    """{"SFT", "advantages", "GVMs": {setting: {"score", "gain", "length", "nats"; of GVMs "accuracy"}}}."""
    sft, start, online = claims.base(folder, seed, scale)
    gvms = {name: claims.train_gvm(folder / run, sft, start, **flags) for name, (run, flags) in GVMS.items()}
    policies = {name: claims.train("train_dvpo", folder / run, gvm=gvms[SCORES], **online, **flags)
                for name, (run, flags) in ADVANTAGES.items()}
    policies |= {name: claims.train("train_dvpo", folder / f"advantage_on_{gvm.name}", gvm=gvm, **online)
                 for name, gvm in gvms.items() if name != SCORES}
    policies[SCORES] = policies[USED]
    judged = claims.judge(folder / "advantage.log", sft, policies.values(), start)
    found = {name: judged[output.name] | {"gain": judged[output.name]["score"] - judged[sft.name]["score"]}
             for name, output in policies.items()}
    for name, gvm in gvms.items():
        accuracy = claims.pair_accuracy(gvm)
        found[name] |= {"accuracy": accuracy["mean"], "accuracy, last value": accuracy["last"]}
    return {"SFT": judged[sft.name], "advantages": {name: found[name] for name in ADVANTAGES},
            "GVMs": {name: found[name] for name in GVMS}}


# ---- 2. The answer ----
def support(values, default):
    """In words: the setting with the best mean, and those that the seeds cannot tell from it."""
    best = max(values, key=lambda name: mean(values[name]))
    equal = [name for name in values
             if name != best and verdict(minus(values[best], values[name])) != "confirmed"]
    names = {name: f"{name} (the default)" if name == default else name for name in values}
    rest = (f"not distinguishable from {', '.join(names[name] for name in equal)}" if equal else
            "ahead of every other by the paired interval")
    behind = "" if default in (best, *equal) else f": the default, {default}, is behind"
    return f"{names[best]} has the best mean, {cell(values[best])}, {rest}{behind}"


def answer(seeds, per_seed):
    def gap(group, better, worse, key="score"):
        return minus(per_seed(group, better, key), per_seed(group, worse, key))

    found, accuracy = {}, ("accuracy", "accuracy, last value")
    for other in ADVANTAGES:
        if other != USED:
            ahead = gap("advantages", USED, other)
            found[f"advantage {USED} gives a better policy than {other}"] = claim(ahead)
    for other in ("td 0", "td 0.5", "td 1"):
        name = f"{other} (Eq. (1) to the letter)" if other == "td 0" else other
        found[f"a GVM by {SCORES} gives a better policy than by {name}"] = claim(gap("GVMs", SCORES, other))
        ahead, last = (gap("GVMs", SCORES, other, key) for key in accuracy)
        found[f"a GVM by {SCORES} ranks held-out pairs better than by {name}"] = (
            verdict(ahead), f"pair accuracy {cell(ahead)}; by the last value {cell(last)}")
    words = {"confirmed": "pairs better", "not confirmed: the reverse": "scores better"}
    ahead, last, policy = (gap("GVMs", "pairs", SCORES, key) for key in (*accuracy, "score"))
    found["Table 9: pairs or scores, which GVM ranks held-out pairs better?"] = (
        words.get(verdict(ahead), "not decided"),
        f"pairs minus scores: pair accuracy {cell(ahead)}; by the last value {cell(last)}")
    found["Table 9: pairs or scores, which GVM gives the better policy?"] = (
        words.get(verdict(policy), "not decided"), f"pairs minus scores: score {cell(policy)}")

    settings = {"advantages": ADVANTAGES, "GVMs": GVMS}
    defaults = {"advantages": USED, "GVMs": SCORES}
    scores = {group: {name: per_seed(group, name, "score") for name in settings[group]} for group in settings}
    by = {group: support(scores[group], defaults[group]) for group in settings}
    ranked = support({name: per_seed("GVMs", name, "accuracy") for name in GVMS}, defaults["GVMs"])
    finding = (f"By the policy's score: of the advantages, {by['advantages']}; of the GVMs, {by['GVMs']}; "
               f"by the GVM's own pair accuracy, {ranked}.")
    sft = [["(SFT)", per_seed("SFT", "score"), "", per_seed("SFT", "length"), per_seed("SFT", "nats")]]
    tables = claims.table("setting | oracle score, held out | gain over SFT | length | KL (nats)", sft + [
        [f"{group.removesuffix('s')} {name}" + (", the default" if name == defaults[group] else ""),
         *(per_seed(group, name, key) for key in ("score", "gain", "length", "nats"))]
        for group in settings for name in settings[group]])
    tables += ["", *claims.table("GVM | held-out pair accuracy, mean value | last value", [
        [name, *(per_seed("GVMs", name, key) for key in accuracy)] for name in GVMS])]

    picture, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, group, title, x in ((panels[0], "advantages", "Advantages, from one GVM", "advantage, lambda"),
                                   (panels[1], "GVMs", "GVMs, default advantage", "td_lambda, or pairs")):
        claims.draw(panel, range(len(scores[group])), scores[group].values(), fmt="o", label="mean, 95 %")
        for i, values in enumerate(scores[group].values()):
            panel.plot([i + 0.15] * len(values), values, ".", color="tab:orange")
        panel.axhline(mean(per_seed("SFT", "score")), color="black", linestyle=":", label="SFT (mean)")
        panel.set_xticks(range(len(scores[group])), scores[group])
        claims.label(panel, f"{title} ({len(seeds)} seeds: dots)", x, "oracle score, held-out questions")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
