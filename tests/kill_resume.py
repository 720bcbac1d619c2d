"""Kills training scripts at random moments and resumes them: the end must be that of a run that was never killed.

    make test-resume                                         25 kills, a few minutes
    python tests/kill_resume.py --kills 100 --seed 7         a kill counts for one script; --scripts sft ppo: only these

SIGKILL comes at any moment of a run, or a few milliseconds after a checkpoint, or the final files, begin to be written.
Compared are all weights, byte by byte, and the logs, apart from the seconds. Exit status 1 if anything differs.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
ONLINE = "--steps 12 --batch_size 8 --micro_batch_size 2 --max_response_length 12 --model {w}/sft --save_steps {every}"
PPO = f"--mini_batch_size 4 {ONLINE}"
OFFLINE = "--warmup_steps 2 --save_steps {every}"
# kills of 25, script, flags
PLANS = {
    "sft": (5, "sft.py", f"--model {{w}}/base --epochs 2 {OFFLINE}"),
    "gvm": (5, "train_gvm.py", f"--model {{w}}/sft --epochs 1 --tau_pairs 1 {OFFLINE}"),
    "dvpo": (5, "train_dvpo.py", f"--gvm {{w}}/gvm {PPO}"),
    "ppo": (5, "baselines/ppo.py", f"--reward_model {{w}}/reward_model {PPO}"),
    "reward_model": (2, "baselines/reward_model.py", f"--model {{w}}/sft --epochs 1 {OFFLINE}"),
    "grpo": (1, "baselines/grpo.py", f"--group_size 4 --reward_model {{w}}/reward_model {PPO}"),
    "remax": (1, "baselines/remax.py", f"--reward_model {{w}}/reward_model {ONLINE}"),
    "dpo": (1, "baselines/dpo.py", f"--model {{w}}/sft --batch_size 16 {OFFLINE}"),
}


def start(name, world, output, every, *more):
    _, script, flags = PLANS[name]
    words = [sys.executable, ROOT / script, *flags.format(w=world, every=every).split(), "--data", world / "data", "--output", output, *more]
    return subprocess.Popen(list(map(str, words)), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def whole_run(name, world, output):
    """Runs a script to its end. Returns the seconds from the start of the run folder to the end."""
    process, began = start(name, world, output, 1), None
    while process.poll() is None:
        began = began or ((output / "args.json").exists() and time.time())
        time.sleep(0.005)
    if process.returncode:
        sys.exit(f"error: {name}: {process.stderr.read()}")
    return time.time() - began


def make_world(folder, scripts):
    """Data and models that the scripts start from, and a whole run of each: {script: its seconds}."""
    sys.path[:0] = [str(ROOT), str(ROOT / "data")]
    import atlas
    atlas.write_base_model(folder / "base", seed=1, hidden_size=32, layers=1)
    atlas.write_data(folder / "data", seed=1)
    for file in (folder / "data").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:160]))
    first = [name for name in ("sft", "reward_model", "gvm")                   # what the others start from
             if name in scripts or any(f"{{w}}/{name}" in PLANS[other][2] for other in scripts)]
    seconds = {name: whole_run(name, folder, folder / name) for name in first}
    return seconds | {name: whole_run(name, folder, folder / name) for name in scripts if name not in seconds}


def wait_for_moment(process, output, kind, rng, seconds):
    """Sleeps until the moment of a kill has come, or the process has ended by itself."""
    begins, most = {"any": ("args.json", seconds), "end": ("README.md", 0.05),
                    "checkpoint": (f"checkpoints/step_{rng.randint(1, 3) * 2:08d}", 0.3)}[kind]
    while process.poll() is None and not (output / begins).exists():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, most))


def logs(output):
    return [[{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
             for line in (output / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "rollouts.jsonl") if (output / name).exists()]


def difference(a, b):
    """What differs between two finished runs, in words; None if nothing does."""
    files = sorted(file.relative_to(a) for file in a.glob("**/*.safetensors") if "checkpoints" not in file.parts)
    for file in files:
        if not (b / file).exists() or (a / file).read_bytes() != (b / file).read_bytes():
            return f"{file} differs"
    return None if logs(a) == logs(b) else "the logs differ"


def kill_and_resume(name, world, number, seed, seconds):
    """One line of the table: (name, kind of moment, where it was, verdict)."""
    rng = random.Random(f"{seed} {name} {number}")
    kind, every, output = rng.choice(["any", "any", "checkpoint", "end"]), rng.choice([1, 2]), world / "killed" / f"{name}_{number}"
    process = start(name, world, output, every)
    wait_for_moment(process, output, kind, rng, seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted(path.name.removeprefix("step_").lstrip("0") for path in output.glob("checkpoints/*"))
    finished = any(output.glob("*.safetensors"))
    resumed = start(name, world, output, every, "--resume")
    _, errors = resumed.communicate()
    if (resumed.returncode != 0) != finished or finished != ("is in use" in errors):
        verdict = f"--resume: {resumed.returncode} {errors.strip().splitlines()[-1:]}"
    else:
        verdict = difference(world / name, output)
    shutil.rmtree(output, ignore_errors=True)
    return name, kind, "finished" if finished else f"checkpoints {' '.join(left)}", verdict or "the same"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="in all; each script gets its share, at least one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--scripts", nargs="+", choices=PLANS, default=list(PLANS))
    args = parser.parse_args()
    share = args.kills / sum(PLANS[name][0] for name in args.scripts)
    world, began = Path(tempfile.mkdtemp(prefix="kill_resume_")), time.time()
    try:
        seconds = make_world(world, args.scripts)
        jobs = [(name, number) for name in args.scripts for number in range(max(1, round(share * PLANS[name][0])))]
        with ThreadPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(lambda job: kill_and_resume(job[0], world, job[1], args.seed, seconds[job[0]]), jobs))
    finally:
        shutil.rmtree(world, ignore_errors=True)
    for row in [("script", "moment", "killed at", "after --resume"), *rows]:
        print("{:14}{:12}{:30}{}".format(*row))
    different = sum(row[-1] != "the same" for row in rows)
    print(f"{len(rows)} kills, {different} different, {time.time() - began:.0f} s")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
