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
            and KL coefficient. Learning rate: the best of three on two other seeds, by the objective, true
            score - kl_coef x KL to the start, of the last rollouts of a shorter run (DPO has none: of answers
            to the RL prompts); test prompts play no part. By the score alone the rates would win that give
            up on language. Data, SFT, GVMs and reward model are shared: a seed is of the policy's training.
            Fluency: perplexity of the answers under the SFT model. distinct-2: different pairs of
            neighbouring words, as a share of all; it falls when a policy repeats itself; so does the share of
            different answers, of two to each prompt. Arms end at unlike KL; "score at 2 nats" is that of a
            run's rollouts when their KL first passes 2 nats.
            One more arm, added when seed 1 of the others had been seen: the KL coefficient is in units of the
            reward, and the values of the GVM from pairs vary less over the start's answers (deviation 0.056)
            than PPO's standardised rewards (0.86). "DVPO, pairs, KL 0.003" has 0.05 x 0.056 / 0.86.
            True Q of a prefix: the mean score of eight completions by the policy in question.
Command     pip install vaderSentiment==3.3.2; python data/smollm2.py; python experiments/sentiment.py
"""
import argparse
import json
import math
import os
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
from answers import at_temperature  # noqa: E402

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
LRS, KL_COEF = (3e-6, 1e-5, 3e-5), RECIPE["train_dvpo"]["kl_coef"]
RATES = claims.ROOT / "experiments" / "results" / "sentiment_rates.json"
PAIRS = {"gvm": "gvm_pairs"}
ARMS = {   # name: (script, {flag: run of all seeds}, other flags)
    "DVPO, pairs": ("train_dvpo", PAIRS, {}), "PPO": ("baselines.ppo", {"reward_model": "reward_model"}, {}),
    "GRPO": ("baselines.grpo", {"reward_model": "reward_model"}, {}),
    "DVPO, scores": ("train_dvpo", {"gvm": "gvm_scores"}, {}),
    "PPO, critic from the GVM": ("baselines.ppo", {
        "reward_model": "reward_model", "critic_init": "gvm_pairs"}, {}),
    "DPO": ("baselines.dpo", {}, {}), "DVPO, pairs, KL 0.003": ("train_dvpo", PAIRS, {"kl_coef": 0.003})}
TUNED = [arm for arm in ARMS if ", KL" not in arm]


# ---- 1. Data ----
def score(prompt, response):
    """The true reward, for evaluate.py --judge too: VADER's compound of the answer, -1 to 1."""
    return VADER.polarity_scores(response)["compound"]


def prompt_of(opening, system=""):
    """An empty system message: else SmolLM2's template writes a long one."""
    return [{"role": "system", "content": system},
            {"role": "user", "content": f"Finish this text in one short sentence: {opening}"}]


def load(folder):
    tokenizer = train_dvpo.load_tokenizer(str(folder))
    policy = train_dvpo.load_model(train_dvpo.AutoModelForCausalLM, str(folder), tokenizer, PROMPT + LONGEST)
    return policy.eval().to(evaluate.DEVICE), tokenizer


def autocast():
    """To measure in the precision of the runs."""
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return torch.autocast(evaluate.DEVICE, torch.bfloat16, enabled=bf16)


def sample(policy, prompt_ids, what, longest=LONGEST):
    """One response to each prompt (ids), 64 at a time."""
    stop_ids, found = policy.generation_config.eos_token_id, []
    for start in tqdm(range(0, len(prompt_ids), 64), what):
        with autocast():
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
        responses = sample(at_temperature(policy, temperature), ids, f"answers, {name}")
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
def train(script, output, flags):
    """claims.train, for a worker."""
    began = time.time()
    claims.train(script, output, **flags)
    if not (output / "commit.txt").exists():
        (output / "commit.txt").write_text(claims.commit())
    print(f"{output.name}: {time.time() - began:.0f} s", flush=True)
    return output


def shared_runs(folder, args, at_once):
    """Once for all seeds, what the arms need: {"sft", "gvm_pairs" ...: run folder}; and the data folder."""
    data = write_data(folder, args.model, args.scale)
    sft = train("sft", folder / "sft", {"model": args.model, "data": data} | RECIPE["sft"])
    inputs, calls = {"model": sft, "data": data}, []
    for name in dict.fromkeys(name for arm in args.arms for name in ARMS[arm][1].values()):
        script = "baselines.reward_model" if name == "reward_model" else "train_gvm"
        flags = {"supervision": "pairs"} if name == "gvm_pairs" else {}
        calls.append((script, folder / name, flags | inputs | RECIPE[script.split(".")[-1]]))
    return {"sft": str(sft)} | {run.name: str(run) for run in at_once(train, calls)}, data


def policy_run(folder, data, shared, arm, lr, seed, steps):
    """The call of `train` for the policy of an arm: all learn from the same number of rollouts, once each."""
    script, inputs, more = ARMS[arm]
    flags = RECIPE[script.split(".")[-1]] | {name: shared[run] for name, run in inputs.items()} | more
    flags |= {"model": shared["sft"], "data": data, "lr": lr, "seed": seed}
    flags |= {"steps": steps} if "max_response_length" in flags else {}
    flags |= {"critic_lr": lr} if "critic_lr" in flags else {}
    return script, folder / claims.file_name(f"{arm}_{lr:g}_{steps}_{seed}"), flags


def curve(run):
    """[mean true score, mean KL to the start (nats)] of each step's rollouts; of DPO, which has none, []."""
    if not (run / "rollouts.jsonl").exists():
        return []
    return [[statistics.mean(x) for x in zip(*rows)]
            for rows in claims.by_step(run, lambda row: (score("", row["response"]), row["kl"]))]


def objective(run, start, data):
    """True score - kl_coef x KL: of the last five steps' rollouts, or of 80 answers to prompts for RL."""
    last = curve(run)[-5:]
    if not last:
        found = measure(run, start, data, "rl", 40)
        last = [[found["score"], found["kl"]]]
    return statistics.mean(true - KL_COEF * kl for true, kl in last)


def tune(folder, data, shared, args, at_once):
    """{"machine", "commit", "precision", "rates": {arm: {learning rate: [objective of each seed]}}}, of
    shorter runs on other seeds; kept in RATES."""
    if not args.tune_seeds:
        return json.loads(RATES.read_text(encoding="utf-8"))
    tried = [(arm, lr, seed) for seed in args.tune_seeds for lr in LRS for arm in args.arms if arm in TUNED]
    runs = list(at_once(train, [policy_run(folder / "tune", data, shared, arm, lr, seed, args.tune_steps)
                                for arm, lr, seed in tried]))
    found = {arm: {f"{lr:g}": [] for lr in LRS} for arm in args.arms if arm in TUNED}
    for (arm, lr, _), goal in zip(tried, at_once(objective, [(run, shared["sft"], data) for run in runs])):
        found[arm][f"{lr:g}"].append(goal)
    found = {"machine": claims.machine(), "commit": claims.commit(), "precision": args.precision,
             "rates": found}
    RATES.parent.mkdir(parents=True, exist_ok=True)
    RATES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def best(tuned, arm):
    rates = tuned["rates"][arm.partition(", KL")[0]]
    return float(max(rates, key=lambda lr: statistics.mean(rates[lr])))


# ---- 3. Measuring ----
@torch.no_grad()
def measure(run, start, data, prompts="test_prompts", most=None):
    """Numbers of a policy, of two answers to each test prompt; kept beside it."""
    file = Path(run, f"measured_{prompts}.json")
    if file.exists() and file.stat().st_mtime >= Path(run, "model.safetensors").stat().st_mtime:
        return json.loads(file.read_text(encoding="utf-8"))
    (policy, tokenizer), (reference, _) = load(run), load(start)
    ids = [train_dvpo.encode_prompt(tokenizer, row["prompt"])
           for row in claims.read_lines(data / f"{prompts}.jsonl")[:most] for _ in range(2)]
    torch.manual_seed(1)
    sequences, kl, nll = list(zip(ids, sample(policy, ids, Path(run).name))), 0.0, 0.0
    for i in range(0, len(sequences), 16):
        batch, is_response, _ = train_dvpo.collate(sequences[i:i + 16], 0)
        batch, is_response = batch.to(policy.device), is_response.to(policy.device)
        with autocast():
            logp = train_dvpo.token_logp(policy, batch, is_response)
            logp_ref = train_dvpo.token_logp(reference, batch, is_response)
        kl, nll = kl + (logp - logp_ref).sum().item(), nll - logp_ref.sum().item()
    texts, tokens = [claims.text(tokenizer, y) for _, y in sequences], sum(len(y) for _, y in sequences)
    pairs = [pair for text in texts for pair in zip(text.lower().split(), text.lower().split()[1:])]
    found = {"score": statistics.mean(score("", text) for text in texts), "kl": kl / len(texts),
             "length": tokens / len(texts), "perplexity": math.exp(nll / tokens),
             "distinct-2": len(set(pairs)) / len(pairs), "answers": texts}
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def wins(found, rival):
    """Share of the answers that score above the start's to the same prompt; a tie counts half."""
    margins = [score("", a) - score("", b) for a, b in zip(found["answers"], rival["answers"])]
    return statistics.mean((margin > 0) + (margin == 0) / 2 for margin in margins)


def steps_to(goal, curve, width=5):
    """The first step at which the rollouts' true score, mean of `width` steps, is `goal`; None if never."""
    scores = [score for score, _ in curve]
    ends = range(width, len(curve) + 1)
    return next((end for end in ends if statistics.mean(scores[end - width:end]) >= goal), None)


def score_at(nats, start, curve, width=5):
    """True score of a run's rollouts where their KL, both means over `width` steps, first passes `nats`;
    None if it never does. `start` is the score at 0 nats."""
    means = [[start, 0.0]] + [[statistics.mean(x) for x in zip(*curve[i:i + width])]
                              for i in range(len(curve) - width + 1)]
    for (score_0, kl_0), (score_1, kl_1) in zip(means, means[1:]):
        if kl_0 < nats <= kl_1:
            return score_0 + (score_1 - score_0) * (nats - kl_0) / (kl_1 - kl_0)
    return None


def true_states(file, run, openings, system, temperature, n=8):
    """[(opening, first tokens of an answer, share of it, true Q: mean score of n completions), ...], kept."""
    if file.exists():
        return json.loads(file.read_text())
    torch.manual_seed(1)
    (policy, tokenizer), rng = load(run), random.Random(1)
    policy = at_temperature(policy, temperature)
    ids = [train_dvpo.encode_prompt(tokenizer, prompt_of(opening, system)) for opening in openings]
    said = sample(policy, ids, "answers")
    states = [(i, response[:rng.randint(1, len(response))], len(response)) for i, response in enumerate(said)]
    stop_ids = policy.generation_config.eos_token_id
    going = [i for i, first, _ in states for _ in range(n)
             if first[-1] not in stop_ids and len(first) < LONGEST]
    tails = sample(policy, [ids[i] + states[i][1] for i in going], "completions")
    scores = [[] for _ in states]
    for i, tail in zip(going, tails):
        scores[i].append(score("", claims.text(tokenizer, (states[i][1] + tail)[:LONGEST])))
    true = [statistics.mean(found or [score("", claims.text(tokenizer, first))])
            for found, (_, first, _) in zip(scores, states)]
    states = [(openings[i], first, len(first) / length, q) for (i, first, length), q in zip(states, true)]
    file.write_text(json.dumps(states))
    return states


def value_error(gvm, states):
    """{place in the answer: [correlation with the true Q, squared error, variance of the true Q, states]}.
    Values from pairs have a scale of their own: for their error, the straight line that fits best."""
    tokenizer = train_dvpo.load_tokenizer(gvm)
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


def measure_all(args, folder, at_once):
    """(what sentiment.json holds, openings of the test prompts, first GVM, data folder)."""
    shared, data = shared_runs(folder, args, at_once)
    tuned = tune(folder, data, shared, args, at_once)
    asked = [(arm, seed) for seed in args.seeds for arm in args.arms]        # every arm, then the next seed
    rate = {arm: best(tuned, arm) for arm in args.arms}
    made = list(at_once(train, [policy_run(folder, data, shared, arm, rate[arm], seed, args.steps)
                                for arm, seed in asked]))
    start, *measured = at_once(measure, [(run, shared["sft"], data) for run in [Path(shared["sft"]), *made]])
    for found in [*measured, start]:
        found |= {"wins": wins(found, start), "objective": found["score"] - KL_COEF * found["kl"]}
        found["different"] = len(set(found["answers"])) / len(found["answers"])
        found["answers"] = found["answers"][:6]               # to three prompts, as examples
    numbers, runs = {"start": [start]} | {arm: [] for arm in args.arms}, {arm: [] for arm in args.arms}
    for (arm, _), run, found in zip(asked, made, measured):
        runs[arm].append(run)
        numbers[arm].append(found)
    times = {arm: [statistics.median(statistics.median(claims.step_seconds(run)) for run in each),
                   statistics.mean(sum(claims.step_seconds(run)) for run in each)
                   + sum(sum(claims.step_seconds(shared[name])) for name in ARMS[arm][1].values())]
             for arm, each in runs.items()}
    openings = [row["prompt"][-1]["content"].partition(": ")[2]
                for row in claims.read_lines(data / "test_prompts.jsonl")]
    policies = {name: (args.model, *policy) for name, policy in POLICIES.items()} if args.scale == 1 else {}
    policies |= {"start": (shared["sft"], "", 1.0), args.arms[0]: (runs[args.arms[0]][0], "", 1.0)}
    states = list(at_once(true_states, [
        (folder / f"states_{claims.file_name(name)}_{Path(run).name}.json", run, openings[:60], system, t)
        for name, (run, system, t) in policies.items()]))
    gvms = [name for name in shared if "gvm" in name]
    errors = at_once(value_error, [(shared[name], found) for name in gvms for found in states])
    return {"numbers": numbers, "tuned": tuned, "seconds": times,
            "values": {name: {policy: next(errors) for policy in policies} for name in gvms},
            "curves": {arm: [curve(run) for run in each] for arm, each in runs.items() if arm != "DPO"},
            "commits": sorted({Path(run, "commit.txt").read_text() for run in [*made, *shared.values()]}),
            "machine": claims.machine()}, openings, shared[gvms[0]], data


# ---- 4. The answer ----
def draw(numbers, curves):
    picture, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for i, (arm, seeds) in enumerate(numbers.items()):        # an arm has one colour in both panels
        right.scatter([x["kl"] for x in seeds], [x["score"] for x in seeds], label=arm, color=f"C{i}")
        if curves.get(arm):
            mean = [[statistics.mean(x) for x in zip(*step)] for step in zip(*curves[arm])]
            width = max(1, len(mean) // 8)
            ends = range(width, len(mean) + 1)
            true, kl = zip(*([statistics.mean(x) for x in zip(*mean[end - width:end])] for end in ends))
            left.plot(ends, true, label=arm, color=f"C{i}")
            right.plot(kl, true, color=f"C{i}", linewidth=1)
    claims.label(left, f"True score of the rollouts (mean of {width} steps)", "step of 16 rollouts", "VADER")
    claims.label(right, "Test prompts, each seed; lines: the rollouts", "KL to the start (nats)", "VADER")
    return picture


def report(args, found):
    """sentiment.md, .json and .png; what is printed is what is written."""
    numbers, tuned, start = found["numbers"], found["tuned"], found["numbers"]["start"][0]
    verdicts, rows, each = {}, [], {name: {arm: [x[name] for x in seeds] for arm, seeds in numbers.items()}
                                    for name in start if name != "answers"}
    for arm in numbers:
        columns = [claims.cell(each[name][arm], 2) for name in (
            "score", "wins", "kl", "objective", "length", "perplexity", "distinct-2", "different")]
        at_2 = [score_at(2, start["score"], curve) for curve in found["curves"].get(arm, [])]
        columns.insert(4, claims.cell(at_2, 2) if at_2 and None not in at_2 else "")
        pairs = zip(found["curves"].get(arm, []), found["curves"].get("PPO", []))
        reached = [steps_to(statistics.mean(score for score, _ in rival[-5:]), mine) for mine, rival in pairs]
        columns.insert(5, ", ".join(str(step or "never") for step in reached))
        cost = [""] * 3
        if arm in found["seconds"]:
            step, total = found["seconds"][arm]
            cost = [f"{step:.1f}", f"{total / 60:.1f}", f"{best(tuned, arm):g}"]
            verdicts[f"{arm} improves on the start: true score"] = claims.claim(
                [x - start["score"] for x in each["score"][arm]], "by")
        for name in ("score", "objective") if arm not in ("start", "PPO") and "PPO" in numbers else ():
            verdicts[f"{arm} ends better than PPO: {name}"] = claims.claim(
                claims.minus(each[name][arm], each[name]["PPO"]), "by")
        rows.append([arm, *columns, *cost])
    about = __doc__[__doc__.index("Hypothesis"):__doc__.index("Command")].rstrip().splitlines()
    command = f"--seeds {' '.join(map(str, args.seeds))} --steps {args.steps} --scale {args.scale:g}"
    shared = f", {args.jobs} at a time: seconds are of runs that shared the machine" if args.jobs > 1 else ""
    lines = [f"# {__doc__.splitlines()[0]}", "", *(f"    {line}" for line in about), "",
             f"`python experiments/sentiment.py {command}`, model {args.model}, precision {args.precision}, "
             f"runs of commit {', '.join(found['commits'])}, page of {claims.commit()}, "
             f"{found['machine']}{shared}. Mean, 95 % interval over the seeds.", "",
             *claims.table("claim | verdict | numbers", [
                 (x, f"**{a}**", b) for x, (a, b) in verdicts.items()]), "",
             "![sentiment](sentiment.png)", "",
             *claims.table("arm | true score | wins over the start | KL, nats | objective | score at 2 nats "
                           "| steps to PPO's last score | tokens | perplexity | distinct-2 "
                           "| different answers | seconds a step | minutes in all | rate", rows), "",
             "Minutes in all: the policy's training, and that of the GVM or the reward model it needs.", "",
             "The value models against the true Q, by place in the answer.", "",
             *claims.table("value model | policy | place | correlation | error | variance of Q | states", [
                 [gvm, policy, part, *(f"{number:.3f}" for number in x[:3]), str(x[3])]
                 for gvm, policies in found["values"].items() for policy, parts in policies.items()
                 for part, x in parts.items()]), "",
             f"Learning rates tried, on seeds of their own: true score - {KL_COEF:g} x KL, see Method. "
             f"{tuned['machine']}, precision {tuned['precision']}, commit {tuned['commit']}.", "",
             *claims.table("arm | " + " | ".join(f"{lr:g}" for lr in LRS), [
                 [arm, *(f"{statistics.mean(x):.3f}" for x in rates.values())]
                 for arm, rates in tuned["rates"].items()]), "",
             "![Values of the tokens of two answers](sentiment_tokens.png)"]
    claims.write_result(args.output, "sentiment", found, lines)
    draw(numbers, found["curves"]).savefig(Path(args.output, "sentiment.png"), dpi=110, bbox_inches="tight")
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
    parser.add_argument("--tune_seeds", type=int, nargs="*", default=[11, 12],
                        help="none: the rates of results/sentiment_rates.json")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=40, help="of 16 rollouts")
    parser.add_argument("--tune_steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the prompts")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--runs", default="runs/sentiment")
    parser.add_argument("--output", default=str(claims.ROOT / "experiments/results"))
    args = parser.parse_args()
    os.environ["ACCELERATE_MIXED_PRECISION"] = args.precision
    with claims.workers(args.jobs) as at_once:
        found, openings, gvm, data = measure_all(args, Path(args.runs), at_once)
    heat_map(args, data, gvm)
    report(args, found)
    for i in (0, 2, 4):                                       # three prompts and their answers
        said = [f"    {arm}: {x[0]['answers'][i]}" for arm, x in found["numbers"].items()]
        print(f"\n{openings[i // 2]}", *said, sep="\n")
    print(f"\nvalues of tokens: {Path(args.output, 'sentiment_tokens.png')}")


if __name__ == "__main__":
    main()
