"""A real language model: SmolLM2-135M-Instruct finishes short texts, and learns to be positive.

Hypothesis  As in Atlas: a frozen GVM, trained once on offline answers, improves the policy as PPO's reward
            model and critic do, in less time. The setting is that of "controlled sentiment" (Rafailov et al.
            2023, section 6), where the truth can be asked: the reward is a public function of the text.
Method      Openings of reviews and letters (data/sentiment_prompts.txt): 160 for the values, 200 for RL, 100
            for the test. The model finishes each in at most 32 tokens. True reward: VADER's compound score of
            the answer, in [-1, 1] (vaderSentiment 3.3.2). Behaviour data: answers under five combinations of
            a system message and a temperature, which are the policies. SFT: one pass over the answers of the
            calm one (temperature 0.7) that end: the start of every arm. Then, of the same pairs: a reward
            model and a GVM; a second GVM of the scores. All arms have the same prompts, number of rollouts
            and KL coefficient. Learning rate: the best of three on two other seeds, by the true score of the
            last rollouts of a short run; test prompts play no part. Data, SFT, GVMs and reward model are
            shared: seeds differ in the policy's training.
            Fluency: perplexity of the answers under the SFT model. distinct-2: different pairs of
            neighbouring words, as a share of all; it falls when a policy repeats itself.
            True Q of a prefix: the mean score of eight completions by the policy in question.
Command     pip install vaderSentiment==3.3.2; python data/smollm2.py; python experiments/sentiment.py
"""
import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml
from tqdm import tqdm
from transformers import AutoModelForTokenClassification

import claims
import evaluate
import train_dvpo

sys.path.append(str(claims.ROOT / "analysis"))
import figures  # noqa: E402

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError:
    raise SystemExit("error: this experiment alone needs VADER: pip install vaderSentiment==3.3.2") from None

PROMPTS = claims.ROOT / "data" / "sentiment_prompts.txt"
RECIPE = yaml.safe_load((claims.ROOT / "recipes" / "smollm2_sentiment.yaml").read_text(encoding="utf-8"))
VADER = SentimentIntensityAnalyzer()
LONGEST, PROMPT = (RECIPE["train_dvpo"][f"max_{x}_length"] for x in ("response", "prompt"))       # tokens
POLICIES = {"calm": ("", 0.7), "plain": ("", 1.0),            # name: system message, temperature
            "cheerful": ("You are cheerful and love everything.", 0.8),
            "grumpy": ("You hate everything and complain.", 0.8), "reporter": ("You report facts.", 0.7)}
LRS = (3e-6, 1e-5, 3e-5)
ARMS = {"DVPO, pairs": ("train_dvpo", {"gvm": "gvm_pairs"}), "PPO": ("baselines.ppo", {}),
        "GRPO": ("baselines.grpo", {}), "DVPO, scores": ("train_dvpo", {"gvm": "gvm_scores"}),
        "PPO, critic from the GVM": ("baselines.ppo", {"critic_init": "gvm_pairs"}),
        "DPO": ("baselines.dpo", {})}
NEEDS = {"DVPO, pairs": ["gvm_pairs"], "PPO": ["reward_model"], "GRPO": ["reward_model"], "DPO": [],
         "DVPO, scores": ["gvm_scores"], "PPO, critic from the GVM": ["reward_model", "gvm_pairs"]}


# ---- 1. Data ----
def score(prompt, response):
    """The true reward, for evaluate.py --judge too: VADER's compound of the answer, -1 to 1."""
    return VADER.polarity_scores(response)["compound"]


def prompt_of(opening, system=""):
    """An empty system message: else SmolLM2's template writes a long one."""
    return [{"role": "system", "content": system},
            {"role": "user", "content": f"Finish this text in one short sentence: {opening}"}]


class Tempered:
    """A policy at another temperature, for rollout()."""

    def __init__(self, policy, temperature):
        self.policy, self.temperature, self.device = policy, temperature, policy.device

    def __call__(self, **inputs):
        output = self.policy(**inputs)
        output.logits = output.logits / self.temperature
        return output


def load(folder):
    tokenizer = train_dvpo.load_tokenizer(str(folder))
    policy = train_dvpo.load_model(train_dvpo.AutoModelForCausalLM, str(folder), tokenizer, PROMPT + LONGEST)
    return policy.eval().to(evaluate.DEVICE), tokenizer


def sample(policy, prompt_ids, what, longest=LONGEST):
    """One response to each prompt (ids), 64 at a time."""
    stop_ids, found = getattr(policy, "policy", policy).generation_config.eos_token_id, []
    for start in tqdm(range(0, len(prompt_ids), 64), what):
        found += train_dvpo.rollout(policy, prompt_ids[start:start + 64], longest, stop_ids)
    return found


def write_data(folder, model, scale):
    """The data folder: answers of the behaviour policies that end, with the prompt as the stages see it."""
    data, rng = folder / "data", random.Random(1)
    if (data / "test_prompts.jsonl").exists():
        return data
    openings = PROMPTS.read_text(encoding="utf-8").splitlines()
    parts = [160, 200, 100, 60]                               # values, RL, test, held-out pairs
    parts = [max(16, round(scale * n)) for n in parts]
    values, rl, test, held_out = (openings[sum(parts[:i]):sum(parts[:i + 1])] for i in range(4))
    policy, tokenizer = load(model)
    stop_ids, rows = policy.generation_config.eos_token_id, []
    torch.manual_seed(1)
    for name, (system, temperature) in POLICIES.items():
        asked = [opening for opening in values + held_out for _ in range(2)]
        ids = [train_dvpo.encode_prompt(tokenizer, prompt_of(opening, system)) for opening in asked]
        responses = sample(Tempered(policy, temperature), ids, f"answers, {name}")
        for opening, response in zip(asked, responses):
            text = claims.text(tokenizer, response)
            if response[-1] in stop_ids and text.strip():
                rows.append({"prompt": prompt_of(opening), "response": text, "reward": score("", text),
                             "policy": name, "opening": opening})
    files = {"scored": [], "pairs": [], "test_scored": [], "test_pairs": []}
    for opening in values + held_out:
        mine = [row for row in rows if row["opening"] == opening]
        where = "test_" * (opening in held_out)
        files[f"{where}scored"] += mine
        couples = [(a, b) for i, a in enumerate(mine) for b in mine[i + 1:] if a["reward"] != b["reward"]]
        for a, b in rng.sample(couples, min(4, len(couples))):
            good, bad = (a, b) if a["reward"] > b["reward"] else (b, a)
            files[f"{where}pairs"].append({
                "prompt": good["prompt"], "chosen": good["response"], "rejected": bad["response"],
                "policy_chosen": good["policy"], "policy_rejected": bad["policy"]})
    files["sft"] = [row for row in files["scored"] if row["policy"] == "calm"]
    files["rl"] = [{"prompt": prompt_of(opening)} for opening in rl]
    files["test_prompts"] = [{"prompt": prompt_of(opening)} for opening in test]
    for name, lines in files.items():                         # test_prompts last: the sign that all is there
        claims.write_lines(data / f"{name}.jsonl", lines)
    return data


# ---- 2. Runs ----
def shared_runs(folder, args):
    """Once for all seeds, what the arms need: {"sft", "gvm_pairs" ...: run folder}; and the data folder."""
    data = write_data(folder, args.model, args.scale)
    sft = claims.train("sft", folder / "sft", model=args.model, data=data, **RECIPE["sft"])
    runs, inputs = {"sft": str(sft)}, {"model": sft, "data": data}
    for name in dict.fromkeys(name for arm in args.arms for name in NEEDS[arm]):
        script = "baselines.reward_model" if name == "reward_model" else "train_gvm"
        flags = {"supervision": "pairs"} if name == "gvm_pairs" else {}
        print(f"{name} ...", flush=True)
        flags |= inputs | RECIPE[script.split(".")[-1]]
        runs[name] = str(claims.train(script, folder / name, **flags))
    return runs, data


def train(folder, data, shared, arm, lr, seed, steps):
    """The policy of an arm. All arms learn from the same number of rollouts, in one pass over each."""
    script, flags = ARMS[arm]
    flags = RECIPE[script.split(".")[-1]] | {name: shared[value] for name, value in flags.items()}
    flags |= {"model": shared["sft"], "data": data, "lr": lr, "seed": seed}
    flags |= {"steps": steps} if "max_response_length" in flags else {}
    flags |= {"critic_lr": lr} if "critic_lr" in flags else {}
    flags |= {"reward_model": shared["reward_model"]} if script in ("baselines.ppo", "baselines.grpo") else {}
    began = time.time()
    run = claims.train(script, folder / file_name(f"{arm}_{lr:g}_{steps}_{seed}"), **flags)
    print(f"{arm}, learning rate {lr:g}, seed {seed}: {time.time() - began:.0f} s", flush=True)
    return run


def file_name(words):
    return "".join(c if c.isalnum() else "_" for c in words)


def rewards(run, last=None):
    """Mean true score of each step's rollouts, or of the last steps'; of DPO, which has none, -loss."""
    if not (run / "rollouts.jsonl").exists():
        found = [-row["loss"] for row in claims.read_lines(run / "metrics.jsonl")]
    else:
        found = [statistics.mean(x) for x in claims.by_step(run, lambda row: score("", row["response"]))]
    return found if last is None else statistics.mean(found[-last:])


def tune(folder, data, shared, arm, args):
    """The learning rate whose short runs on other seeds end best: [lr, {lr: [score of each seed]}]."""
    tried = {lr: [rewards(train(folder / "tune", data, shared, arm, lr, seed, args.tune_steps), 5)
                  for seed in args.tune_seeds] for lr in LRS}
    return max(tried, key=lambda lr: statistics.mean(tried[lr])), tried


# ---- 3. Measuring ----
@torch.no_grad()
def measure(run, start, data):
    """Numbers of a policy, of two answers to each test prompt; kept beside it. Wins are over the start."""
    file = Path(run, "measured.json")
    if not file.exists() or file.stat().st_mtime < Path(run, "model.safetensors").stat().st_mtime:
        (policy, tokenizer), (reference, _) = load(run), load(start)
        ids = [train_dvpo.encode_prompt(tokenizer, row["prompt"])
               for row in claims.read_lines(data / "test_prompts.jsonl") for _ in range(2)]
        torch.manual_seed(1)
        sequences, kl, nll = list(zip(ids, sample(policy, ids, Path(run).name))), 0.0, 0.0
        for i in range(0, len(sequences), 16):
            batch, is_response, _ = train_dvpo.collate(sequences[i:i + 16], 0)
            batch, is_response = batch.to(policy.device), is_response.to(policy.device)
            logp = train_dvpo.token_logp(policy, batch, is_response)
            logp_ref = train_dvpo.token_logp(reference, batch, is_response)
            kl, nll = kl + (logp - logp_ref).sum().item(), nll - logp_ref.sum().item()
        texts, tokens = [claims.text(tokenizer, y) for _, y in sequences], sum(len(y) for _, y in sequences)
        pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:])]
        found = {"score": statistics.mean(score("", text) for text in texts), "kl": kl / len(texts),
                 "length": tokens / len(texts), "perplexity": math.exp(nll / tokens),
                 "distinct-2": len(set(pairs)) / len(pairs), "answers": texts}
        file.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    kept = Path(start, "measured.json")
    rival = json.loads(kept.read_text(encoding="utf-8"))      # the start is measured first
    margins = [score("", a) - score("", b) for a, b in zip(found["answers"], rival["answers"])]
    return found | {"wins": statistics.mean((margin > 0) + (margin == 0) / 2 for margin in margins)}


def true_states(policy, tokenizer, openings, system, n, rng):
    """[(opening, first tokens of an answer, share of it, true Q: mean score of n completions), ...]"""
    ids = [train_dvpo.encode_prompt(tokenizer, prompt_of(opening, system)) for opening in openings]
    said = sample(policy, ids, "answers")
    states = [(i, response[:rng.randint(1, len(response))], len(response)) for i, response in enumerate(said)]
    stop_ids = getattr(policy, "policy", policy).generation_config.eos_token_id
    going = [i for i, first, _ in states for _ in range(n)
             if first[-1] not in stop_ids and len(first) < LONGEST]
    tails = sample(policy, [ids[i] + states[i][1] for i in going], "completions")
    scores = [[] for _ in states]
    for i, tail in zip(going, tails):
        scores[i].append(score("", claims.text(tokenizer, (states[i][1] + tail)[:LONGEST])))
    true = [statistics.mean(found or [score("", claims.text(tokenizer, first))])
            for found, (_, first, _) in zip(scores, states)]
    return [(openings[i], first, len(first) / length, q) for (i, first, length), q in zip(states, true)]


def value_error(gvm, tokenizer, states):
    """{place in the answer: [correlation with the true Q, squared error, variance of the true Q, states]}.
    Values from pairs have a scale of their own: for their error, the straight line that fits best."""
    sequences = [(train_dvpo.encode_prompt(tokenizer, prompt_of(opening)), first)
                 for opening, first, _, _ in states]
    value, share, truth = torch.tensor([
        (line[-1], share, q) for line, (_, _, share, q) in zip(claims.token_values(gvm, sequences), states)],
        dtype=torch.float64).unbind(1)
    correlation = torch.corrcoef(torch.stack([value, truth]))[0, 1]
    if "pairs" in str(gvm):
        value = truth.mean() + correlation * truth.std() / value.std() * (value - value.mean())
    parts = {"all": share > 0, "first half": share <= 0.5, "second half": (share > 0.5) & (share < 1),
             "end": share == 1}
    return {part: [torch.corrcoef(torch.stack([value[x], truth[x]]))[0, 1].item(),
                   (value[x] - truth[x]).square().mean().item(), truth[x].var().item(), int(x.sum())]
            for part, x in parts.items() if x.sum() > 2}


def seconds(run):
    """Seconds of a run: of a step (median), and of all."""
    steps = [sum(x for name, x in row.items() if name.startswith("seconds"))
             for row in claims.read_lines(Path(run) / "metrics.jsonl")]
    return statistics.median(steps), sum(steps)


# ---- 4. The answer ----
def draw(numbers, curves):
    picture, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for arm, seeds in curves.items():
        mean = [statistics.mean(x) for x in zip(*seeds)]
        width = max(1, len(mean) // 8)
        left.plot(range(width, len(mean) + 1),
                  [statistics.mean(mean[i - width:i]) for i in range(width, len(mean) + 1)], label=arm)
    claims.label(left, f"True score of the rollouts (mean of {width} steps)", "step of 16 rollouts", "VADER")
    for arm, seeds in numbers.items():
        right.scatter([x["kl"] for x in seeds], [x["score"] for x in seeds], label=arm)
    claims.label(right, "Test prompts, each seed", "KL to the start (nats)", "VADER")
    return picture


def report(args, numbers, curves, tuned, times, values):
    """sentiment.md, .json and .png; what is printed is what is written."""
    scores = {arm: [x["score"] for x in seeds] for arm, seeds in numbers.items()}
    verdicts, names, rows = {}, ("score", "wins", "kl", "length", "perplexity", "distinct-2"), []
    for arm, seeds in numbers.items():
        columns = [claims.cell([x[name] for x in seeds], 2) for name in names]
        cost = [""] * 3
        if arm in tuned:
            cost = [f"{times[arm][0]:.1f}", f"{times[arm][1] / 60:.0f}", f"{tuned[arm][0]:g}"]
        rows.append([arm, *columns, *cost])
        if arm in tuned:
            verdicts[f"{arm} improves on the start"] = claims.claim(
                [x - scores["start"][0] for x in scores[arm]], "true score, more by")
        if arm in tuned and arm != "PPO" and "PPO" in scores:
            verdicts[f"{arm} ends better than PPO"] = claims.claim(
                claims.minus(scores[arm], scores["PPO"]), "true score, more by")
    about = __doc__[__doc__.index("Hypothesis"):__doc__.index("Command")].rstrip().splitlines()
    command = f"--seeds {' '.join(map(str, args.seeds))} --steps {args.steps} --scale {args.scale:g}"
    lines = [f"# {__doc__.splitlines()[0]}", "", *(f"    {line}" for line in about), "",
             f"`python experiments/sentiment.py {command}`, model {args.model}, precision "
             f"{args.precision}, commit {claims.commit()}, {platform.machine()}, {os.cpu_count()} cores. "
             "Mean and 95 % interval over the seeds.", "",
             *claims.table("claim | verdict | numbers", [
                 (x, f"**{a}**", b) for x, (a, b) in verdicts.items()]), "",
             "![sentiment](sentiment.png)", "",
             *claims.table("arm | true score | wins over the start | KL, nats | tokens | perplexity | "
                           "distinct-2 | seconds a step | minutes in all | learning rate", rows), "",
             "Minutes in all: the policy's training, and that of the GVM or the reward model it needs.", "",
             "The value models against the true Q, by place in the answer.", "",
             *claims.table("value model | policy | place | correlation | error | variance of Q | states", [
                 [gvm, policy, part, *(f"{number:.3f}" for number in x[:3]), str(x[3])]
                 for gvm, policies in values.items() for policy, parts in policies.items()
                 for part, x in parts.items()]), "",
             "Learning rates tried, on seeds of their own: true score of the last five steps (DPO: minus the "
             "loss).", "", *claims.table("arm | " + " | ".join(f"{lr:g}" for lr in LRS), [
                 [arm, *(f"{statistics.mean(x):.3f}" for x in tried.values())]
                 for arm, (_, tried) in tuned.items() if tried]), "",
             "![Values of the tokens of two answers](sentiment_tokens.png)"]
    claims.write_result(args.output, "sentiment", {
        "numbers": numbers, "tuned": tuned, "seconds": times, "values": values, "curves": curves}, lines)
    draw(numbers, curves).savefig(Path(args.output, "sentiment.png"), dpi=110, bbox_inches="tight")
    print("\n".join(lines))


def heat_map(args, data, gvm):
    """The values of both answers of a held-out pair, of the first twenty the one with the largest margin."""
    def margin(row):
        return score("", row["chosen"]) - score("", row["rejected"])

    Path(args.output).mkdir(parents=True, exist_ok=True)
    row = max(claims.read_lines(data / "test_pairs.jsonl")[:20], key=margin)
    tokenizer = train_dvpo.load_tokenizer(gvm)
    model = AutoModelForTokenClassification.from_pretrained(gvm).eval()
    answers = [figures.response_values(model, tokenizer, row["prompt"], row[side])
               for side in ("chosen", "rejected")]
    figures.draw_tokens(Path(args.output, "sentiment_tokens.png"), row["prompt"][-1]["content"], answers,
                        figures.colour_scale(model, answers))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/smollm2/base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tune_seeds", type=int, nargs="*", default=[11, 12], help="none: the middle rate")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=40, help="of 16 rollouts")
    parser.add_argument("--tune_steps", type=int, default=12)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the prompts")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--runs", default="runs/sentiment")
    parser.add_argument("--output", default=str(claims.ROOT / "experiments/results"))
    args = parser.parse_args()
    os.environ["ACCELERATE_MIXED_PRECISION"] = args.precision
    folder = Path(args.runs)
    shared, data = shared_runs(folder, args)
    tuned = {arm: tune(folder, data, shared, arm, args) if args.tune_seeds else (LRS[1], {})
             for arm in args.arms}
    runs = {arm: [] for arm in args.arms}
    for seed in args.seeds:                                   # every arm of a seed, then the next seed
        for arm in args.arms:
            runs[arm].append(train(folder, data, shared, arm, tuned[arm][0], seed, args.steps))
    numbers = {"start": [measure(shared["sft"], shared["sft"], data)]} | {
        arm: [measure(run, shared["sft"], data) for run in each] for arm, each in runs.items()}
    curves = {arm: [rewards(run) for run in each] for arm, each in runs.items() if arm != "DPO"}
    times = {arm: (statistics.median(seconds(run)[0] for run in each),
                   statistics.mean(seconds(run)[1] for run in each)
                   + sum(seconds(shared[name])[1] for name in NEEDS[arm]))
             for arm, each in runs.items()}
    values = {name: {} for name in shared if "gvm" in name}
    openings = [row["prompt"][-1]["content"].partition(": ")[2]
                for row in claims.read_lines(data / "test_prompts.jsonl")][:60]
    behaviour, tokenizer = load(args.model)
    policies = {name: (None, *policy) for name, policy in POLICIES.items()} if args.scale == 1 else {}
    for name, run in {"start": shared["sft"], args.arms[0]: runs[args.arms[0]][0]}.items():
        policies[name] = run, "", 1.0
    for name, (run, system, temperature) in policies.items():
        file = folder / f"states_{Path(run).name if run else name}.json"       # minutes each: kept
        if not file.exists():
            torch.manual_seed(1)
            policy = Tempered(load(run)[0] if run else behaviour, temperature)
            file.write_text(json.dumps(true_states(policy, tokenizer, openings, system, 8, random.Random(1))))
        states = json.loads(file.read_text())
        for kind in values:
            values[kind][name] = value_error(shared[kind], tokenizer, states)
    heat_map(args, data, shared[next(iter(values))])
    for seeds in numbers.values():
        for x in seeds:
            x["answers"] = x["answers"][:6]                   # to three prompts, as examples
    report(args, numbers, curves, tuned, times, values)
    for i in (0, 2, 4):                                       # three prompts and their answers
        said = [f"    {arm}: {x[0]['answers'][i]}" for arm, x in numbers.items()]
        print(f"\n{openings[i // 2]}", *said, sep="\n")
    print(f"\nvalues of tokens: {Path(args.output, 'sentiment_tokens.png')}")


if __name__ == "__main__":
    main()
