"""evaluate.py: statistics against known answers, values against training and against loops, policies against the judge."""
import json

import numpy
import pytest
import torch
from conftest import ROOT, fails, read_lines, responses, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import evaluate


@pytest.fixture
def values_args(world):
    return lambda *models, **changes: evaluate.ValuesArgs(**{"models": list(map(str, models)), "data": str(world / "data")} | changes)


@pytest.fixture
def policy_args(world, runs, tmp_path):
    given = {"models": [str(runs("sft")), str(runs("dvpo"))], "data": str(world / "data"), "samples": 2, "max_response_length": 12,
             "judge": str(ROOT / "data" / "atlas.py:oracle"), "output": str(tmp_path / "eval")}
    return lambda **changes: evaluate.PolicyArgs(**given | changes)


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


def test_outcomes():
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), "b": torch.tensor([[0.0, 2.0], [4.0, 1.0]])}
    assert evaluate.outcomes(scores)["a"] == {"b": {"win": 1 / 3, "tie": 1 / 3, "lose": 1 / 3, "pairs": 3}}


def test_margins_are_cut_at_quartiles(world):
    rows = read_lines(world / "data" / "test_pairs.jsonl")
    groups = evaluate.group_rows(rows)
    margin = numpy.array([abs(row["score_chosen"] - row["score_rejected"]) for row in rows])
    edges = [*numpy.quantile(margin, (0, 0.25, 0.5, 0.75)), numpy.inf]
    assert list(map(len, groups["by_margin"].values())) == [((low <= margin) & (margin < high)).sum() for low, high in zip(edges, edges[1:])]
    first = margin[margin < edges[1]]
    assert list(groups["by_margin"])[0] == f"1: {first.min():.4g} to {first.max():.4g}"
    for policy, numbers in groups["by_policy"].items():
        assert numbers == [i for i, row in enumerate(rows) if policy in (row["policy_chosen"], row["policy_rejected"])]
    ties = [{"score_chosen": n, "score_rejected": 0} for n in [1] * 70 + [2] * 20 + [3] * 10]
    assert {label: len(numbers) for label, numbers in evaluate.group_rows(ties)["by_margin"].items()} == {"1: 1 to 1": 70, "2: 2 to 3": 30}
    assert evaluate.group_rows([{"score_chosen": 1, "score_rejected": 0.5}, {}]) == {"by_margin": {}, "by_policy": {}}


def test_values_agrees_with_training(runs, values_args, tmp_path, capsys):
    args = values_args(runs("gvm"), f"rm={runs('reward_model')}", output=str(tmp_path / "values.json"))
    result = evaluate.evaluate_values(args)
    gvm, reward_model = result["models"]["gvm"], result["models"]["rm"]
    logged = read_lines(runs("gvm") / "metrics.jsonl")[-1]
    found = {f"pair_accuracy/{name}": x["mean"] for name, x in gvm["pair_accuracy"].items() if name != "backup"}
    assert found == pytest.approx({name: x for name, x in logged.items() if "pair_accuracy" in name}, abs=0.01)
    assert set(reward_model["pair_accuracy"]) == {"last"}     # one score for an answer
    logged = next(x for name, x in read_lines(runs("reward_model") / "metrics.jsonl")[-1].items() if "pair_accuracy" in name)
    assert reward_model["pair_accuracy"]["last"]["mean"] == pytest.approx(logged, abs=0.01)
    for x in (gvm, reward_model):
        margins = x["by_margin"].values()
        mean = sum(group["mean"] * group["pairs"] for group in margins) / x["pairs"]
        assert mean == pytest.approx(x["pair_accuracy"][x["aggregate"]]["mean"]) and len(margins) == 4
    assert json.loads((tmp_path / "values.json").read_text()) == result
    assert "{mean:.3f} ({low:.3f}, {high:.3f})".format(**gvm["pair_accuracy"]["mean"]) in capsys.readouterr().out
    fails(lambda: evaluate.evaluate_values(args), "values.json: exists")


def test_bellman_backup_against_a_loop(random_batch):
    mask, draw = random_batch
    q = draw()
    for gamma, lam in ((1.0, 0.95), (1.0, 0.0), (1.0, 1.0), (0.9, 0.5)):
        for found, (b, start, end) in zip(evaluate.bellman_backup(q, mask, gamma, lam), responses(mask)):
            g = q[b, end - 1].item()                          # G_T = Q_T
            for value in reversed(q[b, start:end].tolist()):  # Q_{t+1}, for t = T - 1, ..., 0
                g = gamma * ((1 - lam) * value + lam * g)
            assert found.item() == pytest.approx(g)


def test_a_critic_is_read_before_the_last_token(runs):
    """PPO's critic is V(s_t); its value after the end of the answer was never trained."""
    tokenizer = evaluate.load_tokenizer(str(runs("gvm")))
    model = evaluate.load_model(evaluate.AutoModelForTokenClassification, runs("gvm"), tokenizer, 64, trained=True)
    model.config.critic = True
    prompt, response = evaluate.encode_prompt(tokenizer, "Is Malta an island?"), evaluate.encode_response(tokenizer, "Yes.")
    value = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt):-1, 0]
    scores = evaluate.score_answer(model, prompt, response, 1.0)
    assert scores["last"] == scores["backup"] == pytest.approx(value[-1].item()) and scores["mean"] == pytest.approx(value.mean().item())


def test_values_reads_tau_first(runs, values_args, tmp_path):
    """A GVM that was trained with tau: its answers are scored after two answers of the same policy."""
    tokenizer = evaluate.load_tokenizer(str(runs("gvm")))
    model = evaluate.load_model(evaluate.AutoModelForTokenClassification, runs("gvm"), tokenizer, 64, trained=True)
    tokenizer.save_pretrained(tmp_path / "gvm")
    scores = []
    for k in (0, 2):
        model.config.gvm["tau_pairs"] = k
        model.save_pretrained(tmp_path / "gvm")
        scores.append(evaluate.score_pairs(str(tmp_path / "gvm"), values_args())[2]["mean"])
    assert not torch.allclose(*scores)


@pytest.mark.parametrize("pad", ["<|end|>", "<|user|>", None])
def test_another_reward_model_reads_its_whole_chat_template(world, values_args, tmp_path, pad):
    """A line end after the answer, as ChatML has it, is read too. The score is the class's own, whatever pads."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.chat_template += "{% if not add_generation_prompt %}{{ '\\n' }}{% endif %}"
    tokenizer.save_pretrained(tmp_path / "theirs")
    model = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(pad) if pad else None
    model.save_pretrained(tmp_path / "theirs")
    rows, dropped, scores = evaluate.score_pairs(str(tmp_path / "theirs"), values_args())
    for row, (chosen, rejected) in zip(rows[:5], scores["last"].view(-1, 2)):
        for side, score in (("chosen", chosen), ("rejected", rejected)):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
            assert tokenizer.decode(ids[0]).endswith("\n") and model(ids).logits.item() == pytest.approx(score.item(), abs=1e-5)
    assert len(rows) == 160 and dropped == 0


def test_long_pairs_are_dropped_and_counted(runs, values_args):
    rows, dropped, _ = evaluate.score_pairs(str(runs("gvm")), values_args(max_length=40))
    assert max(len(row["prompt_ids"]) for row in rows) < 40
    assert len(rows) + dropped == 160 and dropped > 0
    fails(lambda: evaluate.score_pairs(str(runs("gvm")), values_args(max_length=3)), "no pair fits")


def test_kl_is_that_of_the_answer_alone(runs):
    """log pi - log pi_ref summed over sampled answers of different length, by hand; positive on average."""
    tokenizer = evaluate.load_tokenizer(str(runs("dvpo")))
    policy, reference = (evaluate.load_model(evaluate.AutoModelForCausalLM, runs("dvpo"), tokenizer, 64) for _ in range(2))
    with torch.no_grad():                                     # far enough from the reference to tell a sign
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    prompt = evaluate.encode_prompt(tokenizer, "Is Malta an island?")
    answers = evaluate.rollout(policy, [prompt] * 8, 12, policy.generation_config.eos_token_id)
    answers = [answer[:5 + i] for i, answer in enumerate(answers)]
    found = evaluate.log_ratios(policy, reference, prompt, answers)
    for response, log_ratio in zip(answers, found):
        ids = torch.tensor([[*prompt, *response]])
        by_hand = sum((m(ids).logits[0].log_softmax(-1)[range(len(prompt) - 1, ids.shape[1] - 1), response].sum() * sign)
                      for m, sign in ((policy, 1), (reference, -1)))
        assert log_ratio.item() == pytest.approx(by_hand.item(), abs=1e-3)
    assert found.mean() > 0


def test_policy(policy_args, tmp_path):
    result = evaluate.evaluate_policy(policy_args())
    lines = read_lines(tmp_path / "eval" / "answers.jsonl")
    for name in ("sft", "dvpo"):
        mine = [line for line in lines if line["model"] == name]
        assert len(mine) == 2 * result["models"][name]["prompts"]
        assert result["models"][name]["score"]["mean"] == pytest.approx(sum(line["score"] for line in mine) / len(mine))
    assert result["models"]["sft"]["kl"]["mean"] == 0 != result["models"]["dvpo"]["kl"]["mean"]
    assert result["win_rate"]["sft"]["dvpo"]["mean"] + result["win_rate"]["dvpo"]["sft"]["mean"] == pytest.approx(1)
    shares = result["outcomes"]["dvpo"]["sft"]
    assert shares["win"] + shares["tie"] / 2 == pytest.approx(result["win_rate"]["dvpo"]["sft"]["mean"])
    assert json.loads((tmp_path / "eval" / "policy.json").read_text()) == result
    unjudged = evaluate.evaluate_policy(policy_args(judge="", output=""))      # the same seed, the same samples
    assert unjudged["models"]["dvpo"]["kl"] == result["models"]["dvpo"]["kl"] and "score" not in unjudged["models"]["dvpo"]
    fails(lambda: evaluate.evaluate_policy(policy_args()), "policy.json: exists")


def test_bad_input(runs, values_args, policy_args, world, tmp_path):
    def values(*models, **changes):
        return lambda: evaluate.evaluate_values(values_args(*models, **changes))

    def policy(**changes):
        return lambda: evaluate.evaluate_policy(policy_args(**changes))

    assert evaluate.named(["runs/a/gvm", "large=runs/b/gvm/"]) == {"gvm": "runs/a/gvm", "large": "runs/b/gvm/"}
    row = read_lines(world / "data" / "test_pairs.jsonl")[0]
    write_rows(tmp_path / "data" / "test_pairs.jsonl", [row, {name: x for name, x in row.items() if name != "rejected"}])
    fails(values("runs/a/gvm", "runs/b/gvm"), "have the same name")
    fails(values(runs("gvm"), data=str(tmp_path / "data")), "test_pairs.jsonl:2: .*rejected")
    fails(values(runs("gvm"), data=str(tmp_path)), "test_pairs.jsonl: no such file")
    fails(values(runs("sft")), "LlamaForCausalLM")
    fails(policy(models=[str(runs("gvm"))]), "LlamaForTokenClassification")
    fails(policy(max_prompt_length=3), "no prompt fits")
    fails(policy(max_response_length=600), "too small for rows of")
    fails(policy(judge="nowhere.py:f"), "no such file")
    fails(policy(judge=f"{ROOT / 'data' / 'atlas.py'}:nobody"), "has no 'nobody'")
    tokenizer = AutoTokenizer.from_pretrained(runs("sft"))
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(tmp_path / "other")
    fails(policy(models=[str(runs("sft")), str(tmp_path / "other")]), "another tokenizer or chat template")
    fails(lambda: evaluate.main(["nonsense"]), "values or policy")
    assert not (tmp_path / "eval" / "policy.json").exists()
