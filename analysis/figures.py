"""Pictures: where in an answer does the value fall, and how did the policy learn?

    python analysis/figures.py tokens --gvm runs/atlas/gvm --policy runs/atlas/dvpo
    python analysis/figures.py curves --runs runs/atlas/dvpo --judge data/atlas.py:oracle
    python analysis/figures.py wins --results runs/atlas/eval/policy.json

tokens   Figure 3: every token of one or more answers, coloured by the value that the GVM gives right after
         it, as a PNG and as a page of HTML in which the mouse shows the numbers. (The PNG has no coloured
         emoji and no right-to-left text; the page has.)
curves   Figure 4: what the policy's answers were worth, step by step; seeds become a mean and a band.
wins     Figure 2: how often one model's answer beats, equals and loses to each other model's.
"""
import html
import json
import sys
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import (encode_prompt, encode_response, fail, load_judge, load_model, load_tokenizer,  # noqa: E402
                      new_file, parse_args)

matplotlib.use("Agg")                                         # files, no window
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import font_manager  # noqa: E402

# DejaVu comes with matplotlib; the others draw Chinese, Japanese, Korean and emoji, where they are installed.
WANTED = ["DejaVu Sans Mono", "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei",
          "WenQuanYi Micro Hei", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "Noto Emoji", "Segoe UI Emoji"]
FONTS = [name for name in WANTED if name in {font.name for font in font_manager.fontManager.ttflist}]
matplotlib.rcParams["text.parse_math"] = False                # a dollar sign in an answer is just that
matplotlib.rcParams["font.family"] = ["DejaVu Sans", *FONTS]
# Red, white, blue, all light enough for dark text.
COLOURS = matplotlib.colors.ListedColormap(matplotlib.colormaps["RdBu"](numpy.linspace(0.2, 0.8, 255)))


# ---- 1. Arguments ----
@dataclass
class TokensArgs:
    gvm: str = HfArg(default="runs/atlas/gvm", help="global value model, the output of train_gvm.py")
    prompt: str = HfArg(default="As an island, is Beijing located in Asia?", help="the question (Figure 3's)")
    responses: list[str] = HfArg(default_factory=lambda: [
        "Beijing is not an island, but it is in Asia. It is the capital of China.",
        "Beijing is an island, and it is in Asia. It is the capital of China."], help="answers to compare")
    policy: str = HfArg(default="", help="policy whose probability of each token the page shows, too")
    output: str = HfArg(default="runs/atlas/figures", help="folder for tokens.png and tokens.html")
    overwrite: bool = HfArg(default=False, help="replace the figures that are there")


@dataclass
class CurvesArgs:
    runs: list[str] = HfArg(default_factory=lambda: ["runs/atlas/dvpo"], help="run folders, or NAME=FOLDER; "
                            "runs with the same NAME= are seeds of one curve")
    judge: str = HfArg(default="", help="FILE.py:FUNCTION, (prompt, response) -> score: draws it as well")
    x: Literal["step", "seconds"] = HfArg(default="step", help="horizontal axis; seconds: of training")
    output: str = HfArg(default="runs/atlas/figures", help="folder for curves.png")
    overwrite: bool = HfArg(default=False, help="replace the figure that is there")


@dataclass
class WinsArgs:
    results: str = HfArg(default="runs/atlas/eval/policy.json", help="of evaluate.py policy, or of judge.py")
    model: str = HfArg(default="", help="whose wins to draw, against all others (default: the last model)")
    output: str = HfArg(default="runs/atlas/figures", help="folder for wins.png")
    overwrite: bool = HfArg(default=False, help="replace the figure that is there")


def read_results(file, field):
    results = json.loads(Path(file).read_text()) if Path(file).is_file() else fail(f"{file}: no such file")
    return results if results.get(field) else fail(f'{file}: has no "{field}"')


def save(figure, png, dpi=150):
    figure.savefig(png, dpi=dpi)
    plt.close(figure)
    print(png)


# ---- 2. Token values (Figure 3) ----
def token_texts(tokenizer, ids):
    """The text that each token adds. Of a character that needs several byte-level tokens, the last has it."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd")
        texts.append("" if unfinished else text[len(shown):])
        shown = shown if unfinished else text
    return texts


@torch.no_grad()
def response_values(gvm, tokenizer, prompt, response, policy=None):
    """[(text, value, change, probability), ...] of the tokens of one response, its end included.

    The value is in units of the training scores. The first token's change is from V(s_1), read at the last
    token of the prompt. probability is that of the token under the policy (None without one).
    """
    prompt_ids, response_ids = encode_prompt(tokenizer, prompt), encode_response(tokenizer, response)
    ids, before, T = torch.tensor([[*prompt_ids, *response_ids]]), len(prompt_ids) - 1, len(response_ids)
    q = gvm(input_ids=ids, use_cache=False).logits[0, before:, 0]                        # (1 + T,)
    q = q * gvm.config.gvm["reward_std"] + gvm.config.gvm["reward_mean"]
    probability = [None] * T
    if policy:
        logits = policy(input_ids=ids, use_cache=False).logits[0, before:-1]             # (T, V): s_t is seen
        probability = logits.softmax(-1)[range(T), response_ids].tolist()
    return list(zip(token_texts(tokenizer, response_ids), q[1:].tolist(), q.diff().tolist(), probability))


def colour_scale(gvm, answers):
    """One scale for all answers: white is the mean of the training scores."""
    centre = gvm.config.gvm["reward_mean"]
    limit = max(abs(value - centre) for answer in answers for _, value, _, _ in answer) or 1.0
    return matplotlib.colors.Normalize(centre - limit, centre + limit)


def heading(number, answer):
    values = [value for _, value, _, _ in answer]
    mean = sum(values) / len(values)
    return f"Answer {number}: mean {mean:+.2f}, last {values[-1]:+.2f}, {len(values)} tokens"


def lay_out(answer, columns):
    """[(row, column, width, text, value), ...]: tokens in rows of so many columns of a monospaced font."""
    boxes, row, column = [], 0, 0
    for text, value, _, _ in answer:
        shown = text.replace("\n", "\u21b5").strip() or ("\u00b7" if text else "\u2026")
        shown = "".join(c if c.isprintable() else "\u00b7" for c in shown[:20])
        width = 1 + max(5, sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown))
        if column and column + width > columns:
            row, column = row + 1, 0
        boxes.append((row, column, width, shown, value))
        row, column = (row + 1, 0) if "\n" in text else (row, column + width)
    return boxes


def draw_tokens(png, prompt, answers, scale, columns=88):
    """The heat map as a PNG, in units of a character. answers: one response_values list per answer."""
    blocks = [lay_out(answer, columns) for answer in answers]
    lines = textwrap.wrap(prompt, columns, max_lines=4, placeholder=" \u2026")
    top = 1.7 + 0.7 * len(lines)                              # rows above the answers: the prompt, the scale
    rows = sum(block[-1][0] + 2 for block in blocks)          # with a heading for each
    size = (0.092 * (columns + 2), 0.33 * (rows + top))
    figure = plt.figure(figsize=size)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(-1, columns + 1), ylim=(rows, -top))
    axes.axis("off")
    for number, line in enumerate(lines, 1):
        axes.text(0, 0.7 * number - top, line, fontsize=11)
    bar = axes.inset_axes([1, -1.2, 28, 0.35], transform=axes.transData)
    figure.colorbar(matplotlib.cm.ScalarMappable(scale, COLOURS), cax=bar, orientation="horizontal",
                    format="{x:+.2f}", ticks=numpy.linspace(scale.vmin, scale.vmax, 3))
    bar.tick_params(labelsize=7, length=2)
    first = 0
    for number, (block, answer) in enumerate(zip(blocks, answers), 1):
        axes.text(0, first + 0.7, heading(number, answer), fontsize=9, fontweight="bold")
        for row, x, width, shown, value in block:
            y, colour = first + 1 + row, COLOURS(scale(value))
            axes.add_patch(plt.Rectangle((x, y + 0.04), width - 0.15, 0.92, color=colour, linewidth=0))
            axes.text(x + width / 2, y + 0.46, shown, ha="center", fontsize=8, family=FONTS)
            axes.text(x + width / 2, y + 0.86, f"{value:+.2f}", ha="center", fontsize=6, color="#111111")
        first += block[-1][0] + 2
    save(figure, png, dpi=min(160, 60000 / max(size)))        # a side has at most 65535 pixels


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Token values</title><style>
body{font:16px/1.9 sans-serif;margin:2em auto 4em;padding:0 1em;max-width:80em;color:#111;background:#fff}
h1{font-size:1.2em;line-height:1.4}h2{font-size:1em;margin:1.5em 0 0}p{margin:0}
h1,section p{white-space:break-spaces;overflow-wrap:anywhere}
#scale{display:flex;justify-content:space-between;max-width:25em;padding:0 .5em;margin:.5em 0}
span{padding:.15em .06em}span:hover{outline:2px solid #111}
span:hover::after{content:attr(data-t);position:fixed;left:1em;bottom:1em;padding:.2em .8em;
background:#111;color:#fff;direction:ltr;white-space:normal}
</style></head><body>
"""


def write_token_page(page, prompt, answers, scale, note=""):
    """The heat map as one HTML page without any outside file. All text is escaped: an answer may be HTML."""
    def colour(value):
        return matplotlib.colors.to_hex(COLOURS(scale(value)))

    ticks = numpy.linspace(scale.vmin, scale.vmax, 9)
    parts = [PAGE, f'<h1 dir="auto">{html.escape(prompt)}</h1>\n'
             f"<p>Q(tau, s, a) of each token, read after it. White: the mean of the training scores. "
             f"Point at a token for its numbers.{note}</p>\n"
             f'<div id="scale" style="background:linear-gradient(90deg,{",".join(map(colour, ticks))})">'
             + "".join(f"<b>{value:+.2f}</b>" for value in ticks[::4]) + "</div>\n"]
    for number, answer in enumerate(answers, 1):
        parts.append(f'<section><h2>{heading(number, answer)}</h2>\n<p dir="auto">')
        for text, value, change, probability in answer:
            hover = (text if text.isprintable() else ascii(text)) or "part of a character"
            hover += f": value {value:+.3f}, change {change:+.3f}"
            hover += "" if probability is None else f", probability {probability:.3g}"
            parts.append(f'<span style="background:{colour(value)}" data-t="{html.escape(hover)}">'
                         f'{html.escape(text)}</span>')
        parts.append("</p></section>\n")
    page.write_text("".join([*parts, "</body></html>\n"]), encoding="utf-8")
    print(page)


def draw_token_figures(args):
    png, page = Path(args.output, "tokens.png"), Path(args.output, "tokens.html")
    for file in (png, page):
        new_file(file, args.overwrite)
    tokenizer, policy = load_tokenizer(args.gvm), None
    length = max(len(encode_prompt(tokenizer, args.prompt)) + len(encode_response(tokenizer, response))
                 for response in args.responses)
    gvm = load_model(AutoModelForTokenClassification, args.gvm, tokenizer, length, trained=True).eval()
    if not hasattr(gvm.config, "gvm"):
        fail(f"{args.gvm}: not made by train_gvm.py (a critic's values are V(s_t), read before the token)")
    if args.policy:
        policy = load_model(AutoModelForCausalLM, args.policy, tokenizer, length).eval()
        if load_tokenizer(args.policy).get_vocab() != tokenizer.get_vocab():
            fail(f"{args.policy}: another tokenizer than {args.gvm}")
    answers = [response_values(gvm, tokenizer, args.prompt, response, policy) for response in args.responses]
    pairs = gvm.config.gvm["tau_pairs"]
    note = f" The model was trained with --tau_pairs {pairs}; here it reads no tau." if pairs else ""
    scale = colour_scale(gvm, answers)
    draw_tokens(png, args.prompt, answers, scale)
    write_token_page(page, args.prompt, answers, scale, note)


# ---- 3. Learning curves (Figure 4) ----
PANELS = {"score": "judge's score of the answers", "value": "GVM value or reward-model score, own scale",
          "kl": "KL to the reference (nats per answer)", "response_length": "answer length (tokens)",
          "entropy": "entropy (nats per token)", "clip_fraction": "clip fraction"}


def read_lines(path):
    """The rows of a log. What follows the last line end was cut off when a run was stopped."""
    if not path.is_file():
        fail(f"{path}: no such file")
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def read_run(folder, judge):
    """{metric: (steps,) array} of a run: its logged numbers, "seconds" so far, the judge's mean "score"."""
    records = read_lines(Path(folder, "metrics.jsonl"))
    if not records or "seconds_update" not in records[0]:
        fail(f"{folder}: not the run folder of an online method, with a finished step")
    run = {name: numpy.array([record[name] for record in records]) for name in records[0]}
    run["seconds"] = sum(run[name] for name in run if name.startswith("seconds_")).cumsum()
    if "reward" in run:                                       # of the baselines
        run["value"] = run["reward"]
    if judge:
        scores = {step: [] for step in run["step"]}
        for row in read_lines(Path(folder, "rollouts.jsonl")):
            scores[row["step"]].append(judge(row["prompt"], row["response"]))
        run["score"] = numpy.array([numpy.mean(x or numpy.nan) for x in scores.values()])
    return run


def draw_curves(args):
    png, curves = Path(args.output, "curves.png"), {}
    judge = load_judge(args.judge) if args.judge else None
    new_file(png, args.overwrite)
    for run in args.runs:
        name, named, folder = run.rpartition("=")
        name = name if named else Path(folder).resolve().name
        if name in curves and not named:
            fail(f"{run}: another run is called {name}, too. Name it: OTHER={run}; the same NAME= for seeds")
        curves.setdefault(name, []).append(read_run(folder, judge))
    panels = [metric for metric in PANELS if any(metric in seeds[0] for seeds in curves.values())]
    several = max(map(len, curves.values())) > 1
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.4), layout="constrained")
    handles = {}
    for panel, metric in zip(axes.flat, panels):
        for number, (name, seeds) in enumerate(curves.items()):
            if metric not in seeds[0]:
                continue                                      # ReMax clips nothing
            shortest = min(len(seed["step"]) for seed in seeds)
            x = numpy.mean([seed[args.x][:shortest] for seed in seeds], 0)
            y = numpy.array([seed[metric][:shortest] for seed in seeds])                 # (seeds, steps)
            label = f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
            handles[label], = panel.plot(x, y.mean(0), color=f"C{number}", linewidth=1.3)
            if len(seeds) > 1:
                panel.fill_between(x, y.min(0), y.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
        panel.set_title(PANELS[metric], fontsize=9, loc="left")
        label = {"step": "step (one batch of rollouts)", "seconds": "training time (s)"}[args.x]
        panel.set_xlabel(label, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(panels):]:
        panel.remove()
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5, fontsize=9,
                  title="mean, lowest and highest of the seeds" if several else None)
    save(figure, png)


# ---- 4. Wins (Figure 2) ----
def draw_wins(args):
    """How often --model's answer wins against, ties with and loses to every other model's."""
    png, results = Path(args.output, "wins.png"), read_results(args.results, "outcomes")
    new_file(png, args.overwrite)
    left = args.model or list(results["outcomes"])[-1]
    rows = results["outcomes"].get(left) or fail(f"{args.results}: compares {left} with nothing")
    figure, axes = plt.subplots(figsize=(7.5, 1.3 + 0.55 * len(rows)), layout="constrained")
    start = numpy.zeros(len(rows))
    for outcome, colour in (("win", "#6baed6"), ("tie", "#d9d9d9"), ("lose", "#f4a582")):
        share = numpy.array([100 * row[outcome] for row in rows.values()])
        label = f"{left} {outcome}s"
        bars = axes.barh(range(len(rows)), share, left=start, color=colour, height=0.72, label=label)
        axes.bar_label(bars, [f"{x:.0f}" if x >= 3 else "" for x in share], label_type="center", fontsize=9)
        start += share
    labels = [f"{right}\n({row['pairs']} pairs)" for right, row in rows.items()]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    unjudged = f"; {results['unjudged']} answers without a verdict" if results.get("unjudged") else ""
    axes.set(xlim=(0, 100), xlabel=f"% of the pairs of answers{unjudged}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    save(figure, png)


# ---- 5. Main ----
COMMANDS = {"tokens": (TokensArgs, draw_token_figures), "curves": (CurvesArgs, draw_curves),
            "wins": (WinsArgs, draw_wins)}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        fail(f"the first word has to be one of {', '.join(COMMANDS)} (figures.py tokens --help)")
    arguments, command = COMMANDS[argv[0]]
    command(parse_args(arguments, argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
