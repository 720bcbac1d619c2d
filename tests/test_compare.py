"""experiments/compare.py: its bookkeeping against known answers, and the whole of it with almost nothing."""
import argparse
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, script
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import claims
import compare


def test_sign_flips_and_holm():
    assert compare.sign_flips([1.0, 2.0, 3.0]) == 2 / 8                        # only all plus and all minus are as far from 0
    assert compare.sign_flips([1.0, -1.0]) == 1 and compare.sign_flips([0.1] * 10) == 2 / 1024
    assert compare.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert compare.holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("centre, spread, p, word", [
    (0.1, 0.01, 0.04, "better"), (-0.1, 0.01, 0.04, "worse"), (0.02, 0.002, 0.04, "better, by less than 0.03"),
    (-0.02, 0.002, 0.04, "worse, by less than 0.03"), (0.1, 0.01, 0.05, "not worse by more than 0.03"),
    (-0.1, 0.01, 0.05, "not better by more than 0.03"), (0.02, 0.002, 0.05, "equal within 0.03"),
    (0.02, 0.04, 0.05, "not worse by more than 0.03"), (0.0, 0.2, 0.05, "not decided")])
def test_verdicts(centre, spread, p, word):
    differences = [centre - spread, centre + spread, centre, centre - spread / 2, centre + spread / 2]
    assert compare.verdict(differences, p) == word


def test_the_arm_s_own_signal_says_where_to_stop():
    record = {"signal": [0] * 5 + [5] * 5 + [0] * 6, "curve": [float(i) for i in range(16)]}
    assert compare.stopped(record) == (10, 12.0)                               # best in steps 6 to 10; 10.0 ... 14.0 follow
    assert compare.drawdown(record) == 0 and compare.drawdown({"curve": [0.0] * 5 + [5.0] * 5 + [2.0] * 5 + [9.0] * 5}) == 3


def test_every_arm_s_flags_are_its_script_s(monkeypatch, tmp_path):
    """The flags of every try are fields of Args, fit one process, and give every online arm as many rollouts. Of each knob
    the first value is the script's own; each arm has as many values."""
    asked = []
    monkeypatch.setattr(claims, "train", lambda script, output, **flags: asked.append((script, flags)))
    for arm in compare.EQUAL:
        knobs = compare.ARMS[arm][2]
        assert sum(map(len, knobs.values())) - (len(knobs) - 1) == 8
        for settings in [{name: value} for name, values in knobs.items() for value in values]:
            compare.train(tmp_path, arm, tmp_path, {"data": tmp_path, "seed": 1, "model": "m"}, settings | (
                {} if arm == "DPO" else {"steps": 50}))
    rollouts = set()
    for name, flags in asked:
        module = script(next(key for key, path in SCRIPTS.items() if path == f"{name.replace('.', '/')}.py"))
        args = module.Args(**flags)
        module.start_accelerator(args, getattr(args, "mini_batch_size", args.batch_size))
        rollouts.add(args.steps * args.batch_size if hasattr(args, "steps") else None)
    assert rollouts == {50 * compare.ROLLOUTS, None}
    for arm in compare.EQUAL:
        name, _, knobs = compare.ARMS[arm]
        module = script(next(key for key, path in SCRIPTS.items() if path == f"{name.replace('.', '/')}.py"))
        for knob, values in list(knobs.items())[1:]:
            assert getattr(module.Args(data="d", model="m"), knob) == values[0], (arm, knob)


def test_tuning_takes_a_knob_after_the_other_and_goes_beyond_the_edge(monkeypatch):
    """The best of a made-up score, at lr 3e-5, KL 0.45 and gae_lambda 0.8, is found in short runs; after all steps,
    where a smaller lr and a larger KL coefficient are best, these are."""
    def made_up(settings, steps):
        goals = {60: (3e-5, 0.45, 0.8), 120: (1e-5, 1.35, 0.95)}[steps]
        return sum(-abs(math.log(settings[name] / goal)) for name, goal in zip(("lr", "kl_coef"), goals)) - abs(
            settings["gae_lambda"] - goals[2])

    def over_seeds(run_seed, args, steps, jobs, samples, passes):
        args.made_with = "commit x"
        return {str(seed): {arm: [{"oracle": made_up(settings, steps)} for settings in tries] for arm, tries in jobs.items()}
                for seed in args.seeds}

    monkeypatch.setattr(claims, "over_seeds", over_seeds)
    monkeypatch.setattr(compare, "EQUAL", ["DVPO"])
    chosen, tried = compare.tune(argparse.Namespace(sweep_seeds=[1, 2]), 60, 120)
    assert chosen["DVPO"] == chosen["DVPO, oracle"] == {"lr": 1e-5, "kl_coef": 1.3, "gae_lambda": 0.95}
    assert [steps for _, steps, _ in tried["DVPO"]] == [60] * (4 + 2 + 2 + 2) + [120] * (2 + 3 * 2 + 2)


def test_a_value_model_as_a_reward_model(runs, tmp_path):
    compare.as_reward_model(runs("gvm"), tmp_path / "as")
    gvm = AutoModelForTokenClassification.from_pretrained(runs("gvm")).eval()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "as").eval()
    ids = torch.randint(10, 500, (1, 9))
    with torch.no_grad():
        assert model(input_ids=ids).logits.item() == pytest.approx((gvm(input_ids=ids).logits[0, -1] - gvm.score.bias).item(), abs=1e-5)


@pytest.mark.parametrize("flags", [["--seeds", "1", "2", "--sweep_seeds", "2"], ["--seeds", "3", "3"]])
def test_seeds_that_prove_nothing_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags, "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit):
        compare.main()
    assert not (tmp_path / "runs").exists()


def test_it_runs_through(world, tmp_path, monkeypatch, capsys):
    """One learning rate and what is beyond it, in a world of its own; the best is used for the seed."""
    for seed in (20, 21):
        for part in ("base", "data"):
            shutil.copytree(world / part, tmp_path / "runs" / f"seed{seed}" / part)
    train, small = claims.train, {"max_response_length": 8, "batch_size": 20}
    monkeypatch.setattr(claims, "train", lambda script, output, **flags: train(script, output, **flags | (
        {"epochs": 1} if "steps" not in flags else small if "remax" in script else small | {"mini_batch_size": 10})))
    monkeypatch.setattr(compare, "ARMS", {arm: (script, inputs, {"lr": [1e-4]} if knobs else {})
                                          for arm, (script, inputs, knobs) in compare.ARMS.items()})
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "21", "--sweep_seeds", "20", "--steps", "240", "--sweep_steps", "40", "--rounds", "1", "--jobs", "1", "--scale",
                                      "0.05", "--samples", "2", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)])
    monkeypatch.setattr(compare, "CLIMBS", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)             # threads: it leaves as many as it finds here
    monkeypatch.chdir(ROOT)
    compare.main()
    results, page = json.loads((tmp_path / "compare.json").read_text()), (tmp_path / "compare.md").read_text()
    for arm, tries in results["tried"].items():
        best = max((x for x in tries if x[1] == results["steps"]), key=lambda x: x[2][0])
        assert results["chosen"][arm] == best[0]
    for arm, seconds in results["seconds"].items():
        assert seconds["all"] == pytest.approx(seconds["before"] + 12 * seconds["step"]) if arm != "DPO" else seconds["all"] > 0
    assert set(results["seconds"]) == {*compare.ARMS} and results["seconds"]["DVPO"]["before"] > results["seconds"]["PPO"]["before"] > 0
    assert len(results["seeds"]["21"]["PPO"]["curve"]) == len(results["seeds"]["21"]["PPO"]["signal"]) == 12
    assert page.count("\n| DVPO, pairs |") == 5 and page.count("\n| DVPO, oracle |") == 3 and (tmp_path / "compare.png").exists()
    labelled = [json.loads(line) for line in (tmp_path / "runs" / "seed21" / "labelled" / "scored.jsonl").read_text().splitlines()]
    assert 0 < results["seeds"]["21"]["ranked"]["gvm_labelled"] <= 1 and "the reward model's scores |" in page
    pairs = [json.loads(line) for line in (tmp_path / "runs" / "seed21" / "data" / "pairs.jsonl").read_text().splitlines()]
    answers = [row[side] for row in pairs for side in ("chosen", "rejected")]
    assert len(labelled) == len({(row["prompt"], row["response"]) for row in labelled}) > 90
    assert {row["response"] for row in labelled} == set(answers) and len({row["reward"] for row in labelled}) > 90
