"""The experiments on a real language model, run through with a tiny one and a stand-in for VADER."""
import json
import shutil
import sys
import types

import pytest
from conftest import ROOT, read_lines, write_rows
from transformers import AutoTokenizer

import claims


@pytest.fixture
def sentiment(monkeypatch):
    """experiments/sentiment.py with a score that is the share of vowels, doubled, minus 1."""
    vader = types.ModuleType("vaderSentiment.vaderSentiment")

    class Analyzer:
        def polarity_scores(self, text):
            return {"compound": 2 * sum(c in "aeiou" for c in text) / max(1, len(text)) - 1}
    vader.SentimentIntensityAnalyzer = Analyzer
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", vader)
    monkeypatch.delitem(sys.modules, "sentiment", raising=False)
    import sentiment
    yield sentiment
    del sys.modules["sentiment"]


def test_openings_are_600_different_lines():
    lines = (ROOT / "data" / "sentiment_prompts.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 600 and all(line.strip() == line and len(line) < 90 for line in lines)


def test_without_vader_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.delitem(sys.modules, "sentiment", raising=False)
    with pytest.raises(SystemExit, match="pip install vaderSentiment==3.3.2"):
        import sentiment  # noqa: F401


def test_sentiment_runs_through(sentiment, runs, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(runs("sft"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)          # Atlas's template, and a system message
    tokenizer.chat_template = "{% for m in messages %}{% if m['content'] %}<|user|>{{ m['content'] }}{% if m['role'] == 'assistant' %}" \
                              "<|end|>{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.save_pretrained(model)
    sample = sentiment.sample

    def ends(policy, ids, what, longest=32):                  # the tiny model seldom ends: half of its answers do here
        stop = getattr(policy, "policy", policy).generation_config.eos_token_id[0]
        return [[*y[:3 + i % 5], stop] if i % 2 else y for i, y in enumerate(sample(policy, ids, what, longest))]

    monkeypatch.setattr(sentiment, "sample", ends)
    monkeypatch.setattr(sentiment, "LRS", (1e-4, 1e-3))
    monkeypatch.setattr(sentiment, "RATES", tmp_path / "rates.json")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sentiment.py", "--model", str(model), "--seeds", "1", "--tune_seeds", "11", "--steps", "2", "--tune_steps", "1",
                                      "--scale", "0.1", "--precision", "no", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results")])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    sentiment.main()
    found = json.loads((tmp_path / "results" / "sentiment.json").read_text())
    assert set(found["numbers"]) == {"start", *sentiment.ARMS} and set(found["values"]) == {"gvm_pairs", "gvm_scores"}
    assert found["numbers"]["start"][0]["kl"] == pytest.approx(0, abs=1e-6) and found["numbers"]["start"][0]["wins"] == 0.5
    assert all(0 < x["distinct-2"] <= 1 and x["perplexity"] > 1 and len(x["answers"]) == 6 for seeds in found["numbers"].values() for x in seeds)
    best = {arm: float(max(rates, key=lambda x: rates[x][0])) for arm, rates in found["tuned"]["rates"].items()}
    best["DVPO, pairs, KL 0.003"] = best["DVPO, pairs"]
    assert {run.name for run in (tmp_path / "runs").glob("*_2_1")} == {claims.file_name(f"{arm}_{lr:g}_2_1") for arm, lr in best.items()}
    page = (tmp_path / "results" / "sentiment.md").read_text()
    assert page.count("\n| PPO |") == 2 and "nan" not in page.replace("(nan to nan)", "")
    assert (tmp_path / "results" / "sentiment.png").exists() and (tmp_path / "results" / "sentiment_tokens.png").exists()
    data = tmp_path / "runs" / "data"
    parts = [{json.dumps(row["prompt"]) for row in read_lines(data / f"{name}.jsonl")} for name in ("scored", "rl", "test_scored", "test_prompts")]
    assert sum(map(len, parts)) == len(set.union(*parts))     # no prompt is in two parts
    assert all(row["prompt"][0] == {"role": "system", "content": ""} for row in read_lines(data / "scored.jsonl"))
    monkeypatch.setattr(sentiment.claims, "words_to", None)   # a second time nothing is trained
    sentiment.main()


def test_preferences_run_through(runs, tmp_path, monkeypatch, capsys):
    import preferences
    hh = [{"chosen": f"\n\nHuman: Is it {n}?\n\nAssistant: No, it is not{' at all' * (n % 3)}.", "rejected": f"\n\nHuman: Is it {n}?\n\nAssistant: Yes{', it is' * (n % 2)}."}
          for n in range(60)]
    scored = [{"prompt_id": n, "policy": p, "response": f"It is {n} {p * (1 + n % 2)}.", "reward": len(p) / 9} for n in range(60) for p in ("a", "bb", "ccc")]
    write_rows(tmp_path / "hh.jsonl", hh)
    write_rows(tmp_path / "scored.jsonl", scored)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt_id": n, "prompt": f"What is {n}?"} for n in range(60)])
    monkeypatch.setattr(sys, "argv", ["preferences.py", "--model", str(runs("sft")), "--hh", str(tmp_path / "hh.jsonl"), "--alpaca", str(
        tmp_path / "scored.jsonl"), "--prompts", str(tmp_path / "prompts.jsonl"), "--precision", "no", "--runs", str(tmp_path / "runs"),
        "--output", str(tmp_path / "results")])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    preferences.main()
    found = json.loads((tmp_path / "results" / "preferences.json").read_text())
    assert len(found) == 8 and set(found["HH harmless: GVM"]) == {"all", "like length"}
    assert found["HH harmless: ScalarRM"]["all"]["longer wins"]["mean"] == 1.0 and found["AlpacaEval: GVM"]["all"]["pairs"] > 10
    assert (tmp_path / "results" / "preferences.md").read_text().count("\n| AlpacaEval") == 8
    assert claims.read_lines(tmp_path / "runs" / "HH_harmless" / "alike" / "pairs.jsonl")
