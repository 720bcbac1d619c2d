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
            each, against that with a GVM made from that model. Improvement: the first of these runs in
            blocks of ten steps; a decline is a block whose mean true score (640 rollouts) is lower than the
            one before; by more than two standard errors: a clear one. Variance: 1,024 rollouts of the SFT
            model, and the gradient that each gives of Eq. (2) at ratio 1, with whitened advantages: token-
            level (gae), token-level (q), and one number per answer, the GVM's last value or that minus its
            value of the prompt. Noise: trace of the gradients' covariance over the squared length of the
            true gradient (product of two halves' means), as a logarithm to base 10.
Command     python experiments/properties.py --seeds 21 22 23 24 25
Result      experiments/results/properties.json, .md, .png
"""
from itertools import product
from statistics import mean, pvariance, stdev

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
import torch
import train_dvpo
from claims import minus

PREFIXES, COMPLETIONS, ROLLOUTS, BLOCK = 100, 200, 1024, 10
KINDS = ("token-level, gae", "token-level, q", "the last value", "the last value - the prompt's")


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
    """{kind: log10 of the trace of the covariance of single rollouts' gradients / squared length of the true
    gradient}."""
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
        advantages[KINDS[3]].append((q[-1] - q[0]).expand(len(q) - 1))
    found, parameters = {}, list(policy.parameters())
    for kind, each in advantages.items():
        every, squares, halves = torch.cat(each), 0.0, [0.0, 0.0]
        for i, (sequence, advantage) in enumerate(zip(said, each)):
            ids, is_response, _ = train_dvpo.collate([sequence], 0)
            logp = train_dvpo.token_logp(policy, ids, is_response)[is_response]
            loss = -(logp * (advantage - every.mean()) / every.std()).sum()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            squares, halves[i % 2] = squares + gradient @ gradient, halves[i % 2] + gradient
        signal = 4 * halves[0] @ halves[1] / len(said) ** 2   # without the noise that a mean's own square has
        trace = squares / len(said) - (sum(halves) / len(said)).square().sum()
        found[kind] = (trace / signal.abs()).log10().item()
    return found


def run_seed(folder, seed, scale):
    sft, start, online = claims.base(folder, seed, scale)
    gvm, gains, own, blocks = claims.train_gvm(folder / "gvm", sft, start), {}, {}, []
    policies = {"its own SFT model": sft}
    others = {"another start": (128, 3, seed + 1000), "a smaller one": (64, 2, seed)}
    for name, (hidden, layers, base_seed) in others.items():
        base = folder / f"properties_{name.split()[-1]}_base"
        if not (base / "model.safetensors").exists():
            atlas.write_base_model(base, base_seed, hidden, layers)
        policies[name] = claims.train("sft", base.with_name(f"{base.name}_sft"), model=base, **start)
    for name, policy in policies.items():
        which, runs = name.split()[-1], [folder / "dvpo"]
        if name in others:
            mine = claims.train_gvm(folder / f"properties_gvm_{which}", policy, start)
            runs = [claims.train("train_dvpo", folder / f"properties_dvpo_{which}_own",
                                 **online | {"model": policy, "gvm": mine}),
                    folder / f"properties_dvpo_{which}"]
        run = claims.train("train_dvpo", runs[-1], **online | {"model": policy, "gvm": gvm})
        found = claims.judge(folder / "properties.log", policy, runs, start)
        gains[name], own[name] = (found[x.name]["score"] - found[policy.name]["score"]
                                  for x in (run, runs[0]))
        if not blocks:
            scores = claims.by_step(run, claims.score)
            for i in range(0, len(scores) - len(scores) % BLOCK or 1, BLOCK):
                block = sum(scores[i:i + BLOCK], [])
                blocks.append((mean(block), stdev(block) / len(block) ** 0.5))
    rows = claims.read_lines(start["data"] / "test_scored.jsonl")[:max(4, round(scale * PREFIXES))]
    within, between, n = invariance(rows, claims.load_policy(sft)[1], max(10, round(scale * COMPLETIONS)))
    asked = [row["prompt"] for row in claims.read_lines(start["data"] / "rl.jsonl")] * 9
    return {"within": within, "between": between, "prefixes": n, "gains": gains, "own": own, "blocks": blocks,
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
        if name != "its own SFT model":
            found[f"and as much as {name}'s own GVM"] = claims.claim(
                minus(per_seed("gains", name), per_seed("own", name)), "gain, more by")
    found["no block of ten steps is clearly worse than the one before"] = (
        "not confirmed" if any(clear) else "confirmed",
        f"share of declines {claims.cell(declines)}, of clear ones {claims.cell(clear)}")
    for kind, rival in product(KINDS[:2], KINDS[2:]):
        found[f"{kind}: less noise than {rival}"] = claims.claim(
            minus(per_seed("noise", rival), per_seed("noise", kind)), "powers of ten, less by")
    tables = [f"Share of the true Q's variance that is over policies: {claims.cell(share)}; "
              f"{claims.cell(per_seed('prefixes'), 0)} prefixes.", "", *claims.table(
                  "gradient of single rollouts | noise, log10", [
                      [kind, per_seed("noise", kind)] for kind in KINDS])]
    picture, panel = plt.subplots(figsize=(6, 4))
    for seed, blocks in zip(seeds, per_seed("blocks")):
        means, errors = zip(*blocks)
        ends = [BLOCK * (n + 1) for n in range(len(blocks))]
        panel.errorbar(ends, means, [2 * e for e in errors], label=seed)
    claims.label(panel, "True score along DVPO, two standard errors", "step", "oracle score")
    finding = (f"{100 * mean(share):.0f} % of the variance of true values is over policies; "
               f"{100 * mean(declines):.0f} % of the blocks of ten steps decline.")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
