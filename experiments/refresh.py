"""The semi-online regime: a frozen value model, refreshed now and then with true labels of the policy's own answers.

Hypothesis  The paper fixes the feedback before training; its reviewers asked for a GVM that is refreshed when a
            little new feedback arrives. Refreshed with labels of the current rollouts, the GVM knows where the
            policy is now, and the policy gets better than with the frozen one. It is the labels that help, not the
            further training: old rows in their place do less. Few labels often are worth more than many at once.
Method      One world per seed, 40 steps of 64 rollouts from the same SFT model and the same GVM. A refresh (N, M)
            is one function put in front of scoring: every N steps (in the middle of each N) the oracle labels M of
            the rollouts, and the GVM learns from each of them once, when it is new, eight at a time beside eight
            old rows of scored.jsonl, lest it forget (Adam, constant rate 3e-4: updates are in proportion to
            labels). Control: (5, 64) with old rows in place of the new labels. Beside them DVPO with the frozen
            GVM, and PPO with its reward model, both without new labels. Score, KL and length on held-out prompts.
            Value error: the final GVM's last value against the oracle's score of new answers of the final policy
            to the held-out prompts. That truth is exact; its standard error is 0.
Command     python experiments/refresh.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/refresh.json, .md, .png
"""
import random
import statistics
from unittest.mock import patch

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
import torch
import train_dvpo
import train_gvm
from claims import cell, minus, verdict

REFRESHES = [(20, 64), (5, 16), (5, 64), (1, 16), (1, 64)]    # (N, M): every N steps M labels
CONTROL = (5, 64)
STEPS = 40
HALF = 8                                                      # an update: so many new labels, and as many old rows
RATE = 3e-4                                                   # train_gvm starts at 1e-3 and ends at 0


# ---- 1. The refresh: one function in front of scoring ----
class Refresh:
    """Replaces train_dvpo.score_rollouts: first, when it is time, the GVM learns; then scoring as before."""

    def __init__(self, every, labels, steps, old, questions, tokenizer, seed, output, new_labels=True):
        self.every, self.labels, self.steps, self.output = every, labels, steps, output
        self.old = old                                        # [((prompt ids, response ids), reward)] of scored.jsonl
        self.questions, self.tokenizer = questions, tokenizer                              # {prompt ids: prompt}
        self.random, self.new_labels = random.Random(seed), new_labels
        self.step, self.optimizer, self.labelled = 0, None, []
        self.score_rollouts = train_dvpo.score_rollouts

    def __call__(self, policy, reference, gvm, sequences, taus, micro_size, pad_id):
        self.step += 1
        if self.step % self.every == self.every // 2:         # mid-way: the last labels are of use to several steps
            self.learn(gvm, self.label(sequences), pad_id)
        if self.step == self.steps:                           # before the run counts as finished
            gvm.save_pretrained(self.output)
            claims.write_lines(self.output / "labels.jsonl", self.labelled)
        return self.score_rollouts(policy, reference, gvm, sequences, taus, micro_size, pad_id)

    def label(self, sequences):
        """[((prompt ids, response ids), the oracle's score)] of the first rollouts: prompts come in random order."""
        if not self.new_labels:
            return self.random.sample(self.old, self.labels)
        found = []
        for prompt_ids, response in sequences[:self.labels]:
            prompt, answer = self.questions[tuple(prompt_ids)], claims.text(self.tokenizer, response)
            found.append(((prompt_ids, response), atlas.oracle(prompt, answer)))
            self.labelled.append({"step": self.step, "prompt": prompt, "response": answer, "reward": found[-1][1]})
        return found

    def learn(self, gvm, labelled, pad_id):
        """One pass over the labels, by the loss and in the units that train_gvm.py taught this GVM in."""
        made = gvm.config.gvm
        gvm.requires_grad_(True)                              # prepare_frozen has switched it off
        if self.optimizer is None:                            # one for the whole run: Adam's averages are kept
            self.optimizer = torch.optim.AdamW(gvm.parameters(), lr=RATE, weight_decay=0.0)
        for start in range(0, len(labelled), HALF):
            rows = labelled[start:start + HALF]
            rows = rows + self.random.sample(self.old, len(rows))
            ids, is_response, _ = train_gvm.collate([sequence for sequence, _ in rows], pad_id)
            rewards = (torch.tensor([reward for _, reward in rows]) - made["reward_mean"]) / made["reward_std"]
            reward = train_gvm.is_last_token(is_response) * rewards[:, None]
            q = gvm(input_ids=ids, use_cache=False).logits.squeeze(-1)
            train_gvm.td_loss(q, reward, train_gvm.value_positions(is_response), made["gamma"],
                              made["td_lambda"]).backward()
            torch.nn.utils.clip_grad_norm_(gvm.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        gvm.requires_grad_(False)                             # frozen again, until the next time


# ---- 2. One seed ----
def value_error(policy_folder, gvm_folder, prompts, seed):
    """The last value against the oracle's score, on new answers: it may have learned from those of the last step.
    Returns {"error": mean squared, "correlation"}."""
    torch.manual_seed(seed)
    policy, tokenizer = claims.load_policy(policy_folder)
    sequences = claims.answers(policy, tokenizer, prompts)
    truths = [atlas.oracle(prompt, claims.text(tokenizer, said)) for prompt, (_, said) in zip(prompts, sequences)]
    values = [line[-1] for line in claims.token_values(gvm_folder, sequences, tokenizer.pad_token_id)]
    varied = len(set(truths)) > 1 and len(set(values)) > 1   # in a trial all answers may be equally bad
    return {"error": statistics.mean(gap ** 2 for gap in minus(values, truths)),
            "correlation": statistics.correlation(values, truths) if varied else 0.0}


def oracle_by_step(run):
    """The oracle's mean score of a run's rollouts, step by step."""
    steps = {}
    for row in claims.read_lines(run / "rollouts.jsonl"):
        steps.setdefault(row["step"], []).append(atlas.oracle(row["prompt"], row["response"]))
    return [statistics.mean(steps[step]) for step in sorted(steps)]


def run_seed(folder, seed, scale):
    """{run: {"score", "nats", "length" on held-out prompts, "labels", "curve", and "error" and "correlation" of its
    GVM, which PPO has not}}."""
    start, sft = claims.base(folder, seed, scale)
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    online = {"model": sft, "steps": claims.steps(scale, STEPS)} | start
    runs = {"frozen": claims.train("train_dvpo", folder / "dvpo", gvm=gvm, **online),
            "PPO": claims.train("baselines.ppo", folder / "ppo", reward_model=reward_model, **online)}

    _, tokenizer = claims.load_policy(sft)
    old = [(claims.sequence(tokenizer, row["prompt"], row["response"]), row["reward"])
           for row in claims.read_lines(start["data"] / "scored.jsonl")]
    questions = {tuple(train_dvpo.encode_prompt(tokenizer, row["prompt"])): row["prompt"]
                 for row in claims.read_lines(start["data"] / "rl.jsonl")}
    gvms, found = {"frozen": gvm}, {}
    for (every, labels), new_labels in [(refresh, True) for refresh in REFRESHES] + [(CONTROL, False)]:
        name = f"({every}, {labels})" if new_labels else "old rows"
        output = folder / (f"refresh_{every}_{labels}" if new_labels else "refresh_old_rows")
        gvms[name] = folder / f"{output.name}_gvm"
        refresh = Refresh(max(1, round(every * online["steps"] / STEPS)), max(2, round(labels * scale)),
                          online["steps"], old, questions, tokenizer, seed, gvms[name], new_labels)
        with patch.object(train_dvpo, "score_rollouts", refresh):
            runs[name] = claims.train("train_dvpo", output, gvm=gvm, **online)

    judged = claims.judge(folder / "refresh.log", sft, runs.values(), start)
    prompts = [prompt for prompt in claims.prompts_of(start) for _ in range(2)]
    for name, output in runs.items():
        found[name] = judged[output.name] | {"labels": 0, "curve": oracle_by_step(output)}
        if name in gvms:
            found[name] |= value_error(output, gvms[name], prompts, seed)
        if name not in ("frozen", "PPO"):
            found[name]["labels"] = len(claims.read_lines(gvms[name] / "labels.jsonl"))
    return found


# ---- 3. The answer ----
def answer(seeds, per_seed):
    refreshes = ["({}, {})".format(*refresh) for refresh in REFRESHES]

    def gap(a, b, key="score"):
        return minus(per_seed(a, key), per_seed(b, key))

    found = {}
    for claim, better, worse in (
            ("refreshing every 5 steps with 64 labels gives a better policy than the frozen GVM", "(5, 64)", "frozen"),
            ("it is the new labels: old rows in their place give a worse policy", "(5, 64)", "old rows"),
            ("as many labels (128): 16 every 5 steps are better than 64 every 20", "(5, 16)", "(20, 64)"),
            ("more labels: 64 every step are better than 64 every 5", "(1, 64)", "(5, 64)"),
            ("without new labels DVPO with its frozen GVM is better than PPO", "frozen", "PPO")):
        found[claim] = verdict(gap(better, worse)), f"score {cell(gap(better, worse))}"
    less = gap("frozen", "(5, 64)", "error")
    found["the refreshed GVM (5, 64) knows its policy's answers better than the frozen GVM knows its own policy's"] = (
        verdict(less), f"squared error of the last value, frozen minus refreshed {cell(less)}")

    best = max(refreshes, key=lambda name: statistics.mean(per_seed(name, "score")))
    labels = {name: statistics.mean(per_seed(name, "labels")) for name in seeds[min(seeds)]}
    finding = (f"The best of {len(refreshes)} refreshes, {best} with {labels[best]:.0f} true labels, changed the score "
               f"of frozen DVPO by {cell(gap(best, 'frozen'))}, (5, 64) with {labels['(5, 64)']:.0f} by "
               f"{cell(gap('(5, 64)', 'frozen'))}, and old rows in place of these by "
               f"{cell(gap('old rows', 'frozen'))}.")
    tables = ["(N, M): every N steps M labels. The value error is the mean squared error of the final GVM's last value "
              "against the oracle (exact: standard error 0), on the final policy's own answers.", "",
              *claims.table("run | new labels | oracle score, held out | KL (nats) | length (tokens) | value error | "
                            "correlation", [
                                [name, f"{labels[name]:.0f}", per_seed(name, "score"), cell(per_seed(name, "nats"), 2),
                                 cell(per_seed(name, "length"), 1),
                                 *("" if name == "PPO" else per_seed(name, key) for key in ("error", "correlation"))]
                                for name in labels])]

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, colour in (("frozen", "tab:blue"), ("PPO", "tab:gray")):
        mean, low, high = claims.interval(per_seed(name, "score"))
        left.axhline(mean, color=colour, label=f"{name}: no new labels")
        left.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
    for name in refreshes:
        claims.draw(left, [labels[name] * (1.06 if name == "(5, 16)" else 1)], [per_seed(name, "score")], fmt="o",
                    label=f"{name}: every N steps M")
    claims.draw(left, [labels["(5, 64)"] * 1.06], [per_seed("old rows", "score")], fmt="x",
                label="old rows in place of (5, 64)")
    left.set(xscale="log", xlabel="true labels of rollouts in all (log scale)", ylabel="oracle score, held-out "
             "questions (-1 to 1)", title=f"Score and labels ({len(seeds)} seeds, 95 % intervals)")
    counts = sorted({round(labels[name]) for name in refreshes})
    left.set_xticks(counts, counts)
    left.minorticks_off()
    left.legend(fontsize=6)
    for name, colour in (("frozen", "tab:blue"), (best, "tab:red"), ("PPO", "tab:gray")):
        curve = [statistics.mean(values) for values in zip(*per_seed(name, "curve"))]
        right.plot(range(1, len(curve) + 1), curve, color=colour, label=name)
    right.set(xlabel="step (64 rollouts each)", ylabel="oracle score of the rollouts (-1 to 1)",
              title=f"While training (mean of {len(seeds)} seeds)")
    right.legend(fontsize=7)
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
