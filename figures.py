"""Stage 4: pictures. Where in an answer does the value fall, and how did the policy learn?

    python figures.py tokens --gvm runs/atlas/gvm --output runs/atlas/figures
    python figures.py curves --runs runs/atlas/dvpo --judge atlas.py:oracle --output runs/atlas/figures
    python figures.py compare --results results/compare.json --output runs/atlas/figures

`tokens` is the paper's Figure 3: every token of one or more answers, coloured by the value the GVM gives right after it
(PNG, and a self-contained HTML page in which the mouse shows the numbers).
`curves` is Figure 4: what the policy's answers were worth, step by step.
`compare` draws what `make compare` measured: all methods, against rollouts and against time.
"""
import html
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
import torch
import yaml
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

matplotlib.use("Agg")                                         # files, no window
import matplotlib.pyplot as plt  # noqa: E402


# ---- 1. Arguments ----
@dataclass
class TokensArgs:
    gvm: str = HfArg(default="runs/atlas/gvm", help="global value model, the output of train_gvm.py")
    prompt: str = HfArg(default="As an island, is Beijing located in Asia?", help="the question (default: Figure 3's)")
    responses: list[str] = HfArg(default_factory=lambda: [
        "Beijing is not an island, but it is in Asia. It is the capital of China.",
        "Beijing is an island, and it is in Asia. It is the capital of China."], help="answers to compare")
    output: str = HfArg(default="runs/atlas/figures", help="folder for tokens.png and tokens.html")
    overwrite: bool = HfArg(default=False, help="replace the figures that are there")


@dataclass
class CurvesArgs:
    runs: list[str] = HfArg(default_factory=lambda: ["runs/atlas/dvpo"], help="run folders, the outputs of training")
    judge: str = HfArg(default="", help="FILE.py:FUNCTION, (prompt, response) -> score: draws the true score as well")
    output: str = HfArg(default="runs/atlas/figures", help="folder for curves.png")
    overwrite: bool = HfArg(default=False, help="replace the figure that is there")


@dataclass
class CompareArgs:
    results: str = HfArg(default="results/compare.json", help="what experiments/compare.py wrote")
    output: str = HfArg(default="runs/atlas/figures", help="folder for compare.png")
    overwrite: bool = HfArg(default=False, help="replace the figure that is there")


def fail(message):
    """Ends the program with one clear line and exit status 1. For what the user can mend; bugs keep their traceback."""
    raise SystemExit(f"error: {message}")


def parse_args(cls, argv):
    """Command line -> dataclass. `script.py recipe.yaml --lr 1e-5`: the recipe's section that is named like the script
    (sft, train_gvm, ...) gives the settings, the flags after it win. What is unknown ends the program."""
    parser = HfArgumentParser(cls)
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe, section = Path(argv[0]), Path(sys.argv[0]).stem
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None
        if not isinstance(settings, dict) or not isinstance(settings.get(section), dict):
            fail(f"{recipe}: no such recipe, or no section {section!r} in it")
        argv = [word for key, value in settings[section].items() for word in (f"--{key}", str(value))] + argv[1:]
    return cls(**vars(parser.parse_args(argv)))


# ---- 2. Reading ----
def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt (a string is one user turn; or a list of chat messages), ready for the answer to begin.

    The chat template writes BOS itself where the model wants one: tokenising its text again would double it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def encode_response(tokenizer, response):
    """Token ids y^1..y^T of a response. y^T is EOS: to stop is an action too, and has to be learned."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids + [tokenizer.eos_token_id]


def load(auto_class, name, kind=None, **kwargs):
    """auto_class.from_pretrained(name), with one clear line where that cannot work.

    kind  "policy" refuses value and reward models, "value" refuses policies: transformers would load either one with
          a fresh, random head.
    """
    transformers_logging.set_verbosity_error()                # a new head is expected here, not news
    transformers_logging.disable_progress_bar()
    folder = Path(name)
    local = folder.exists() or name.count("/") > 1 or (folder.parent != Path() and folder.parent.is_dir())
    if local and not any(folder.glob("*config.json")):
        fail(f"{name}: no model in this folder (no config.json). Was the stage before this one run?")
    try:
        made_as = (AutoConfig.from_pretrained(name).architectures or ["?"])[0] if kind else "?"
        is_value = made_as.endswith(("ForTokenClassification", "ForSequenceClassification"))
        if kind and is_value != (kind == "value"):
            fail(f"{name}: holds a {made_as}; a {'value' if kind == 'value' else 'language'} model is wanted here")
        if not kind:
            return auto_class.from_pretrained(name, **kwargs)
        model, report = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
    except Exception as problem:                              # transformers, safetensors and the hub have many kinds
        reason = (str(problem).strip() or repr(problem)).splitlines()[0]
        fail(f"{name}: {auto_class.__name__} cannot load it ({reason})")
    new_head = kind == "policy" and auto_class.__name__.endswith(("TokenClassification", "SequenceClassification"))
    missing = [key for key in report["missing_keys"] if not (new_head and key.startswith(("score.", "classifier.")))]
    return fail(f"{name}: the weights of {missing[0]} and {len(missing) - 1} more are missing") if missing else model


def load_judge(place):
    """FILE.py:FUNCTION -> the function."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        fail(f"--judge {place}: no file {file!r}; it wants FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(Path(file).stem, module)           # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as problem:                              # whatever the user's file does
        fail(f"--judge {place}: {file} cannot be imported ({type(problem).__name__}: {problem})")
    function = getattr(module, name, None)
    return function if callable(function) else fail(f"--judge {place}: {file} has no function {name!r}")


def judged_score(judge, place, prompt, response):
    """The judge's score of one answer, which has to be a finite number."""
    try:
        score = float(judge(prompt, response))
    except Exception as problem:                              # whatever the user's judge does
        fail(f"--judge {place}: {type(problem).__name__}: {problem} (prompt {prompt!r:.80})")
    return score if math.isfinite(score) else fail(f"--judge {place}: score {score} (prompt {prompt!r:.80})")


def new_file(folder, name, overwrite):
    """The path of a figure to write; refuses one that exists, without --overwrite."""
    path = Path(folder) / name
    if path.exists() and not overwrite:
        fail(f"{path}: exists already. Choose another --output, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def token_texts(tokenizer, ids):
    """The text that each token adds: with byte-level tokens one character may need several; the last one shows it."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):
            texts.append("")                                  # in the middle of a character
        else:
            texts.append(text[len(shown):])
            shown = text
    return texts


# ---- 3. Token values (Figure 3) ----
@torch.no_grad()
def response_values(gvm, tokenizer, prompt, response):
    """[(text of the token, its value in units of the training scores), ...] of one response, EOS included."""
    prompt_ids, ids = encode_prompt(tokenizer, prompt), encode_response(tokenizer, response)
    q = gvm(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids):, 0].float()  # (T,)
    made = getattr(gvm.config, "gvm", {"reward_std": 1.0, "reward_mean": 0.0})
    return list(zip(token_texts(tokenizer, ids), (q * made["reward_std"] + made["reward_mean"]).tolist()))


def colour(value, limit):
    """Red below zero, white at zero, blue above; one scale for all answers. Value -> (r, g, b, a)."""
    return matplotlib.colormaps["RdBu"](0.5 + 0.3 * max(-1.0, min(1.0, value / limit)))


def draw_tokens(path, prompt, answers, columns=88):
    """The heat map as a PNG. answers: one response_values list per answer."""
    limit = max(abs(value) for answer in answers for _, value in answer) or 1.0
    boxes, row = [], 0
    for number, answer in enumerate(answers, 1):
        boxes.append((row, 0, f"Answer {number}", None))
        row, column = row + 1, 0
        for text, value in answer:
            text = text.replace("\n", "\u21b5").strip() or "\u00b7"
            width = max(len(text), 5) + 1
            if column and column + width > columns:
                row, column = row + 1, 0
            boxes.append((row, column, text, value))
            column += width
        row += 1
    figure, axes = plt.subplots(figsize=(0.115 * columns, 0.42 * row + 0.6))
    axes.set(xlim=(0, columns), ylim=(row + 0.1, -0.1))
    axes.axis("off")
    axes.set_title(prompt.replace("$", r"\$"), loc="left", fontsize=11)
    for row, column, text, value in boxes:
        label = text.replace("$", r"\$")
        if value is None:
            axes.text(column, row + 0.7, label, fontsize=9, fontweight="bold")
            continue
        width = max(len(text), 5) + 0.85
        axes.add_patch(plt.Rectangle((column, row + 0.04), width, 0.92, color=colour(value, limit), linewidth=0))
        axes.text(column + width / 2, row + 0.42, label, ha="center", fontsize=8, family="monospace")
        axes.text(column + width / 2, row + 0.86, f"{value:+.2f}", ha="center", fontsize=6, color="#333333")
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


def write_token_page(path, prompt, answers):
    """The heat map as one HTML page without any outside file. All text is escaped: an answer may contain HTML."""
    limit = max(abs(value) for answer in answers for _, value in answer) or 1.0
    parts = []
    for number, answer in enumerate(answers, 1):
        spans, before = [], None
        for text, value in answer:
            change = "" if before is None else f", change {value - before:+.3f}"
            hover = html.escape(f"{text.strip() or repr(text)}: value {value:+.3f}{change}", quote=True)
            shade = matplotlib.colors.to_hex(colour(value, limit))
            spans.append(f'<span style="background:{shade}" title="{hover}">{html.escape(text)}</span>')
            before = value
        parts.append(f"<h2>Answer {number}</h2>\n<p dir=\"auto\">{''.join(spans)}</p>")
    style = ("body{font:16px/1.9 sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color:#111;background:#fff}"
             "p{white-space:pre-wrap}span{padding:.15em 0}h1{font-size:1.2em}h2{font-size:1em;margin-bottom:0}")
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Token values</title>'
        f"<style>{style}</style></head><body>\n<h1>{html.escape(prompt)}</h1>\n"
        f"<p>The value Q(tau, s, a) of each token, read after it: blue above zero, red below (scale &plusmn;"
        f"{limit:.2f}). Move the mouse over a token for the numbers.</p>\n"
        f"{chr(10).join(parts)}\n</body></html>\n", encoding="utf-8")


def tokens(args):
    png = new_file(args.output, "tokens.png", args.overwrite)
    page = new_file(args.output, "tokens.html", args.overwrite)
    tokenizer = load(AutoTokenizer, args.gvm)
    gvm = load(AutoModelForTokenClassification, args.gvm, kind="value", dtype=torch.float32).eval()
    answers = [response_values(gvm, tokenizer, args.prompt, response) for response in args.responses]
    draw_tokens(png, args.prompt, answers)
    write_token_page(page, args.prompt, answers)
    print(f"{png}\n{page}")


# ---- 4. Learning curves (Figure 4) ----
def read_lines(path):
    """The rows of a JSON-lines log of this project."""
    if not path.is_file():
        fail(f"{path}: no such file. Is {path.parent} the run folder of a policy?")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def curves(args):
    png = new_file(args.output, "curves.png", args.overwrite)
    judge = load_judge(args.judge) if args.judge else None
    panels = {"value": "GVM value, or reward model's\nscore, of the answers",
              "kl": "KL to the reference\n(nats per answer)", "response_length": "answer length (tokens)",
              "entropy": "entropy (nats per token)"}
    if judge:
        panels = {"score": "true score of the answers"} | panels
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.8), layout="constrained")
    for run in args.runs:
        records = read_lines(Path(run) / "metrics.jsonl")
        if not records or "step" not in records[0]:
            fail(f"{run}: has no steps in its metrics.jsonl. Is it the run folder of a policy?")
        steps = [record["step"] for record in records]
        if judge:
            scores = {step: [] for step in steps}
            for row in read_lines(Path(run) / "rollouts.jsonl"):               # a run that was killed may lack the last
                scores[row["step"]].append(judged_score(judge, args.judge, row["prompt"], row["response"]))
            records = [record | {"score": sum(scores[record["step"]]) / len(scores[record["step"]])}
                       for record in records]
        for panel, name in zip(axes, panels):
            column = "reward" if name == "value" and name not in records[0] else name      # a baseline
            panel.plot(steps, [record[column] for record in records], label=Path(run).name, linewidth=1.2)
    for panel, title in zip(axes, panels.values()):
        panel.set_xlabel("step (one batch of rollouts)")
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(png, dpi=150)
    plt.close(figure)
    print(png)


# ---- 5. Comparison (Tables 1, 2, 7 and Figure 4 in kind) ----
def compare(args):
    """results/compare.json as a picture: score against rollouts, against time, and on held-out prompts."""
    png = new_file(args.output, "compare.png", args.overwrite)
    if not Path(args.results).is_file():
        fail(f"{args.results}: no such file (make compare writes it)")
    results = json.loads(Path(args.results).read_text(encoding="utf-8"))
    seeds, methods = list(results["seeds"].values()), ["SFT", *results["methods"]]
    figure, (by_rollouts, by_time, final) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    for number, method in enumerate(methods):
        colour_, scores = f"C{number}", [seed[method]["oracle"] for seed in seeds]
        mean = sum(scores) / len(scores)
        final.plot([mean], [-number], "o", color=colour_)
        final.plot(scores, [-number] * len(scores), "|", color=colour_, markersize=12)
        final.text(mean, 0.18 - number, f"{mean:.2f}", ha="center", fontsize=8)
        if "curve" not in seeds[0][method]:
            continue                                                           # SFT and DPO have no rollouts
        curve = numpy.array([seed[method]["curve"] for seed in seeds])                             # (seeds, steps)
        smooth = numpy.stack([curve[:, max(0, step - 4):step + 1].mean(1) for step in range(curve.shape[1])], 1)
        steps = numpy.arange(1, smooth.shape[1] + 1)
        seconds = results["step_seconds"].get(method, results["step_seconds"]["DVPO"])["total"]
        for panel, x in ((by_rollouts, steps * results["rollouts_per_step"]), (by_time, steps * seconds)):
            panel.plot(x, smooth.mean(0), color=colour_, label=method, linewidth=1.4)
            panel.fill_between(x, smooth.min(0), smooth.max(0), color=colour_, alpha=0.1, linewidth=0)
    for panel, label in ((by_rollouts, "rollouts"), (by_time, "training time (s, two CPU cores)"),
                         (final, "oracle score on held-out prompts")):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    by_rollouts.set_ylabel(f"oracle score of the rollouts\n(5 steps, mean and range of {len(seeds)} seeds)")
    by_rollouts.legend(fontsize=8)
    final.set_yticks([-number for number in range(len(methods))], methods)
    final.set_ylim(0.6 - len(methods), 0.6)
    figure.savefig(png, dpi=150)
    plt.close(figure)
    print(png)


# ---- 6. Main ----
COMMANDS = {"tokens": (TokensArgs, tokens), "curves": (CurvesArgs, curves), "compare": (CompareArgs, compare)}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        fail(f"the first word must be one of {', '.join(COMMANDS)} (python figures.py tokens --help)")
    arguments, command = COMMANDS[argv[0]]
    command(parse_args(arguments, argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
