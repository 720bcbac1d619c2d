"""Numbers and pictures: statistics against known answers, and files that survive hostile text."""
import html.parser
import json

import pytest
import torch
from conftest import ROOT, read_lines
from transformers import AutoTokenizer

import evaluate
import figures


def test_bootstrap_covers_the_mean():
    """95 % intervals of the mean of 50 draws contain the true mean in about 95 of 100 cases."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        x = evaluate.bootstrap(2 + torch.randn(50, generator=generator), seed, resamples=400)
        assert x["low"] < x["mean"] < x["high"]
        hits += x["low"] < 2 < x["high"]
    assert 0.88 <= hits / 200 <= 0.98
    assert evaluate.bootstrap([1.0] * 5, 0) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_wins():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])
    assert evaluate.wins(a, b).tolist() == [1.0, 0.5, 0.0]
    assert (evaluate.wins(a, b) + evaluate.wins(b, a) == 1).all()


def test_values_agrees_with_training(gvm_run, gvm_args, tmp_path):
    args = evaluate.ValuesArgs(model=str(gvm_run), data=gvm_args.data, output=str(tmp_path / "values.json"))
    result = evaluate.evaluate_values(args)
    logged = read_lines(gvm_run / "metrics.jsonl")[-1]["pair_accuracy"]
    assert {name: x["mean"] for name, x in result["pair_accuracy"].items()} == pytest.approx(logged)
    assert json.loads((tmp_path / "values.json").read_text()) == result
    with pytest.raises(SystemExit, match="exists already"):
        evaluate.evaluate_values(args)


def test_policy(sft_run, dvpo_run, world, tmp_path):
    args = evaluate.PolicyArgs(models=[str(sft_run), str(dvpo_run)], data=str(world / "data"), samples=2,
                               judge=str(ROOT / "atlas.py:oracle"), output=str(tmp_path / "eval"), max_response_length=12)
    result = evaluate.evaluate_policy(args)
    lines = read_lines(tmp_path / "eval" / "answers.jsonl")
    for name, run in (("sft", sft_run), ("dvpo", dvpo_run)):
        mine = [line for line in lines if line["model"] == name]
        assert len(mine) == 2 * result["models"][name]["prompts"]
        assert result["models"][name]["score"]["mean"] == pytest.approx(sum(line["score"] for line in mine) / len(mine))
    assert result["models"]["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-6) != result["models"]["dvpo"]["kl"]["mean"]
    assert result["win_rate"]["sft"]["dvpo"]["mean"] + result["win_rate"]["dvpo"]["sft"]["mean"] == pytest.approx(1)
    again = evaluate.evaluate_policy(evaluate.PolicyArgs(**vars(args) | {"output": ""}))
    assert again["models"] == result["models"]                                 # the same seed, the same samples
    with pytest.raises(SystemExit, match="holds an evaluation"):
        evaluate.evaluate_policy(args)


HOSTILE = ["<script>alert('x')</script> & \"quotes\" $math$ \\alpha", "日本 🙂 é", "שלום world", "two\nlines", "."]


class Text(html.parser.HTMLParser):
    """Collects the text of the answers and the tags of a page."""
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.inside = [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag == "span"
        if tag == "p":
            self.text.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.text[-1] += data


def test_token_figures(gvm_run, tmp_path):
    figures.main(["tokens", "--gvm", str(gvm_run), "--prompt", HOSTILE[0], "--responses", *HOSTILE, "--output", str(tmp_path)])
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    page, text = (tmp_path / "tokens.html").read_text(encoding="utf-8"), Text()
    text.feed(page)
    assert "script" not in text.tags and "http" not in page                    # escaped, and self-contained
    answers = [answer.removesuffix("<|end|>") for answer in text.text if answer]
    assert answers == HOSTILE                                                  # every character is there, once
    with pytest.raises(SystemExit, match="exists already"):
        figures.main(["tokens", "--gvm", str(gvm_run), "--output", str(tmp_path)])


def test_token_texts_add_up(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for text in HOSTILE:
        ids = figures.encode_response(tokenizer, text)
        parts = figures.token_texts(tokenizer, ids)
        assert len(parts) == len(ids) and "".join(parts) == text + "<|end|>"


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


def test_curves(dvpo_run, ppo_run, tmp_path):
    figures.main(["curves", "--runs", str(dvpo_run), str(ppo_run), "--judge", str(ROOT / "atlas.py:oracle"), "--output", str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no such file"):
        figures.main(["curves", "--runs", str(tmp_path), "--output", str(tmp_path / "other")])
