"""Pictures: what is drawn is what was measured, and no text spoils the PNG or the page."""
import html
import json
import re

import numpy
import pytest
import torch
from conftest import ROOT, fails, read_lines, write_rows
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import atlas
import figures

HOSTILE = ["<script>alert('x')</script> & \"quotes\" $math$ \\alpha", "日本 🙂 é", "two\n\nlines\n\tend ", "a\u200b\u202e\x07e\u0301", "."]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a command drew, still open: a test reads lines, bars and texts off them."""
    kept = []
    monkeypatch.setattr(figures.plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    figures.plt.close("all")


@pytest.mark.filterwarnings("ignore:Glyph")                                    # not every machine has fonts for HOSTILE
def test_token_figures(runs, tmp_path, drawn):
    command = ["tokens", "--gvm", str(runs("gvm")), "--policy", str(runs("dvpo")), "--prompt", HOSTILE[0],
               "--responses", *HOSTILE, "--output", str(tmp_path)]
    figures.main(command)
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert not re.search("<script|http|url|src=|href", page) and page.count("<section>") == len(HOSTILE)   # escaped, self-contained
    tokens = re.findall(r'<span style="[^"]*" data-t="[^"]*: value (\S+), change \S+, probability \S+">([^<]*)</span>', page)
    assert html.unescape("".join(text for _, text in tokens)).split("<|end|>") == [*HOSTILE, ""]          # every character, once
    values = [float(value) for value, _ in tokens]
    shown = [text.get_text() for text in drawn[0].axes[0].texts]
    assert [float(text) for text in shown if re.fullmatch(r"[+-]\d\.\d\d", text)] == pytest.approx(values, abs=0.006)
    fails(lambda: figures.main(command), "tokens.png: exists")


def test_token_numbers(runs):
    """Value, change and probability of every token, against the models read by hand."""
    tokenizer = AutoTokenizer.from_pretrained(runs("gvm"))
    gvm = AutoModelForTokenClassification.from_pretrained(runs("gvm"), dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(runs("dvpo"), dtype=torch.float32)
    prompt, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (
        "<|user|>Is Cuba an island?<|assistant|>", "<|user|>Is Cuba an island?<|assistant|>Yes, it is.<|end|>"))
    with torch.no_grad():
        q = gvm(input_ids=torch.tensor([ids])).logits[0, :, 0] * gvm.config.gvm["reward_std"] + gvm.config.gvm["reward_mean"]
        probability = policy(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
    found = figures.response_values(gvm, tokenizer, "Is Cuba an island?", "Yes, it is.", policy)
    assert "".join(text for text, *_ in found) == "Yes, it is.<|end|>" and len(found) == len(ids) - len(prompt)
    for t, (_, value, change, p) in enumerate(found, len(prompt)):
        assert (value, change) == pytest.approx((q[t].item(), (q[t] - q[t - 1]).item()), abs=1e-6)
        assert p == pytest.approx(probability[t - 1, ids[t]].item())
    scale = figures.colour_scale(gvm, [found])
    assert (scale.vmin + scale.vmax) / 2 == pytest.approx(gvm.config.gvm["reward_mean"])
    assert max(abs(value - gvm.config.gvm["reward_mean"]) for _, value, *_ in found) == pytest.approx(scale.vmax / 2 - scale.vmin / 2)


def test_curves(runs, tmp_path, drawn):
    """Of PPO and ReMax, which clips nothing; the judge's scores are those of the rollouts."""
    figures.main(["curves", "--runs", str(runs("ppo")), f"R={runs('remax')}", "--judge", f"{ROOT}/data/atlas.py:oracle", "--output", str(tmp_path)])
    lines = {panel.get_title(loc="left").split()[0]: panel.lines for panel in drawn[0].axes}
    assert {title: len(x) for title, x in lines.items()} == {"judge's": 2, "GVM": 2, "KL": 2, "answer": 2, "entropy": 2, "clip": 1}
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["ppo (1 seed)", "R (1 seed)"]
    for number, name in enumerate(("ppo", "remax")):
        assert lines["GVM"][number].get_ydata().tolist() == [record["reward"] for record in read_lines(runs(name) / "metrics.jsonl")]
    second = [atlas.oracle(row["prompt"], row["response"]) for row in read_lines(runs("ppo") / "rollouts.jsonl") if row["step"] == 2]
    assert lines["judge's"][0].get_ydata()[1] == pytest.approx(numpy.mean(second))
    fails(lambda: figures.main(["curves", "--runs", str(runs("sft")), "--output", str(tmp_path / "x")]), "not the run folder of an online")


def test_seeds_are_one_curve(tmp_path, drawn):
    for name, kl in (("a/x", [1, 2, 3]), ("b/x", [3, 6])):
        write_rows(tmp_path / name / "metrics.jsonl", [{"step": t, "kl": x, "seconds_score": 1.0, "seconds_update": 2.0 * x}
                                                       for t, x in enumerate(kl, 1)])
    with open(tmp_path / "b" / "x" / "metrics.jsonl", "ab") as log:
        log.write(b'{"step": 3, "\xd7')                                        # killed in the middle of a character
    command = ["curves", "--output", str(tmp_path), "--overwrite", "--runs"]
    figures.main([*command, f"x={tmp_path}/a/x", f"x={tmp_path}/b/x", "--x", "seconds"])
    panel, = drawn[0].axes                                                     # no panel for what no run logs
    assert panel.lines[0].get_ydata().tolist() == [2, 4] and panel.lines[0].get_xdata().tolist() == [5, 14]
    assert {tuple(point) for point in panel.collections[0].get_paths()[0].vertices} == {(5, 1), (5, 3), (14, 2), (14, 6)}
    fails(lambda: figures.main([*command, f"{tmp_path}/a/x", f"{tmp_path}/b/x"]), "b/x: another run is called x, too")


def test_wins_figure(tmp_path, drawn):
    file, wins = tmp_path / "policy.json", {"win": 0.5, "tie": 0.2, "lose": 0.3, "pairs": 400}
    lost = {"win": 0.3, "tie": 0.2, "lose": 0.5, "pairs": 400}
    file.write_text(json.dumps({"outcomes": {"sft": {"dvpo": lost}, "dvpo": {"sft": wins, "ppo": wins | {"pairs": 399}}}, "unjudged": 7}))
    command = ["wins", "--results", str(file), "--output", str(tmp_path), "--overwrite"]
    figures.main(command)
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sft\n(400 pairs)", "ppo\n(399 pairs)"]
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[50, 50], [20, 20], [30, 30]]
    assert [bar.get_x() for bar in axes.containers[2]] == [70, 70] and "7 answers" in axes.get_xlabel()
    figures.main([*command, "--model", "sft"])
    assert [bar.get_width() for bar in drawn[1].axes[0].containers[0]] == [30]
    fails(lambda: figures.main([*command, "--model", "grpo"]), "compares grpo with nothing")


def test_only_a_gvm_has_token_values(runs, tmp_path):
    for folder, why in ((runs("ppo") / "critic", "not made by train_gvm.py"), (runs("reward_model"), "not a trained TokenClassification")):
        fails(lambda: figures.main(["tokens", "--gvm", str(folder), "--output", str(tmp_path)]), why)
