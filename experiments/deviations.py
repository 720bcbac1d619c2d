"""What our departures from the paper cost or gain (docs/deviations.md), and does the value model do the work?

Hypothesis  (1) The policy improves because the GVM guides it: with shuffled training rewards the gain
            vanishes. (2) What we do where the paper says otherwise, or nothing, is at least as good as the
            other way.
Method      One world per seed. DVPO, 40 steps of 64 rollouts, from the same SFT model, in which one thing
            differs from the defaults; a GVM, two passes over its data, in which one thing differs, and DVPO
            with it. Where a script has no setting for it, another function replaces the script's own. Judged
            by the oracle on held-out questions; a GVM by how often it gives the better answer of a held-out
            pair the higher mean value. Many comparisons: an interval that barely leaves out 0 is weak
            evidence.
Command     python experiments/deviations.py --seeds 21 22 23 24 25
Result      experiments/results/deviations.json, .md, .png
"""
import random
from contextlib import nullcontext
from unittest import mock

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
import torch
import train_dvpo
import train_gvm
from claims import cell, claim, minus, verdict


def q_with_kl_sum(q, reward_kl, is_response):
    """A_t = Q_t + the sum of this and all later KL rewards; --advantage q adds only the token's own."""
    return torch.where(is_response, q + reward_kl.flip(-1).cumsum(-1).flip(-1), 0.0)


# Name: (deviation, run folder, flags, (where, name of a function, what replaces it)).
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
    "q, sum of later KL": (4, "deviation_q_kl_sum", {"advantage": "q"}, (
        train_dvpo, "advantage_q", q_with_kl_sum)),
    "q": (5, "advantage_q", {"advantage": "q"}, None),
    "gae 0": (5, "advantage_gae_0", {"advantage": "gae", "gae_lambda": 0.0}, None),
    "released": (5, "advantage_released", {"advantage": "released"}, None),
    "gae, not whitened": (6, "deviation_gae_raw", {"whiten": False}, None),
    "q, not whitened": (6, "deviation_q_raw", {"advantage": "q", "whiten": False}, None),
    "learning rate 5e-5": (None, "deviation_lr", {"lr": 5e-5}, None),
}
RIVALS = {"q, sum of later KL": "q", "q, not whitened": "q"}  # compared with q, all others with the default


# ---- 1. One seed ----
def shuffled(data, target, seed):
    """The data of a GVM, in which scored.jsonl's rewards have changed places."""
    rows = claims.read_lines(data / "scored.jsonl")
    rewards = random.Random(seed).sample([row["reward"] for row in rows], len(rows))
    rows = [row | {"reward": reward} for row, reward in zip(rows, rewards)]
    claims.write_lines(target / "scored.jsonl", rows)
    claims.write_lines(target / "test_pairs.jsonl", claims.read_lines(data / "test_pairs.jsonl"))
    return target


def run_seed(folder, seed, scale):
    """{"SFT" or the name of a setting: {"score", "gain", "length", "nats", of GVMs "accuracy"}}."""
    sft, start, online = claims.base(folder, seed, scale)
    gvms = {"default": claims.train_gvm(folder / "gvm", sft, start, supervision="scores", td_lambda=0.95)}
    policies = {"default": claims.train("train_dvpo", folder / "dvpo", gvm=gvms["default"], advantage="gae",
                                        gae_lambda=0.95, **online)}
    for name, (_, run, flags, replaced) in GVMS.items():
        data = start["data"]
        if name == "shuffled rewards":
            data = shuffled(data, folder / f"{run}_data", seed)
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
        found[name]["accuracy"] = claims.pair_accuracy(gvm)["mean"]
    return found | {"SFT": judged[sft.name]}


# ---- 2. The answer ----
def answer(seeds, per_seed):
    def ahead(name, key):
        """Per seed, by how much what we do is better than this."""
        return minus(per_seed(RIVALS.get(name, "default"), key), per_seed(name, key))

    settings = POLICIES | GVMS
    found, said = {}, {"confirmed": [], "not decided": [], "not confirmed: the reverse": []}
    lost = per_seed("shuffled rewards", "gain")
    vanishes = verdict(ahead("shuffled rewards", "score")) == "confirmed" and verdict(lost) != "confirmed"
    found["the gain is the value model's: without it, from shuffled rewards, there is none"] = (
        "confirmed" if vanishes else "not confirmed",
        f"gain over SFT {cell(per_seed('default', 'gain'))}, from shuffled rewards {cell(lost)}")
    for name, (number, *_) in sorted(settings.items(), key=lambda item: item[1][0] or 99):
        if name == "shuffled rewards":
            continue
        word, numbers = claim(ahead(name, "score"))
        said[word].append(name)
        if name in GVMS:
            pairs = ahead(name, "accuracy")
            numbers += f"; pair accuracy {cell(pairs)}, {verdict(pairs)}"
        words = f"{RIVALS.get(name, 'the default')} gives a better policy than {name}"
        found[(f"deviation {number}: " if number else "") + words] = word, numbers
    ours, theirs, open_ = ("; ".join(names) or "none" for names in (
        said["confirmed"], said["not confirmed: the reverse"], said["not decided"]))
    finding = (f"Ours is ahead, by the interval of the policies' scores, of: {ours}. It is behind: {theirs}. "
               f"Not decided: {open_}.")

    keys = ("score", "gain", "length", "nats")
    tables = claims.table("DVPO with | deviation | oracle score | gain over SFT | length | KL (nats)", [
        [name, str(settings.get(name, [""])[0] or ""),
         *("" if (name, key) == ("SFT", "gain") else per_seed(name, key) for key in keys)]
        for name in ("SFT", "default", *settings)])
    tables += ["", *claims.table("GVM | held-out pair accuracy, mean value", [
        [name, per_seed(name, "accuracy")] for name in ("default", *GVMS)])]

    picture, panel = plt.subplots(figsize=(9, 4.5), layout="constrained")
    names = [name for name in settings if name != "shuffled rewards"]
    claims.draw(panel, range(len(names)), [ahead(name, "score") for name in names], fmt="o", label="95 %")
    for i, name in enumerate(names):
        panel.plot([i + 0.2] * len(seeds), ahead(name, "score"), ".", color="tab:orange")
    panel.axhline(0, color="black", linestyle=":")
    panel.set_xticks(range(len(names)), [f"{RIVALS.get(name, 'default')}\nover {name}" for name in names],
                     rotation=45, ha="right")
    claims.label(panel, f"Our way against the other ({len(seeds)} seeds: dots)", "",
                 "oracle score that we are ahead by")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
