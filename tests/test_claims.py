"""make claims: what the experiments share, checked; and each experiment, run through with almost nothing."""
import argparse
import ast
import json
import re
import runpy
import shutil
import statistics
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForTokenClassification

import atlas
import claims

NAMES = [*re.search("CLAIMS := (.*)", (ROOT / "Makefile").read_text())[1].split()]
QUESTION, ANSWER = "Is Japan an island?", "Yes, Japan is an island country."


def test_verdict_needs_the_whole_interval_on_one_side():
    """Five numbers by hand: mean 1, deviation 1/2 -> half the interval is 2.776 * 0.5 / sqrt(5) = 0.62."""
    assert claims.interval([0.5, 0.5, 1.0, 1.5, 1.5])[1:] == pytest.approx((1 - 0.6207, 1 + 0.6207), abs=1e-3)
    assert claims.verdict([0.5, 0.5, 1.0, 1.5, 1.5]) == "confirmed"
    assert claims.verdict([-0.5, -0.5, -1.0, -1.5, -1.5]) == "not confirmed: the reverse"
    assert claims.verdict([-0.5, 0.5, 0.0, 1.5, -1.0]) == claims.verdict([3.0]) == "not decided"


def test_completions_go_on_from_the_prefix_and_leave_what_has_ended(runs):
    policy, tokenizer = claims.load_policy(runs("dvpo"))
    prompt, response = claims.sequence(tokenizer, QUESTION, ANSWER)
    long = [5] * claims.LONGEST
    done = claims.completions(policy, [(prompt, response), (prompt, response[:3]), (prompt, []), (prompt, long), (prompt, long[1:])], 7)
    assert done[0] == [response] and done[3] == [long] and [len(rows) for rows in done] == [1, 7, 7, 1, 7]
    assert {len(row) for row in done[4]} == {claims.LONGEST}                    # not longer, though others have room
    assert all(row[:3] == response[:3] and len(row) > 3 for row in done[1])
    with torch.no_grad():                                      # the share of the likeliest next token is what the policy says
        said = policy(torch.tensor([[*prompt, *response[:2]]])).logits[0, -1].softmax(-1)
    next_tokens = [row[2] for row in claims.completions(policy, [(prompt, response[:2])], 1000)[0]]
    likely = said.argmax().item()
    assert next_tokens.count(likely) / 1000 == pytest.approx(said[likely].item(), abs=4.5 * (0.25 / 1000) ** 0.5)


def test_true_values_of_a_model_are_means_of_the_oracle(runs):
    _, tokenizer = claims.load_policy(runs("dvpo"))
    good, bad = (claims.sequence(tokenizer, QUESTION, text)[1] for text in ("Yes, it is.", "No, it is not."))
    (value, squared_error), (ended, none) = claims.true_values([QUESTION] * 2, tokenizer, [[good, bad, good, bad], [good]])
    assert value == 0 and squared_error == pytest.approx(statistics.variance([.5, -.5, .5, -.5]) / 4)
    assert (ended, none) == (0.5, 0.0)


def test_token_values_begin_at_the_last_prompt_token(runs):
    """One value more than the response has tokens, in units of the scores."""
    _, tokenizer = claims.load_policy(runs("dvpo"))
    model = AutoModelForTokenClassification.from_pretrained(runs("gvm")).eval()
    prompt, response = claims.sequence(tokenizer, QUESTION, ANSWER)
    (found,) = claims.token_values(runs("gvm"), [(prompt, response)])
    q = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1:, 0] * model.config.gvm["reward_std"]
    assert found == pytest.approx((q + model.config.gvm["reward_mean"]).tolist(), abs=1e-5) and len(found) == len(response) + 1


def test_a_finished_run_is_made_once_and_another_one_again(tmp_path, world, runs):
    rows = claims.read_lines(world / "data" / "scored.jsonl")
    claims.write_lines(tmp_path / "data" / "scored.jsonl", rows)
    flags, made = {"model": runs("sft"), "data": tmp_path / "data", "epochs": 1}, tmp_path / "gvm" / "model.safetensors"

    def made_again(**more):
        before = made.stat().st_mtime_ns if made.exists() else 0
        assert claims.train("train_gvm", tmp_path / "gvm", **flags | more) == tmp_path / "gvm"
        return made.stat().st_mtime_ns > before

    assert made_again() and not made_again()
    claims.write_lines(tmp_path / "data" / "scored.jsonl", rows)                # the same rows: nothing is new
    assert not made_again()
    claims.write_lines(tmp_path / "data" / "scored.jsonl", rows[:64])
    assert made_again() and made_again(td_lambda=0.0)
    assert json.loads((tmp_path / "gvm" / "args.json").read_text())["td_lambda"] == 0


def test_what_a_seed_has_found_is_kept_until_its_script_changes(tmp_path):
    text = ('"""What is it?"""\nimport random\n\n\ndef run_seed(folder, seed, scale):\n    calls.append(seed)\n    return {"twice": 2 * seed}\n\n\n'
            "# ---- 2. The answer ----\n")

    def over_seeds(text, scale=0.5):
        (tmp_path / "one.py").write_text(text)
        names = {"calls": []}
        exec(compile(text, tmp_path / "one.py", "exec"), names)
        found = claims.over_seeds(names["run_seed"], argparse.Namespace(runs=tmp_path, seeds=[4, 3], jobs=1, scale=scale))
        assert found == {"4": {"twice": 8}, "3": {"twice": 6}}
        return names["calls"]

    for seed in (3, 4):
        (tmp_path / f"seed{seed}").mkdir()
    threads = torch.get_num_threads()
    assert over_seeds(text) == [4, 3] and over_seeds(text) == []
    assert over_seeds(text + "print()") == [] and over_seeds(text.replace("What is it", "What")) == []   # another report, another question
    assert over_seeds(text.replace("2 * seed", "seed * 2")) == [4, 3]
    assert over_seeds(text.replace("2 * seed", "seed * 2"), scale=1.0) == [4, 3]
    torch.set_num_threads(threads)


def test_experiments_stand_alone_and_say_hypothesis_method_command_result():
    for name in NAMES:
        tree = ast.parse((ROOT / "experiments" / f"{name}.py").read_text())
        imported = {(node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0] for node in ast.walk(tree)
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert not imported & {*NAMES, "compare", "value_models", "compute"}, name
        text = ast.get_docstring(tree)
        places = [text.index(f"\n{word} ") for word in ("Hypothesis", "Method", "Command", "Result")]
        assert places == sorted(places), name


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory, world):
    """One folder of runs for all experiments, as in make claims, around the tests' tiny world."""
    folder = tmp_path_factory.mktemp("claims")
    for part in ("base", "data"):
        shutil.copytree(world / part, folder / "runs" / "seed21" / part)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_through(name, laboratory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", "--seeds", "21", "--jobs", "1", "--scale", "0.02", "--runs",
                                      str(laboratory / "runs"), "--output", str(laboratory / "results")])
    monkeypatch.chdir(ROOT)
    train, online = claims.train, {"batch_size": 8, "mini_batch_size": 4, "max_response_length": 20}
    monkeypatch.setattr(claims, "LONGEST", 20)
    monkeypatch.setattr(claims, "train", lambda script, output, **flags: train(
        script, output, **flags | (online if script in ("train_dvpo", "baselines.ppo") else {})))
    policies, threads = dict(atlas.POLICIES), torch.get_num_threads()
    runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    assert atlas.POLICIES == policies
    result = json.loads((laboratory / "results" / f"{name}.json").read_text())
    assert result["claims"] and all(claim["verdict"] and claim["numbers"] for claim in result["claims"].values())
    assert result["finding"].endswith(".") and result["seeds"]["21"] and "nan" not in result["finding"]
    if name == "drift":                                       # a sentence about the GVM has the GVM's numbers
        found = result["claims"]["the GVM goes stale along DVPO: its squared error grows"]["numbers"]
        assert "{} to {} for the frozen GVM".format(*re.match(r"(\S+).* at step 0, (\S+)", found).groups()) in result["finding"]
    text = (laboratory / "results" / f"{name}.md").read_text()
    assert result["finding"] in text and (laboratory / "results" / f"{name}.png").stat().st_size > 5000
