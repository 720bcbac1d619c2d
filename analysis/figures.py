"""Stage 4: pictures. Where in an answer does the value fall, and how did the policy learn?

    python figures.py tokens --gvm runs/atlas/gvm --output runs/atlas/figures
    python figures.py curves --runs runs/atlas/dvpo --judge atlas.py:oracle --output runs/atlas/figures
    python figures.py wins --results runs/atlas/eval/policy.json --output runs/atlas/figures
    python figures.py compare --results results/compare.json --output runs/atlas/figures

`tokens` is the paper's Figure 3: every token of one or more answers, coloured by the value the GVM gives right after it
(PNG, and a self-contained HTML page in which the mouse shows the numbers). The PNG has right-to-left text in the right
order, but matplotlib joins no Arabic or Hindi letters and knows no coloured emoji: for these, see the page.
`curves` is Figure 4: what the policy's answers were worth, step by step; seeds become a mean and a band.
`wins` is Figure 2: how often one model's answer beats, equals and loses to each other model's.
`compare` draws what `make compare` measured: all methods, against rollouts and against time.
"""
import html
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
import torch
import yaml
from matplotlib import font_manager
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer,
                          HfArgumentParser)
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

matplotlib.use("Agg")                                         # files, no window
import matplotlib.pyplot as plt  # noqa: E402

matplotlib.rcParams["text.parse_math"] = False                # a dollar sign in a text or a name is just that


# ---- 1. Arguments ----
@dataclass
class TokensArgs:
    gvm: str = HfArg(default="runs/atlas/gvm", help="global value model, the output of train_gvm.py")
    prompt: str = HfArg(default="As an island, is Beijing located in Asia?", help="the question (default: Figure 3's)")
    responses: list[str] = HfArg(default_factory=lambda: [
        "Beijing is not an island, but it is in Asia. It is the capital of China.",
        "Beijing is an island, and it is in Asia. It is the capital of China."], help="answers to compare")
    policy: str = HfArg(default="", help="language model whose probability of each token the page shows as well")
    output: str = HfArg(default="runs/atlas/figures", help="folder for tokens.png and tokens.html")
    overwrite: bool = HfArg(default=False, help="replace the figures that are there")


@dataclass
class CurvesArgs:
    runs: list[str] = HfArg(default_factory=lambda: ["runs/atlas/dvpo"], help="run folders, or NAME=FOLDER; "
                            "runs of the same name (without NAME=: the folder's) are seeds of one curve")
    judge: str = HfArg(default="", help="FILE.py:FUNCTION, (prompt, response) -> score: draws the true score as well")
    output: str = HfArg(default="runs/atlas/figures", help="folder for curves.png")
    overwrite: bool = HfArg(default=False, help="replace the figure that is there")


@dataclass
class WinsArgs:
    results: str = HfArg(default="runs/atlas/eval/policy.json", help="what evaluate.py policy or judge wrote")
    model: str = HfArg(default="", help="whose wins to draw, against all others (default: the last in the file)")
    output: str = HfArg(default="runs/atlas/figures", help="folder for wins.png")
    overwrite: bool = HfArg(default=False, help="replace the figure that is there")


@dataclass
class CompareArgs:
    results: str = HfArg(default="results/compare.json", help="what experiments/compare.py wrote")
    output: str = HfArg(default="runs/atlas/figures", help="folder for compare.png")
    overwrite: bool = HfArg(default=False, help="replace the figure that is there")


def fail(message):
    """Ends the program with one clear line and exit status 1. For what the user can mend; bugs keep their traceback."""
    raise SystemExit(f"error: {' '.join(message.splitlines())}")


def parse_args(cls, argv):
    """Command line -> dataclass. `script.py recipe.yaml --lr 1e-5`: the recipe's section that is named like the script
    (sft, train_gvm, ...) gives the settings, the flags after it win. What is unknown ends the program."""
    parser = HfArgumentParser(cls, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            fail(f"{flag} is given twice (several values stand behind one flag)")
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe, section = Path(argv[0]), Path(sys.argv[0]).stem
        try:
            settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None
        except Exception as problem:                          # a broken !!int or !!timestamp is no YAMLError
            fail(f"{recipe}: not a recipe in YAML ({' '.join(str(problem).split())})")
        if not isinstance(settings, dict) or not isinstance(settings.get(section), dict):
            fail(f"{recipe}: no such recipe, or no section {section!r} in it")
        argv = [word for key, value in settings[section].items() for word in (f"--{key}", str(value))] + argv[1:]
    return cls(**vars(parser.parse_args(argv)))


# ---- 2. Reading ----
def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt (a string is one user turn; or a list of chat messages), ready for the answer to begin.

    The chat template writes BOS itself where the model wants one: tokenising its text again would double it.
    A control token spelled out in a message ("<|im_end|>", typed by a user or left in scraped text) would end the turn.
    It stays text, as in encode_response: a mark breaks it until the template's own control tokens are found.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern, mark = "|".join(map(re.escape, sorted(control, reverse=True))) or "(?!)", "\ufdd0"    # never a character
    broken = [message | {key: re.sub(pattern, lambda found: found[0][0] + mark + found[0][1:], message[key])
                         for key in ("role", "content")} for message in messages]
    try:
        text = tokenizer.apply_chat_template(broken, add_generation_prompt=True, tokenize=False)
        if not text.strip():
            raise ValueError("it writes nothing")
        if broken == messages:
            return tokenizer(text, add_special_tokens=False).input_ids
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        return [i for part in re.split(f"({pattern})", text) for i in
                ([control[part]] if part in control else tokenizer(part.replace(mark, ""), **plain).input_ids)]
    except Exception as problem:                              # the template's own raise_exception, or a fault in it
        fail(f"{tokenizer.name_or_path}: its chat template cannot write the prompt {str(prompt)[:80]!r} ({problem})")


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
    local = os.path.exists(name) or name.count("/") > 1 or (folder.parent != Path() and os.path.isdir(folder.parent))
    if local and not (os.path.isdir(name) and any(folder.glob("*config.json"))):
        fail(f"{name}: no model in this folder (no config.json). Was the stage before this one run?")
    safe = {"trust_remote_code": False}                       # no program that comes with a model is run
    try:
        made_as = (AutoConfig.from_pretrained(name, **safe).architectures or ["?"])[0] if kind else "?"
        is_value = made_as.endswith(("ForTokenClassification", "ForSequenceClassification"))
        if kind and is_value != (kind == "value"):
            fail(f"{name}: holds a {made_as}; a {'value' if kind == 'value' else 'language'} model is wanted here")
        if not kind:
            found = auto_class.from_pretrained(name, **safe, **kwargs)
            if auto_class is AutoTokenizer and found("a") and not found.eos_token:
                raise ValueError("no eos_token: a model could not be taught to stop")
            return found
        safe["use_safetensors"] = True                        # nor a pickle, which is one too
        model, report = auto_class.from_pretrained(name, output_loading_info=True, **safe, **kwargs)
    except Exception as problem:                              # transformers, safetensors and the hub have many kinds
        reason = (str(problem).strip() or repr(problem)).splitlines()[0]
        pickled = ". Weights in .bin are programs too: save them as safetensors" * (local and any(folder.glob("*.bin")))
        fail(f"{name}: {auto_class.__name__} cannot load it ({reason}){pickled}")
    new_head = kind == "policy" and auto_class.__name__.endswith(("TokenClassification", "SequenceClassification"))
    missing = [key for key in report["missing_keys"] if not (new_head and key.startswith(("score.", "classifier.")))]
    missing += [key for key in report["unexpected_keys"] if re.match(rf"{model.base_model_prefix}\..*weight$", key)]
    return fail(f"{name}: the weights of {missing[0]} and {len(missing) - 1} more do not fit its config.json: "
                f"missing, or more than it wants") if missing else model


def load_judge(place):
    """FILE.py:FUNCTION -> the function."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        fail(f"--judge {place}: no file {file!r}; it wants FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None:
        fail(f"--judge {place}: {file} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(Path(file).stem, module)           # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:                # whatever the user's file does
        fail(f"--judge {place}: {file} cannot be imported ({type(problem).__name__}: {' '.join(str(problem).split())})")
    function = getattr(module, name, None)
    return function if callable(function) else fail(f"--judge {place}: {file} has no function {name!r}")


def judged_score(judge, place, prompt, response):
    """The judge's score of one answer, which has to be a finite number."""
    try:
        score = float(judge(prompt, response))
    except (Exception, SystemExit) as problem:                # whatever the user's judge does
        fail(f"--judge {place}: {type(problem).__name__}: {' '.join(str(problem).split())} (prompt {prompt!r:.80})")
    return score if math.isfinite(score) else fail(f"--judge {place}: score {score} (prompt {prompt!r:.80})")


def new_output(path, overwrite):
    """A file to be written at the end, looked at before any work is done: its path, with its folder made."""
    path = Path(path)
    try:
        if path.is_dir():
            fail(f"{path}: is a folder, and a file of that name is to be written. Choose another --output")
        if path.exists() and not overwrite:
            fail(f"{path}: exists already. Choose another --output, or pass --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as problem:
        fail(f"{path}: cannot be written ({problem}). Choose another --output")
    return path


def read_json(path, maker):
    """The JSON object in a file that `maker` writes."""
    if not Path(path).is_file():
        fail(f"{path}: no such file ({maker} writes it)")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        fail(f"{path}: not JSON that can be read ({problem}). {maker} writes it")
    return content if isinstance(content, dict) else fail(f"{path}: not a JSON object. {maker} writes it")


def has_numbers(row, *names):
    """Is it a JSON object with a finite number under each name?"""
    return isinstance(row, dict) and all(type(row.get(name)) in (int, float) and math.isfinite(row[name])
                                         for name in names)


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


def load_tokenizer(folder):
    """The tokenizer of a model that takes part in a chat, with a pad token."""
    tokenizer = load(AutoTokenizer, folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.chat_template is None:
        fail(f"{folder}: the tokenizer has no chat template, so the model cannot be asked a question")
    return tokenizer


# ---- 3. Token values (Figure 3) ----
def load_gvm(folder):
    """(tokenizer, model) of a value model that says Q(tau, s, a): one number per token, read after it."""
    tokenizer, config = load_tokenizer(folder), load(AutoConfig, folder)
    if (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        fail(f"{folder}: holds a reward model, which scores whole answers. A token-level value model is wanted here: "
             f"the output of train_gvm.py")
    if getattr(config, "critic", False):
        fail(f"{folder}: holds a PPO critic, whose values are V(s_t), before the token: `evaluate.py values` reads it. "
             f"The output of train_gvm.py is wanted here")
    gvm = load(AutoModelForTokenClassification, folder, kind="value", dtype=torch.float32).eval()
    if gvm.config.num_labels != 1:
        fail(f"{folder}: has {gvm.config.num_labels} outputs per token; a value model has one")
    return tokenizer, gvm


@torch.no_grad()
def response_values(gvm, tokenizer, prompt, response, policy=None):
    """[(text, value, change, probability), ...] of the tokens of one response, EOS included.

    The value is in units of the training scores. The first token's change is from V(s_1), read at the last token of the
    prompt. probability is that of the token under the policy (None without one).
    """
    prompt_ids, response_ids = encode_prompt(tokenizer, prompt), encode_response(tokenizer, response)
    context = min(getattr(model.config, "max_position_embeddings", math.inf) for model in (gvm, policy or gvm))
    length = len(prompt_ids) + len(response_ids)
    if length > context:
        fail(f"--responses {response!r:.40}: with the prompt it has {length} tokens, the model's context is {context}")
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    scale = getattr(gvm.config, "gvm", {"reward_std": 1.0, "reward_mean": 0.0})
    q = gvm(input_ids=ids).logits[0, len(prompt_ids) - 1:, 0].float() * scale["reward_std"] + scale["reward_mean"]
    probability = [None] * len(response_ids)
    if policy:
        logits = policy(input_ids=ids).logits[0, len(prompt_ids) - 1:-1].float()  # (T, V): a position has seen s_t
        probability = logits.softmax(-1)[range(len(response_ids)), response_ids].tolist()
    return list(zip(token_texts(tokenizer, response_ids), q[1:].tolist(), q.diff().tolist(), probability))


# Red, white, blue, all light enough for dark text.
COLOURS = matplotlib.colors.ListedColormap(matplotlib.colormaps["RdBu"](numpy.linspace(0.2, 0.8, 255)))


def colour_scale(gvm, answers):
    """One scale for all answers: white is the mean of the training scores, the largest distance from it is an end."""
    centre = getattr(gvm.config, "gvm", {"reward_mean": 0.0})["reward_mean"]
    limit = max(abs(value - centre) for answer in answers for _, value, _, _ in answer) or 1.0
    return matplotlib.colors.Normalize(centre - limit, centre + limit)


def heading(number, answer):
    values = [value for _, value, _, _ in answer]
    return f"Answer {number + 1}: mean {sum(values) / len(values):+.2f}, last {values[-1]:+.2f}, {len(values)} tokens"


def right_to_left(text):
    """Is its first letter one of a right-to-left script?"""
    letters = (unicodedata.bidirectional(character) for character in text)
    return next((kind for kind in letters if kind in ("L", "R", "AL")), "L") != "L"


def choose_fonts(text):
    """Installed fonts that have the text's characters between them, and the set of characters that none has."""
    missing, fonts = {ord(c) for c in text if unicodedata.category(c)[0] != "C"}, []     # C: control, private, ...
    for name in ["DejaVu Sans Mono", "DejaVu Sans", *sorted({font.name for font in font_manager.fontManager.ttflist})]:
        if missing and not name.startswith("Last Resort"):                     # that one has a box for everything
            found = missing & font_manager.get_font(font_manager.findfont(name)).get_charmap().keys()
            fonts, missing = fonts + [name] * bool(found), missing - found
    return fonts, set(map(chr, missing))


def drawable(text, missing):
    """A token as matplotlib can draw it: visible, from left to right, an unknown character as its code point."""
    shown = text.replace("\n", "\u21b5").strip() or ("\u00b7" if text else "\u2026")    # white space; half a character
    return "".join(f"U+{ord(c):04X}" if c in missing or unicodedata.category(c)[0] == "C" else c
                   for c in (reversed(shown) if right_to_left(shown) else shown))


def drawable_line(line, missing):
    """A line of text, or a name, as matplotlib can draw it."""
    words = [drawable(word, missing) for word in line.split()]
    return " ".join(words[::-1] if right_to_left(line) else words)


def use_fonts(names):
    """Has matplotlib draw these names in fonts that have their characters. Returns the characters that none has."""
    fonts, missing = choose_fonts("".join(names) + "U+0123456789ABCDEF")
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *fonts]
    return missing


def lay_out(answer, columns, missing):
    """[(row, column, width, text, value), ...]: tokens in rows of so many columns of a monospaced font."""
    boxes, row, column, mirrored = [], 0, 0, right_to_left("".join(text for text, *_ in answer))
    for text, value, _, _ in answer:
        shown = drawable(text, missing)
        shown = shown if len(shown) <= 20 else shown[:19] + "\u2026"
        width = max(sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in shown), 5) + 1
        if column and column + width > columns:
            row, column = row + 1, 0
        boxes.append((row, columns - column - width if mirrored else column, width, shown, value))
        row, column = (row + 1, 0) if "\n" in text else (row, column + width)
    return boxes


def draw_tokens(path, prompt, answers, scale):
    """The heat map as a PNG. answers: one response_values list per answer."""
    texts = [prompt, *(text for answer in answers for text, *_ in answer)]
    fonts, missing = choose_fonts("".join(texts) + "U+0123456789ABCDEF\u21b5\u00b7\u2026")
    for columns in (88, 44):                                                   # long answers stand side by side
        blocks = [lay_out(answer, columns, missing) for answer in answers]
        rows = [block[-1][0] + 2 for block in blocks]                          # one for the heading
        if len(answers) == 1 or max(rows) <= 5:
            break
    beside = columns == 44
    width, height = (46 * len(answers), max(rows)) if beside else (columns + 2, sum(rows))
    lines = textwrap.wrap(prompt, width if prompt.isascii() else width // 2, max_lines=4, placeholder=" \u2026")
    top = 1.7 + 0.7 * len(lines)                                               # rows above the answers
    size = (0.092 * width, 0.33 * (height + top))
    figure = plt.figure(figsize=size)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(-1, width - 1), ylim=(height, -top))
    axes.axis("off")
    for number, line in enumerate(lines, 1):
        axes.text(0, 0.7 * number - top, drawable_line(line, missing), fontsize=11, family=["DejaVu Sans", *fonts])
    bar = axes.inset_axes([1, -1.2, 28, 0.35], transform=axes.transData)
    figure.colorbar(matplotlib.cm.ScalarMappable(scale, COLOURS), cax=bar, orientation="horizontal", format="{x:+.2f}",
                    ticks=numpy.linspace(scale.vmin, scale.vmax, 3))
    bar.tick_params(labelsize=7, length=2)
    for number, (block, answer) in enumerate(zip(blocks, answers)):
        left, first = (46 * number, 0) if beside else (0, sum(rows[:number]))
        axes.text(left, first + 0.7, heading(number, answer), fontsize=9, fontweight="bold")
        for row, column, wide, shown, value in block:
            x, y = left + column, first + 1 + row
            axes.add_patch(plt.Rectangle((x, y + 0.04), wide - 0.15, 0.92, color=COLOURS(scale(value)), linewidth=0))
            axes.text(x + wide / 2, y + 0.46, shown, ha="center", fontsize=8, family=fonts)
            axes.text(x + wide / 2, y + 0.86, f"{value:+.2f}", ha="center", fontsize=6, color="#111111")
    figure.savefig(path, dpi=min(160, 60000 / max(size)))                      # a side has at most 65535 pixels
    plt.close(figure)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Token values</title><style>
body{font:16px/1.9 sans-serif;margin:2em auto 4em;padding:0 1em;max-width:110em;color:#111;background:#fff}
h1{font-size:1.2em;line-height:1.4;max-height:9em;overflow:auto}h2{font-size:1em;margin:0}p{margin:0}
h1,section p{white-space:break-spaces;overflow-wrap:anywhere}
#scale{display:flex;justify-content:space-between;max-width:25em;padding:0 .5em;margin:.5em 0 1.5em}
#answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24em),1fr));gap:1.5em 2.5em}
span{padding:.15em 0}.thin{padding:.15em .12em;border-left:1px solid #888}
i::before{content:"\\21b5";font-style:normal;color:#444}
span:hover{outline:2px solid #111}
span:hover::after{content:attr(data-t);position:fixed;left:1em;bottom:1em;max-width:90vw;padding:.2em .8em;
background:#111;color:#fff;direction:ltr;white-space:normal;z-index:1}
</style></head><body>
"""


def write_token_page(path, prompt, answers, scale, note=""):
    """The heat map as one HTML page without any outside file. All text is escaped: an answer may contain HTML."""
    shades = ",".join(matplotlib.colors.to_hex(COLOURS(x)) for x in numpy.linspace(0, 1, 9))
    numbers = "".join(f"<b>{value:+.2f}</b>" for value in numpy.linspace(scale.vmin, scale.vmax, 3))
    parts = [PAGE, f'<h1 dir="auto">{html.escape(prompt)}</h1>\n<p>Q(tau, s, a) of each token, read after it. '
             f"White: the mean of the training scores. Point at a token: its numbers appear at the bottom.{note}</p>\n"
             f'<div id="scale" style="background:linear-gradient(90deg,{shades})">{numbers}</div>\n',
             '<div id="answers">\n']
    for number, answer in enumerate(answers):
        parts.append(f'<section><h2>{heading(number, answer)}</h2>\n<p dir="auto">')
        for text, value, change, probability in answer:
            name = text if text.isprintable() and text.strip() else ascii(text) if text else "part of a character"
            hover = f"{name}: value {value:+.3f}, change {change:+.3f}"
            hover += "" if probability is None else f", probability {probability:.3g}"
            # Nothing to point at (a part of a character, a joiner, an accent): the token is a thin bar.
            thin = ' class="thin"' * all(unicodedata.category(c)[0] in "CM" and c != "\n" for c in text)
            shown = html.escape(text).replace("\r", "&#13;").replace("\n", "<i></i>\n")
            parts.append(f'<span{thin} style="background:{matplotlib.colors.to_hex(COLOURS(scale(value)))}" '
                         f'data-t="{html.escape(hover)}">{shown}</span>')
        parts.append("</p></section>\n")
    path.write_text("".join([*parts, "</div>\n</body></html>\n"]), encoding="utf-8")


def tokens(args):
    png = new_output(Path(args.output) / "tokens.png", args.overwrite)
    page = new_output(Path(args.output) / "tokens.html", args.overwrite)
    for text in [args.prompt, *args.responses]:
        if not text.strip() or any("\ud800" <= character <= "\udfff" for character in text):
            fail(f"--prompt and --responses: {text!r:.40} is empty, or not UTF-8")
    (tokenizer, gvm), policy = load_gvm(args.gvm), None
    if args.policy:
        policy = load(AutoModelForCausalLM, args.policy, kind="policy", dtype=torch.float32).eval()
        if load(AutoTokenizer, args.policy).get_vocab() != tokenizer.get_vocab():
            fail(f"--policy {args.policy}: its vocabulary is not that of {args.gvm}")
    answers = [response_values(gvm, tokenizer, args.prompt, response, policy) for response in args.responses]
    for folder, column in ((args.gvm, 2), (args.policy, 3)):                   # a change is finite if both values are
        if not all(math.isfinite(token[column] or 0) for answer in answers for token in answer):
            fail(f"{folder}: gives values that are not finite numbers. Its training has failed")
    pairs = getattr(gvm.config, "gvm", {}).get("tau_pairs", 0)
    note = f" The model was trained with --tau_pairs {pairs}, and is read without tau here." if pairs else ""
    scale = colour_scale(gvm, answers)
    draw_tokens(png, args.prompt, answers, scale)
    write_token_page(page, args.prompt, answers, scale, note)
    print("\n".join([f"{args.gvm}:{note}"] * bool(note) + [f"{png}\n{page}"]))


# ---- 4. Learning curves (Figure 4) ----
def read_lines(path, *fields):
    """The rows of a JSON-lines log of this project, which have to have these fields. A last line that was cut off (a
    run that was killed) is no row."""
    if not path.is_file():
        fail(f"{path}: no such file. Is {path.parent} the run folder of a policy?")
    *lines, last = path.read_bytes().split(b"\n")                              # bytes: it may be cut inside a character
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as problem:
            fail(f"{path}:{number}: invalid JSON ({problem}). Remove the line, or run the training again")
        if not isinstance(rows[-1], dict) or not rows[-1].keys() >= set(fields):
            fail(f"{path}:{number}: not a JSON object{' with ' * bool(fields)}{', '.join(fields)}. Remove the line, or "
                 f"run the training again")
    return rows


PANELS = {"score": "true score of the answers", "value": "GVM value or reward-model score, own scale",
          "kl": "KL to the reference (nats per answer)", "response_length": "answer length (tokens)",
          "entropy": "entropy (nats per token)", "clip_fraction": "clip fraction"}


def read_run(folder, judge, place):
    """The records of a run folder's metrics.jsonl, with the judge's mean score of the step, if there is a judge."""
    log = Path(folder) / "metrics.jsonl"
    records = read_lines(log)
    if not records or "step" not in records[0]:
        fail(f"{folder}: has no steps in its metrics.jsonl. Is it the run folder of a policy, of an online method?")
    columns = sorted({"step", "reward", *PANELS} & set().union(*records))
    for number, record in enumerate(records, 1):
        for column in columns:
            if not has_numbers(record, column):
                fail(f"{log}:{number}: step {record.get('step')} has no number {column!r}, other steps have. Remove "
                     f"the line, or run the training again")
    records = [({"value": record["reward"]} if "reward" in record else {}) | record for record in records]   # baselines
    if judge:
        scores = {}
        for row in read_lines(Path(folder) / "rollouts.jsonl", "step", "prompt", "response"):
            scores.setdefault(row["step"], []).append(judged_score(judge, place, row["prompt"], row["response"]))
        records = [record | {"score": numpy.mean(scores[record["step"]])} for record in records
                   if record["step"] in scores]                                # a run that was killed may lack the last
    return records or fail(f"{folder}: rollouts.jsonl has no answers of the steps in metrics.jsonl")


# What the runs of one name may differ in: the seed, where things are, and how the run was run.
MAY_DIFFER = {"seed", "model", "gvm", "reward_model", "data", "output", "overwrite", "resume", "save_steps", "log_with"}


def check_same_settings(name, folders):
    """Ends the program if two runs of one name are no seeds of one experiment, or the same seed."""
    for first, folder in itertools.combinations(folders, 2):
        if Path(first).resolve() == Path(folder).resolve():
            fail(f"{name}: {first} and {folder} are the same folder, not two seeds: name it once")
        a, b = (read_json(Path(run) / "args.json", "the training script") for run in (first, folder))
        for flag in sorted((a.keys() | b.keys()) - MAY_DIFFER):
            if a.get(flag) != b.get(flag):
                fail(f"{name}: {first} was made with --{flag} {a.get(flag)}, {folder} with {b.get(flag)}. They are no "
                     f"seeds of one curve: give them different names (NAME=FOLDER)")
        if a.get("seed") == b.get("seed"):
            fail(f"{name}: {first} and {folder} were both made with --seed {a.get('seed')}, so they are one seed. "
                 f"Leave one out, or give them different names (NAME=FOLDER)")


def curves(args):
    png = new_output(Path(args.output) / "curves.png", args.overwrite)
    judge, names = load_judge(args.judge) if args.judge else None, {}
    for run in args.runs:
        name, _, folder = run.partition("=") if "=" in run and not Path(run).is_dir() else ("", "", run)
        names.setdefault(name or Path(folder).resolve().name, []).append(folder)
    lines = {}                                                                 # {name: [records of a seed, ...]}
    for name, folders in names.items():
        check_same_settings(name, folders)
        seeds = [read_run(folder, judge, args.judge) for folder in folders]
        for metric in PANELS:
            if len({metric in seed[0] for seed in seeds}) > 1:
                fail(f"{name}: not all of {', '.join(folders)} have {metric!r} in metrics.jsonl. Give them different "
                     f"names (NAME=FOLDER)")
        shortest = min(map(len, seeds))
        if shortest < max(map(len, seeds)):
            print(f"{name}: runs of {', '.join(str(len(seed)) for seed in seeds)} steps, the first {shortest} drawn")
        lines[name] = [seed[:shortest] for seed in seeds]
    panels = {metric: title for metric, title in PANELS.items()
              if any(metric in seed[0] for seeds in lines.values() for seed in seeds)}
    missing, handles = use_fonts(names), {}
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.4), layout="constrained")
    for panel, metric in zip(axes.flat, panels):
        for number, (name, seeds) in enumerate(lines.items()):
            if metric not in seeds[0][0]:
                continue                                                       # ReMax clips nothing
            steps = [record["step"] for record in seeds[0]]
            y = numpy.array([[record[metric] for record in seed] for seed in seeds])               # (seeds, steps)
            label = f"{drawable_line(name, missing)} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
            handles[name], = panel.plot(steps, y.mean(0), label=label, color=f"C{number}", linewidth=1.3)
            if len(seeds) > 1:
                panel.fill_between(steps, y.min(0), y.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
        panel.set_title(panels[metric], fontsize=9, loc="left")
        panel.set_xlabel("step (one batch of rollouts)", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(panels):]:
        panel.remove()
    title = "mean, lowest and highest of the seeds" if max(map(len, lines.values())) > 1 else None
    # Labels are passed: by itself matplotlib leaves out what is called "_...".
    figure.legend(handles.values(), [line.get_label() for line in handles.values()], loc="outside upper center",
                  ncols=5, fontsize=9, title=title)
    figure.savefig(png, dpi=150)
    plt.close(figure)
    print(png)


# ---- 5. Wins (Figure 2) ----
def win_bars(args):
    """How often --model's answer ("left") wins against, ties with and loses to every other model's ("right")."""
    png = new_output(Path(args.output) / "wins.png", args.overwrite)
    results = read_json(args.results, "evaluate.py policy or judge")
    outcomes = results.get("outcomes") or fail(f'{args.results}: no "outcomes" in it. evaluate.py judge writes them, '
                                               "and evaluate.py policy with --judge and two models")
    columns = ("win", "tie", "lose", "pairs")
    if not isinstance(outcomes, dict) or not all(
            isinstance(rows, dict) and all(has_numbers(row, *columns) for row in rows.values())
            for rows in outcomes.values()):
        fail(f'{args.results}: "outcomes" is not a table {{model: {{other: {{{", ".join(columns)}}}}}}} of numbers. '
             "evaluate.py policy or judge writes one")
    left = args.model or list(outcomes)[-1]
    if left not in outcomes:
        fail(f"--model {left}: {args.results} has {', '.join(outcomes)}")
    rows = outcomes[left] or fail(f"{args.results}: {left} is alone in it, with nothing to be compared with")
    missing = use_fonts([left, *rows])
    name = drawable_line(left, missing)
    labels = [f"{drawable_line(right, missing)}\n({row['pairs']} pairs)" for right, row in rows.items()]
    figure, axes = plt.subplots(figsize=(7.5, 1.3 + 0.55 * len(rows)), layout="constrained")
    start = numpy.zeros(len(rows))
    for outcome, colour in (("win", "#6baed6"), ("tie", "#d9d9d9"), ("lose", "#f4a582")):
        share = numpy.array([100 * row[outcome] for row in rows.values()])
        bars = axes.barh(range(len(rows)), share, left=start, color=colour, height=0.72, label=f"{name} {outcome}s")
        axes.bar_label(bars, [f"{x:.0f}" if x >= 3 else "" for x in share], label_type="center", fontsize=9)
        start += share
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    unjudged = f"; {results['unjudged']} answers without a verdict left out" if results.get("unjudged") else ""
    axes.set(xlim=(0, 100), xlabel=f"% of the pairs of answers{unjudged}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    # Labels are passed: by itself matplotlib leaves out what is called "_...".
    figure.legend(axes.containers, [bars.get_label() for bars in axes.containers], loc="outside upper center", ncols=3,
                  fontsize=9, frameon=False)
    figure.savefig(png, dpi=150)
    plt.close(figure)
    print(png)


# ---- 6. Comparison (Tables 1, 2, 7 and Figure 4 in kind) ----
def compare(args):
    """results/compare.json as a picture: score against rollouts, against time, and on held-out prompts."""
    png = new_output(Path(args.output) / "compare.png", args.overwrite)
    results = read_json(args.results, "make compare")
    kinds = {"seeds": dict, "methods": dict, "step_seconds": dict, "rollouts_per_step": int}
    lacking = [key for key, kind in kinds.items() if not (isinstance(results.get(key), kind) and results[key])]
    if lacking:
        fail(f"{args.results}: has no {', '.join(lacking)}. Is it what `make compare` wrote?")
    seeds, methods = list(results["seeds"].values()), ["SFT", *results["methods"]]
    for method in methods:
        if not all(isinstance(seed, dict) and has_numbers(seed.get(method), "oracle") for seed in seeds):
            fail(f"{args.results}: not all seeds have the oracle's score of {method}. Run `make compare` again")
    figure, (by_rollouts, by_time, final) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    for number, method in enumerate(methods):
        colour_, scores = f"C{number}", [seed[method]["oracle"] for seed in seeds]
        mean = sum(scores) / len(scores)
        final.plot([mean], [-number], "o", color=colour_)
        final.plot(scores, [-number] * len(scores), "|", color=colour_, markersize=12)
        final.text(mean, 0.24 - number, f"{mean:.2f}", ha="center", fontsize=8)
        if "curve" not in seeds[0][method]:                                    # SFT and DPO have no rollouts
            for panel in (by_rollouts, by_time):
                panel.axhline(mean, color=colour_, label=f"{method} (held-out)", linestyle="--", linewidth=1)
            continue
        curve = numpy.array([seed[method]["curve"] for seed in seeds])                             # (seeds, steps)
        smooth = numpy.stack([curve[:, max(0, step - 4):step + 1].mean(1) for step in range(curve.shape[1])], 1)
        steps = numpy.arange(1, smooth.shape[1] + 1)
        # "DVPO, pairs" is not timed: it is DVPO with another GVM of the same size, so a step costs the same.
        seconds = results["step_seconds"].get(method, results["step_seconds"]["DVPO"])["total"]
        for panel, x in ((by_rollouts, steps * results["rollouts_per_step"]), (by_time, steps * seconds)):
            panel.plot(x, smooth.mean(0), color=colour_, label=method, linewidth=1.4)
            panel.fill_between(x, smooth.min(0), smooth.max(0), color=colour_, alpha=0.1, linewidth=0)
    machine = f", {results['machine']}" if results.get("machine") else ""
    for panel, label in ((by_rollouts, "rollouts"), (by_time, f"training time (s{machine})"),
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


# ---- 7. Main ----
COMMANDS = {"tokens": (TokensArgs, tokens), "curves": (CurvesArgs, curves), "wins": (WinsArgs, win_bars),
            "compare": (CompareArgs, compare)}


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if not argv or argv[0] not in COMMANDS:
        fail(f"the first word must be one of {', '.join(COMMANDS)} (python figures.py tokens --help)")
    arguments, command = COMMANDS[argv[0]]
    command(parse_args(arguments, argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
