"""What the pages say is true: commands parse, links and names point at what is there, metrics and departures are described."""
import ast
import importlib
import json
import re
import shlex
import sys
from statistics import mean

import pytest
from conftest import ROOT, SCRIPTS, read_lines

import claims

RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]
WRITTEN = PAGES[:1 + len(list((ROOT / "docs").glob("*.md")))]  # by hand; results name the scripts of their commit
FOLDERS = ("", "baselines", "data", "analysis", "experiments")
PYTHON = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
CLAIMS = re.search("CLAIMS := (.*)", (ROOT / "Makefile").read_text())[1].split()


def text_of(page):
    return page.read_text(encoding="utf-8")


def module_of(name):
    """The module of baselines/ppo.py, or of analysis/judge.py, which tests import as judge."""
    folder, _, stem = name.removesuffix(".py").rpartition("/")
    return importlib.import_module(stem if folder in ("data", "analysis") else f"{folder}.{stem}".strip("."))


def parse(words):
    """Parses a command line as its script would. words: ["python", "sft.py", "--lr", ...]."""
    while not words[0].endswith(".py"):
        assert not words[0].endswith(".yaml") or (ROOT / words[0]).is_file(), words[0]
        words = words[1:]
    assert (ROOT / words[0]).is_file(), words
    if words[0].startswith(("experiments/", "tests/")):
        return True
    module, sys.argv = module_of(words[0]), [words[0]]
    if words[0] in ("data/smollm2.py", "classroom/classroom.py"):              # plain words, or argparse
        return len(words) < 3 or words[1] in ("assignment", "grade", "bugs", "gradescope")
    if hasattr(module, "Args"):
        return module.parse_args(module.Args, words[1:])
    if hasattr(module, f"{words[1].capitalize()}Args"):        # evaluate.py values: ValuesArgs
        return module.parse_args(getattr(module, f"{words[1].capitalize()}Args"), words[2:])
    return words[1] in ("world", "summary") or pytest.fail(f"no such command: {words}")           # data/atlas.py


def commands(text):
    """Every command in fenced code blocks and docstrings: lines that call python or accelerate."""
    launch = r"python|accelerate launch(?: --config_file [\w/.]+\.yaml)?(?: --[a-z_]+ \w+| \\\n   )*"
    found = re.findall(rf"^(?:    )?((?:{launch}) [\w/]+\.py(?:[^\n\\]|\\\n)*)", text, re.M)
    return [shlex.split(re.sub(r"\\\n", " ", command), comments=True) for command in found]


@pytest.mark.parametrize("page", [*WRITTEN, *PYTHON], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["test"])
    text = text_of(page) if page.suffix == ".md" else ast.get_docstring(ast.parse(text_of(page))) or ""
    found = commands(text)
    for command in found:
        command = [word.replace("RECIPE", "recipes/paper_llama3.2_3b_base.yaml") for word in command]
        assert parse(command)
    scripts = {ROOT / path for path in (*SCRIPTS.values(), "evaluate.py", "README.md")}
    assert found or page not in scripts


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M)
    for page in WRITTEN:
        for target in re.findall(r"(?:`|^)make ([\w-]+)", text_of(page), re.M):
            assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_point_at_what_is_there(page):
    """[baselines.ppo.value_loss](../baselines/ppo.py): that file, and a function or class (or test) of that name in it."""
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), f"{page.name}: {target}"
        name = text.strip("`").rpartition(".")[2]
        if path.suffix == ".py" and name != "py":
            assert re.search(rf"^(def|class) {name}\b", text_of(path), re.M), f"{page.name}: no {name} in {target}"
    if page in WRITTEN:                                        # `evaluate.bellman_backup`, --flags in backticks
        modules = {path.stem: path for path in PYTHON}
        for stem, name in re.findall(r"`(\w+)\.(\w+)`", text_of(page)):
            if stem in modules and name not in ("py", "md", "json", "yaml", "jsonl"):
                assert re.search(rf"^(def|class) {name}\b|^{name} = ", text_of(modules[stem]), re.M), f"{page.name}: {stem}.{name}"
        known = " ".join(map(text_of, PYTHON))
        for flag in re.findall(r"`--(\w+)", text_of(page)):
            assert re.search(rf"\b{flag}\b", known) or flag in ("num_processes", "machine_rank", "multi_gpu", "cpu"), f"{page.name}: --{flag}"


def test_paper_to_code_covers_both_equations_and_names_a_test_each():
    rows = [line for line in text_of(ROOT / "docs" / "paper_to_code.md").split("## Tables and figures")[0].splitlines() if line.startswith("| ")][1:]
    assert sum("Eq. (1)" in row for row in rows) == 1 == sum("Eq. (2)" in row for row in rows)
    assert all(".py)" in row.split("|")[3] and "../tests/" in row.split("|")[4] or "released code" in row for row in rows)


def test_every_table_and_figure_has_a_command_or_a_reason(monkeypatch):
    """Tables 1 to 10 and Figures 2 to 4; every command in the rows parses as its script would."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["test"])
    page = text_of(ROOT / "docs" / "paper_to_code.md").split("## Tables and figures")[1]
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith(("| Table", "| Figure"))}
    named = {int(n) for cell in rows for n in re.findall(r"\d+", cell) if cell.startswith("Table")}
    assert set(range(1, 11)) <= named and {"Figure 2", "Figure 3", "Figure 4"} <= set(rows)
    for cell, line in rows.items():
        found = re.findall(r"`((?:python|make) [^`]+)`", line)
        assert all(command.startswith("make") or parse(shlex.split(command)) for command in found)
        assert found or cell in ("Table 2", "Tables 11 to 13"), cell


def test_every_departure_is_marked_and_described():
    described = set(re.findall(r"^\| (\d+) \|", text_of(ROOT / "docs" / "deviations.md"), re.M))
    marked = {number for path in PYTHON for number in re.findall(r"DEVIATION (\d+)", text_of(path))}
    assert described == marked and "1" in marked


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_metric_is_described(name, runs):
    page = text_of(ROOT / "docs" / "metrics.md")
    section = page[page.index(f"## {SCRIPTS[name]}"):].split("\n## ")[0]
    described = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`([\w/]+)`", row)}
    assert described == {name for record in read_lines(runs(name) / "metrics.jsonl") for name in record}


# ---- numbers ----
def test_the_comparison_is_what_was_measured():
    """Every row of the table in docs/findings.md against experiments/results/compare.json."""
    results, page = json.loads(text_of(RESULTS / "compare.json")), text_of(ROOT / "docs" / "findings.md")
    for arm in results["chosen"]:
        seeds, seconds = [seed[arm] for seed in results["seeds"].values()], results["seconds"][arm]
        row = next(line for line in page.splitlines() if line.startswith(f"| {arm} | ") and "±" in line)
        cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        wins, nats = (mean(seed[name] for seed in seeds) for name in ("wins", "kl"))
        score, low, _ = claims.interval([seed["oracle"] for seed in seeds])
        assert cells == [f"{score:.2f} ± {score - low:.2f}", f"{wins:.2f}", f"{nats:.1f}", f"{seconds['all']:.0f}",
                         f"{seconds['step']:.2f}" if "step" in seconds else ""], row


def test_claims_are_what_was_measured():
    """experiments/results/README.md: each verdict is one of its page's, each number stands on that page."""
    rows = [line.split("|")[1:-1] for line in text_of(RESULTS / "README.md").splitlines() if line.startswith("| ") and ".md)" in line]
    assert {re.search(r"\((\w+)\.md\)", row[0])[1] for row in rows} == set(CLAIMS)
    for claim, word, numbers in rows:
        name = re.search(r"\((\w+)\.md\)", claim)[1]
        verdicts = {found["verdict"] for found in json.loads(text_of(RESULTS / f"{name}.json"))["claims"].values()}
        assert word.strip(" *") in verdicts, (name, word)
        assert not [number for number in re.findall(r"\d+\.\d+", numbers) if number not in text_of(RESULTS / f"{name}.md")], name


def test_findings_are_what_was_measured():
    """docs/findings.md: each number of a section stands on a page that the section links; README's are numbers of findings."""
    findings = text_of(ROOT / "docs" / "findings.md")
    for section in findings.split("\n## ")[1:]:
        text = re.sub(r"Llama-3.2-1B|--\w+|\]\(.*?\)|\|.*", "", section)      # the table has a test of its own
        pages = "".join(text_of(RESULTS / f"{name}.md") for name in re.findall(r"results/(\w+)\.md", section))
        assert not [number for number in re.findall(r"\d+\.\d\d+", text) if number not in pages], section[:20]
    section = text_of(ROOT / "README.md").split("## What we found")[1].split("\n## ")[0]
    assert not [number for number in re.findall(r"\d+\.\d+", section) if number not in findings]


def test_measured_effects_of_deviations_are_those_of_their_pages():
    """Each number of the last column of docs/deviations.md stands on a page that it names."""
    rows = [line.split("|")[-2] for line in text_of(ROOT / "docs" / "deviations.md").splitlines() if re.match(r"\| \d+ \|", line)]
    for row in rows:
        pages = "".join(text_of(RESULTS / f"{name}.md") for name in {"deviations", *re.findall(r"results/(\w+)\.md", row)})
        assert not [number for number in re.findall(r"\d+\.\d+", row) if number not in pages], row
    assert len(re.findall(r"\d+\.\d+", " ".join(rows))) > 15
