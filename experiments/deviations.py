"""What our departures from the paper cost or gain (docs/deviations.md), and does the value model do the work?

Hypothesis  (1) The policy improves because the GVM guides it: with shuffled training rewards the gain vanishes.
            (2) What we do where the paper says otherwise, or nothing, is at least as good as the other way.
Method      One world per seed. DVPO, 40 steps of 64 rollouts, from the same SFT model, in which one thing differs from
            the defaults; a GVM, two passes over its data, in which one thing differs, and DVPO with it. Where a script
            has no setting for it, another function stands in for the script's own. Judged by the oracle on held-out
            questions; a GVM by how often it gives the better answer of a held-out pair the higher mean value.
            Deviation 10 is measured where it matters: answers cut after 16 tokens (SFT's have 21 on average), judged
            with room for 64. Differences are within seeds. Many comparisons: an interval that barely leaves out 0 is
            weak evidence.
Command     python experiments/deviations.py --seeds 21 22 23 24 25
Result      results/deviations.json, results/deviations.md, results/deviations.png
"""
import random
import statistics
import time
from contextlib import nullcontext
from unittest import mock

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
import torch
import train_dvpo
import train_gvm
from claims import cell, interval, verdict


def q_with_kl_sum(q, reward_kl, is_response):
    """A_t = Q_t + the sum of this and all later KL rewards, where --advantage q adds the token's own only."""
    later = torch.where(is_response, reward_kl, 0.0).flip(-1).cumsum(-1).flip(-1)
    return torch.where(is_response, q + later, 0.0)


def not_whitened(x, mask, reduce=None):
    """In place of whiten()."""
    return torch.where(mask, x, 0.0)


# Name: (deviation, run folder, flags, (where, name of a function, what stands in for it)).
GVMS = {
    "gradient through the target": (2, "deviation_gvm_residual", {}, (
        train_gvm, "lambda_return", train_gvm.lambda_return.__wrapped__)),
    "V(s_1) not trained": (3, "deviation_gvm_no_v1", {}, (
        train_gvm, "value_positions", lambda is_response: is_response)),
    "scores not scaled": (7, "deviation_gvm_raw", {}, (
        torch.Tensor, "std", lambda scores, correction: torch.ones(()))),
    "shuffled rewards": (None, "deviation_gvm_shuffled", {}, None),
}
POLICIES = {
    "q, sum of later KL": (4, "deviation_q_kl_sum", {"advantage": "q"}, (train_dvpo, "advantage_q", q_with_kl_sum)),
    "q": (5, "advantage_q", {"advantage": "q"}, None),
    "gae 0": (5, "advantage_gae_0", {"advantage": "gae", "gae_lambda": 0.0}, None),
    "released": (5, "advantage_released", {"advantage": "released"}, None),
    "gae, not whitened": (6, "deviation_gae_raw", {}, (train_dvpo, "whiten", not_whitened)),
    "q, not whitened": (6, "deviation_q_raw", {"advantage": "q"}, (train_dvpo, "whiten", not_whitened)),
    "learning rate 5e-5": (None, "deviation_lr", {"lr": 5e-5}, None),
    "cut at 16, kept": (10, "deviation_cut_keep", {"max_response_length": 16}, None),
    "cut at 16, masked": (10, "deviation_cut_mask", {"max_response_length": 16, "truncated": "mask"}, None),
    "cut at 16, penalised": (10, "deviation_cut_penalise", {"max_response_length": 16, "truncated": "penalise"}, None),
}
BEHIND = {"q, sum of later KL": "q", "q, not whitened": "q",   # compared with this, all others with the default
          "cut at 16, masked": "cut at 16, kept", "cut at 16, penalised": "cut at 16, kept"}


# ---- 1. One seed ----
def shuffled(data, target, seed):
    """A copy of the data folder in which scored.jsonl's rewards have changed places."""
    for file in data.glob("*.jsonl"):
        rows = claims.read_lines(file)
        if file.name == "scored.jsonl":
            rewards = [row["reward"] for row in rows]
            random.Random(seed).shuffle(rewards)
            rows = [row | {"reward": reward} for row, reward in zip(rows, rewards)]
        claims.write_lines(target / file.name, rows)
    return target


def run_seed(folder, seed, scale):
    """{"SFT" or the name of a setting: {"score", "gain", "length", "nats", of GVMs "accuracy"}}."""
    start, sft = claims.base(folder, seed, scale)
    online = {"model": sft, "steps": claims.steps(scale)} | start
    gvms = {"default": claims.train_gvm(folder / "gvm", sft, start, supervision="scores", td_lambda=0.95)}
    policies = {"default": claims.train("train_dvpo", folder / "dvpo", gvm=gvms["default"], advantage="gae",
                                        gae_lambda=0.95, **online)}
    for name, (_, run, flags, replaced) in GVMS.items():
        data = shuffled(start["data"], folder / f"{run}_data", seed) if name == "shuffled rewards" else start["data"]
        with mock.patch.object(*replaced) if replaced else nullcontext():
            gvms[name] = claims.train_gvm(folder / run, sft, start, data=data, **flags)
        policies[name] = claims.train("train_dvpo", folder / f"{run}_dvpo", gvm=gvms[name], **online)
    for name, (_, run, flags, replaced) in POLICIES.items():
        with mock.patch.object(*replaced) if replaced else nullcontext():
            policies[name] = claims.train("train_dvpo", folder / run, gvm=gvms["default"], **online, **flags)
    judged = claims.judge(folder / "deviations.log", sft, policies.values(), start)
    found = {name: judged[output.name] | {"gain": judged[output.name]["score"] - judged[sft.name]["score"]}
             for name, output in policies.items()}
    for name, gvm in gvms.items():
        measured = [row["pair_accuracy"] for row in claims.read_lines(gvm / "metrics.jsonl") if "pair_accuracy" in row]
        found[name]["accuracy"] = measured[-1]["mean"]
    return found | {"SFT": judged[sft.name]}


# ---- 2. The answer ----
def main():
    args, started = claims.parse(__doc__), time.time()
    seeds = claims.over_seeds(run_seed, args)

    def values(name, key):
        return [seed[name][key] for seed in seeds.values()]

    def ahead(name, key):
        """Per seed, by how much what we do is better than this."""
        return [a - b for a, b in zip(values(BEHIND.get(name, "default"), key), values(name, key), strict=True)]

    settings = {name: setting for table in (POLICIES, GVMS) for name, setting in table.items()}
    found, said = {}, {"confirmed": [], "not decided": [], "not confirmed: the reverse": []}
    lost = values("shuffled rewards", "gain")
    found["the gain is the value model's: without it, from shuffled rewards, there is none"] = (
        "confirmed" if verdict(ahead("shuffled rewards", "score")) == "confirmed" and verdict(lost) != "confirmed" else
        "not confirmed", f"gain over SFT {cell(values('default', 'gain'))}, from shuffled rewards {cell(lost)}")
    for name, (number, *_) in sorted(settings.items(), key=lambda item: item[1][0] or 99):
        if name == "shuffled rewards":
            continue
        gap, ours = ahead(name, "score"), BEHIND.get(name, "the default")
        said[verdict(gap)].append(name)
        numbers = f"score {cell(gap)}"
        if name in GVMS:
            pairs = ahead(name, "accuracy")
            numbers += f"; pair accuracy {cell(pairs)}, {verdict(pairs)}"
        found[(f"deviation {number}: " if number else "") + f"{ours} gives a better policy than {name}"] = verdict(
            gap), numbers
    finding = ("Ours is ahead, by the interval of the policies' scores, of: "
               f"{'; '.join(said['confirmed']) or 'none'}. It is behind: "
               f"{'; '.join(said['not confirmed: the reverse']) or 'none'}. Not decided: "
               f"{'; '.join(said['not decided']) or 'none'}.")

    tables = ["| DVPO with | deviation | oracle score, held out | gain over SFT | length | KL (nats) |",
              "|---" * 6 + "|"]
    for name in ("SFT", "default", *settings):
        number = settings.get(name, [""])[0] or ""
        tables.append(f"| {name} | {number} | {cell(values(name, 'score'))} | "
                      f"{cell(values(name, 'gain')) if name != 'SFT' else ''} | {cell(values(name, 'length'), 1)} | "
                      f"{cell(values(name, 'nats'), 2)} |")
    tables += ["", "| GVM | held-out pair accuracy, mean value |", "|---|---|"]
    tables += [f"| {name} | {cell(values(name, 'accuracy'))} |" for name in ("default", *GVMS)]

    picture, panel = plt.subplots(figsize=(8, 5.5), layout="constrained")
    names = [name for name in settings if name != "shuffled rewards"][::-1]
    for i, name in enumerate(names):
        mean, low, high = interval(ahead(name, "score"))
        panel.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color="tab:blue", capsize=4, zorder=3,
                       label=None if i else "mean, 95 %")
        panel.plot(ahead(name, "score"), [i + 0.2] * len(seeds), ".", color="tab:orange",
                   label=None if i else "a seed each")
    panel.axvline(0, color="black", linestyle=":")
    panel.set_yticks(range(len(names)), [f"{BEHIND.get(name, 'default')} over {name}" for name in names])
    panel.set(xlabel="oracle score that our way is ahead by, held-out questions",
              title=f"Our way against the other ({len(seeds)} seeds)")
    panel.legend(fontsize=8)
    claims.report("deviations", args, __doc__, seeds, found, tables, finding, picture)
    print(f"{time.time() - started:.0f} s; default {statistics.mean(values('default', 'gain')):.3f} over SFT")


if __name__ == "__main__":
    main()
