"""Which advantage, and from which GVM (Table 9, section 3.3 and Eq. (1); deviations 1, 4 and 5).

Hypothesis  A = Q - V accumulated by GAE (lambda 0.95) gives a better policy than A = Q (section 3.3), than GAE with
            other lambdas, and than the released code's formula. A GVM trained with td_lambda 0.95 ranks held-out
            answers better than one by Eq. (1) to the letter (0), by 0.5 or by Monte Carlo returns (1), and gives a
            better policy. Supervision by pairs is as good as by scores (Table 9 has pairs 2.6 to 5.5 points ahead; its
            scores are a reward model's that learned from these pairs).
Method      One world per seed. DVPO, 40 steps of 64 rollouts from the same SFT model: five ways to form the advantage
            from one GVM; and one way with five GVMs, that differ in td_lambda or in their supervision (pairs: +1 for
            the better answer, -1 for the worse one; scores: the oracle's, and of half as many answers again). Every GVM
            makes two passes over its data and every policy has the same learning rate: a setting that only learns more
            slowly loses by it. Judged by the oracle on held-out questions; the GVMs by how often they give the better
            answer of a held-out pair the higher mean value. All differences are within seeds. The best setting is
            chosen and compared on the same seeds, and no interval is widened for the number of comparisons: a lead
            that is barely decided is weak evidence.
Command     python experiments/advantage.py --seeds 21 22 23 24 25        (part of make claims)
Result      results/advantage.json, results/advantage.md, results/advantage.png
"""
import statistics
import time

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
import train_dvpo
import train_gvm
from claims import cell, interval, verdict

# Setting: (run folder, what differs from the defaults of the script, or spells them out). The settings that are the
# defaults have the names of the runs that other experiments use, too.
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
USED, SCORES = "gae 0.95", "td 0.95"                          # the settings that the claims are about: one run for both


# ---- 1. One seed ----
def last_accuracy(gvm):
    """Held-out pair accuracy at the end of a GVM's training, by the answer's mean value and by its last."""
    measured = [row["pair_accuracy"] for row in claims.read_lines(gvm / "metrics.jsonl") if "pair_accuracy" in row][-1]
    return {"accuracy": measured["mean"], "accuracy, last value": measured["last"]}


def run_seed(folder, seed, scale):
    """{"SFT", "advantages", "GVMs": {setting: {"score", "gain", "length", "nats"}}}; of the GVMs the accuracy, too."""
    start, sft = claims.base(folder, seed, scale)
    online = {"model": sft, "steps": claims.steps(scale)} | start
    gvms = {name: claims.train_gvm(folder / run, sft, start, **flags) for name, (run, flags) in GVMS.items()}
    policies = {name: claims.train("train_dvpo", folder / run, gvm=gvms[SCORES], **online, **flags)
                for name, (run, flags) in ADVANTAGES.items()}
    policies |= {name: claims.train("train_dvpo", folder / f"advantage_on_{gvm.name}", gvm=gvm, **online)
                 for name, gvm in gvms.items() if name != SCORES}
    policies[SCORES] = policies[USED]
    judged = claims.judge(folder / "advantage.log", sft, dict.fromkeys(policies.values()), start)
    before = judged[sft.name]
    found = {name: judged[output.name] | {"gain": judged[output.name]["score"] - before["score"]}
             for name, output in policies.items()}
    return {"SFT": before, "advantages": {name: found[name] for name in ADVANTAGES},
            "GVMs": {name: found[name] | last_accuracy(gvms[name]) for name in GVMS}}


# ---- 2. The answer ----
def default_of(settings, defaults):
    """The name of the setting that the script has by default; None if it has none of them."""
    same = [name for name, (_, flags) in settings.items()
            if all(getattr(defaults, flag) == value for flag, value in flags.items())]
    return same[0] if same else None


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def support(values, default):
    """In words: the setting with the best mean, those that the seeds cannot tell from it; is the default of these?"""
    best = max(values, key=lambda name: statistics.mean(values[name]))
    equal = [name for name in values if name != best and verdict(minus(values[best], values[name])) != "confirmed"]
    names = {name: f"{name} (the default)" if name == default else name for name in values}
    sentence = f"{names[best]} has the best mean, {cell(values[best])}, "
    if equal:
        sentence += f"not distinguishable from {', '.join(names[name] for name in equal)}"
    else:
        sentence += "ahead of every other by the paired interval"
    if default in (best, *equal):
        return sentence
    return f"{sentence}: the default, {default}, is behind" if default else f"{sentence}: none of them is the default"


def compare_supervision(gap):
    return {"confirmed": "pairs better", "not confirmed: the reverse": "scores better"}.get(verdict(gap), "not decided")


def main():
    args, started = claims.parse(__doc__), time.time()
    seeds = claims.over_seeds(run_seed, args)

    def per_seed(group, name, key):
        return [seed[group][name][key] for seed in seeds.values()]

    found = {}
    for other in ADVANTAGES:
        if other != USED:
            gap = minus(per_seed("advantages", USED, "score"), per_seed("advantages", other, "score"))
            found[f"advantage {USED} gives a better policy than {other}"] = verdict(gap), f"score {cell(gap)}"
    for other in ("td 0", "td 0.5", "td 1"):
        name = f"{other} (Eq. (1) to the letter)" if other == "td 0" else other
        gap = minus(per_seed("GVMs", SCORES, "score"), per_seed("GVMs", other, "score"))
        found[f"a GVM by {SCORES} gives a better policy than by {name}"] = verdict(gap), f"score {cell(gap)}"
        gap, last = (minus(per_seed("GVMs", SCORES, key), per_seed("GVMs", other, key))
                     for key in ("accuracy", "accuracy, last value"))
        found[f"a GVM by {SCORES} ranks held-out pairs better than by {name}"] = (
            verdict(gap), f"pair accuracy {cell(gap)}; by the last value {cell(last)}")
    gap, last, policy = (minus(per_seed("GVMs", "pairs", key), per_seed("GVMs", SCORES, key))
                         for key in ("accuracy", "accuracy, last value", "score"))
    found["Table 9: pairs or scores, which GVM ranks held-out pairs better?"] = (
        compare_supervision(gap), f"pairs minus scores: pair accuracy {cell(gap)}; by the last value {cell(last)}")
    found["Table 9: pairs or scores, which GVM gives the better policy?"] = (
        compare_supervision(policy), f"pairs minus scores: score {cell(policy)}")

    defaults = {"advantages": default_of(ADVANTAGES, train_dvpo.Args()), "GVMs": default_of(GVMS, train_gvm.Args())}
    scores = {group: {name: per_seed(group, name, "score") for name in settings}
              for group, settings in (("advantages", ADVANTAGES), ("GVMs", GVMS))}
    finding = (f"By the policy's score: of the advantages, {support(scores['advantages'], defaults['advantages'])}; of "
               f"the GVMs, {support(scores['GVMs'], defaults['GVMs'])}; by the GVM's own pair accuracy, "
               f"{support({name: per_seed('GVMs', name, 'accuracy') for name in GVMS}, defaults['GVMs'])}.")
    tables = ["| setting | oracle score, held out | gain over SFT | length | KL (nats) |", "|---" * 5 + "|"]
    sft = {key: [seed["SFT"][key] for seed in seeds.values()] for key in ("score", "length", "nats")}
    tables.append(f"| (SFT) | {cell(sft['score'])} | | {cell(sft['length'], 1)} | {cell(sft['nats'], 2)} |")
    for group in scores:
        for name in scores[group]:
            title = f"{group.removesuffix('s')} {name}" + (", the default" if name == defaults[group] else "")
            tables.append(f"| {title} | {cell(scores[group][name])} | {cell(per_seed(group, name, 'gain'))} | "
                          f"{cell(per_seed(group, name, 'length'), 1)} | {cell(per_seed(group, name, 'nats'), 2)} |")
    tables += ["", "| GVM | held-out pair accuracy, mean value | last value |", "|---|---|---|"]
    tables += [f"| {name} | {cell(per_seed('GVMs', name, 'accuracy'))} | "
               f"{cell(per_seed('GVMs', name, 'accuracy, last value'))} |" for name in GVMS]

    picture, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, group, title in zip(panels, scores, ("Advantages, from one GVM", "GVMs, with the default advantage")):
        for i, (name, values) in enumerate(scores[group].items()):
            mean, low, high = interval(values)
            colour = "tab:blue" if name == defaults[group] else "tab:gray"
            panel.errorbar(i, mean, [[mean - low], [high - mean]], fmt="o", color=colour, capsize=4, zorder=3,
                           label="mean, 95 % (default: blue)" if name == defaults[group] else None)
            panel.plot([i + 0.15] * len(values), values, ".", color="tab:orange", label=None if i else "a seed each")
        panel.axhline(statistics.mean(sft["score"]), color="black", linestyle=":", label="SFT (mean)")
        panel.set_xticks(range(len(scores[group])), scores[group])
        panel.set(xlabel="advantage (and lambda)" if group == "advantages" else "td_lambda of the GVM, or pairs",
                  title=f"{title} ({len(seeds)} seeds)")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("oracle score, held-out questions (-1 to 1)")
    claims.report("advantage", args, __doc__, seeds, found, tables, finding, picture)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
