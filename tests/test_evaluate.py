"""Numbers: statistics against known answers."""
import json
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT, read_lines, write_rows

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


def test_bootstrap_draws_groups():
    """Twenty values of two prompts are two draws, however often each prompt was answered."""
    values = [0.0] * 10 + [1.0] * 10
    grouped, single = evaluate.bootstrap(values, 3, "a" * 10 + "b" * 10), evaluate.bootstrap([0.0, 1.0], 3)
    assert grouped == single != evaluate.bootstrap(values, 3)


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


def test_values_by_margin_and_by_policy(gvm_run, gvm_args, tmp_path):
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
    first = margin[margin < edges[1]]
    assert list(margins)[0] == f"1: {first.min():.4g} to {first.max():.4g}"
    close = [{"score_chosen": 1000 + i / 100, "score_rejected": 0.0} for i in range(40)]
    assert [len(numbers) for numbers in evaluate.margin_groups(close).values()] == [10] * 4        # close edges are four groups
    ties = [{"score_chosen": n, "score_rejected": 0} for n in [1] * 70 + [2] * 20 + [3] * 10]
    assert {label: len(numbers) for label, numbers in evaluate.margin_groups(ties).items()} == {"1: 1 to 1": 70, "2: 2 to 3": 30}
    for policy, x in policies.items():
        assert x["pairs"] == sum(policy in (row["policy_chosen"], row["policy_rejected"]) for row in rows)
    assert evaluate.margin_groups([{"score_chosen": 1, "score_rejected": 0.5}] * 3) == {"1: 0.5 to 0.5": [0, 1, 2]}
    assert evaluate.margin_groups([{"score_chosen": 1, "score_rejected": 0.5}, {}]) == {} == evaluate.policy_groups([{}])
    none = [row | {"score_chosen": None, "policy_chosen": None} for row in rows]           # as a hub data set writes "not there"
    write_rows(tmp_path / "test_pairs.jsonl", none)
    assert evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(gvm_run)], data=str(tmp_path)))["models"]["gvm"]["by_margin"] == {}


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


def test_values_reads_tau_first(gvm_run, gvm_args, tmp_path):
    """A GVM that was trained behind tau: its answers are scored behind two answers of the same policy."""
    model, tokenizer, _ = evaluate.load_value_model(str(gvm_run))
    torch.nn.init.normal_(evaluate.value_head(model).weight)  # so that every token before matters
    model.config.gvm["tau_pairs"] = 2
    model.save_pretrained(tmp_path / "tau")
    tokenizer.save_pretrained(tmp_path / "tau")
    rows = read_lines(Path(gvm_args.data) / "test_pairs.jsonl")
    args = evaluate.ValuesArgs(data=gvm_args.data)
    _, behind, _, k = evaluate.score_pairs(str(tmp_path / "tau"), rows, args)
    model.config.gvm["tau_pairs"] = 0
    model.save_pretrained(tmp_path / "tau")
    _, plain, _, _ = evaluate.score_pairs(str(tmp_path / "tau"), rows, args)
    assert k == 2 and not torch.allclose(behind["mean"][0], plain["mean"][0])


def test_values_refuses(gvm_run, gvm_args, tmp_path):
    model, tokenizer, _ = evaluate.load_value_model(str(gvm_run))
    tokenizer.save_pretrained(tmp_path / "nan")
    torch.nn.init.constant_(evaluate.value_head(model).weight, torch.nan)
    model.save_pretrained(tmp_path / "nan")
    three = evaluate.AutoModelForTokenClassification.from_pretrained(gvm_run, num_labels=3, ignore_mismatched_sizes=True)
    tokenizer.save_pretrained(tmp_path / "three")
    three.save_pretrained(tmp_path / "three")
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    for name, message in (("nan", "values that are not finite"), ("three", "has 3 outputs per token"), ("mute", "no chat template")):
        with pytest.raises(SystemExit, match=message):
            evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(tmp_path / name)], data=gvm_args.data))
    row = read_lines(Path(gvm_args.data) / "test_pairs.jsonl")[0]
    for change, message in (({"policy_chosen": ["x"]}, '"policy_chosen" is empty or not a string'),
                            ({"score_chosen": "high"}, '"score_chosen" is not a finite number'),
                            ({"score_chosen": 1e308, "score_rejected": -1e308}, "its margin is not finite")):
        write_rows(tmp_path / "data" / "test_pairs.jsonl", [row, row | change])
        with pytest.raises(SystemExit, match=f"test_pairs.jsonl:2: {message}"):
            evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(gvm_run)], data=str(tmp_path / "data")))
    with pytest.raises(SystemExit, match="given twice"):
        evaluate.main(["values", "--models", "a", "--models", "b"])
    for output, message in ((tmp_path, "is a folder"), (tmp_path / "data" / "test_pairs.jsonl" / "x.json", "cannot be written")):
        with pytest.raises(SystemExit, match=message):
            evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(gvm_run)], data=gvm_args.data, output=str(output), overwrite=True))


def test_rows_beyond_the_context_are_dropped(gvm_run, gvm_args, tmp_path):
    model, tokenizer, _ = evaluate.load_value_model(str(gvm_run))
    lengths = [max(len(evaluate.encode_prompt(tokenizer, row["prompt"])) + len(evaluate.encode_response(tokenizer, row[side]))
                   for side in ("chosen", "rejected")) for row in read_lines(Path(gvm_args.data) / "test_pairs.jsonl")]
    model.config.max_position_embeddings = sorted(lengths)[len(lengths) // 2]
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    found = evaluate.evaluate_values(evaluate.ValuesArgs(models=[str(tmp_path / "short")], data=gvm_args.data))["models"]["short"]
    assert found["pairs"] == sum(n <= model.config.max_position_embeddings for n in lengths) < len(lengths)


def test_kl_is_that_of_the_answer_alone(sft_run, dvpo_run, world, tmp_path):
    """log pi - log pi_ref summed over one sampled answer, by hand; positive on average."""
    args = evaluate.PolicyArgs(batch_size=4, max_response_length=8)
    model, tokenizer = evaluate.load_chat_model(str(dvpo_run))
    reference, _ = evaluate.load_chat_model(str(sft_run))
    with torch.no_grad():                                     # far enough from the reference to tell a sign
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prompts = [evaluate.encode_prompt(tokenizer, text) for text in ("Is Malta an island?", "What is the capital of Cuba?")] * 2
    torch.manual_seed(0)
    found = evaluate.answer(model, reference, tokenizer, prompts, args)
    for prompt, (response, kl) in zip(prompts, found):
        ids = torch.tensor([[*prompt, *response]])
        by_hand = sum((m(ids).logits[0].log_softmax(-1)[range(len(prompt) - 1, ids.shape[1] - 1), response].sum() * sign)
                      for m, sign in ((model, 1), (reference, -1)))
        assert kl == pytest.approx(by_hand.item(), abs=1e-3)
    assert sum(kl for _, kl in found) > 0


def test_a_failing_judge_loses_no_answer(sft_run, world, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompt, response):\n    raise SystemExit('no\\nmore')\n")
    args = evaluate.PolicyArgs(models=[str(sft_run)], data=str(world / "data"), samples=1, judge=f"{tmp_path / 'judge.py'}:judge",
                               output=str(tmp_path / "eval"), max_response_length=4)
    with pytest.raises(SystemExit, match="SystemExit: no more"):
        evaluate.evaluate_policy(args)
    assert len(read_lines(tmp_path / "eval" / "answers.jsonl")) == len(read_lines(world / "data" / "test_prompts.jsonl"))
    with pytest.raises(SystemExit, match="more than the context"):
        evaluate.evaluate_policy(evaluate.PolicyArgs(**vars(args) | {"max_response_length": 600, "overwrite": True}))


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
    with pytest.raises(SystemExit, match="policy.json: exists already"):
        evaluate.evaluate_policy(args)
