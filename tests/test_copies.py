"""Scripts import nothing from each other; helpers are copied. Same name, same text: a mend in one is a mend in all."""
import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Names that differ by design: what a script is about, and the few constants that belong to it.
MAY_DIFFER = {"Args", "main", "accumulation_steps", "scored_rows", "score_rollouts", "improve"}


def scripts():
    return sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])


def definitions(text):
    """{name: source text} of every top-level function and class, decorators, comments inside and docstring included."""
    lines = text.splitlines()
    return {node.name: "\n".join(lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1:node.end_lineno])
            for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_the_same_name_has_the_same_text():
    first, copies = {}, 0
    for path in scripts():
        for name, text in definitions(path.read_text()).items():
            if name in MAY_DIFFER:
                continue
            if name in first:
                copies += 1
                assert text == first[name][1], f"{name} in {path.name} is not what it is in {first[name][0]}"
            else:
                first[name] = (path.name, text)
    assert copies > 20                                        # the test saw copies at all


def test_no_script_imports_another():
    names = {path.stem for path in scripts()}
    for path in scripts():
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not names & {name.split(".")[0] for name in imported}, path.name


def test_names_that_may_differ_do():
    """An entry that is not needed any more would hide a copy that drifts."""
    texts = {}
    for path in scripts():
        for name, text in definitions(path.read_text()).items():
            texts.setdefault(name, set()).add(text)
    assert all(len(texts[name]) > 1 for name in MAY_DIFFER)


def test_training_scripts_have_the_same_sections():
    headings = {}
    for path in [ROOT / "train_gvm.py", ROOT / "train_dvpo.py", *ROOT.glob("baselines/*.py")]:
        lines = path.read_text().splitlines()
        headings[path.name] = [line.split()[2] for line in lines if line.startswith("# ---- ")]
    assert len(headings) == 7 and all(found == ["1.", "2.", "3.", "4.", "5.", "6."] for found in headings.values())
    sft = [line.split()[2] for line in (ROOT / "sft.py").read_text().splitlines() if line.startswith("# ---- ")]
    assert sft == ["1.", "2.", "3.", "5.", "6."]                              # nothing to measure but the loss


def test_what_dvpo_removes():
    """`diff train_dvpo.py baselines/ppo.py`: everything outside the method itself is the same text."""
    ours, ppo = (definitions((ROOT / name).read_text()) for name in ("train_dvpo.py", "baselines/ppo.py"))
    assert {name for name in ours if name not in ppo} == {
        "with_tau", "advantage_q", "advantage_gae", "advantage_released", "token_values"}
    assert {name for name in ppo if name not in ours} == {
        "advantage_from_critic", "value_loss", "state_values", "value_head", "load_reward_model", "response_reward", "score_scale",
        "ResponseReward", "ActorCritic", "new_critic"}


def test_the_last_section_holds_nothing_of_a_method():
    """It may be left for later, as the docstrings say: all of it is in three training scripts or more."""
    paths = [ROOT / "sft.py", ROOT / "train_gvm.py", ROOT / "train_dvpo.py", *ROOT.glob("baselines/*.py")]
    names = Counter(name for path in paths for name in definitions(path.read_text()))
    heading = "\n# ---- 6. The same in every script: command line, rows and prompts, engine, run folder ----\n"
    for path in paths:
        method, rest = (set(definitions(part)) for part in path.read_text().split(heading))
        assert len(rest) > 20 and min(names[name] for name in rest) > 2 and {"Args", "main"} <= method
