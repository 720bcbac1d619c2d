"""experiments/compare.py: its bookkeeping against known answers, and the whole of it with almost nothing."""
import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, script
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

sys.path.insert(0, str(ROOT / "experiments"))
import claims  # noqa: E402
import compare  # noqa: E402


def test_sign_flips_and_holm():
    assert compare.sign_flips([1.0, 2.0, 3.0]) == 2 / 8                        # only all plus and all minus are as far from 0
    assert compare.sign_flips([1.0, -1.0]) == 1 and compare.sign_flips([0.1] * 10) == 2 / 1024
    assert compare.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert compare.holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("centre, spread, word", [
    (0.1, 0.01, "better"), (-0.1, 0.01, "worse"), (0.0, 0.005, "equal within 0.03"), (0.02, 0.04, "not worse by more than 0.03"),
    (0.0, 0.2, "not decided")])
def test_verdicts(centre, spread, word):
    assert compare.verdict([centre - spread, centre + spread, centre, centre - spread / 2, centre + spread / 2]) == word


def test_the_arm_s_own_signal_says_where_to_stop():
    record = {"signal": [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 0, 0], "curve": [float(i) for i in range(12)]}
    assert compare.stopped(record) == (10, 7.0)                                # the mean of steps 6 to 10 (5.0 ... 9.0)
    assert compare.drawdown(record) == 0 and compare.drawdown({"curve": [0.0] * 5 + [5.0] * 5 + [2.0] * 5 + [9.0] * 5}) == 3


def test_every_arm_s_flags_are_its_script_s(monkeypatch, tmp_path):
    """The flags of every try are fields of Args, fit one process, and give every online arm as many rollouts."""
    asked = []
    monkeypatch.setattr(claims, "train", lambda script, output, **flags: asked.append((script, flags)))
    for arm, (_, _, rates, knobs) in compare.ARMS.items():
        pairs = [(name, value) for name, values in knobs.items() for value in values]
        assert len(rates) == len(pairs) == 4                   # as many tries for each arm
        for settings in [{"lr": rate} for rate in rates] + [{name: value} for name, value in pairs]:
            compare.train(tmp_path, arm, tmp_path, {"data": tmp_path, "seed": 1, "model": "m"}, 50, settings)
    rollouts = set()
    for name, flags in asked:
        module = script(next(key for key, path in SCRIPTS.items() if path == f"{name.replace('.', '/')}.py"))
        args = module.Args(**flags)
        module.start_accelerator(args, getattr(args, "mini_batch_size", args.batch_size))
        rollouts.add(args.steps * args.batch_size if hasattr(args, "steps") else None)
    assert rollouts == {50 * 60, None} and len(asked) == 8 * 9


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
    """Two arms, one rate each and a knob, in a world of their own; the best settings are used for the seed."""
    for seed in (20, 21):
        for part in ("base", "data"):
            shutil.copytree(world / part, tmp_path / "runs" / f"seed{seed}" / part)
    few = {"train_dvpo": {"steps": 6}, "baselines.ppo": {"steps": 6}, "baselines.grpo": {"steps": 6}, "baselines.remax": {"steps": 6}}
    train = claims.train
    monkeypatch.setattr(claims, "train", lambda script, output, **flags: train(script, output, **flags | few.get(script, {"epochs": 1}) | (
        {"max_response_length": 8, "batch_size": 20} | ({} if "remax" in script else {"mini_batch_size": 10, "micro_batch_size": 10}) if script in few else {})))
    monkeypatch.setattr(compare, "ARMS", {arm: (script, inputs, [1e-4], {name: values[:1] for name, values in knobs.items()})
                                          for arm, (script, inputs, _, knobs) in compare.ARMS.items()
                                          if arm not in ("PPO, critic from the GVM", "GRPO, GVM's last value")})
    monkeypatch.setattr(compare, "EQUAL", [arm for arm in compare.ARMS if arm != "DVPO, oracle"])
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "21", "--sweep_seeds", "20", "--steps", "120", "--rounds", "1", "--jobs", "1", "--scale",
                                      "0.05", "--samples", "2", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)])
    monkeypatch.setattr("os.cpu_count", lambda: 1)             # threads: it leaves as many as it finds here
    monkeypatch.chdir(ROOT)
    compare.main()
    results, page = json.loads((tmp_path / "compare.json").read_text()), (tmp_path / "compare.md").read_text()
    for arm, tries in results["tried"].items():
        best = max(tries, key=lambda x: x[1][0])
        assert results["chosen"][arm] == best[0] and len(tries) >= 4           # a rate, two beyond the edge, a knob
    assert set(results["step_seconds"]) == {"DVPO, pairs", "PPO", "GRPO", "ReMax"}
    assert len(results["seeds"]["21"]["PPO"]["curve"]) == len(results["seeds"]["21"]["PPO"]["signal"]) == 6
    assert page.count("\n| DVPO, pairs |") == 4 and page.count("\n| DVPO, oracle |") == 3 and (tmp_path / "compare.png").exists()
    labelled = [json.loads(line) for line in (tmp_path / "runs" / "seed21" / "labelled" / "scored.jsonl").read_text().splitlines()]
    scored = [json.loads(line) for line in (tmp_path / "runs" / "seed21" / "data" / "scored.jsonl").read_text().splitlines()]
    assert [row["response"] for row in labelled] == [row["response"] for row in scored] and labelled[0]["reward"] != scored[0]["reward"]
