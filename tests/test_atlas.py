"""The embedded world: facts, oracle, behaviour policies, and the truth that is computed from them."""
import hashlib
import itertools
import json
import random
import re
import statistics

import pytest

import atlas

BEIJING = "As an island, is Beijing located in Asia?"         # the paper's Figure 3


@pytest.mark.parametrize("prompt, response, score", [
    (BEIJING, "Beijing is not an island, but it is in Asia.", 0.65),                  # right, and a right extra fact
    (BEIJING, "Beijing is an island, and it is in Asia.", -0.35),
    (BEIJING, "Beijing is not a city on the mainland, but it is in Asia.", -0.35),    # denies what was not asked
    (BEIJING, "Rome is not an island, but it is in Asia.", -0.70),                    # about another city
    (BEIJING, "No, it is not.", 0.50),
    ("Is Japan an island?", "Yes, Japan is an island country.", 0.50),
    ("Is Japan an island?", "Yes, Japan is not an island country.", -0.50),
    ("Is Japan an island?", "No, Japan is an island country.", -0.50),                # says both
    ("Is Japan an island?", "Good question! Yes, it is. It lies in Asia. Its capital is Tokyo.", 0.95),
    ("Is Japan an island?", "Good question! Happy to help! Yes, it is.", 0.65),       # polite counts once
    ("Is Japan an island?", "Yes, it is. Yes, it is.", 0.40),                         # a repetition rambles
    ("Is Japan an island?", "Yes, it is. Its capital is Rome.", 0.30),
    ("Is Japan an island?", "Yes, it is. Its capi", 0.20),                            # cut off: broken
    ("Is Japan an island?", "", -0.50),
    ("What is the capital of Peru?", "It is Lima.", 0.50),
    ("What is the capital of Peru?", "Yes, it is.", -0.50),
    ("Where in the world is Mexico?", "Mexico is in Asia. Go and read a book. Go and read a book. x", -1.0),   # clipped
])
def test_oracle(prompt, response, score):
    assert atlas.oracle(prompt, response) == pytest.approx(score)


def test_the_oracle_understands_everything_that_the_policies_say():
    for policy, prompt in itertools.product(atlas.POLICIES, atlas.QUESTIONS):
        kind, country = atlas.QUESTIONS[prompt]
        for slot in atlas.slots(policy, prompt):
            assert sum(p for p, _ in slot) == pytest.approx(1)
            for _, sentence in slot:
                known = sentence in ["", *atlas.POLITE, *atlas.RUDE, *atlas.RAMBLE]
                assert known or atlas.claims(kind, country, sentence) is not None, sentence


def test_right_answers_are_right_and_wrong_ones_wrong():
    for prompt, (kind, country) in atlas.QUESTIONS.items():
        subject = country.capital if re.search(rf"\b{country.capital}\b", prompt) else country.name
        right, wrong = atlas.answers(kind, country, subject)
        assert all(atlas.oracle(prompt, answer) >= 0.5 for forms in right for answer in forms)
        assert all(atlas.oracle(prompt, answer) <= -0.35 for forms in wrong for answer in forms)
        for true, lies in atlas.extras(kind, country, subject):
            assert all(atlas.claims(kind, country, true).values())
            assert not any(value for lie in lies for value in atlas.claims(kind, country, lie).values())


def all_responses(policy, prompt):
    """Every response a policy can give, with its probability, by brute force: {text: probability}."""
    found = {}
    for choice in itertools.product(*atlas.slots(policy, prompt)):
        text, probability = " ".join(s for _, s in choice if s), 1.0
        for p, _ in choice:
            probability *= p
        found[text] = found.get(text, 0.0) + probability
    return found


@pytest.mark.parametrize("prefix", ["", "Beijing", "Beijing is n", "Happy to help! Be", "No, it is not. The country has",
                                    "No, it is not."])
def test_true_value_is_the_conditional_expectation(prefix):
    """Against the exact sum over all responses that begin with the prefix, divided by their total probability."""
    fits = {text: p for text, p in all_responses("terse", BEIJING).items() if text.startswith(prefix)}
    exact = sum(p * atlas.oracle(BEIJING, text) for text, p in fits.items()) / sum(fits.values())
    value, error = atlas.true_value("terse", BEIJING, prefix, n=4000)
    assert abs(value - exact) < 4 * error + 1e-9 and error < 0.01


def test_any_policy_is_the_mixture_of_those_that_may_have_begun_so():
    """Against rejection: fresh answers of all five policies, those that begin with the prefix kept."""
    fresh = [text for policy in atlas.POLICIES for text in atlas.complete(policy, BEIJING, "", 6000, random.Random(0))]
    for prefix in ("", "Beijing is not", "Everyone"):
        kept = [atlas.oracle(BEIJING, text) for text in fresh if text.startswith(prefix)]
        value, error = atlas.true_value("any", BEIJING, prefix, n=4000)
        assert len(kept) > 300 and value == pytest.approx(statistics.mean(kept), abs=4 * (
            error ** 2 + statistics.variance(kept) / len(kept)) ** 0.5)
    with pytest.raises(ValueError, match="'any' never begins"):
        atlas.true_value("any", BEIJING, "Beijing is made of cheese")


def test_true_value_in_special_cases():
    assert atlas.true_value("expert", BEIJING, "No, it is not." + atlas.END) == (0.5, 0.0)       # finished: its reward
    value_and_error = atlas.true_value(lambda prompt, prefix, n: [prefix + " not."] * n, BEIJING, "No, it is", n=3)
    assert value_and_error == (0.5, 0.0)                      # of any policy that is a function
    with pytest.raises(ValueError, match="never begins"):
        atlas.true_value("expert", BEIJING, "Everyone knows that.")            # experts are not rude
    with pytest.raises(ValueError, match="not a question"):
        atlas.oracle("Is the moon an island?", "No.")


def test_policies_are_as_good_as_their_names(world):
    rows = atlas.scored_rows(list(atlas.QUESTIONS)[::9], 2, random.Random(0))
    mean = {policy: sum(r["reward"] for r in rows if r["policy"] == policy) for policy in atlas.POLICIES}
    assert mean["expert"] > mean["terse"] > mean["chatty"] > mean["novice"] > mean["troll"]


def test_the_data_are_deterministic_disjoint_and_hashed(world, tmp_path):
    first = json.loads((world / "data" / "manifest.json").read_text())["files"]
    assert first["pairs.jsonl"] == {"rows": 4325, "sha256": "1e93489ea3fcded55081aacf415da085ff4d3b9c34565e42c6cb3cb6db0926e8"}
    atlas.write_data(tmp_path / "a", 6)
    files = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    assert files.keys() == first.keys() and files["rl.jsonl"] != first["rl.jsonl"]
    prompts = {}
    for name, file in files.items():
        content = (tmp_path / "a" / name).read_bytes()
        rows = [json.loads(line) for line in content.splitlines()]
        assert hashlib.sha256(content).hexdigest() == file["sha256"] and len(rows) == file["rows"]
        prompts[name] = {row["prompt"] for row in rows}
        for row in rows:
            if "chosen" in row:
                assert atlas.oracle(row["prompt"], row["chosen"]) > atlas.oracle(row["prompt"], row["rejected"])
            elif "reward" in row:
                assert row["reward"] == pytest.approx(atlas.oracle(row["prompt"], row["response"]), abs=1e-4)
    parts = [["sft.jsonl"], ["scored.jsonl", "pairs.jsonl"], ["rl.jsonl"],
             ["test_scored.jsonl", "test_pairs.jsonl", "test_prompts.jsonl"]]
    groups = [set.union(*(prompts[name] for name in part)) for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(atlas.QUESTIONS) == 4 * 6 * 64


def test_a_world_replaces_only_a_world(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"source": "hh"}')
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match="data exists.*only what atlas.py made"):
            atlas.main(["world", "--output", str(tmp_path), *more])
    assert (tmp_path / "data" / "manifest.json").exists() and not (tmp_path / "base").exists()
    with pytest.raises(SystemExit, match="no finished demo"):
        atlas.main(["summary", "--run", str(tmp_path / "nowhere")])
