"""What the pages say is true: commands parse, links point at what they name, metrics and departures are all described."""
import ast
import importlib
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT, read_lines

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]
BASELINES = ["reward_model", "ppo", "grpo", "remax", "dpo"]
SCRIPTS = {"sft", "train_gvm", "train_dvpo", "prepare_data", "label_rollouts", *(f"baselines/{name}" for name in BASELINES)}
CLAIMS = re.search("CLAIMS := (.*)", (ROOT / "Makefile").read_text())[1].split()
COMMANDS = {"evaluate", "figures"}                            # scripts with subcommands


def parse(words):
    """Parses a command line as its script would. words: ["python", "sft.py", "--lr", ...]."""
    while not words[0].endswith(".py"):
        assert not words[0].endswith(".yaml") or (ROOT / words[0]).is_file(), words[0]
        words = words[1:]
    script, arguments = words[0].removesuffix(".py"), words[1:]
    module = importlib.import_module(script.replace("/", "."))
    sys.argv = [words[0]]
    if script in SCRIPTS:
        return module.parse_args(module.Args, arguments)
    if script in COMMANDS:
        return module.parse_args(module.COMMANDS[arguments[0]][0], arguments[1:])
    if script == "atlas":
        return arguments[0] in ("world", "summary") or pytest.fail(f"no such command: {words}")
    return (ROOT / words[0]).is_file() or pytest.fail(f"no such script: {words}")


def commands(text):
    """Every command in the fenced code blocks and in the modules' docstrings: lines that call python or accelerate."""
    launch = r"python|accelerate launch(?: --config_file [\w/]+\.yaml)?(?: --[a-z_]+ \w+| \\\n   )*"
    found = re.findall(rf"^(?:    )?((?:{launch}) [\w/]+\.py(?:[^\n\\]|\\\n)*)", text, re.M)
    return [shlex.split(re.sub(r"\\\n", " ", command), comments=True) for command in found]


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("baselines/*.py"))], ids=lambda page: page.name)
def test_every_command_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["test"])
    text = page.read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(text)) if page.suffix == ".py" else text
    found = commands(text or "")
    for command in found:
        assert parse(command)
    assert found or page.name not in ("README.md", "sft.py", "train_gvm.py", "train_dvpo.py", "evaluate.py", "ppo.py")


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for page in PAGES:
        for target in re.findall(r"`?make ([\w-]+)", page.read_text(encoding="utf-8")):
            assert target in targets or target in ("sure", "it", "the"), f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_at_what_they_name(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "#")):
            continue
        file, _, line = target.partition("#L")
        path = (page.parent / file).resolve()
        assert path.exists(), f"{page.name}: {target}"
        if line:
            name = text.rpartition(".")[2].strip("`")
            there = path.read_text(encoding="utf-8").splitlines()[int(line) - 1]
            right = [i for i, row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
                     if re.match(rf"(def|class) {name}\b", row)]
            assert re.match(rf"(def|class) {name}\b", there), f"{page.name}: {name} is at line {right} of {file}, not {line}"


def test_paper_to_code_covers_both_equations_and_names_a_test_each():
    page = (ROOT / "docs" / "paper_to_code.md").read_text().split("## Tables and figures")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert sum("Eq. (1)" in row for row in rows) == 1 == sum("Eq. (2)" in row for row in rows)
    assert all(".py#L" in row.split("|")[3] and "tests/" in row.split("|")[4] for row in rows)


def test_every_table_and_figure_has_a_command_or_a_reason(monkeypatch):
    """Tables 1 to 10 and Figures 2 to 4; every command in the rows parses as its script would."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["test"])
    page = (ROOT / "docs" / "paper_to_code.md").read_text().split("## Tables and figures")[1]
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith(("| Table", "| Figure"))}
    named = {int(n) for cell in rows for n in re.findall(r"\d+", cell) if cell.startswith("Table")}
    assert set(range(1, 11)) <= named and {"Figure 2", "Figure 3", "Figure 4"} <= set(rows)
    for cell, line in rows.items():
        found = re.findall(r"`((?:python|make) [^`]+)`", line)
        assert all(command.startswith("make") or parse(shlex.split(command)) for command in found)
        assert found or cell in ("Table 2", "Table 6", "Tables 11 to 13"), cell


def test_every_departure_is_marked_and_described():
    described = set(re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "deviations.md").read_text(), re.M))
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]
    marked = {number for path in scripts for number in re.findall(r"DEVIATION (\d+)", path.read_text())}
    assert described == marked and "1" in marked


@pytest.mark.parametrize("run, heading", [("sft", "sft.py"), ("gvm", "train_gvm.py"), ("dvpo", "train_dvpo.py"),
                                          *((name, f"baselines/{name}.py") for name in BASELINES)])
def test_every_metric_is_described(run, heading, request):
    page = (ROOT / "docs" / "metrics.md").read_text()
    section = page[page.index(f"## {heading}"):].split("\n## ")[0]
    described = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    written = {name for record in read_lines(request.getfixturevalue(f"{run}_run") / "metrics.jsonl") for name in record}
    assert described == written


def nesting(node):
    """Depth of nested loops, conditions and with-blocks."""
    deeper = isinstance(node, (ast.For, ast.While, ast.If, ast.With))
    return deeper + max((nesting(child) for child in ast.iter_child_nodes(node)), default=0)


@pytest.mark.parametrize("script", ["sft.py", "train_gvm.py", "train_dvpo.py", *(f"baselines/{x}.py" for x in BASELINES)])
def test_the_training_loop_fits_one_screen(script):
    """At most 80 lines and three levels deep, from `for update` (or `for step`) to the end of its body."""
    functions = {node.name: node for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, ast.FunctionDef)}
    for name in ("main", "improve"):
        for node in functions[name].body if name in functions else ():
            if isinstance(node, ast.For):
                assert node.end_lineno - node.lineno < 80 and nesting(node) <= 3, (script, name, nesting(node))


def test_the_readme_s_comparison_is_what_was_measured():
    """Every row of README's table against results/compare.json."""
    results = json.loads((ROOT / "results" / "compare.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method in results["methods"]:
        seeds = [seed[method] for seed in results["seeds"].values()]
        row = next(line for line in readme.splitlines() if line.startswith(f"| {method} | ") and "±" in line)
        cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        assert cells[0].startswith(f"{sum(seed['oracle'] for seed in seeds) / len(seeds):.2f} ±"), row
        assert cells[1] == f"{sum(seed['win_rate']['sft'] for seed in seeds) / len(seeds):.2f}", row
        assert cells[2] == f"{sum(seed['kl'] for seed in seeds) / len(seeds):.1f}", row
        seconds, large = results["step_seconds"].get(method), results["large"].get(method)
        assert cells[3] == (f"{seconds['total']:.2f}" if seconds else ""), row
        assert cells[4] == (f"{large['peak_mib'] / 1024:.1f}" if large else ""), row


def test_the_value_tables_are_what_was_measured():
    """results/values.md against results/values.json: every row is the mean over the seeds."""
    results = json.loads((ROOT / "results" / "values.json").read_text())
    page = (ROOT / "results" / "values.md").read_text(encoding="utf-8")
    tables = {part.split("\n")[0].split(" (")[0]: dict(re.findall(r"^\| ([\w. ]+) \| (0\.[\d |.]+) \|$", part, re.M))
              for part in page.split("\n## ")}
    seeds = list(results["seeds"].values())

    def row(pick, models=("scores", "pairs", "ScalarRM", "A/C"), seeds=seeds):
        return " | ".join(f"{sum(pick(seed[model]) for seed in seeds) / len(seeds):.3f}" for model in models)

    aggregates, margins, policies = (tables[name] for name in ("Pair accuracy by aggregate", "By margin of the true scores", "By behaviour policy"))
    assert len(aggregates) == 9 and len(margins) == 4 and len(policies) == 5
    for name, cells in aggregates.items():
        assert cells == row(lambda model: model["pair_accuracy"][name]["mean"])
    for number, cells in enumerate(margins.values()):
        assert cells == row(lambda model: list(model["by_margin"].values())[number]["mean"])
    for name, cells in policies.items():
        assert cells == row(lambda model: model["by_policy"][name]["mean"])
    for name, cells in tables['The "Bellman-style backup"'].items():
        assert cells == row(lambda x: x, ("scores", "pairs"), results["backup_lambda"][name].values())


def test_the_readme_s_findings_are_what_was_measured():
    """Every row of "What we found": its verdict is one of its page's, and each number stands on that page."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What we found")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ") and "results/" in line]
    measured = [name for name in CLAIMS if (ROOT / "results" / f"{name}.json").exists()]
    assert measured and {re.search(r"results/(\w+)", row[0])[1] for row in rows} == set(measured)
    for claim, word, numbers in rows:
        name = re.search(r"\(results/(\w+)\.md\)", claim)[1]
        page = (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
        verdicts = {found["verdict"] for found in json.loads((ROOT / "results" / f"{name}.json").read_text())["claims"].values()}
        assert word.strip(" *") in verdicts, (name, word)
        missing = [number for number in re.findall(r"\d+\.\d+", numbers) if number not in page]
        assert not missing, (name, missing)


def test_measured_effects_of_deviations_are_those_of_their_pages():
    """Each number of the last column of docs/deviations.md, and of README's table of deviations, stands on a page it names."""
    rows = [line.split("|")[-2] for line in (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8").splitlines()
            if re.match(r"\| \d+ \|", line)]
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Faithful, and where not")[1].split("\n## ")[0]
    rows += [line.split("|")[-2] for line in section.splitlines() if line.startswith("| ")]
    seen = 0
    for row in rows:
        pages = "".join((ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
                        for name in {"deviations", *re.findall(r"results/(\w+)\.md", row)})
        numbers = re.findall(r"\d+\.\d+", row)
        assert not [number for number in numbers if number not in pages], row
        seen += len(numbers)
    assert seen > 20
