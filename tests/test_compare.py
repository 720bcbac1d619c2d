"""experiments/compare.py: its bookkeeping against known answers, and the whole of it with almost nothing."""
import json
import shutil
import sys

import pytest
from conftest import ROOT, SCRIPTS, script

sys.path.insert(0, str(ROOT / "experiments"))
import claims  # noqa: E402
import compare  # noqa: E402


def test_steps_to_reach():
    assert compare.steps_to_reach([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], 0.6) == 7          # the mean of steps 3 to 7 is 0.6
    assert compare.steps_to_reach([0.0] * 10, 0.6) is None
    assert compare.steps_to_reach([1.0] * 10, 0.6) == 5


def test_every_method_s_flags_are_its_script_s(monkeypatch, tmp_path):
    """The flags of a whole run are fields of Args, fit one process, and give every online method as many rollouts."""
    asked = []
    monkeypatch.setattr(claims, "train", lambda script, output, **flags: asked.append((script, flags)))
    for method, (_, _, _, rates) in compare.METHODS.items():
        compare.train(tmp_path, method, tmp_path, {"data": tmp_path, "seed": 1}, 50, rates[0])
        assert len(rates) == 4
    rollouts = set()
    for name, flags in asked:
        module = script(next(key for key, path in SCRIPTS.items() if path == f"{name.replace('.', '/')}.py"))
        args = module.Args(**flags)
        module.start_accelerator(args, getattr(args, "mini_batch_size", args.batch_size))
        rollouts.add(args.steps * args.batch_size if hasattr(args, "steps") else None)
    assert rollouts == {50 * 60, None} and len(asked) == 6


@pytest.mark.parametrize("flags", [["--seeds", "1", "2", "--sweep_seeds", "2"], ["--seeds", "3", "3"]])
def test_seeds_that_prove_nothing_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags, "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit):
        compare.main()
    assert not (tmp_path / "runs").exists()


def test_it_runs_through(world, tmp_path, monkeypatch, capsys):
    """Two rates per method in a world of their own; the better one is used for the seed."""
    for seed in (20, 21):
        for part in ("base", "data"):
            shutil.copytree(world / part, tmp_path / "runs" / f"seed{seed}" / part)
    few = {"train_dvpo": {"steps": 5}, "baselines.ppo": {"steps": 5}, "baselines.grpo": {"steps": 5}, "baselines.remax": {"steps": 5}}
    train = claims.train
    monkeypatch.setattr(claims, "train", lambda script, output, **flags: train(script, output, **flags | few.get(script, {"epochs": 1}) | (
        {"max_response_length": 8, "batch_size": 20} | ({} if "remax" in script else {"mini_batch_size": 10, "micro_batch_size": 10}) if script in few else {})))
    monkeypatch.setattr(compare, "METHODS", {method: (*rest, rates[:2]) for method, (*rest, rates) in compare.METHODS.items()})
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "21", "--sweep_seeds", "20", "--steps", "100", "--rounds", "1", "--jobs", "1", "--scale",
                                      "0.05", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)])
    monkeypatch.setattr("os.cpu_count", lambda: 1)             # threads: it leaves as many as it finds here
    monkeypatch.chdir(ROOT)
    compare.main()
    results, page = json.loads((tmp_path / "compare.json").read_text()), (tmp_path / "compare.md").read_text()
    for method, found in results["sweep"].items():
        best = max(found, key=lambda rate: found[rate][0])
        assert results["methods"][method]["lr"] == float(best) and len(found) == 2
    assert set(results["step_seconds"]) == {"DVPO", "PPO", "GRPO", "ReMax"} and len(results["seeds"]["21"]["PPO"]["curve"]) == 5
    assert page.count("\n| DVPO, pairs |") == 3
