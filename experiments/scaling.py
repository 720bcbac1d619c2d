"""Table 8 in kind: does the GVM get better with a larger model, and with more data?

Hypothesis  "The value model's performance exhibits a clear scaling law, with larger models achieving higher accuracy"
            (appendix E, Table 8: mean value 63.6 % of pairs with 3 billion parameters, 70.6 % with 13; the four models
            there also differ in their family). Atlas can ask the same of data, and of the error against the true Q.
Method      One world per seed. Models: hidden size 32, 64, 96 and 128 with 1, 2, 2 and 3 layers, each with a base model
            and SFT of its own (the three small ones 2 epochs, the largest, which all experiments share, 4: part of its
            lead may be that). Data: the first 1/8, 1/4, 1/2 or all of the scored answers, largest model. Every GVM sees
            its data twice, so fewer answers also mean fewer updates. Pair accuracy is that of the run itself, on the
            held-out pairs. The true Q is that of all behaviour policies together, which is what a GVM without tau
            models: 200 completions at the first, the middle and the last but one token of 150 held-out answers; what
            Monte Carlo adds to the squared error is taken off. Per seed a straight line by least squares, on log2 of
            the parameters (embeddings included) and on log2 of the answers; its slope is the gain per doubling.
Command     python experiments/scaling.py --seeds 21 22 23 24 25        (part of make claims)
Result      results/scaling.json, results/scaling.md, results/scaling.png
"""
import math
import statistics
import time

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
from claims import cell, interval, verdict
from transformers import AutoModelForTokenClassification

SIZES = ((32, 1), (64, 2), (96, 2))                           # hidden, layers; the largest is the shared (128, 3)
SHARES = (0.125, 0.25, 0.5)                                   # of the scored answers; all of them: the shared GVM
ANSWERS, COMPLETIONS = 150, 200                               # of the truth
MEASURES = {                                                  # name: (unit, factor)
    "mean": ("points of pair accuracy, mean value", 100), "last": ("points of pair accuracy, last value", 100),
    "error": ("squared error against the true Q", 1)}


# ---- 1. The models ----
def smaller_model(folder, seed, start, hidden, layers):
    """The GVM of a smaller model, from a base model and an SFT model of its own."""
    base = folder / f"scaling_base_{hidden}"
    if not (base / "model.safetensors").exists():
        atlas.write_base_model(base, seed, hidden, layers)
    sft = claims.train("sft", folder / f"scaling_sft_{hidden}", model=base, epochs=2, **start)
    return claims.train_gvm(folder / f"scaling_gvm_{hidden}", sft, start)


def less_data(folder, sft, start, share):
    """(the GVM of the first answers alone, how many they are)."""
    data, rows = folder / f"scaling_data_{share:g}", claims.read_lines(start["data"] / "scored.jsonl")
    rows = rows[:max(round(share * len(rows)), 16)]           # at least one batch
    claims.write_lines(data / "scored.jsonl", rows)
    claims.write_lines(data / "test_pairs.jsonl", claims.read_lines(start["data"] / "test_pairs.jsonl"))
    return claims.train_gvm(folder / f"scaling_gvm_data_{share:g}", sft, start, data=data), len(rows)


# ---- 2. The truth, and what a GVM says of it ----
def true_values(rows, sequences, tokenizer, completions):
    """[(row, response tokens read, true Q, squared standard error, place), ...]."""
    found = []
    for number, (row, (_, said)) in enumerate(zip(rows, sequences)):
        for place, count in (("first", 1), ("middle", len(said) // 2), ("last but one", len(said) - 1)):
            prefix = claims.text(tokenizer, said[:count])
            if prefix and row["response"].startswith(prefix):                  # else it ends within a character
                mean, error = atlas.true_value("any", row["prompt"], prefix, completions)
                found.append((number, count, mean, error ** 2, place))
    return found


def squared_errors(values, truth):
    """{place: mean squared error, Monte Carlo error of the truth taken off; "error": of all places}."""
    errors = {}
    for row, count, mean, variance, place in truth:
        for key in (place, "error"):
            errors.setdefault(key, []).append((values[row][count] - mean) ** 2 - variance)        # [0] is V(s_1)
    return {key: statistics.mean(found) for key, found in errors.items()}


# ---- 3. One seed ----
def run_seed(folder, seed, scale):
    """{"size" and "data": [{"parameters", "rows", "mean", "last", "error", ...} from small to large], "truth": ...}."""
    start, sft = claims.base(folder, seed, scale)
    _, tokenizer = claims.load_policy(sft)                    # the same for all sizes: atlas.py trains it on all texts
    held_out = claims.read_lines(start["data"] / "test_scored.jsonl")[:max(4, round(scale * ANSWERS))]
    sequences = [claims.sequence(tokenizer, row["prompt"], row["response"]) for row in held_out]
    truth = true_values(held_out, sequences, tokenizer, max(10, round(scale * COMPLETIONS)))

    def measured(gvm, rows):
        accuracy = claims.read_lines(gvm / "metrics.jsonl")[-1]["pair_accuracy"]
        parameters = AutoModelForTokenClassification.from_pretrained(gvm).num_parameters()
        values = claims.token_values(gvm, sequences, tokenizer.pad_token_id)
        return {"parameters": parameters, "rows": rows, "mean": accuracy["mean"], "last": accuracy["last"]
                } | squared_errors(values, truth)

    every = len(claims.read_lines(start["data"] / "scored.jsonl"))
    largest = measured(claims.train_gvm(folder / "gvm", sft, start), every)
    sizes = [measured(smaller_model(folder, seed, start, *size), every) for size in SIZES]
    data = [measured(*less_data(folder, sft, start, share)) for share in SHARES]
    average = statistics.mean(mean for _, _, mean, _, _ in truth)
    return {"size": sizes + [largest], "data": data + [largest],
            "truth": {"places": len(truth), "rms standard error": statistics.mean(t[3] for t in truth) ** 0.5,
                      "error of a constant": statistics.mean((t[2] - average) ** 2 - t[3] for t in truth)}}


# ---- 4. The answer ----
def slope(points, size, measure):
    """Gain in a measure per doubling of a size."""
    return statistics.linear_regression([math.log2(point[size]) for point in points],
                                        [point[measure] for point in points]).slope


def main():
    args, started = claims.parse(__doc__), time.time()
    seeds = claims.over_seeds(run_seed, args)
    axes_of = {"size": ("parameters", "a larger model"), "data": ("rows", "more data")}
    found, per_doubling = {}, {}
    for axis, (size, words) in axes_of.items():
        for measure, (unit, factor) in MEASURES.items():
            sign = -1 if measure == "error" else 1            # what is better
            slopes = [factor * slope(seed[axis], size, measure) for seed in seeds.values()]
            steps = [factor * (seed[axis][-1][measure] - seed[axis][-2][measure]) for seed in seeds.values()]
            doublings = statistics.mean(math.log2(seed[axis][-1][size] / seed[axis][-2][size])
                                        for seed in seeds.values())
            per_doubling[axis, measure] = slopes
            found[f"{words} is better: {unit}"] = (verdict([sign * x for x in slopes]),
                                                   f"{cell(slopes)} per doubling of {size}")
            found[f"{words} still helps at the last step: {unit}"] = (
                verdict([sign * x for x in steps]), f"{cell(steps)} for {doublings:.1f} doublings")
    table_8 = (70.55 - 63.61) / math.log2(13 / 3)             # its smallest and its largest model
    finding = (f"A doubling of the parameters changes the pair accuracy of the mean value by "
               f"{cell(per_doubling['size', 'mean'], 2)} points (Table 8, from 3 to 13 billion: {table_8:.2f}), "
               f"a doubling of the data by {cell(per_doubling['data', 'mean'], 2)} points; the squared error against "
               f"the true Q changes by {cell(per_doubling['size', 'error'], 4)} and "
               f"{cell(per_doubling['data', 'error'], 4)}.")

    places = ("first", "middle", "last but one")
    truth = [seed["truth"] for seed in seeds.values()]
    tables = [f"Truth: {statistics.mean(t['places'] for t in truth):.0f} places per seed, root mean square standard "
              f"error {cell([t['rms standard error'] for t in truth])}; a constant would have a squared error of "
              f"{cell([t['error of a constant'] for t in truth])}.", "",
              "| parameters | answers | accuracy, mean value | last value | squared error, all places | "
              f"{' | '.join(places)} |", "|---" * 8 + "|"]
    curves = {}
    for axis in axes_of:
        for step in range(len(next(iter(seeds.values()))[axis])):
            points = [seed[axis][step] for seed in seeds.values()]
            cells = [cell([point[key] for point in points]) for key in (*MEASURES, *places) if key in points[0]]
            curves.setdefault(axis, []).append(points)
            if not (axis == "data" and step == len(SHARES)):  # the largest of both: listed once
                tables.append(f"| {points[0]['parameters']:,} | {points[0]['rows']:,} | {' | '.join(cells)} |")

    picture, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, colour, label in (("size", "tab:blue", "parameters"), ("data", "tab:orange", "scored answers")):
        size = axes_of[axis][0]
        shares = [points[0][size] / curves[axis][-1][0][size] for points in curves[axis]]
        for panel, measure, style in ((panels[0], "mean", "-"), (panels[0], "last", "--"), (panels[1], "error", "-")):
            means, lows, highs = zip(*(interval([point[measure] for point in points]) for points in curves[axis]))
            panel.errorbar(shares, means, [[m - low for m, low in zip(means, lows)],
                                           [high - m for m, high in zip(means, highs)]], fmt="o" + style, capsize=2,
                           color=colour, label=f"{label}, {measure} value" if measure != "error" else label)
            if measure != "last":                             # the straight line whose slope the claims give
                line = statistics.linear_regression([math.log2(share) for share in shares], means)
                panel.plot(shares, [line.slope * math.log2(share) + line.intercept for share in shares], ":",
                           color=colour, label=f"{label}, fitted" + (", mean value" if measure != "error" else ""))
    full = next(iter(seeds.values()))["size"][-1]
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xlabel(f"share of {full['parameters']:,} parameters, or of {full['rows']:,} answers")
        panel.legend(fontsize=7)
    panels[0].set(ylabel="held-out pair accuracy", title=f"Which answer is better? ({len(seeds)} seeds)")
    panels[1].set(ylabel="squared error (score units squared)", title=f"Error against the true Q ({len(seeds)} seeds)")
    claims.report("scaling", args, __doc__, seeds, found, tables, finding, picture)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
