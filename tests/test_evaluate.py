"""Numbers: statistics against known answers."""
import json
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT, read_lines

import evaluate


def test_bootstrap_covers_the_mean():
    """95 % intervals of the mean of 50 draws contain the true mean in about 95 of 100 cases."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        x = evaluate.bootstrap(2 + torch.randn(50, generator=generator), seed, resamples=400)
        assert x["low"] < x["mean"] < x["high"]
        hits += x["low"] < 2 < x["high"]
    assert 0.88 <= hits / 200 <= 0.98
    assert evaluate.bootstrap([1.0] * 5, 0) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_wins():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])
    assert evaluate.wins(a, b).tolist() == [1.0, 0.5, 0.0]
    assert (evaluate.wins(a, b) + evaluate.wins(b, a) == 1).all()


def test_values_agrees_with_training(gvm_run, gvm_args, reward_model_run, reward_model_args, tmp_path, capsys):
    args = evaluate.ValuesArgs(models=[str(gvm_run), f"rm={reward_model_run}"], data=gvm_args.data,
                               output=str(tmp_path / "values.json"))
    result = evaluate.evaluate_values(args)
    logged = read_lines(gvm_run / "metrics.jsonl")[-1]["pair_accuracy"]
    found = result["models"]["gvm"]["pair_accuracy"]
    assert {name: found[name]["mean"] for name in logged} == pytest.approx(logged) and set(found) - set(logged) == {"backup"}
    logged = read_lines(reward_model_run / "metrics.jsonl")[-1]["pair_accuracy"]
    assert result["models"]["rm"]["pair_accuracy"]["last"]["mean"] == pytest.approx(logged)
    assert (result["models"]["gvm"]["aggregate"], result["models"]["rm"]["aggregate"]) == ("mean", "last")
    assert json.loads((tmp_path / "values.json").read_text()) == result
    assert f"{found['mean']['mean']:.3f} ({found['mean']['low']:.3f} to" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists already"):
        evaluate.evaluate_values(args)


def test_values_by_margin_and_by_policy(gvm_run, gvm_args):
    """Every pair is in one group of margins, and in the group of each policy that wrote one of its answers."""
    rows = read_lines(Path(gvm_args.data) / "test_pairs.jsonl")
    result = evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(gvm_run)], data=gvm_args.data))["models"]["gvm"]
    margins, policies = result["by_margin"], result["by_policy"]
    assert len(margins) == 4 and sum(x["pairs"] for x in margins.values()) == len(rows)
    mean = sum(x["mean"] * x["pairs"] for x in margins.values()) / len(rows)
    assert mean == pytest.approx(result["pair_accuracy"]["mean"]["mean"])
    margin = numpy.array([abs(row["score_chosen"] - row["score_rejected"]) for row in rows])
    edges = [*numpy.quantile(margin, (0, 0.25, 0.5, 0.75)), numpy.inf]
    assert [x["pairs"] for x in margins.values()] == [((low <= margin) & (margin < high)).sum() for low, high in zip(edges, edges[1:])]
    assert list(margins)[0].startswith(f"{edges[0]:.3g} to {edges[1]:.3g}")
    for policy, x in policies.items():
        assert x["pairs"] == sum(policy in (row["policy_chosen"], row["policy_rejected"]) for row in rows)
    assert evaluate.margin_groups([{"score_chosen": 1, "score_rejected": 0.5}] * 3) == {"0.5": [0, 1, 2]}
    assert evaluate.margin_groups([{"score_chosen": 1, "score_rejected": 0.5}, {}]) == {} == evaluate.policy_groups([{}])


def test_no_sequence_is_scored_twice(gvm_run, gvm_args, monkeypatch):
    """Atlas's pairs share answers: as many rows pass through the model as there are different ones, sorted by length."""
    rows = read_lines(Path(gvm_args.data) / "test_pairs.jsonl")
    seen, collate = [], evaluate.collate

    def counted(sequences, *others):
        seen.append([len(prompt) + len(response) for prompt, response in sequences])
        return collate(sequences, *others)

    monkeypatch.setattr(evaluate, "collate", counted)
    evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(gvm_run)], data=gvm_args.data, batch_size=10))
    different = {(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")}
    lengths = [length for batch in seen for length in batch]
    assert len(lengths) == len(different) < 2 * len(rows) and lengths == sorted(lengths)


def test_bellman_backup_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    q, mask = torch.randn(4, 9, generator=generator, dtype=torch.float64), torch.zeros(4, 9, dtype=torch.bool)
    for row, (start, end) in enumerate(((1, 9), (3, 4), (2, 7), (5, 8))):
        mask[row, start:end] = True
    for gamma, lam in ((1.0, 0.95), (1.0, 0.0), (1.0, 1.0), (0.9, 0.5)):
        found = evaluate.bellman_backup(q, mask, gamma, lam)
        for row in range(4):
            values = q[row][mask[row]].tolist()
            g = values[-1]                                    # G_T = Q_T
            for value in reversed(values[:-1]):               # from G_{t+1} to the target of t
                g = gamma * ((1 - lam) * values[values.index(value) + 1] + lam * g)
            assert found[row].item() == pytest.approx(gamma * ((1 - lam) * values[0] + lam * g))
    first, last = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0)), evaluate.last_token(mask)
    assert torch.equal(evaluate.bellman_backup(q, mask, 1.0, 1.0), q[last])
    assert torch.equal(evaluate.bellman_backup(q, mask, 1.0, 0.0), q[first])
    # Appendix B's rewards, Q_t - gamma Q_{t+1}, sum up to the first value.
    q_next = torch.nn.functional.pad(torch.where(mask, q, 0.0)[:, 1:], (0, 1))
    assert torch.allclose(torch.where(mask, q - q_next, 0.0).sum(-1), q[first])


def test_a_critic_is_read_before_the_last_token(ppo_run, world):
    """Its value behind EOS was never trained: another value there changes nothing."""
    args = evaluate.ValuesArgs(models=[str(ppo_run / "critic")], data=str(world / "data"))
    model, tokenizer, _ = evaluate.load_value_model(str(ppo_run / "critic"))
    assert model.config.critic
    sequences = [(evaluate.encode_prompt(tokenizer, "Is Malta an island?"), evaluate.encode_response(tokenizer, "Yes."))]
    ids = torch.tensor([[*sequences[0][0], *sequences[0][1]]])
    value = model(ids).logits[0, len(sequences[0][0]):, 0]
    scores = evaluate.score_answers(model, sequences, args, tokenizer.pad_token_id)
    assert scores["last"].item() == pytest.approx(value[-2].item()) and scores["mean"].item() == pytest.approx(value[:-1].mean().item())


def test_outcomes():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, torch.nan]), "b": torch.tensor([0.0, 2.0, 4.0, 1.0])}
    table = evaluate.outcomes(scores)
    assert table["a"]["b"] == {"win": 1 / 3, "tie": 1 / 3, "lose": 1 / 3, "pairs": 3} and set(table["b"]) == {"a"}


def test_names():
    assert evaluate.named(["runs/a/gvm", "large=runs/b/gvm/"]) == {"gvm": "runs/a/gvm", "large": "runs/b/gvm/"}
    with pytest.raises(SystemExit, match="runs/a/gvm and runs/b/gvm are both called 'gvm'"):
        evaluate.named(["runs/a/gvm", "runs/b/gvm"])


def test_policy(sft_run, dvpo_run, world, tmp_path):
    args = evaluate.PolicyArgs(models=[str(sft_run), str(dvpo_run)], data=str(world / "data"), samples=2,
                               judge=str(ROOT / "atlas.py:oracle"), output=str(tmp_path / "eval"), max_response_length=12)
    result = evaluate.evaluate_policy(args)
    lines = read_lines(tmp_path / "eval" / "answers.jsonl")
    for name, run in (("sft", sft_run), ("dvpo", dvpo_run)):
        mine = [line for line in lines if line["model"] == name]
        assert len(mine) == 2 * result["models"][name]["prompts"]
        assert result["models"][name]["score"]["mean"] == pytest.approx(sum(line["score"] for line in mine) / len(mine))
    assert result["models"]["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-6) != result["models"]["dvpo"]["kl"]["mean"]
    assert result["win_rate"]["sft"]["dvpo"]["mean"] + result["win_rate"]["dvpo"]["sft"]["mean"] == pytest.approx(1)
    shares = result["outcomes"]["dvpo"]["sft"]
    assert shares["win"] + shares["tie"] / 2 == pytest.approx(result["win_rate"]["dvpo"]["sft"]["mean"])
    unjudged = evaluate.evaluate_policy(evaluate.PolicyArgs(**vars(args) | {"judge": "", "output": ""}))
    assert unjudged["models"]["dvpo"]["kl"] == result["models"]["dvpo"]["kl"] and "score" not in unjudged["models"]["dvpo"]
    again = evaluate.evaluate_policy(evaluate.PolicyArgs(**vars(args) | {"output": ""}))
    assert again["models"] == result["models"]                                 # the same seed, the same samples
    with pytest.raises(SystemExit, match="holds an evaluation"):
        evaluate.evaluate_policy(args)
