"""Four things that the paper says of a global value model: invariance, generality, improvement, variance.

Hypothesis  Section 1: the value of a state hardly depends on the policy, so one GVM serves many. Corollary of
            3.4.2: the policy improves at every step. Section 1: token-level advantages have less variance
            than one score for the whole answer.
Method      One world per seed.
            Invariance: prefixes of held-out answers (first, middle, last but one token) that two or more of
            the five behaviour policies may have written; their true Q under each of these policies, 200
            completions. Variance over policies, prefix by prefix, against the variance over prefixes.
            Generality: the GVM of the demo's SFT model guides DVPO of that model, of an SFT model from
            another random start, and of a smaller one (64 hidden units, 2 layers); gain in true score of
            each. Improvement: the first of these runs in blocks of ten steps; a decline is a block whose mean
            true score (640 rollouts) is lower than the one before; by more than two standard errors: a clear
            one. Variance: 256 rollouts of the SFT model, and the gradient that each gives of Eq. (2) at ratio
            1, with whitened advantages: token-level (gae), token-level (q), one number per answer (the GVM's
            last value). Noise: trace of the gradients' covariance over the squared length of their mean.
Command     python experiments/properties.py --seeds 21 22 23 24 25
Result      experiments/results/properties.json, .md, .png
"""
from statistics import mean, pvariance, stdev

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
import torch
import train_dvpo
from claims import minus

PREFIXES, COMPLETIONS, ROLLOUTS, BLOCK = 100, 200, 256, 10
KINDS = ("token-level, gae", "token-level, q", "one number per answer")


# ---- 1. One seed ----
def invariance(rows, tokenizer, n):
    """(mean variance of the true Q over policies, its variance over prefixes, prefixes)."""
    within, means = [], []
    for row, (_, said) in zip(rows, claims.sequences(tokenizer, rows)):
        for count in {1, len(said) // 2, len(said) - 1}:
            prefix, values = claims.text(tokenizer, said[:count]), []
            for policy in atlas.POLICIES:
                try:
                    values.append(atlas.true_value(policy, row["prompt"], prefix, n)[0])
                except ValueError:                            # this policy never begins so
                    pass
            if len(values) > 1:
                within.append(pvariance(values))
                means.append(mean(values))
    return mean(within), pvariance(means), len(means)


def noise(sft, gvm, prompts):
    """{kind: trace of the covariance of single rollouts' gradients / squared length of their mean}."""
    policy, tokenizer = claims.load_policy(sft)
    torch.manual_seed(1)
    said = claims.answers(policy, tokenizer, prompts)
    advantages = {kind: [] for kind in KINDS}
    for values in claims.token_values(gvm, said):             # V(s_1), Q_1, ..., Q_T
        q, is_response = torch.tensor(values), torch.arange(len(values))[None] > 0
        gae = train_dvpo.advantage_gae(q[None], 0 * q[None], is_response, 1.0, 0.95)
        advantages[KINDS[0]].append(gae[0, 1:])
        advantages[KINDS[1]].append(q[1:])
        advantages[KINDS[2]].append(q[-1].expand(len(q) - 1))
    found, parameters = {}, list(policy.parameters())
    for kind, each in advantages.items():
        every, gradients = torch.cat(each), []
        for sequence, advantage in zip(said, each):
            ids, is_response, _ = train_dvpo.collate([sequence], 0)
            logp = train_dvpo.token_logp(policy, ids, is_response)[is_response]
            loss = -(logp * (advantage - every.mean()) / every.std()).sum()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        gradients = torch.stack(gradients)
        found[kind] = (gradients.var(0).sum() / gradients.mean(0).square().sum()).item()
    return found


def run_seed(folder, seed, scale):
    sft, start, online = claims.base(folder, seed, scale)
    gvm, gains, blocks = claims.train_gvm(folder / "gvm", sft, start), {}, []
    policies = {"its own SFT model": sft}
    others = {"another start": (128, 3, seed + 1000), "a smaller one": (64, 2, seed)}
    for name, (hidden, layers, base_seed) in others.items():
        base = folder / f"properties_{name.split()[-1]}_base"
        if not (base / "model.safetensors").exists():
            atlas.write_base_model(base, base_seed, hidden, layers)
        policies[name] = claims.train("sft", base.with_name(f"{base.name}_sft"), model=base, **start)
    for name, policy in policies.items():
        run = claims.train("train_dvpo", folder / f"properties_dvpo_{name.split()[-1]}",
                           **online | {"model": policy, "gvm": gvm})
        found = claims.judge(folder / "properties.log", policy, [run], start)
        gains[name] = found[run.name]["score"] - found[policy.name]["score"]
        if not blocks:
            scores = claims.by_step(run, claims.score)
            for i in range(0, len(scores) - len(scores) % BLOCK or 1, BLOCK):
                block = sum(scores[i:i + BLOCK], [])
                blocks.append((mean(block), stdev(block) / len(block) ** 0.5))
    rows = claims.read_lines(start["data"] / "test_scored.jsonl")[:max(4, round(scale * PREFIXES))]
    within, between, n = invariance(rows, claims.load_policy(sft)[1], max(10, round(scale * COMPLETIONS)))
    asked = [row["prompt"] for row in claims.read_lines(start["data"] / "rl.jsonl")] * 9
    return {"within": within, "between": between, "prefixes": n, "gains": gains, "blocks": blocks,
            "noise": noise(sft, gvm, asked[:max(8, round(scale * ROLLOUTS))])}


# ---- 2. The answer ----
def answer(seeds, per_seed):
    steps = [[(b - a, (e ** 2 + f ** 2) ** 0.5) for (a, e), (b, f) in zip(blocks, blocks[1:])]
             for blocks in per_seed("blocks")]
    declines = [mean(x < 0 for x, _ in each) if each else 0.0 for each in steps]
    clear = [mean(x < -2 * error for x, error in each) if each else 0.0 for each in steps]
    share = [a / (a + b) for a, b in zip(per_seed("within"), per_seed("between"))]
    found = {"the value varies less over policies than over prefixes": claims.claim(
        minus(per_seed("between"), per_seed("within")), "variance, less by")}
    for name in per_seed("gains")[0]:
        found[f"one GVM improves {name}"] = claims.claim(per_seed("gains", name), "gain in true score")
    found["every block of ten steps improves on the one before"] = (
        "confirmed" if not any(declines) else "not confirmed",
        f"share of declines {claims.cell(declines)}, of clear ones {claims.cell(clear)}")
    for kind in KINDS[:2]:
        found[f"{kind}: less noise than one number per answer"] = claims.claim(
            minus(per_seed("noise", KINDS[2]), per_seed("noise", kind)), "noise, less by")
    tables = [f"Share of the true Q's variance that is over policies: {claims.cell(share)}; "
              f"{claims.cell(per_seed('prefixes'), 0)} prefixes.", "", *claims.table(
                  "gradient of single rollouts | noise", [[kind, per_seed("noise", kind)] for kind in KINDS])]
    picture, panel = plt.subplots(figsize=(6, 4))
    for seed, blocks in zip(seeds, per_seed("blocks")):
        means, errors = zip(*blocks)
        panel.errorbar(range(1, len(blocks) + 1), means, [2 * e for e in errors], label=seed)
    claims.label(panel, "True score along DVPO, two standard errors", "block of ten steps", "oracle score")
    finding = (f"{100 * mean(share):.0f} % of the variance of true values is over policies; "
               f"{100 * mean(declines):.0f} % of the blocks of ten steps decline.")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
