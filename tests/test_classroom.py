"""The assignment: what is stripped, grafted and graded. A student's file may hold anything."""
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
import yaml
from conftest import ROOT, fails

import classroom

EXERCISES = yaml.safe_load((ROOT / "classroom" / "exercises.yaml").read_text())
FUNCTIONS, BUGS = EXERCISES["functions"], EXERCISES["bugs"]
TEXT = {file: (ROOT / file).read_text() for file in ("train_gvm.py", "train_dvpo.py")}


def submit(folder, **bodies):
    """A submission: the reference, but for these functions' bodies."""
    folder.mkdir()
    for file, text in TEXT.items():
        for name, body in bodies.items():
            if FUNCTIONS[name]["file"] == file:
                text = classroom.strip(text, [name]).replace("    raise NotImplementedError\n", body)
        (folder / file).write_text(text)
    return folder


def test_points_add_up_and_every_test_is_there():
    assert sum(sum(x["tests"].values()) for x in FUNCTIONS.values()) == 50
    handout = (ROOT / "classroom" / "assignment.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| \S+ \|.*\| (\d+) \|$", handout, re.M))
    assert {name: int(n) for name, n in rows.items()} == {name: sum(x["tests"].values()) for name, x in FUNCTIONS.items()}
    assert sum(int(n) for n in re.findall(r"^## \d.*\((\d+) points", handout, re.M)) == 100
    named = {test for x in FUNCTIONS.values() for test in x["tests"]} | {bug["test"] for bug in BUGS.values() if bug["test"]}
    for test in named:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), test


def test_stripping_keeps_signature_and_docstring_and_grafting_undoes_it():
    for file, text in TEXT.items():
        stripped = classroom.strip(text, FUNCTIONS)
        mine = [name for name in FUNCTIONS if name in classroom.functions(text)]
        assert stripped.count("    raise NotImplementedError\n") == len(mine) >= 4
        assert '"""Eq. (1): L_GVM(phi)' in stripped or file == "train_dvpo.py"
        assert "delta = torch.where(is_value" not in stripped and "unclipped = ratio" not in stripped
        assert classroom.graft(text, text, FUNCTIONS) == text == classroom.graft(stripped, text, mine)


def test_helpers_travel_and_other_changes_do_not():
    theirs = TEXT["train_dvpo.py"].replace("def whiten(", "def my_helper(x):\n    return x\n\n\ndef whiten(")
    theirs = theirs.replace("MAX_GRAD_NORM = 1.0", "MAX_GRAD_NORM = 7.0").replace("    raise SystemExit", "    return 0  # SystemExit")
    grafted = classroom.graft(TEXT["train_dvpo.py"], theirs, ["whiten"])
    assert "def my_helper(x):\n    return x\n" in grafted and "MAX_GRAD_NORM = 1.0" in grafted and "return 0  #" not in grafted
    compile(grafted, "grafted", "exec")


def test_the_reference_has_all_points_and_a_wrong_body_costs_its_own(tmp_path, capsys):
    one = {name: x for name, x in FUNCTIONS.items() if name in ("is_last_token", "kl_reward", "whiten", "td_loss")}
    right = classroom.grade_functions(submit(tmp_path / "right"), one)
    assert all(x["score"] == x["max_score"] and not x["output"] for x in right)
    wrong = classroom.grade_functions(submit(tmp_path / "wrong", whiten="    return x\n", td_loss="    return q.sum() * 0\n"), one)
    assert {x["name"]: x["score"] for x in wrong} == {"is_last_token": 2, "kl_reward": 3, "whiten": 0, "td_loss": 0}
    assert "test_whiten" in next(x["output"] for x in wrong if x["name"] == "whiten")


@pytest.mark.distributed
def test_no_stub_and_no_lazy_body_passes_any_test(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for file, text in TEXT.items():
        (empty / file).write_text(classroom.strip(text, FUNCTIONS))
    assert all(x["score"] == 0 for x in classroom.grade_functions(empty, FUNCTIONS))
    first = {name: re.search(rf"^def {name}\((\w+)", TEXT[x["file"]], re.M)[1] for name, x in FUNCTIONS.items()}
    for number, lazy in enumerate(("    return {0}\n", "    return {0} * 0\n")):
        bodies = {name: lazy.format(first[name]) for name in FUNCTIONS}
        found = classroom.grade_functions(submit(tmp_path / str(number), **bodies), FUNCTIONS)
        assert all(x["score"] == 0 for x in found), [x["name"] for x in found if x["score"]]


SLOW = pytest.mark.distributed


@pytest.mark.parametrize("body, why", [
    ("    while True:\n        pass\n", "not finished after"),
    pytest.param("    import os\n    os._exit(0)\n", "the process ended", marks=SLOW),
    pytest.param("    import not_there\n", "not_there", marks=SLOW),
    pytest.param("    print('x' * 10_000_000)\n    raise SystemExit\n", "SystemExit", marks=SLOW)])
def test_what_a_body_does_costs_its_own_points_only(body, why, tmp_path, monkeypatch):
    monkeypatch.setattr(classroom, "PLUGIN", classroom.PLUGIN.replace(f"alarm({classroom.SECONDS})", "alarm(4)"))
    one = {name: FUNCTIONS[name] for name in ("kl_reward", "advantage_q")}
    found = classroom.grade_functions(submit(tmp_path / "one", kl_reward=body), one)
    assert [x["score"] for x in found] == [0, 2] and why in found[0]["output"]


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    one = {name: FUNCTIONS[name] for name in ("value_positions", "advantage_q", "kl_reward")}
    folder = submit(tmp_path / "one")
    (folder / "train_gvm.py").write_text("def value_positions(is_response):\nreturn 1\n")      # a syntax error
    text = (folder / "train_dvpo.py").read_text()
    (folder / "train_dvpo.py").write_text(text.replace("def kl_reward(", "def my_reward("))
    found = {x["name"]: x for x in classroom.grade_functions(folder, one)}
    assert {name: x["score"] for name, x in found.items()} == {"value_positions": 0, "advantage_q": 2, "kl_reward": 0}
    assert "train_gvm.py: expected an indented block" in found["value_positions"]["output"]
    assert "no function kl_reward" in found["kl_reward"]["output"]
    fails(lambda: classroom.main(["grade", "--submission", str(tmp_path / "nowhere")]), "no such folder")


def test_bugs_are_not_called_like_the_healthy_run():
    assert "healthy" not in BUGS


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_one_line(name):
    bug = BUGS[name]
    before, after = TEXT[bug["file"]].splitlines(), classroom.with_bug(bug).splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@SLOW
@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_found_by_the_test_that_is_named_or_by_none(name):
    text, test = {BUGS[name]["file"]: classroom.with_bug(BUGS[name])}, BUGS[name]["test"]
    graded = sorted({test for x in FUNCTIONS.values() for test in x["tests"]})
    found = {name for name, why in classroom.run_tests(text, graded).items() if why}
    assert test in found if test else not found


@SLOW
def test_matching_and_a_test_of_ones_own(tmp_path):
    key = tmp_path / "key.json"
    key.write_text(json.dumps({"runs": {"A": 2, "B": 1}, "assigned": "KL"}))
    (tmp_path / "matching.json").write_text('{"A": 2, "B": 7}')
    test = "import torch, train_dvpo\n\n\ndef test_sign():\n    x, y = torch.ones(1, 1), torch.ones(1, 1).bool()\n" \
           "    assert train_dvpo.kl_reward(x, 0 * x, y, 0.1).item() < 0\n"
    (tmp_path / "test_bug.py").write_text(test)
    assert [x["score"] for x in classroom.grade_bugs(tmp_path, key, BUGS)] == [1, 10]
    (tmp_path / "test_bug.py").write_text(test + "    assert False\n")          # fails on the reference, too
    (tmp_path / "matching.json").unlink()
    assert [x["score"] for x in classroom.grade_bugs(tmp_path, key, BUGS)] == [0, 0]


def test_assignment(tmp_path, capsys):
    classroom.main(["assignment", "--output", str(tmp_path / "hw"), "--seed", "7"])
    files = {path.name for path in (tmp_path / "hw").iterdir()}
    assert files == {"assignment.md", "train_gvm.py", "train_dvpo.py", "world"}
    handout = (tmp_path / "hw" / "assignment.md").read_text()
    assert "has the seed 7" in handout and "SEED" not in handout and "COMMIT" not in handout
    assert json.loads((tmp_path / "hw" / "world" / "data" / "manifest.json").read_text())["seed"] == 7
    fails(lambda: classroom.main(["assignment", "--output", str(tmp_path / "hw")]), "hw: exists")


def test_the_zip_grades_in_an_empty_folder(tmp_path):
    """As Gradescope does, but for the installation: setup.sh and run_autograder in /autograder/source."""
    classroom.main(["gradescope", "--output", str(tmp_path / "autograder.zip")])
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        archive.extractall(tmp_path / "source")
    assert (tmp_path / "source" / "setup.sh").read_text().startswith("#!/bin/sh")
    assert "classroom/classroom.py grade" in (tmp_path / "source" / "run_autograder").read_text()
    exercises = tmp_path / "one.yaml"
    exercises.write_text(yaml.safe_dump({"functions": {"kl_reward": FUNCTIONS["kl_reward"]}, "bugs": {}}))
    command = [sys.executable, "classroom/classroom.py", "grade", "--submission", str(submit(tmp_path / "s1")), "--results",
               str(tmp_path / "results.json"), "--exercises", str(exercises)]
    subprocess.run(command, cwd=tmp_path / "source", env=os.environ, check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["score"] == 3 and results["tests"][0]["max_score"] == 3 and results["stdout_visibility"] == "hidden"
