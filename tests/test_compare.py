"""The bookkeeping of experiments/compare.py: statistics against known answers, and what is run again."""
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("compare", ROOT / "experiments" / "compare.py")
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)


def test_interval():
    """Five numbers by hand: mean 3, deviation sqrt(2.5), t(4) = 2.776."""
    x = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert x["mean"] == 3 and x["high"] - 3 == pytest.approx(2.776 * 2.5 ** 0.5 / 5 ** 0.5) == pytest.approx(3 - x["low"])


def test_steps_to_reach():
    assert compare.steps_to_reach([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], 0.6) == 7          # the mean of steps 3 to 7 is 0.6
    assert compare.steps_to_reach([0.0] * 10, 0.6) is None
    assert compare.steps_to_reach([1.0] * 10, 0.6) == 5


def test_learning_curve(tmp_path):
    rows = [{"step": 2, "prompt": "a", "response": "1"}, {"step": 1, "prompt": "a", "response": "3"},
            {"step": 2, "prompt": "a", "response": "5"}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.learning_curve(tmp_path, lambda prompt, response: float(response)) == [3, 3]


def test_a_run_is_current_only_with_the_same_flags_and_older_inputs(tmp_path):
    output, model = tmp_path / "run", tmp_path / "model"
    output.mkdir()
    model.mkdir()
    flags = {"lr": 1e-4, "model": model}
    assert not compare.is_current(output, flags)
    (output / "process.json").write_text(json.dumps({"flags": {k: str(v) for k, v in flags.items()}}))
    assert compare.is_current(output, flags)
    assert not compare.is_current(output, flags | {"lr": 2e-4})
    assert not compare.is_current(output, flags | {"steps": 3})
    (model / "process.json").write_text("{}")
    os.utime(model / "process.json", (time.time() + 60,) * 2)                  # the model was made again
    assert not compare.is_current(output, flags)


def test_every_method_s_flags_are_its_script_s(monkeypatch, tmp_path):
    """The flags of a whole run parse, and give every online method as many rollouts."""
    rollouts = set()
    for method, (script, _, rates) in compare.METHODS.items():
        name = script.removesuffix(".py").replace("/", ".")
        module = importlib.import_module(name)
        flags = compare.flags_of(method, tmp_path, 50) | {"lr": rates[0], "seed": 1}
        monkeypatch.setattr(sys, "argv", [script])
        args = module.parse_args(module.Args, [word for key, value in flags.items() for word in (f"--{key}", str(value))])
        module.accumulation_steps(args, 1)
        rollouts.add(args.steps * args.batch_size if method != "DPO" else None)
        assert len(rates) == 4
    assert rollouts == {50 * 60, None}


@pytest.mark.parametrize("flags", [["--seeds", "1", "2", "--sweep_seeds", "2"], ["--seeds", "3", "3"],
                                   ["--seeds", *map(str, range(20, 31))]])
def test_seeds_that_prove_nothing_are_refused(flags, tmp_path):
    done = subprocess.run([sys.executable, "experiments/compare.py", *flags, "--runs", str(tmp_path / "runs")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "must all differ" in done.stderr and not (tmp_path / "runs").exists()


def test_the_report():
    def policy(score, curve):
        others = {"sft": 0.6} | {compare.file_name(name): 0.5 for name in compare.METHODS}
        return {"oracle": score, "kl": 1.0, "length": 20.0, "win_rate": others} | ({"curve": curve} if curve else {})

    rising = [step / 10 for step in range(10)]
    seeds = {str(seed): {"SFT": {"oracle": 0.0, "length": 20.0}} | {
        name: policy(0.3 + 0.1 * (name == "DVPO") + seed / 100, None if name == "DPO" else rising)
        for name in compare.METHODS} for seed in (1, 2)}
    seconds = {"generate": 0.3, "score": 0.2, "update": 0.5, "total": 1.0}
    results = {"seeds": seeds, "machine": "m", "answers": 616, "methods": {name: {"lr": "0.1"} for name in compare.METHODS},
               "step_seconds": {"DVPO": seconds, "PPO": seconds | {"total": 2.0}}, "sweep": {"DVPO": {"0.1": [0.1, 0.2]}},
               "sweep_seeds": [9], "large": {name: {"peak_mib": 100.0 + 100 * (name == "PPO"), "seconds": 1.0}
                                             for name in ("DVPO", "PPO")}}
    results["against_ppo"] = compare.against_ppo(results)
    page = compare.table(results, "made", "commit", 10)
    assert "difference seed by seed +0.100 (+0.100 to +0.100)" in page
    assert "100 MiB / 200 MiB = 0.50" in page and "1.00 s / 2.00 s = 0.50" in page
    assert "DVPO [8, 8]; DVPO, pairs [8, 8]; PPO [8, 8]" not in page and "PPO [10, 10]" in page
    assert "| DVPO | **0.1: 0.100, 0.200** |" in page and page.count("\n| DVPO") == 5
