"""Table 8 in kind: does the GVM get better with a larger model, and with more data?

Hypothesis  "The value model's performance exhibits a clear scaling law, with larger models achieving higher
            accuracy" (appendix E, Table 8: mean value 63.6 % of pairs with 3 billion parameters, 70.6 % with
            13; the four models there also differ in their family). Atlas can ask the same of data, and of the
            error against the true Q.
Method      One world per seed. Models: hidden size 32, 64, 96 and 128 with 1, 2, 2 and 3 layers, each with a
            base model and SFT of its own (2 epochs; the largest, which all experiments share, 4: part of its
            lead may be that). Data: the first 1/8, 1/4, 1/2 or all of the scored answers, largest model, two
            passes. Pair accuracy on held-out pairs. The true Q is that of all behaviour policies together,
            which is what a GVM without tau models: 200 completions at the first, the middle and the last but
            one token of 150 held-out answers; what Monte Carlo adds to the squared error is taken off. Per
            seed a least squares line on log2 of the parameters (embeddings included), or of the answers; its
            slope is the gain per doubling.
Command     python experiments/scaling.py --seeds 21 22 23 24 25        (part of make claims)
Result      experiments/results/scaling.json, .md, .png
"""
from math import log2
from statistics import linear_regression, mean, pvariance

import claims                                                 # first: it finds the project's root
import atlas
import matplotlib.pyplot as plt
from claims import cell, verdict
from transformers import AutoModelForTokenClassification

SIZES = ((32, 1), (64, 2), (96, 2))                           # hidden, layers; the shared: (128, 3)
SHARES = (0.125, 0.25, 0.5)                                   # of the scored answers; all: the shared GVM
ANSWERS, COMPLETIONS = 150, 200                               # of the truth
PLACES = ("first", "middle", "last but one")
MEASURES = {"mean": ("points of pair accuracy, mean value", 100),              # name: (unit, factor)
            "last": ("points of pair accuracy, last value", 100),
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
    """[(row, response tokens read, place, true Q, squared standard error), ...]."""
    found = []
    for number, (row, (_, said)) in enumerate(zip(rows, sequences)):
        for place, count in zip(PLACES, (1, len(said) // 2, len(said) - 1)):
            truth = claims.true_value_of_program("any", row, tokenizer, said, count, completions)
            if truth:
                found.append((number, count, place, *truth))
    return found


def squared_errors(values, truth):
    """{place: mean squared error, Monte Carlo error of the truth taken off; "error": of all places}."""
    errors = {}
    for row, count, place, true, variance in truth:
        for key in (place, "error"):
            errors.setdefault(key, []).append((values[row][count] - true) ** 2 - variance)     # [0]: V(s_1)
    return {key: mean(found) for key, found in errors.items()}


# ---- 3. One seed ----
def run_seed(folder, seed, scale):
    """{"size", "data": [{"parameters", "rows", "mean", "last", "error", ...}, small to large], "truth"}."""
    sft, start, _ = claims.base(folder, seed, scale)
    _, tokenizer = claims.load_policy(sft)                    # all sizes have the same one
    held_out = claims.read_lines(start["data"] / "test_scored.jsonl")[:max(4, round(scale * ANSWERS))]
    sequences = claims.sequences(tokenizer, held_out)
    truth = true_values(held_out, sequences, tokenizer, max(10, round(scale * COMPLETIONS)))

    def measured(gvm, rows):
        parameters = AutoModelForTokenClassification.from_pretrained(gvm).num_parameters()
        errors = squared_errors(claims.token_values(gvm, sequences), truth)
        return {"parameters": parameters, "rows": rows} | claims.pair_accuracy(gvm) | errors

    every = len(claims.read_lines(start["data"] / "scored.jsonl"))
    largest = measured(claims.train_gvm(folder / "gvm", sft, start), every)
    sizes = [measured(smaller_model(folder, seed, start, *size), every) for size in SIZES]
    data = [measured(*less_data(folder, sft, start, share)) for share in SHARES]
    noise = mean(variance for *_, variance in truth)
    return {"size": sizes + [largest], "data": data + [largest],
            "truth": {"places": len(truth), "rms standard error": noise ** 0.5,
                      "error of a constant": pvariance([true for *_, true, _ in truth]) - noise}}


# ---- 4. The answer ----
def slope(points, size, measure):
    """Gain in a measure per doubling of a size."""
    return linear_regression([log2(point[size]) for point in points],
                                        [point[measure] for point in points]).slope


def answer(seeds, per_seed):
    axes = {"size": ("parameters", "a larger model"), "data": ("rows", "more data")}
    found, per_doubling = {}, {}
    for axis, (size, words) in axes.items():
        doublings = mean(log2(points[-1][size] / points[-2][size]) for points in per_seed(axis))
        for measure, (unit, factor) in MEASURES.items():
            sign = -1 if measure == "error" else 1            # what is better
            slopes = [factor * slope(points, size, measure) for points in per_seed(axis)]
            steps = [factor * (points[-1][measure] - points[-2][measure]) for points in per_seed(axis)]
            per_doubling[axis, measure] = slopes
            found[f"{words} is better: {unit}"] = (verdict([sign * x for x in slopes]),
                                                   f"{cell(slopes)} per doubling of {size}")
            found[f"{words} still helps at the last step: {unit}"] = (
                verdict([sign * x for x in steps]), f"{cell(steps)} for {doublings:.1f} doublings")
    table_8 = (70.55 - 63.61) / log2(13 / 3)                  # its smallest and its largest model
    (size, less), (data, less_of_data) = (
        (cell(per_doubling[axis, "mean"], 2), cell(per_doubling[axis, "error"], 4)) for axis in axes)
    finding = (f"A doubling of the parameters changes the pair accuracy of the mean value by {size} points "
               f"(Table 8, from 3 to 13 billion: {table_8:.2f}), a doubling of the data by {data} points; "
               f"the squared error against the true Q changes by {less} and {less_of_data}.")

    tables = [f"Truth: {cell(per_seed('truth', 'places'), 0)} places per seed, root mean square standard "
              f"error {cell(per_seed('truth', 'rms standard error'))}; a constant would have a squared error "
              f"of {cell(per_seed('truth', 'error of a constant'))}.", ""]
    points = [(axis, step) for axis in axes for step in range(len(per_seed(axis)[0]))][:-1]  # largest: once
    tables += claims.table(
        f"parameters | answers | accuracy, mean value | last value | squared error | {' | '.join(PLACES)}",
        [[f"{per_seed(*point, size)[0]:,}" for size in ("parameters", "rows")]
         + [per_seed(*point, key) for key in (*MEASURES, *PLACES)] for point in points])

    picture, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    full = per_seed("size")[0][-1]
    for axis, colour, name in (("size", "tab:blue", "parameters"), ("data", "tab:orange", "scored answers")):
        shares = [point[axes[axis][0]] / full[axes[axis][0]] for point in per_seed(axis)[0]]
        for measure, style in (("mean", "-"), ("last", "--"), ("error", "-")):
            claims.draw(panels[int(measure == "error")], shares, [
                per_seed(axis, step, measure) for step in range(len(shares))], fmt=f"o{style}", color=colour,
                label=f"{name}, {measure}")
    for panel, title, y in ((panels[0], "Which answer is better?", "held-out pair accuracy"),
                            (panels[1], "Error against the true Q", "squared error (score units squared)")):
        panel.set_xscale("log", base=2)
        claims.label(panel, f"{title} ({len(seeds)} seeds)",
                     f"share of {full['parameters']:,} parameters, or of {full['rows']:,} answers", y)
    return found, tables, finding, picture


if __name__ == "__main__":
    claims.run(__doc__, run_seed, answer)
