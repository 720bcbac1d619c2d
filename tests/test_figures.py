"""Pictures: what is drawn is what was measured, and hostile text spoils neither the PNG nor the page."""
import html.parser
import json
import re
import unicodedata
import warnings

import numpy
import pytest
import torch
from conftest import ROOT, read_lines
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

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


def test_comparison_figure(tmp_path):
    def seed(shift):
        curve = {"curve": [shift + step / 10 for step in range(7)]}
        return {"SFT": {"oracle": 0.0}, "DVPO": {"oracle": 0.5 + shift} | curve, "PPO": {"oracle": 0.4 + shift} | curve,
                "DPO": {"oracle": 0.3 + shift}}

    (tmp_path / "compare.json").write_text(json.dumps({
        "seeds": {"1": seed(0.0), "2": seed(0.1)}, "methods": {"DVPO": {}, "PPO": {}, "DPO": {}}, "rollouts_per_step": 60,
        "step_seconds": {"DVPO": {"total": 1.0}, "PPO": {"total": 1.7}}}))
    command = ["compare", "--results", str(tmp_path / "compare.json"), "--output", str(tmp_path)]
    figures.main(command)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="exists already"):
        figures.main(command)
    with pytest.raises(SystemExit, match="make compare writes it"):
        figures.main(["compare", "--results", str(tmp_path / "none.json"), "--output", str(tmp_path / "other")])


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
