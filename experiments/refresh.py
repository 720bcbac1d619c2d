"""The semi-online regime: a frozen value model, refreshed with true labels of the policy's own answers.

Hypothesis  The paper fixes the feedback before training; its reviewers asked for a GVM that is refreshed when
            a little new feedback arrives. Refreshed with labels of the current rollouts, the GVM knows where
            the policy is now, and the policy gets better. It is the labels that help, not the further
            training: old rows in their place do less. Few labels often are worth more than many at once.
Method      One world per seed, 40 steps of 64 rollouts from the same SFT model and the same GVM. A refresh
            (N, M) is one function in front of scoring: every N steps the oracle labels M of the rollouts, and
            the GVM learns from each of them once, eight at a time beside eight old rows of scored.jsonl, so
            as not to forget (Adam, constant rate 3e-4: updates are in proportion to labels). Control: (5, 64)
            with old rows in place of the new labels. Beside them DVPO with the frozen GVM, and PPO with its
            reward model of pairs (the GVM has the oracle's scores), both without new labels. Value error: the
            final GVM's last value against the oracle's score of new answers of the final policy.
Command     python experiments/refresh.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/refresh.json, .md, .png
"""
import random
from statistics import correlation, mean
from unittest.mock import patch

import claims                                                 # first: it finds the project's root
import matplotlib.pyplot as plt
import torch
import train_dvpo
import train_gvm
from claims import cell, claim, minus

REFRESHES = [(20, 64), (5, 16), (5, 64), (1, 16), (1, 64)]    # (N, M): every N steps M labels
CONTROL = (5, 64)
HALF = 8                                                      # of an update: new labels, and as many old rows
RATE = 3e-4                                                   # train_gvm starts at 1e-3 and ends at 0


# ---- 1. The refresh: one function in front of scoring ----
class Refresh:
    """Replaces train_dvpo.score_rollouts: first, when it is time, the GVM learns; then scoring as before."""

    def __init__(self, every, labels, steps, old, questions, tokenizer, seed, output, new_labels=True):
        self.every, self.labels, self.steps, self.output = every, labels, steps, output
        self.old = old                                        # [((prompt ids, response ids), reward), ...]
        self.questions, self.tokenizer = questions, tokenizer                  # {prompt ids: prompt}
        self.random, self.new_labels = random.Random(seed), new_labels
        self.step, self.optimizer, self.labelled = 0, None, []
        self.score_rollouts = train_dvpo.score_rollouts

    def __call__(self, policy, reference, gvm, sequences, taus, micro_size, pad_id):
        self.step += 1
        if self.step % self.every == self.every // 2:         # mid-way: the last labels serve several steps
            self.learn(gvm, self.label(sequences), pad_id)
        if self.step == self.steps:                           # before the run counts as finished
            gvm.save_pretrained(self.output)
            claims.write_lines(self.output / "labels.jsonl", self.labelled)
        return self.score_rollouts(policy, reference, gvm, sequences, taus, micro_size, pad_id)

    def label(self, sequences):
        """[((prompt ids, response ids), the oracle's score), ...] of the first rollouts: they are in random
        order."""
        if not self.new_labels:
            return self.random.sample(self.old, self.labels)
        found = []
        for prompt_ids, response in sequences[:self.labels]:
            row = {"step": self.step, "prompt": self.questions[tuple(prompt_ids)],
                   "response": claims.text(self.tokenizer, response)}
            found.append(((prompt_ids, response), claims.score(row)))
            self.labelled.append(row | {"reward": found[-1][1]})
        return found

    def learn(self, gvm, labelled, pad_id):
        """One pass over the labels, by the loss and in the units that train_gvm.py taught this GVM in."""
        made = gvm.config.gvm
        gvm.requires_grad_(True)                              # prepare_frozen has switched it off
        if self.optimizer is None:                            # one for the run: Adam's averages are kept
            self.optimizer = torch.optim.AdamW(gvm.parameters(), lr=RATE, weight_decay=0.0)
        for start in range(0, len(labelled), HALF):
            rows = labelled[start:start + HALF]
            rows = rows + self.random.sample(self.old, len(rows))
            ids, is_response, _ = train_gvm.collate([sequence for sequence, _ in rows], pad_id)
            rewards = torch.tensor([reward for _, reward in rows]) - made["reward_mean"]
            reward = train_gvm.is_last_token(is_response) * (rewards / made["reward_std"])[:, None]
            q = gvm(input_ids=ids, use_cache=False).logits.squeeze(-1)
            is_value = train_gvm.value_positions(is_response)
            train_gvm.td_loss(q, reward, is_value, made["gamma"], made["td_lambda"]).backward()
            torch.nn.utils.clip_grad_norm_(gvm.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        gvm.requires_grad_(False)                             # frozen again, until the next time


# ---- 2. One seed ----
def value_error(policy_folder, gvm_folder, prompts, seed):
    """{"error": mean squared, "correlation"} of last values and oracle scores, on new answers."""
    torch.manual_seed(seed)
    policy, tokenizer = claims.load_policy(policy_folder)
    sequences = claims.answers(policy, tokenizer, prompts)
    truths = [truth for truth, _ in claims.true_values(prompts, tokenizer, [[said] for _, said in sequences])]
    values = [line[-1] for line in claims.token_values(gvm_folder, sequences)]
    varied = len(set(truths)) > 1 and len(set(values)) > 1   # in a trial all answers may be equally bad
    return {"error": mean(gap ** 2 for gap in minus(values, truths)),
            "correlation": correlation(values, truths) if varied else 0.0}


def run_seed(folder, seed, scale):
    """{run: {"score", "nats", "length" on held-out prompts, "labels", "curve", value_error of its GVM}}."""
    sft, start, online = claims.base(folder, seed, scale)
    gvm = claims.train_gvm(folder / "gvm", sft, start)
    reward_model = claims.train_reward_model(folder / "reward_model", sft, start)
    runs = {"frozen": claims.train("train_dvpo", folder / "dvpo", gvm=gvm, **online),
            "PPO": claims.train("baselines.ppo", folder / "ppo", reward_model=reward_model, **online)}

    _, tokenizer = claims.load_policy(sft)
    scored = claims.read_lines(start["data"] / "scored.jsonl")
    old = list(zip(claims.sequences(tokenizer, scored), (row["reward"] for row in scored)))
    questions = {tuple(train_dvpo.encode_prompt(tokenizer, row["prompt"])): row["prompt"]
                 for row in claims.read_lines(start["data"] / "rl.jsonl")}
    gvms, found = {"frozen": gvm}, {}
    for number, (every, labels) in enumerate((*REFRESHES, CONTROL)):
        new_labels = number < len(REFRESHES)
        name = f"({every}, {labels})" if new_labels else "old rows"
        output = folder / (f"refresh_{every}_{labels}" if new_labels else "refresh_old_rows")
        gvms[name] = folder / f"{output.name}_gvm"
        refresh = Refresh(max(1, round(every * scale)), max(2, round(labels * scale)), online["steps"], old,
                          questions, tokenizer, seed, gvms[name], new_labels)
        with patch.object(train_dvpo, "score_rollouts", refresh):
            runs[name] = claims.train("train_dvpo", output, gvm=gvm, **online)

    judged = claims.judge(folder / "refresh.log", sft, runs.values(), start)
    prompts = [prompt for prompt in claims.prompts_of(start) for _ in range(2)]
    for name, output in runs.items():
        curve = [mean(scores) for scores in claims.by_step(output, claims.score)]
        found[name] = judged[output.name] | {"labels": 0, "curve": curve}
        if name in gvms:
            found[name] |= value_error(output, gvms[name], prompts, seed)
        if name not in ("frozen", "PPO"):
            found[name]["labels"] = len(claims.read_lines(gvms[name] / "labels.jsonl"))
    return found


# ---- 3. The answer ----
def answer(seeds, per_seed):
    refreshes, found = ["({}, {})".format(*refresh) for refresh in REFRESHES], {}

    def gap(a, b, key="score"):
        return minus(per_seed(a, key), per_seed(b, key))

    for better, worse, words in (
            ("(5, 64)", "frozen", "refreshing every 5 steps with 64 labels gives a better policy than none"),
            ("(5, 64)", "old rows", "it is the new labels: old rows in their place give a worse policy"),
            ("(5, 16)", "(20, 64)", "as many labels (128): 16 every 5 steps are better than 64 every 20"),
            ("(1, 64)", "(5, 64)", "more labels: 64 every step are better than 64 every 5"),
            ("frozen", "PPO", "without new labels DVPO with its frozen GVM is better than PPO")):
        found[words] = claim(gap(better, worse))
    found["the refreshed GVM (5, 64) knows its policy's answers better than the frozen one its own"] = claim(
        gap("frozen", "(5, 64)", "error"), "squared error of the last value, frozen minus refreshed")

    best = max(refreshes, key=lambda name: mean(per_seed(name, "score")))
    labels = {name: mean(per_seed(name, "labels")) for name in seeds[min(seeds)]}
    finding = (f"The best of {len(refreshes)} refreshes, {best} with {labels[best]:.0f} true labels, changed "
               f"the score of frozen DVPO by {cell(gap(best, 'frozen'))}, (5, 64) with "
               f"{labels['(5, 64)']:.0f} by {cell(gap('(5, 64)', 'frozen'))}, and old rows in place of these "
               f"by {cell(gap('old rows', 'frozen'))}.")
    keys, errors = ("score", "nats", "length"), ("error", "correlation")
    tables = ["(N, M): every N steps M labels. Value error: mean squared error of the final GVM's last value "
              "against the oracle (exact), on the final policy's own answers.", ""]
    tables += claims.table(
        "run | new labels | oracle score, held out | KL (nats) | length | value error | correlation", [
            [name, f"{labels[name]:.0f}", *(per_seed(name, key) for key in keys),
             *("" if name == "PPO" else per_seed(name, key) for key in errors)] for name in labels])

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for x, name in enumerate(labels):
        claims.draw(left, [x], [per_seed(name, "score")], fmt="o")
    left.set_xticks(range(len(labels)), [f"{name}:\n{count:.0f} labels" for name, count in labels.items()],
                    fontsize=7)
    left.set(ylabel="oracle score, held out", title=f"Every N steps M labels ({len(seeds)} seeds, 95 %)")
    for name, colour in (("frozen", "tab:blue"), (best, "tab:red"), ("PPO", "tab:gray")):
        right.plot([mean(values) for values in zip(*per_seed(name, "curve"))], color=colour, label=name)
    claims.label(right, f"While training (mean of {len(seeds)} seeds)", "step (64 rollouts each)",
                 "oracle score of the rollouts")
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
