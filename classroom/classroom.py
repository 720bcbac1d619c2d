"""The assignment: student versions of the scripts, grading by grafting, silent bugs. Teachers: teacher.md.

    python classroom/classroom.py assignment --output ../hw --seed 7
    python classroom/classroom.py grade --submission ../s1 --results results.json --key ../bugs-key.json
    python classroom/classroom.py bugs --output ../bugs --seed 7
    python classroom/classroom.py gradescope --output autograder.zip

Bodies are stripped by the function's name: there is no second copy to keep. To grade, the student's bodies
are written into a fresh copy of the reference, and its own tests are run, each with a time limit.
"""
import argparse
import ast
import difflib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDERS = ("baselines", "data", "analysis", "tests", "classroom")             # beside the scripts of the root
SECONDS, AT_ONCE = 20, 2                                     # of a test: 0 points if it needs more; processes
# pytest loads this in the subprocess: a line per test as it ends, and an alarm for loops that never end.
PLUGIN = f'''
import json, os, signal, pytest
def give_up(*_): raise TimeoutError("not finished after {SECONDS} seconds")
@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    signal.signal(signal.SIGALRM, give_up); signal.alarm({SECONDS})
    try: return (yield)
    finally: signal.alarm(0)
def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        with open(os.environ["GRADES"], "a") as file:
            line = [report.nodeid.split("[")[0], report.passed, str(report.longrepr)[-800:]]
            file.write(json.dumps(line) + "\\n")
'''


def fail(message):
    raise SystemExit(f"error: {message}")


# ---- 1. Stripping and grafting ----
def functions(text):
    """{name: (first line, first line of the body after its docstring, one past the last line)}, from 0."""
    return {node.name: (min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1,
                        node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1,
                        node.end_lineno)
            for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def strip(text, names):
    """The script without the bodies of these functions; signatures and docstrings stay."""
    lines, found = text.splitlines(keepends=True), functions(text)
    for _, body, end in sorted((found[name] for name in names if name in found), reverse=True):
        lines[body:end] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def graft(reference, submitted, names):
    """The reference with these functions, and all top-level functions that it lacks, from the submission."""
    lines, ours = submitted.splitlines(), functions(reference)
    theirs = {name: "\n".join(lines[first:end]) for name, (first, _, end) in functions(submitted).items()}
    mine = reference.splitlines()
    for name in sorted(set(names) & set(theirs), key=ours.get, reverse=True):
        mine[ours[name][0]:ours[name][2]] = [theirs[name]]
    helpers = [f"{text}\n\n" for name, text in theirs.items() if name not in ours]
    place = mine.index('if __name__ == "__main__":')
    return "\n".join([*mine[:place], *helpers, *mine[place:]]) + "\n"


def copy_of_reference(folder, changed):
    """What the tests need, with these files changed: {name: text}."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, folder)
    (folder / "grade_plugin.py").write_text(PLUGIN)
    for name, text in changed.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# ---- 2. Grading ----
def run_tests(changed, tests):
    """{test: "" if it passes, else why not} in a copy of the reference with these files changed."""
    with tempfile.TemporaryDirectory() as folder:
        folder = copy_of_reference(Path(folder) / "reference", changed)
        environment = os.environ | {"GRADES": str(folder / "grades"), "OMP_NUM_THREADS": "1",
                                    "PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "pytest", "-p", "grade_plugin", "-p", "no:cacheprovider", *tests]
        try:
            subprocess.run(command, cwd=folder, env=environment, timeout=60 + SECONDS * len(tests),
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            pass
        log, found = folder / "grades", {}
        lines = log.read_text().splitlines() if log.exists() else []
    for test, passed, why in map(json.loads, lines):
        found[test] = found.get(test, "") or ("" if passed else why)
    return {test: found.get(test, "the process ended before this test, or could not begin") for test in tests}


def grade_functions(submission, exercises):
    """[{name, score, max_score, output}, ...], by function. All together; if that fails, each by itself."""
    reference, theirs, wrong = {}, {}, {}
    for file in sorted({x["file"] for x in exercises.values()}):
        reference[file] = (ROOT / file).read_text(encoding="utf-8")
        try:
            theirs[file] = (submission / file).read_text(encoding="utf-8")
            functions(theirs[file])
        except (OSError, ValueError, SyntaxError) as problem:
            wrong[file], theirs[file] = f"{file}: {problem}", ""

    def with_bodies(names):
        return {file: graft(text, theirs[file], [x for x in names if exercises[x]["file"] == file])
                for file, text in reference.items()}

    every = list(dict.fromkeys(test for x in exercises.values() for test in x["tests"]))
    together = run_tests(with_bodies(exercises), every)
    alone = {}
    if any(together.values()):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            alone = dict(zip(exercises, pool.map(
                lambda name: run_tests(with_bodies([name]), list(exercises[name]["tests"])), exercises)))
    grades = []
    for name, x in exercises.items():
        missing = wrong.get(x["file"]) or f"no function {name}" * (name not in functions(theirs[x["file"]]))
        why = {test: missing or alone.get(name, together)[test] for test in x["tests"]}
        grades.append({"name": name, "max_score": sum(x["tests"].values()),
                       "score": sum(points for test, points in x["tests"].items() if not why[test]),
                       "output": "\n".join(f"{test}: {text[-400:]}" for test, text in why.items() if text)})
    return grades


def grade_bugs(submission, key, bugs):
    """matching.json, {"A": 3, ...}: a point for each run; test_bug.py: 10 points against the assigned bug."""
    key = json.loads(Path(key).read_text())
    try:
        said = json.loads((submission / "matching.json").read_text())
        right = sum(said.get(letter) == number for letter, number in key["runs"].items())
        why = f"{right} of {len(key['runs'])} runs"
    except (OSError, ValueError, AttributeError) as problem:
        right, why = 0, f"matching.json: {problem}"
    grades = [{"name": "silent bugs: matching", "score": right, "max_score": len(key["runs"]), "output": why}]
    test, passes, fails = submission / "test_bug.py", False, False
    if test.is_file():
        files = {"tests/test_bug.py": test.read_text(encoding="utf-8")}
        bug, names = bugs[key["assigned"]], [f"tests/test_bug.py::{name}" for name in functions(
            files["tests/test_bug.py"]) if name.startswith("test_")]
        passes = bool(names) and not any(run_tests(files, names).values())
        fails = any(run_tests(files | {bug["file"]: with_bug(bug)}, names).values())
    why = f"passes on the reference: {passes}; fails on the bug {key['assigned']!r}: {fails}"
    grades.append({"name": "silent bugs: a test", "score": 10 * (passes and fails), "max_score": 10,
                   "output": why})
    return grades


def grade(args, exercises):
    submission = Path(args.submission)
    if not submission.is_dir():
        fail(f"--submission {submission}: no such folder")
    for package in ("pytest", "torch", "transformers"):
        if not importlib.util.find_spec(package):
            fail(f"{sys.executable} has no {package}: activate the environment that make made (.venv)")
    grades = grade_functions(submission, exercises["functions"])
    if args.key:
        grades += grade_bugs(submission, args.key, exercises["bugs"])
    score, most = (sum(x[name] for x in grades) for name in ("score", "max_score"))
    found = {"score": score, "stdout_visibility": "hidden", "tests": grades}
    Path(args.results).write_text(json.dumps(found, indent=1))
    for x in grades:
        print(f"{x['score']:3} of {x['max_score']:2}  {x['name']}")
    print(f"{score:3} of {most}: {args.results}")


# ---- 3. Making ----
def with_bug(bug):
    text = (ROOT / bug["file"]).read_text(encoding="utf-8")
    assert text.count(bug["old"]) == 1, bug
    return text.replace(bug["old"], bug["new"])


def new_folder(path):
    if Path(path).exists():
        fail(f"--output {path}: exists. Choose another, or move it")
    Path(path).mkdir(parents=True)
    return Path(path)


def assignment(args, exercises):
    output, git = new_folder(args.output), ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    for file in sorted({x["file"] for x in exercises["functions"].values()}):
        text = (ROOT / file).read_text(encoding="utf-8")
        (output / file).write_text(strip(text, exercises["functions"]), encoding="utf-8")
    handout = (HERE / "assignment.md").read_text(encoding="utf-8")
    (output / "assignment.md").write_text(handout.replace("SEED", str(args.seed)).replace("COMMIT", commit))
    run(ROOT, "data/atlas.py", args.seed, "world", "--output", output / "world")
    print(f"{output}: assignment.md, train_gvm.py, train_dvpo.py, world (seed {args.seed})")


def run(place, script, seed, *words):
    command = [sys.executable, script, *map(str, words), "--seed", str(seed)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=one_thread, capture_output=True, text=True)
    if done.returncode:
        fail(f"{' '.join(command)}: {done.stderr[-500:]}")


def bugs(args, exercises):
    """diffs/1.diff ..., runs/A/{gvm,dvpo}.jsonl ..., runs/healthy; beside the folder, the key."""
    output, rng, every = new_folder(args.output), random.SystemRandom(), exercises["bugs"]
    numbers = {name: number for number, name in enumerate(every, 1)}
    letters = dict(zip(rng.sample(list(numbers), len(numbers)), "ABCDEFGHIJKLMNOP"))
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        inputs = "--model", world / "sft", "--data", world / "data"

        def train(name):
            bug, place = every.get(name), Path(folder) / str(numbers.get(name, 0))
            copy_of_reference(place, {bug["file"]: with_bug(bug)} if bug else {})
            to, gvm = output / "runs" / letters.get(name, name), world / "gvm"
            if not bug or bug["file"] == "train_gvm.py":
                gvm = gvm if not bug else place / "gvm"
                run(place, "train_gvm.py", args.seed, *inputs, "--output", gvm, "--epochs", 2)
            run(place, "train_dvpo.py", args.seed, *inputs, "--gvm", gvm, "--output", place / "dvpo",
                "--steps", args.steps, "--kl_coef", 0.3)      # so large that a wrong sign shows
            to.mkdir(parents=True)
            shutil.copy(gvm / "metrics.jsonl", to / "gvm.jsonl")
            shutil.copy(place / "dvpo" / "metrics.jsonl", to / "dvpo.jsonl")

        run(ROOT, "data/atlas.py", args.seed, "world", "--output", world)
        run(ROOT, "sft.py", args.seed, "--model", world / "base", *inputs[2:], "--output", world / "sft")
        train("healthy")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(train, numbers))
    (output / "diffs").mkdir()
    for name, bug in every.items():
        before, after = (ROOT / bug["file"]).read_text().splitlines(True), with_bug(bug).splitlines(True)
        diff = difflib.unified_diff(before, after, bug["file"], bug["file"], n=1)
        (output / "diffs" / f"{numbers[name]}.diff").write_text("".join(diff))
    hard = rng.choice([name for name, bug in every.items() if not bug["test"]])
    key = output.with_name(f"{output.name}-key.json")
    key.write_text(json.dumps({"runs": {letters[name]: numbers[name] for name in numbers}, "assigned": hard}))
    print(f"{output}: diffs and runs for the students. Keep {key}. To write a test for: {numbers[hard]}.diff")


def gradescope(args, exercises):
    setup = ("#!/bin/sh\napt-get update && apt-get install -y python3-pip python3-venv\n"
             "python3 -m venv /autograder/venv\n"
             "/autograder/venv/bin/pip install -r /autograder/source/requirements.txt\n")
    start = ("#!/bin/sh\ncd /autograder/source && /autograder/venv/bin/python classroom/classroom.py grade "
             "--submission /autograder/submission --results /autograder/results/results.json\n")
    with zipfile.ZipFile(args.output, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in [*ROOT.glob("*.py"), *ROOT.glob("*.t*t"), ROOT / "pyproject.toml", *(
                file for folder in FOLDERS for file in (ROOT / folder).glob("*.*"))]:
            archive.write(file, file.relative_to(ROOT))
        archive.writestr("setup.sh", setup)
        archive.writestr("run_autograder", start)
    print(args.output)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (assignment, grade, bugs, gradescope):
        one = commands.add_parser(command.__name__)
        one.set_defaults(run=command)
        one.add_argument("--exercises", default=str(HERE / "exercises.yaml"), help="or a private file")
        if command is grade:
            one.add_argument("--submission", required=True, help="folder with the student's files")
            one.add_argument("--results", default="results.json", help="in Gradescope's format")
            one.add_argument("--key", help="BUGS-key.json, to grade matching.json and test_bug.py too")
        else:
            one.add_argument("--output", required=True)
        if command in (assignment, bugs):
            one.add_argument("--seed", type=int, default=7)
        if command is bugs:
            one.add_argument("--steps", type=int, default=16, help="of DVPO, in each run")
    args = parser.parse_args(argv)
    args.run(args, yaml.safe_load(Path(args.exercises).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
