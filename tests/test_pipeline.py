"""make demo: its own commands, in its own order, with tiny sizes."""
import json
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, read_lines

TINY = {"sft.py": "--epochs 1 --max_length 64", "train_gvm.py": "--epochs 1",
        "train_dvpo.py": "--steps 2 --batch_size 8 --mini_batch_size 8 --max_response_length 12", "policy": "--samples 1"}


def test_from_nothing_to_summary(tmp_path, monkeypatch, capsys):
    run = tmp_path / "atlas"
    made = ["make", "-n", "stages", "VENV=", "PYTHON=python", f"RUN={run}", "SEED=4"]
    plan = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line)[1:] for line in plan.splitlines() if line.startswith("python ")]
    scripts = [command[0] for command in commands]
    assert scripts[:4] == ["data/atlas.py", "sft.py", "train_gvm.py", "train_dvpo.py"] and len(scripts) == 9
    monkeypatch.chdir(ROOT)
    for command in [*commands, ["data/atlas.py", "summary", "--run", str(run)]]:
        tiny = TINY.get(command[0], TINY.get(command[1], "")).split()
        monkeypatch.setattr(sys, "argv", [*command, *tiny])
        runpy.run_path(command[0], run_name="__main__")
        if command[1] == "world":                              # few rows: minutes become seconds
            for file in (run / "data").glob("*.jsonl"):
                file.write_text("".join(file.read_text().splitlines(keepends=True)[:160]))
    summary = json.loads((run / "summary.json").read_text())
    assert {"oracle_mean", "win_rate_vs_sft", "kl_to_ref", "response_length", "eos_rate"} <= set(summary["dvpo"])
    assert {"oracle_mean", "response_length"} <= set(summary["sft"])
    assert set(summary["gvm"]["pair_accuracy"]) == {"mean", "last", "p1", "p5", "p10", "p90", "p95", "p99", "backup"}
    assert f"{summary['dvpo']['oracle_mean']:+.3f}" in capsys.readouterr().out
    assert {file.name for file in (run / "figures").iterdir()} >= {"tokens.png", "curves.png", "wins.png"}
    assert json.loads((run / "dvpo" / "args.json").read_text())["seed"] == 4
    steps = read_lines(run / "dvpo" / "metrics.jsonl")
    assert summary["seconds"]["dvpo"] == pytest.approx(sum(x for row in steps for name, x in row.items() if "seconds" in name), abs=0.1)
    assert summary["seconds"]["evaluate"] > 0 and set(summary["seconds"]) == {"data", "sft", "gvm", "dvpo", "evaluate"}


def test_a_bare_make_explains_itself():
    assert "make demo" in subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
