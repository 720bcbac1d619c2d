"""The whole pipeline through the command line with tiny sizes, as a user runs it."""
import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT, read_lines

TINY = {"sft": ["--epochs", "1", "--max_length", "64"], "train_gvm": ["--epochs", "1", "--eval_every", "5"],
        "train_dvpo": ["--steps", "2", "--batch_size", "8", "--mini_batch_size", "8", "--micro_batch_size", "8",
                       "--max_response_length", "12"]}


def run(*command, **environment):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_from_nothing_to_summary(tmp_path):
    folder = tmp_path / "atlas"
    run("atlas.py", "world", "--output", folder, "--seed", 4)
    for file in (folder / "data").glob("*.jsonl"):                             # few rows: minutes become seconds
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:160]))
    shared = ["--data", folder / "data", "--seed", 4]
    run("sft.py", "--model", folder / "base", "--output", folder / "sft", *shared, *TINY["sft"])
    run("train_gvm.py", "--model", folder / "sft", "--output", folder / "gvm", *shared, *TINY["train_gvm"])
    run("train_dvpo.py", "--model", folder / "sft", "--gvm", folder / "gvm", "--output", folder / "dvpo", *shared,
        *TINY["train_dvpo"])
    run("evaluate.py", "values", "--models", folder / "gvm", "--data", folder / "data", "--output", folder / "eval" / "values.json")
    run("evaluate.py", "policy", "--models", folder / "sft", folder / "dvpo", "--data", folder / "data",
        "--judge", "atlas.py:oracle", "--output", folder / "eval", "--samples", 1)
    run("figures.py", "tokens", "--gvm", folder / "gvm", "--output", folder / "figures")
    run("figures.py", "curves", "--runs", folder / "dvpo", "--output", folder / "figures")
    run("figures.py", "wins", "--results", folder / "eval" / "policy.json", "--output", folder / "figures")
    printed = run("atlas.py", "summary", "--run", folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert {"oracle_mean", "win_rate_vs_sft", "kl_to_ref", "response_length", "eos_rate"} <= set(summary["dvpo"])
    assert {"oracle_mean", "response_length"} <= set(summary["sft"])
    assert set(summary["gvm"]["pair_accuracy"]) == {"mean", "last", "p1", "p5", "p10", "p90", "p95", "p99", "backup"}
    assert set(summary["seconds"]) == {"data", "sft", "gvm", "dvpo", "evaluate"}
    assert f"{summary['dvpo']['oracle_mean']:+.3f}" in printed and "tokens.html" in printed


def test_the_makefile_knows_what_is_finished():
    """make demo asks for every stage in its order; a bare make explains itself."""
    plan = subprocess.run(["make", "-n", "stages", "VENV=", f"PYTHON={sys.executable}", "RUN=nowhere", "SEED=7"], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout
    order = [plan.index(script) for script in ("atlas.py world", "sft.py", "train_gvm.py", "train_dvpo.py")]
    assert order == sorted(order) and plan.count("--seed 7") == 6
    assert "make demo" in subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_two_processes_stop_together_and_go_on(dvpo_args, tmp_path):
    """SIGTERM to the launcher and both processes, as a cluster sends it (the launcher hands it on, too)."""
    command = list(map(str, [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0, "--mixed_precision",
        "no", "--dynamo_backend", "no", "tests/launch_cpu.py", "train_dvpo.py", "--model", dvpo_args.model, "--gvm", dvpo_args.gvm, "--data",
        dvpo_args.data, "--output", tmp_path / "two", "--steps", 20, "--batch_size", 8, "--mini_batch_size", 8, "--micro_batch_size", 2,
        "--max_response_length", 12]))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    metrics = tmp_path / "two" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    (checkpoint,) = (tmp_path / "two" / "checkpoints").iterdir()
    assert len(list(checkpoint.glob("random_states_*"))) == 2 and f"stopped by a signal after step {checkpoint.name[5:]}" in said
    run(*command[1:], "--resume")
    assert [record["step"] for record in read_lines(metrics)] == list(range(1, 21))
