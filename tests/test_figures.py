"""Pictures: what is drawn is what was measured, and hostile text spoils neither the PNG nor the page."""
import html.parser
import json
import re
import shutil
import unicodedata
import warnings

import numpy
import pytest
import torch
from conftest import ROOT, read_lines
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import figures

HOSTILE = ["<script>alert('x')</script> & \"quotes\" $math$ \\alpha", "日本 🙂 é", "שלום world", "two\n\nlines\r\n\tend ",
           "a\u200b\u202e\x07e\u0301", "."]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a command drew, still open: a test reads lines, bars and texts off them."""
    kept = []
    monkeypatch.setattr(figures.plt, "close", kept.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)                            # no glyph is missing, no layout fails
        yield kept
    monkeypatch.undo()
    figures.plt.close("all")


class Page(html.parser.HTMLParser):
    """Collects a page's tags, and of each answer [(text, what the mouse shows, class)] of its tokens."""
    def __init__(self, path):
        super().__init__()
        self.tags, self.answers, self.inside = [], [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = self.inside or tag == "span"
        if tag == "section":
            self.answers.append([])
        if tag == "span":
            self.answers[-1].append(["", dict(attributes)["data-t"], dict(attributes).get("class")])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "span"

    def handle_data(self, data):
        if self.inside:
            self.answers[-1][-1][0] += data


def test_token_figures(gvm_run, tmp_path, drawn):
    command = ["tokens", "--gvm", str(gvm_run), "--prompt", HOSTILE[0], "--responses", *HOSTILE, "--output", str(tmp_path)]
    figures.main(command)
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    page = Page(tmp_path / "tokens.html")
    assert "script" not in page.tags                                           # escaped
    assert not re.search("http|url|src=|href", (tmp_path / "tokens.html").read_text(encoding="utf-8"))    # self-contained
    texts = ["".join(text for text, *_ in answer).removesuffix("<|end|>") for answer in page.answers]
    assert texts == HOSTILE                                                    # every character is there, once
    assert page.tags.count("i") == "".join(HOSTILE).count("\n")                # a mark at each newline
    invisible = [not any(unicodedata.category(c)[0] not in "CM" or c == "\n" for c in text)
                 for answer in page.answers for text, *_ in answer]
    assert [kind == "thin" for answer in page.answers for *_, kind in answer] == invisible
    assert any(text == "" for answer in page.answers for text, *_ in answer)   # half a character: with a value as well
    values = [float(re.search(r": value (\S+),", hover)[1]) for answer in page.answers for _, hover, _ in answer]
    shown = [text.get_text() for text in drawn[0].axes[0].texts]
    assert [float(text) for text in shown if re.fullmatch(r"[+-]\d\.\d\d", text)] == pytest.approx(values, abs=0.006)
    with pytest.raises(SystemExit, match="exists already"):
        figures.main(command)


def test_html_inside_one_token(tmp_path):
    texts = ["<script>x</script>", "\"'><b>&amp;"]
    figures.write_token_page(tmp_path / "x.html", "<b>", [[(text, 0.1, 0.0, None) for text in texts]], figures.matplotlib.colors.Normalize(-1, 1))
    page = Page(tmp_path / "x.html")
    assert page.answers == [[[text, f"{text}: value +0.100, change +0.000", None] for text in texts]]
    assert "script" not in page.tags and page.tags.count("b") == 3             # the scale's three numbers


def test_token_numbers(gvm_run, dvpo_run, tmp_path):
    """Value, change and probability of every token, against the models read by hand."""
    prompt, response = "Is Cuba an island?", "Yes, it is."
    tokenizer = AutoTokenizer.from_pretrained(gvm_run)
    gvm = AutoModelForTokenClassification.from_pretrained(gvm_run, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(dvpo_run, dtype=torch.float32)
    ids = figures.encode_prompt(tokenizer, prompt)
    start, ids = len(ids), ids + figures.encode_response(tokenizer, response)
    with torch.no_grad():
        q = gvm(input_ids=torch.tensor([ids])).logits[0, :, 0] * gvm.config.gvm["reward_std"] + gvm.config.gvm["reward_mean"]
        probability = policy(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
    found = figures.response_values(gvm, tokenizer, prompt, response, policy)
    assert len(found) == len(ids) - start
    for t, (_, value, change, p) in enumerate(found, start):
        assert (value, change) == pytest.approx((q[t].item(), (q[t] - q[t - 1]).item()), abs=1e-6)
        assert p == pytest.approx(probability[t - 1, ids[t]].item())
    scale = figures.colour_scale(gvm, [found])
    assert (scale.vmin + scale.vmax) / 2 == pytest.approx(gvm.config.gvm["reward_mean"])
    assert max(abs(value - (scale.vmin + scale.vmax) / 2) for _, value, *_ in found) == pytest.approx(scale.vmax / 2 - scale.vmin / 2)
    figures.main(["tokens", "--gvm", str(gvm_run), "--policy", str(dvpo_run), "--output", str(tmp_path)])
    assert all(", probability " in hover for answer in Page(tmp_path / "tokens.html").answers for _, hover, _ in answer)


def test_token_mistakes(gvm_run, dvpo_run, tmp_path):
    tokens = ["tokens", "--gvm", str(gvm_run), "--output", str(tmp_path / "figures")]
    for text in (" ", "\udcff"):                                               # \udcff: what Python makes of a byte 255
        with pytest.raises(SystemExit, match="is empty, or not UTF-8"):
            figures.main([*tokens, "--responses", "Yes.", text])
    with pytest.raises(SystemExit, match=r"it has \d{3,} tokens, the model's context is 512"):
        figures.main([*tokens, "--responses", "Yes. " * 400])
    with pytest.raises(SystemExit, match="a language model is wanted"):
        figures.main([*tokens, "--policy", str(gvm_run)])
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(dvpo_run).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(dvpo_run)
    tokenizer.add_tokens("Atlantis")
    tokenizer.save_pretrained(other)
    with pytest.raises(SystemExit, match="its vocabulary is not that of"):
        figures.main([*tokens, "--policy", str(other)])


def test_no_other_model_is_taken_for_a_gvm(gvm_run, ppo_run, reward_model_run, tmp_path):
    def refused(folder, why):
        with pytest.raises(SystemExit, match=f"error: {re.escape(str(folder))}: {why}"):
            figures.main(["tokens", "--gvm", str(folder), "--output", str(tmp_path / "figures")])

    refused(ppo_run / "critic", r"holds a PPO critic, .*`evaluate.py values` reads it")
    refused(reward_model_run, "holds a reward model, .*token-level value model is wanted")
    mute, two, nan = (shutil.copytree(gvm_run, tmp_path / name) for name in ("mute", "two", "nan"))
    tokenizer = AutoTokenizer.from_pretrained(mute)
    tokenizer.chat_template = None
    (mute / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(mute)
    refused(mute, "the tokenizer has no chat template")
    AutoModelForTokenClassification.from_pretrained(two, num_labels=2, ignore_mismatched_sizes=True).save_pretrained(two)
    refused(two, "has 2 outputs per token")
    model = AutoModelForTokenClassification.from_pretrained(nan)
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(nan)
    refused(nan, "gives values that are not finite")
    assert not list((tmp_path / "figures").iterdir())


def test_a_policy_of_nan_weights(gvm_run, dvpo_run, tmp_path):
    folder = shutil.copytree(dvpo_run, tmp_path / "nan")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(SystemExit, match=r"error: \S*nan: gives values that are not finite"):
        figures.main(["tokens", "--gvm", str(gvm_run), "--policy", str(folder), "--output", str(tmp_path)])


@pytest.mark.parametrize("pairs", [0, 3])
def test_a_gvm_that_knows_tau(pairs, gvm_run, tmp_path, capsys):
    folder = shutil.copytree(gvm_run, tmp_path / "gvm")
    config = AutoConfig.from_pretrained(folder)
    config.gvm = config.gvm | {"tau_pairs": pairs}
    config.save_pretrained(folder)
    figures.main(["tokens", "--gvm", str(folder), "--output", str(tmp_path)])
    note = "The model was trained with --tau_pairs 3, and is read without tau here."
    assert capsys.readouterr().out == f"{folder}: {note}\n" * (pairs > 0) + f"{tmp_path}/tokens.png\n{tmp_path}/tokens.html\n"
    page = (tmp_path / "tokens.html").read_text()
    assert (f"at the bottom. {note}</p>" in page, "at the bottom.</p>" in page) == (pairs > 0, pairs == 0)


def test_token_texts_add_up(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for text in HOSTILE:
        ids = figures.encode_response(tokenizer, text)
        parts = figures.token_texts(tokenizer, ids)
        assert len(parts) == len(ids) and "".join(parts) == text + "<|end|>"


def test_fonts(monkeypatch):
    """The fonts that are needed, in the order in which matplotlib shall ask them; line breaks are looked for in none."""
    class Font:
        def __init__(self, path):
            self.has = "a" if path.endswith("DejaVuSansMono.ttf") else "b" if path.endswith("DejaVuSans.ttf") else ""

        def get_charmap(self):
            return {ord(character): 1 for character in self.has}

    monkeypatch.setattr(figures.font_manager, "get_font", Font)
    assert figures.choose_fonts("abc\n") == (["DejaVu Sans Mono", "DejaVu Sans"], {"c"})
    assert figures.choose_fonts("aa") == (["DejaVu Sans Mono"], set())


def test_characters_of_the_png():
    assert [figures.drawable(text, {"é"}) for text in ("aé", "\u200b", "\U0010fffd")] == ["aU+00E9", "U+200B", "U+10FFFD"]
    assert figures.drawable(" שלום", set()) == "םולש" and figures.drawable(" left", set()) == "left"
    assert [figures.drawable(text, set()) for text in (" ", "", ".\n")] == ["·", "…", ".↵"]


def test_layout_of_the_png():
    def answer(text, n):
        return [(text, 0.0, 0.0, None)] * n

    boxes = figures.lay_out(answer(" six", 20), 44, set())
    assert all(column >= 0 and column + width <= 44 for _, column, width, *_ in boxes) and boxes[-1][0] == 2
    assert [row for row, *_ in figures.lay_out(answer("a\n", 3), 44, set())] == [0, 1, 2]
    mirrored = figures.lay_out(answer("של", 3), 44, set())
    assert [column + width for _, column, width, *_ in mirrored] == [44, 38, 32]
    assert figures.lay_out(answer("日本語", 1), 44, set())[0][2] == 7          # two columns for each, and the gap
    for long in ("-" * 90, "日" * 90):
        assert 21 <= figures.lay_out(answer(long, 1), 44, {"日"})[0][2] <= 44  # cut: it has to fit into a column


@pytest.mark.parametrize("length, beside", [(3, False), (120, True)])
def test_long_answers_stand_side_by_side(length, beside, tmp_path, drawn):
    answers = [[(" word", 0.1, 0.0, None)] * length] * 3
    figures.draw_tokens(tmp_path / "x.png", "prompt", answers, figures.matplotlib.colors.Normalize(-1, 1))
    axes = drawn[0].axes[0]
    places = [text.get_position() for text in axes.texts if text.get_text().startswith("Answer")]
    assert len(drawn[0].axes[0].child_axes) == 1                               # one colour bar for all
    assert len({x for x, _ in places}) == (3 if beside else 1) and len({y for _, y in places}) == (1 if beside else 3)


@pytest.mark.parametrize("machine, label", [({"machine": "abacus, 3 cores"}, "training time (s, abacus, 3 cores)"), ({}, "training time (s)")])
def test_comparison_figure(machine, label, tmp_path, drawn):
    def seed(shift):
        curve = {"curve": [shift + step / 10 for step in range(7)]}
        return {"SFT": {"oracle": 0.0}, "DVPO": {"oracle": 0.5 + shift} | curve, "PPO": {"oracle": 0.4 + shift} | curve,
                "DVPO, pairs": {"oracle": 0.2 + shift} | curve, "DPO": {"oracle": 0.3 + shift}}

    (tmp_path / "compare.json").write_text(json.dumps({
        "seeds": {"1": seed(0.0), "2": seed(0.0), "3": seed(0.3)}, "methods": {"DVPO": {}, "PPO": {}, "DVPO, pairs": {}, "DPO": {}},
        "rollouts_per_step": 60, "step_seconds": {"DVPO": {"total": 1.5}, "PPO": {"total": 1.7}}} | machine))
    command = ["compare", "--results", str(tmp_path / "compare.json"), "--output", str(tmp_path)]
    figures.main(command)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    by_rollouts, by_time, final = drawn[0].axes
    last_five = numpy.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])             # means of the last five steps, or of all so far
    for panel, units in ((by_rollouts, [60, 60, 60]), (by_time, [1.5, 1.7, 1.5])):       # "DVPO, pairs" takes DVPO's time
        curves = {line.get_label(): line for line in panel.lines}
        assert list(curves) == ["SFT (held-out)", "DVPO", "PPO", "DVPO, pairs", "DPO (held-out)"]
        for method, unit, band in zip(("DVPO", "PPO", "DVPO, pairs"), units, panel.collections, strict=True):
            x = unit * numpy.arange(1, 8)
            assert curves[method].get_xdata() == pytest.approx(x) and curves[method].get_ydata() == pytest.approx(last_five + 0.1)
            edge = band.get_paths()[0].vertices
            for low_or_high, shift in ((edge[edge[:, 0] == x[-1]].min(0)[1], 0), (edge[edge[:, 0] == x[-1]].max(0)[1], 0.3)):
                assert low_or_high == pytest.approx(0.4 + shift)               # of the seeds
        assert curves["DPO (held-out)"].get_ydata() == pytest.approx([0.4, 0.4])
    assert [text.get_text() for text in final.texts] == ["0.00", "0.60", "0.50", "0.30", "0.40"]
    assert by_time.get_xlabel() == label
    with pytest.raises(SystemExit, match="exists already"):
        figures.main(command)
    with pytest.raises(SystemExit, match="make compare writes it"):
        figures.main(["compare", "--results", str(tmp_path / "none.json"), "--output", str(tmp_path / "other")])


COMPARED = {"seeds": {"1": {"SFT": {"oracle": 0.1}, "DVPO": {"oracle": 0.2}}}, "methods": {"DVPO": {}}, "rollouts_per_step": 60,
            "step_seconds": {"DVPO": {"total": 1.0}}}
ROW = {"win": 0.5, "tie": 0.2, "lose": 0.3, "pairs": 4}


@pytest.mark.parametrize("command, content, why", [
    ("wins", "{", "not JSON that can be read .*evaluate.py policy or judge writes it"),
    ("wins", b"\xff", "not JSON that can be read"),
    ("compare", "[]", "not a JSON object. make compare writes it"),
    ("wins", {"outcomes": [1]}, '"outcomes" is not a table'),
    ("wins", {"outcomes": {"a": 1}}, '"outcomes" is not a table'),
    ("wins", {"outcomes": {"a": {"b": 0.5}}}, '"outcomes" is not a table'),
    ("wins", {"outcomes": {"a": {"b": ROW | {"tie": None}}}}, '"outcomes" is not a table'),
    ("wins", {"outcomes": {"a": {"b": ROW | {"win": "1"}}}}, '"outcomes" is not a table'),
    ("wins", {"outcomes": {"a": {"b": ROW | {"lose": float("nan")}}}}, '"outcomes" is not a table'),
    ("wins", {"outcomes": {"a": {"b": {"win": 0.5, "tie": 0.2, "lose": 0.3}}}}, '"outcomes" is not a table'),
    ("compare", (ROOT / "results" / "values.json").read_text(), "has no methods.*`make compare`"),
    ("compare", COMPARED | {"seeds": {}}, "has no seeds. Is it what `make compare` wrote"),
    ("compare", COMPARED | {"seeds": [1]}, "has no seeds"),
    ("compare", {"seeds": COMPARED["seeds"], "methods": {"DVPO": {}}}, "has no step_seconds, rollouts_per_step"),
    ("compare", COMPARED | {"methods": {"DVPO": {}, "PPO": {}}}, "not all seeds have the oracle's score of PPO.*`make compare`"),
    ("compare", COMPARED | {"seeds": {"1": 0.5}}, "not all seeds have the oracle's score of SFT")])
def test_results_of_another_kind(command, content, why, tmp_path):
    file = tmp_path / "results.json"
    file.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    with pytest.raises(SystemExit, match=f"error: {re.escape(str(file))}: {why}"):
        figures.main([command, "--results", str(file), "--output", str(tmp_path)])


@pytest.mark.parametrize("command, name", [("tokens", "tokens.png"), ("tokens", "tokens.html"), ("curves", "curves.png"),
                                           ("wins", "wins.png"), ("compare", "compare.png")])
def test_where_no_figure_can_be_written(command, name, tmp_path, monkeypatch):
    """One clear error, before any work: there is nothing to be read in these calls, which would be the next error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / name).mkdir(parents=True)
    for output, why in (("file", "cannot be written"), ("file/x", "cannot be written"), ("/proc/x", "cannot be written"), ("taken", "is a folder")):
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit, match=rf"error: {output}/\S+: {why}.* Choose another --output"):
                figures.main([command, "--output", output, *more])
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(figures.os, "access", lambda path, mode: False)        # root may write everywhere
    with pytest.raises(SystemExit, match=r"error: locked/\S+: cannot be written \(no permission"):
        figures.main([command, "--output", "locked"])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag, capsys):
    figures.main([flag])                                                       # returns: status 0
    assert capsys.readouterr().out == figures.__doc__.strip() + "\n"


def test_curves(dvpo_run, ppo_run, tmp_path, drawn):
    figures.main(["curves", "--runs", str(dvpo_run), f"PPO={ppo_run}", "--judge", str(ROOT / "atlas.py:oracle"), "--output", str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = {panel.get_title(loc="left").split()[0]: panel.lines for panel in drawn[0].axes}
    assert list(lines) == ["true", "GVM", "KL", "answer", "entropy", "clip"]
    assert [line.get_label() for line in lines["KL"]] == ["dvpo (1 seed)", "PPO (1 seed)"]
    for run, number, metric in ((dvpo_run, 0, "value"), (ppo_run, 1, "reward")):
        logged = [record[metric] for record in read_lines(run / "metrics.jsonl")]
        assert lines["GVM"][number].get_ydata().tolist() == logged
    score, rollouts = figures.load_judge(str(ROOT / "atlas.py:oracle")), read_lines(dvpo_run / "rollouts.jsonl")
    assert lines["true"][0].get_ydata()[1] == pytest.approx(
        numpy.mean([score(row["prompt"], row["response"]) for row in rollouts if row["step"] == 2]))
    with pytest.raises(SystemExit, match="no such file"):
        figures.main(["curves", "--runs", str(tmp_path), "--output", str(tmp_path / "other")])


def run_folder(folder, kl, **settings):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"seed": 1, "output": str(folder), "lr": 0.1} | settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "kl": x}) + "\n" for step, x in enumerate(kl, 1)))
    return str(folder)


def test_seeds_are_one_curve(tmp_path, drawn, capsys):
    one, two = run_folder(tmp_path / "s1" / "x", [1, 2, 3]), run_folder(tmp_path / "lr=1" / "x", [3, 6], seed=2)
    figures.main(["curves", "--runs", one, f"x={two}", f"b={one}", "--output", str(tmp_path)])
    panel, = drawn[0].axes                                                     # no panel for what no run logs
    assert [line.get_label() for line in panel.lines] == ["x (2 seeds)", "b (1 seed)"]
    assert panel.lines[0].get_ydata().tolist() == [2, 4] and panel.lines[1].get_ydata().tolist() == [1, 2, 3]
    band, = panel.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(1, 1), (1, 3), (2, 2), (2, 6)}
    assert "x: runs of 3, 2 steps, the first 2 drawn" in capsys.readouterr().out
    (tmp_path / "s1" / "x" / "rollouts.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no answers of the steps"):
        figures.main(["curves", "--runs", one, "--judge", str(ROOT / "atlas.py:oracle"), "--output", str(tmp_path / "other")])
    three = run_folder(tmp_path / "s3" / "x", [1], lr=0.2)
    with pytest.raises(SystemExit, match=r"with --lr 0.1, .*s3/x with 0.2"):
        figures.main(["curves", "--runs", one, three, "--output", str(tmp_path / "other")])


def test_the_band_is_from_the_lowest_to_the_highest_seed(tmp_path, drawn):
    runs = [run_folder(tmp_path / str(seed) / "x", kl, seed=seed) for seed, kl in enumerate(([1, 5], [1, 8], [7, 5]))]
    figures.main(["curves", "--runs", *runs, "--output", str(tmp_path)])
    panel, = drawn[0].axes
    assert panel.lines[0].get_ydata().tolist() == [3, 6]
    assert {tuple(point) for point in panel.collections[0].get_paths()[0].vertices} == {(1, 1), (1, 7), (2, 5), (2, 8)}


def test_one_run_is_one_seed(tmp_path):
    one, two, three = (run_folder(tmp_path / name / "x", [1, 2], seed=seed) for name, seed in (("a", 1), ("b", 2), ("c", 2)))
    (tmp_path / "link").symlink_to(one)
    for runs, why in (([one, one], "same folder"), ([f"x={one}", two, f"x={tmp_path}/b/../link"], "same folder"),
                      ([one, two, three], "both made with --seed 2, so they are one seed")):
        with pytest.raises(SystemExit, match=f"error: x: .*{why}") as problem:
            figures.main(["curves", "--runs", *runs, "--output", str(tmp_path)])
        named = [two, three] if len(runs) == 3 and three in runs else [runs[0], runs[-1]]
        assert all(run.removeprefix("x=") in str(problem.value) for run in named)


@pytest.mark.parametrize("log, line, why", [
    ("metrics.jsonl", '{"step": 2}', "metrics.jsonl:2: step 2 has no number 'kl'"),
    ("metrics.jsonl", '{"step": 2, "kl": null}', "metrics.jsonl:2: step 2 has no number 'kl'"),
    ("metrics.jsonl", '{"kl": 2}', "metrics.jsonl:2: step None has no number 'step'"),
    ("metrics.jsonl", "5", "metrics.jsonl:2: not a JSON object. Remove"),
    ("rollouts.jsonl", '{"prompt": "a", "response": "b"}', "rollouts.jsonl:2: not a JSON object with step, prompt, response"),
    ("rollouts.jsonl", '{"step": 1, "prompt": "a"}', "rollouts.jsonl:2: not a JSON object with step, prompt, response")])
def test_logs_with_holes(log, line, why, tmp_path):
    run = tmp_path / "x"
    run_folder(run, [1, 2, 3])
    (run / "rollouts.jsonl").write_text("".join(json.dumps({"step": step, "prompt": "a", "response": "b"}) + "\n" for step in (1, 2, 3)))
    lines = (run / log).read_text().splitlines()
    (run / log).write_text("\n".join([lines[0], line, lines[2], ""]))
    with pytest.raises(SystemExit, match=f"error: {re.escape(str(run))}/{why}"):
        figures.main(["curves", "--runs", str(run), "--judge", str(ROOT / "atlas.py:oracle"), "--output", str(tmp_path)])


def test_seeds_that_log_different_things(tmp_path):
    one, two = (run_folder(tmp_path / name / "x", [1], seed=seed) for name, seed in (("a", 1), ("b", 2)))
    (tmp_path / "b" / "x" / "metrics.jsonl").write_text('{"step": 1, "entropy": 2}\n')
    with pytest.raises(SystemExit, match=f"error: x: not all of {one}, {two} have 'kl'"):
        figures.main(["curves", "--runs", one, two, "--output", str(tmp_path)])


# 模型 where a font has it, its code points elsewhere.
NAMES = {"模型": figures.drawable("模型", figures.choose_fonts("模型")[1]), "_a": "_a", "$\\a{$": "$\\a{$", "b\u0007": "bU+0007", "ל ש": "ש ל"}


def test_names_of_models(tmp_path, drawn):
    """As they are: in fonts that have the characters (the fixture makes a missing one an error), "_" at the front."""
    runs = [f"{name}={run_folder(tmp_path / 'runs' / str(number), [1, 2])}" for number, name in enumerate(NAMES)]
    figures.main(["curves", "--runs", *runs, "--output", str(tmp_path)])
    legend, = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{shown} (1 seed)" for shown in NAMES.values()]
    (tmp_path / "wins.json").write_text(json.dumps({"outcomes": {one: {two: ROW for two in NAMES if two != one} for one in NAMES}}))
    for name in NAMES:
        figures.main(["wins", "--results", str(tmp_path / "wins.json"), "--model", name, "--output", str(tmp_path), "--overwrite"])
        legend, = drawn[-1].legends
        assert [text.get_text() for text in legend.get_texts()] == [f"{NAMES[name]} {outcome}s" for outcome in ("win", "tie", "lose")]
        labels = [label.get_text() for label in drawn[-1].axes[0].get_yticklabels()]
        assert labels == [f"{shown}\n(4 pairs)" for other, shown in NAMES.items() if other != name]


def test_clip_fraction_is_not_everybody_s(dvpo_run, remax_run, tmp_path, drawn):
    figures.main(["curves", "--runs", str(dvpo_run), str(remax_run), "--output", str(tmp_path)])
    lines = {panel.get_title(loc="left").split()[0]: [line.get_label() for line in panel.lines] for panel in drawn[0].axes}
    assert lines["KL"] == ["dvpo (1 seed)", "remax (1 seed)"] and lines["clip"] == ["dvpo (1 seed)"]


def test_a_cut_off_log(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2}\n{"text": "\xd7')               # killed inside a character
    assert figures.read_lines(log) == [{"step": 1}, {"step": 2}]
    log.write_bytes(b'{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(SystemExit, match=r"metrics.jsonl:2: invalid JSON"):
        figures.read_lines(log)


def test_wins_figure(tmp_path, drawn):
    file, wins = tmp_path / "policy.json", {"win": 0.5, "tie": 0.2, "lose": 0.3, "pairs": 400}
    lost = {"win": 0.3, "tie": 0.2, "lose": 0.5, "pairs": 400}
    file.write_text(json.dumps({"outcomes": {"sft": {"ppo": lost, "dvpo": lost}, "ppo": {"sft": wins, "dvpo": lost},
                                             "dvpo": {"sft": wins, "ppo": wins | {"pairs": 399}}}, "unjudged": 7}))
    command = ["wins", "--results", str(file), "--output"]
    figures.main([*command, str(tmp_path)])
    assert (tmp_path / "wins.png").read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sft\n(400 pairs)", "ppo\n(399 pairs)"]
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[50, 50], [20, 20], [30, 30]]
    assert [bar.get_x() for bar in axes.containers[2]] == [70, 70] and "7 answers" in axes.get_xlabel()
    assert [text.get_text() for text in axes.texts] == ["50", "50", "20", "20", "30", "30"]
    figures.main([*command, str(tmp_path / "sft"), "--model", "sft"])
    assert [bar.get_width() for bar in drawn[1].axes[0].containers[0]] == [30, 30]
    with pytest.raises(SystemExit, match="--model grpo: .* has sft, ppo, dvpo"):
        figures.main([*command, str(tmp_path / "other"), "--model", "grpo"])
    file.write_text('{"outcomes": {"sft": {}}}')
    with pytest.raises(SystemExit, match="sft is alone in it"):
        figures.main([*command, str(tmp_path / "other")])
    file.write_text("{}")
    with pytest.raises(SystemExit, match='no "outcomes" in it'):
        figures.main([*command, str(tmp_path / "other")])
