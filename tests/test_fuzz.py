"""Damaged files, thousands of them: every reader either reads what is there or ends in one clear line that names the file.

    make test                               some hundred cases
    FUZZ=5000 pytest tests/test_fuzz.py     so many in all, the same ones each time; a failure prints the smallest case
"""
import contextlib
import functools
import gzip
import io
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_resume import Killed, kill_at
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import evaluate
import figures
import prepare_data
import sft
import train_dvpo
import train_gvm

CASES, DONE = int(os.environ.get("FUZZ", 600)), []


def cases(share):
    """So many hundredths of all cases, the same ones in every run. They are counted in DONE."""
    def decorate(test):
        inner = test.hypothesis.inner_test
        test.hypothesis.inner_test = functools.wraps(inner)(lambda *args, **kwargs: (DONE.append(test), inner(*args, **kwargs))[1])
        return settings(max_examples=math.ceil(CASES * share / 100), derandomize=True, database=None, deadline=None,
                        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))(test)

    return decorate


def outcome(call, *places):
    """(result, None), or (None, message) if the program ended with one line that names one of the places."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return call(), None
    except SystemExit as stopped:
        message = str(stopped.code)
        assert message.startswith("error: ") and "\n" not in message.strip(), repr(message)
        assert any(str(place) in message for place in places), (places, message)
        return None, message


# ---- damage ----
CHARACTERS = st.lists(st.sampled_from([*"aZ9 .,:{}[]\"'\\/<|>-_#&*!%@~\n\r\t\0", "é", "\u2028", "\ufdd0", "\ud800", "\ue000",
                                      "<|end|>", "<|user|>", "</s>", "{{", "{%", "%}", "true", "null", "NaN", "1e999"]), max_size=6).map("".join)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 31, 33, 10 ** 400, 0.5, -0.0, 1e300, math.nan, math.inf])
ANYTHING = st.recursive(st.none() | st.booleans() | NUMBERS | CHARACTERS,
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CHARACTERS, inner, max_size=3), max_leaves=4)


@st.composite
def damaged_bytes(draw, whole):
    """Cut off, with bytes flipped, left out, put in or repeated. Now and then as it was."""
    content = bytearray(whole)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3, 0]))):
        at = draw(st.integers(0, len(content)))
        end = min(at + draw(st.integers(1, 24)), len(content))
        kind = draw(st.sampled_from(["cut", "flip", "drop", "put", "twice", "clear"]))
        if kind == "cut":
            del content[at:]
        elif kind == "flip" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "drop":
            del content[at:end]
        elif kind == "put":
            content[at:at] = draw(st.binary(max_size=4) | CHARACTERS.map(lambda text: text.encode("utf-8", "surrogatepass")))
        elif kind == "twice":
            content[at:at] = content[at:end]
        elif kind == "clear":
            content[:] = draw(st.sampled_from([b"", b"\0" * len(content), b"[" * 10_000, b"null", b"\xef\xbb\xbf" + bytes(content)]))
    return bytes(content)


@st.composite
def damaged_json(draw, value):
    """One place of a JSON value replaced, left out or moved under another name."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.sampled_from([1, 1, 2, 0]))):
        at, parent = value, None
        while isinstance(at, (dict, list)) and at and (parent is None or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
            parent, at = at, at[key]
        if parent is None:
            return draw(ANYTHING)
        kind = draw(st.sampled_from(["replace", "replace", "drop", "rename"]))
        if kind == "replace":
            parent[key] = draw(ANYTHING)
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(CHARACTERS)] = parent.pop(key)
        else:
            del parent[key]
    return value


def damaged(value):
    """A JSON value, damaged and written; or written and damaged."""
    text = json.dumps(value).encode()
    return damaged_bytes(text) | damaged_json(value).map(lambda value: json.dumps(value).encode())


# ---- rows ----
SCORED = {"prompt": "Is Peru an island?", "response": "No, it is not.", "reward": 0.5, "policy": "expert"}
CHAT = SCORED | {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}
PAIR = {"prompt": "Is Peru an island?", "chosen": "No.", "rejected": "Yes!", "score_chosen": 1.0}
ROWS = {"scored": ([SCORED, CHAT], {"prompt": "prompt", "response": "text", "reward": "number", "policy": "text"}),
        "pairs": ([PAIR], {"prompt": "prompt", "chosen": "text", "rejected": "text"}), "rl": ([SCORED, CHAT], {"prompt": "prompt"})}


def is_good(row, wanted):
    """What row_problem says, in other words."""
    def text(value):
        return type(value) is str and value.strip() != ""

    good = {"text": text, "number": lambda value: type(value) in (int, float) and abs(value) < math.inf,
            "prompt": lambda value: text(value) or (type(value) is list and all(
                type(m) is dict and {"role", "content"} <= m.keys() and type(m["role"]) is type(m["content"]) is str for m in value)
                and value[-1:] != [] and value[-1]["role"] == "user" and text(value[-1]["content"]))}
    return type(row) is dict and all(name in row and good[kind](row[name]) for name, kind in wanted.items()) and (
        "chosen" not in wanted or row["chosen"] != row["rejected"])


@cases(30)
@given(data=st.data())
def test_rows(tmp_path_factory, data):
    """Each line is either returned as it is, or it is the one that is named: none vanishes, none is changed."""
    split = data.draw(st.sampled_from(sorted(ROWS)))
    rows, wanted = ROWS[split]
    lines = data.draw(st.lists(st.sampled_from(rows).flatmap(damaged), min_size=1, max_size=4))
    lines = [part for line in lines for part in line.split(b"\n")]             # damage may break a line in two
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}.jsonl"
    path.write_bytes(b"\n".join(lines))
    output = io.StringIO()

    def skipping():
        with contextlib.redirect_stdout(output):
            return sft.read_rows(folder, split, wanted, "skip")

    kept, message = outcome(skipping, path)
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()
                assert is_good(row, wanted)
                good.append(row)
            except (ValueError, RecursionError, AssertionError, OverflowError):
                bad.append(number)
    assert json.dumps(kept or []) == json.dumps(good) and (message is None) == bool(good)
    assert f"skipped {len(bad)} bad rows of {len(bad) + len(good)}" in output.getvalue() or not bad
    kept, message = outcome(lambda: sft.read_rows(folder, split, wanted), path)
    assert (message is None) == (not bad and bool(good))
    assert not bad or f"{path}:{bad[0]}: " in message


def test_no_file_is_no_row(tmp_path):
    assert outcome(lambda: sft.read_rows(tmp_path, "sft", {"prompt": "prompt"}), tmp_path)[1]


# ---- prompts and chat templates ----
@cases(10)
@given(prompt=CHARACTERS.filter(str.strip) | st.lists(st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "<|end|>"]), "content": CHARACTERS}), min_size=1, max_size=3))
def test_what_users_write_stays_text(base, prompt):
    """Control tokens come from the template alone, and what is read is what was written."""
    tokenizer = base.tokenizer
    ids, message = outcome(lambda: sft.encode_prompt(tokenizer, prompt), tokenizer.name_or_path)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any("\ud800" in m["content"] or "\ufdd0" in m["content"] for m in messages):            # no text; read_rows says so
        return
    assert message is None and sum(i in tokenizer.added_tokens_decoder for i in ids) == 1 + sum(
        1 + (m["role"] == "assistant") for m in messages)
    written = "".join(f"<|assistant|>{m['content']}<|end|>" if m["role"] == "assistant" else f"<|user|>{m['content']}" for m in messages)
    assert tokenizer.decode(ids).replace(" ", "") == (written + "<|assistant|>").replace(" ", "")        # it adds a space to a text


@cases(10)
@given(data=st.data())
def test_chat_templates(base, data):
    tokenizer, whole = base.tokenizer, base.template
    template = data.draw(damaged_bytes(whole.encode()).map(lambda text: text.decode("utf-8", "replace")) | st.sampled_from(
        ["{{ raise_exception('roles must\nalternate') }}", "{{ 1 / 0 }}", "{{ messages[7]['content'] }}", "{% for", "", " ",
         "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ strftime_now('%Q') }}"]))
    tokenizer.chat_template = template
    try:
        ids, message = outcome(lambda: sft.encode_prompt(tokenizer, "Is Peru an island?"), tokenizer.name_or_path)
    finally:
        tokenizer.chat_template = whole
    assert message or (ids and all(type(i) is int for i in ids))
    assert message or "".join(template.split()) != ""


# ---- command lines and recipes ----
def has_its_type(value, kind):
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind if kind in (str, int, float, bool) else isinstance(value, (list, type(None), str))


@cases(12)
@given(data=st.data())
def test_recipes(tmp_path_factory, data):
    script = data.draw(st.sampled_from([sft, train_gvm, train_dvpo]))
    given_args = data.draw(st.fixed_dictionaries({}, optional={
        field.name: ANYTHING | st.just(field.default) for field in fields(script.Args)}))
    recipe = tmp_path_factory.getbasetemp() / "recipe.yaml"
    whole = yaml.safe_dump({script.__name__: given_args}, allow_unicode=True).encode("utf-8", "surrogatepass")
    whole = data.draw(st.just(whole) | damaged_bytes(whole))
    recipe.write_bytes(data.draw(st.just(whole) | st.sampled_from(
        [b"sft: {lr: !!int ''}", b"sft: {lr: !!timestamp x}", b"sft: {lr: !!bool x}", b"&a [*a]", b"sft: !!python/object:os.system x"])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py"])
        args, message = outcome(lambda: script.parse_args(script.Args, [str(recipe)]), recipe, "--")
    if message is None:
        for field in fields(script.Args):
            assert has_its_type(getattr(args, field.name), field.type), field.name
        outcome(lambda: script.check_numbers(args), "--")


@cases(4)
@given(words=st.lists(CHARACTERS | st.sampled_from(["--lr", "--lr=1", "--epochs", "--data", "1", "--epoch", "--", "-1", "--seed=-1"]), max_size=4))
def test_command_lines(words):
    args, message = outcome(lambda: sft.parse_args(sft.Args, words), "error: ")
    assert message or all(has_its_type(getattr(args, field.name), field.type) for field in fields(sft.Args))


# ---- names and model folders ----
@pytest.fixture(scope="module")
def accelerator():
    return Accelerator()


@cases(3)
@given(name=CHARACTERS | CHARACTERS.map(lambda text: "a" * 300 + text) | CHARACTERS.map(lambda text: f"/no/such/{text}"))
def test_names_of_models_and_data(name):
    first = (str(Path(name)).splitlines() or [""])[0]
    outcome(lambda: sft.load(AutoTokenizer, name), first)
    outcome(lambda: sft.read_rows(name, "sft", {"prompt": "prompt"}), first)


@cases(2)
@given(name=CHARACTERS.filter(lambda text: not {"\0", "\ud800"} & {*text}) | st.just("a" * 300))
def test_names_of_run_folders(tmp_path_factory, accelerator, name):
    folder = tmp_path_factory.mktemp("output")
    (folder / "aZ").write_text("")                            # a file that stands in the way
    _, message = outcome(lambda: sft.start_run(accelerator, sft.Args(output=f"{folder}/{name}/run")), folder)
    assert message or Path(f"{folder}/{name}/run/args.json").is_file()


class Base:
    """An undamaged model folder. (Its repr is short: a failing test prints it.)"""
    def __init__(self, folder):
        self.folder, self.files = folder, {file.name: file.read_bytes() for file in folder.iterdir()}
        self.tokenizer, self.weights = sft.load(AutoTokenizer, str(folder)), load_file(folder / "model.safetensors")
        self.template = self.tokenizer.chat_template


@pytest.fixture(scope="module")
def base(world):
    return Base(world / "base")


def changed_folder(folder, base, name, content):
    """The model folder with one file changed; None: without it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, text in (base.files | {name: content}).items():
        if text is not None:
            (folder / file).write_bytes(text)
    return str(folder)


@cases(6)
@given(data=st.data())
def test_tokenizer_files(base, tmp_path_factory, data):
    name = data.draw(st.sampled_from(["tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "config.json"]))
    content = base.files[name]
    content = data.draw(st.none() | damaged_bytes(content) if name.endswith("jinja") else damaged(json.loads(content)))
    folder = changed_folder(tmp_path_factory.getbasetemp() / "tokenizer", base, name, content)

    def read():
        tokenizer = sft.load(AutoTokenizer, folder)
        tokenizer.chat_template = tokenizer.chat_template or sft.PLAIN_TEMPLATE
        return sft.encode_prompt(tokenizer, "Is Peru an island?"), sft.encode_response(tokenizer, "No.")

    ids, message = outcome(read, folder)
    assert message or all(part and all(type(i) is int for i in part) for part in ids)


@cases(6)
@given(data=st.data())
def test_model_configs(base, tmp_path_factory, data):
    """A model that loads has every tensor of its file, and no other."""
    content = data.draw(damaged(json.loads(base.files["config.json"])))
    folder = changed_folder(tmp_path_factory.getbasetemp() / "config", base, "config.json", content)
    model, message = outcome(lambda: sft.load(AutoModelForCausalLM, folder, kind="policy", dtype=torch.float32), folder)
    assert message or all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.weights.items())
    assert message or sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in base.weights.values())


@cases(5)
@given(data=st.data())
def test_weights(base, tmp_path_factory, data):
    path, weights = tmp_path_factory.getbasetemp() / "changed.safetensors", dict(base.weights)
    kind = data.draw(st.sampled_from(["bytes", "bytes", "head", "tensor", "missing", "pickle"]))
    content, name = base.files["model.safetensors"], data.draw(st.sampled_from(sorted(weights)))
    if kind == "bytes":
        content = data.draw(damaged_bytes(content))
    elif kind == "head":                                      # the JSON in front of the numbers
        content = data.draw(damaged_bytes(content[:2000])) + content[2000:]
    elif kind == "tensor":
        weights[data.draw(st.sampled_from([name, "model.layers.9.mlp.up_proj.weight"]))] = torch.zeros(
            data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=2)), dtype=data.draw(st.sampled_from([torch.float32, torch.int8])))
    elif kind == "missing":
        del weights[name]
    if kind in ("tensor", "missing"):
        save_file(weights, path, metadata={"format": "pt"})
        content = path.read_bytes()
    folder = changed_folder(tmp_path_factory.getbasetemp() / "weights", base, "model.safetensors", None if kind == "pickle" else content)
    auto_class = data.draw(st.sampled_from([AutoModelForCausalLM, AutoModelForTokenClassification]))
    model, message = outcome(lambda: sft.load(auto_class, folder, kind="policy", dtype=torch.float32), folder)
    assert message or kind not in ("missing", "pickle") or (auto_class is AutoModelForTokenClassification and "lm_head" in name)
    if message is None:
        stored, read = load_file(Path(folder) / "model.safetensors"), model.state_dict()
        assert all(torch.equal(read[name], tensor.float()) or tensor.isnan().any() for name, tensor in stored.items()
                   if name.startswith("model."))
        assert all(name in stored for name in read if name.startswith("model."))


# ---- run folders ----
@pytest.fixture(scope="module")
def killed_run(world, sft_args, tmp_path_factory):
    """A run of sft.py that was killed after its fourth update, with checkpoints of 2 and 3."""
    from dataclasses import replace
    args = replace(sft_args, output=str(tmp_path_factory.mktemp("killed") / "run"), save_steps=1, log_every=1)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(sft, patch, 4)
        with pytest.raises(Killed):
            sft.main(args)
    return args


@cases(5)
@given(data=st.data())
def test_settings_of_a_run_to_be_resumed(killed_run, accelerator, data):
    path = Path(killed_run.output) / "args.json"
    before = path.read_bytes()
    from dataclasses import replace
    args = replace(killed_run, resume=True)
    path.write_bytes(data.draw(damaged(json.loads(before))))
    try:
        was = path.read_bytes()
        _, message = outcome(lambda: sft.start_run(accelerator, args), killed_run.output)
        free = ("output", "overwrite", "resume", "save_steps", "log_with")
        if message is None:
            assert {k: v for k, v in json.loads(was).items() if k not in free and k in asdict(args)} == {
                k: v for k, v in asdict(args).items() if k not in free}
    finally:
        path.write_bytes(before)


@cases(5)
@given(data=st.data())
def test_logs_of_a_run_to_be_resumed(tmp_path_factory, accelerator, data):
    output = tmp_path_factory.getbasetemp() / "logs"
    output.mkdir(exist_ok=True)
    lines = data.draw(st.lists(damaged({"step": 0, "loss": 0.5, "seconds": 3.5}) | st.just(b'{"step": 0, "seconds": 2}'), max_size=3))
    path = output / data.draw(st.sampled_from(["metrics.jsonl", "rollouts.jsonl"]))
    whole = b"".join(line + b"\n" for line in lines)
    path.write_bytes(whole)
    resumed, message = outcome(lambda: sft.load_checkpoint(accelerator, output), path)
    if message is None:
        assert resumed[0] == 0 and type(resumed[1]) is float
        records = [json.loads(line) for line in whole.split(b"\n")[:-1]]       # no line vanishes but those of later steps
        kept = [record for record in records if record.get("step", record.get("update")) <= 0]
        assert json.dumps(kept) == json.dumps([json.loads(line) for line in path.read_bytes().splitlines()])
    path.unlink()


@cases(5)
@given(data=st.data())
def test_checkpoints(killed_run, tmp_path_factory, data):
    """What is cut off, missing, empty or in another file's place is never taken up."""
    output = tmp_path_factory.getbasetemp() / "resumed"
    shutil.rmtree(output, ignore_errors=True)
    newest = output / "checkpoints" / "step_3"
    shutil.copytree(Path(killed_run.output) / "checkpoints" / "step_3", newest)
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    kind = data.draw(st.sampled_from(["cut", "cut", "missing", "empty", "swapped", "bytes", "text", "folder", "extra"]))
    content = file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
    elif kind == "bytes":
        file.write_bytes(data.draw(damaged_bytes(content)))
    elif kind == "text":
        file.write_bytes(data.draw(CHARACTERS).encode("utf-8", "surrogatepass"))
    elif kind == "swapped":
        other = data.draw(st.sampled_from([other for other in sorted(newest.iterdir()) if other != file]))
        file.write_bytes(other.read_bytes())
    elif kind == "extra":
        (newest / "custom_checkpoint_0.pkl").write_bytes(content)
    elif kind in ("missing", "folder"):
        file.unlink()
        (file.mkdir() if kind == "folder" else None)
    else:
        file.write_bytes(b"")
    model = AutoModelForCausalLM.from_pretrained(killed_run.model)
    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    resumed, message = outcome(lambda: sft.load_checkpoint(accelerator, output), newest)
    assert message or (kind == "bytes" and resumed[0] == 3)


# ---- what other people's tools write ----
@cases(10)
@given(data=st.data())
def test_raw_data_sets(tmp_path_factory, data):
    """prepare_data.py: every row is read or counted."""
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["raw.jsonl", "raw.json", "raw.jsonl.gz"]))
    raw = {"ultrafeedback": {"instruction": "a", "completions": [{"response": "b", "overall_score": "7", "model": "x"}]},
           "ultrafeedback_binarized": {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "score_chosen": 1,
                                       "rejected": [{"role": "assistant", "content": "c"}], "score_rejected": 0},
           "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
           "alpaca_eval": {"instruction": "a", "output_2": "b", "preference": 1.5, "generator_2": "x"}, "jsonl": SCORED}
    name = data.draw(st.sampled_from(sorted(raw)))
    rows = data.draw(st.lists(damaged(raw[name]) | st.just(json.dumps(raw[name]).encode()), min_size=1, max_size=3))
    content = b"[" + b",".join(rows) + b"]" if path.suffix == ".json" else b"\n".join(rows)
    path.write_bytes(data.draw(damaged_bytes(gzip.compress(content))) if path.suffix == ".gz" else content)
    args = prepare_data.Args(format=name, input=str(path))
    read, message = outcome(lambda: prepare_data.read_questions(args), path)
    if message is None:
        questions, counts = read
        assert all(type(question.prompt) in (str, list) for question in questions)
        assert all(math.isfinite(reward) for question in questions for reward, _ in question.answers.values() if reward is not None)
        assert counts["rows read"] >= len(questions)


QUESTION = {"mt_bench": {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": []},
            "alpaca_eval": {"instruction": "a", "dataset": "x", "output": "", "generator": "g"},
            "arena_hard": {"uid": "u", "category": "c", "subcategory": "s", "cluster": "k", "prompt": "a"}}


@cases(8)
@given(data=st.data())
def test_questions_and_answers(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["questions.jsonl", "questions.json", "questions.json.gz"]))
    name = data.draw(st.sampled_from([*sorted(QUESTION), "answers"]))
    row = QUESTION.get(name, {"model": "m", "prompt": "a", "response": "b"})
    rows = data.draw(st.lists(damaged(row) | st.just(json.dumps(row).encode()), min_size=1, max_size=3))
    content = b"[" + b",".join(rows) + b"]" if path.suffix == ".json" else b"\n".join(rows)
    path.write_bytes(data.draw(damaged_bytes(gzip.compress(content))) if path.suffix == ".gz" else content)
    bad_rows = data.draw(st.sampled_from(["error", "skip"]))
    if name == "answers":
        outcome(lambda: evaluate.read_answers([str(path)], bad_rows), path)
    else:
        read, message = outcome(lambda: evaluate.benchmark_questions(str(path), name, bad_rows), path)
        assert message or all(type(turn) is str and turn.strip() for _, turns, _ in read for turn in turns)


@cases(6)
@given(data=st.data())
def test_logs_that_are_drawn(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "drawn"
    folder.mkdir(exist_ok=True)
    record = {"step": 1, "value": 0.5, "kl": 0.1, "response_length": 9.0, "entropy": 1.0, "clip_fraction": 0.0, "seconds": 1.0}
    lines = data.draw(st.lists(damaged(record) | st.just(json.dumps(record).encode()), min_size=1, max_size=3))
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    read, message = outcome(lambda: figures.read_run(str(folder), None, None), folder)
    assert message or len(read) >= len(lines)
    outcome(lambda: figures.read_json(folder / "metrics.jsonl", "evaluate.py"), folder)
    outcome(lambda: figures.read_lines(folder / "metrics.jsonl", "step"), folder)


def test_so_many_cases_were_tried(request):
    """Hypothesis stops early where it knows every case. (Comes last; a part of this file alone has less to count.)"""
    print(f"{len(DONE)} damaged inputs")
    assert len(DONE) >= CASES or request.config.option.keyword
