"""The baselines: every loss against a slow loop in float64, value and gradient; and the scripts' own main()."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import read_lines, write_rows
from safetensors.torch import load_file
from test_bad_input import fails
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
                          AutoTokenizer)

import train_dvpo
import train_gvm
from baselines import dpo, grpo, ppo, remax, reward_model


def responses(is_response):
    """[(row, first token, one past the last token), ...]"""
    return [(b, row.nonzero()[0].item(), row.nonzero()[-1].item() + 1) for b, row in enumerate(is_response)]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- PPO ----
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_advantage_from_critic(random_batch, gamma, gae_lambda):
    is_response, draw = random_batch
    value, reward = draw(), draw()
    off = torch.where(is_response, 0.0, torch.nan)
    advantage = ppo.advantage_from_critic(value + off, reward + off, is_response, gamma, gae_lambda)
    for b, start, end in responses(is_response):
        for t in range(start, end):
            deltas = [reward[b, k] + gamma * (value[b, k + 1] if k + 1 < end else 0) - value[b, k] for k in range(t, end)]
            slow = sum((gamma * gae_lambda) ** n * delta for n, delta in enumerate(deltas))
            assert advantage[b, t].item() == pytest.approx(slow.item(), abs=1e-12)
    assert (advantage[~is_response] == 0).all()


def test_with_lambda_1_the_critic_learns_the_return(random_batch):
    """A + V = r_t + r_{t+1} + ... + r_T, whatever the critic says."""
    is_response, draw = random_batch
    value, reward = draw(), draw()
    returns = ppo.advantage_from_critic(value, reward, is_response, 1.0, 1.0) + value
    for b, start, end in responses(is_response):
        for t in range(start, end):
            assert returns[b, t].item() == pytest.approx(reward[b, t:end].sum().item(), abs=1e-12)


def test_value_loss_value_and_gradient(random_batch):
    is_response, draw = random_batch
    value, value_old, returns, clip = draw().requires_grad_(), draw(), draw(), 0.2
    off = torch.where(is_response, 0.0, torch.nan)
    loss = ppo.value_loss(value, value_old + off, returns + off, is_response, clip)
    loss.backward()
    total, gradient, count = 0.0, torch.zeros_like(value), is_response.sum().item()
    for b, t in is_response.nonzero().tolist():
        v, old, target = value[b, t].item(), value_old[b, t].item(), returns[b, t].item()
        near = min(max(v, old - clip), old + clip)
        plain, clipped = (v - target) ** 2, (near - target) ** 2
        total += 0.5 * max(plain, clipped)
        if plain >= clipped:                                   # else the clipped value counts, which does not move with v
            gradient[b, t] = (v - target) / count
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    assert torch.allclose(value.grad, gradient, atol=1e-12) and not value.grad.isnan().any()


def test_values_are_read_before_the_action(ppo_run, world):
    """state_values[t] does not change when token t does; it does when token t - 1 does."""
    critic = AutoModelForTokenClassification.from_pretrained(ppo_run / "critic").eval()
    ids = torch.randint(10, 500, (1, 9))
    other = ids.clone()
    other[0, 5] += 1
    with torch.no_grad():
        a, b = ppo.state_values(critic, ids), ppo.state_values(critic, other)
    assert torch.equal(a[0, :6], b[0, :6]) and a[0, 6] != b[0, 6]


def test_a_critic_from_the_reward_model_scores_prefixes_as_it_does(ppo_args, reward_model_run):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_run).eval()
    critic = ppo.new_critic(ppo_args, model).eval()
    ids = torch.randint(10, 500, (1, 9))
    scale = model.config.reward_model
    with torch.no_grad():
        value = critic(input_ids=ids).logits.squeeze(-1)
        for t in range(1, 10):
            score = model(input_ids=ids[:, :t]).logits.item()
            assert value[0, t - 1].item() == pytest.approx((score - scale["reward_mean"]) / scale["reward_std"], abs=1e-5)


def test_a_critic_from_the_sft_model_starts_at_zero(ppo_args, again, reward_model_run):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_run)
    critic = ppo.new_critic(again(ppo_args, critic_init="sft"), model).eval()
    assert (critic(input_ids=torch.randint(10, 500, (2, 9))).logits == 0).all()


def test_policy_and_critic_learn_and_nothing_else(ppo_args, ppo_run, again, monkeypatch):
    frozen = []
    score_rollouts = ppo.score_rollouts
    monkeypatch.setattr(ppo, "score_rollouts", lambda model, reference, reward_model, *rest: (
        frozen.append((reference, reward_model)), score_rollouts(model, reference, reward_model, *rest))[1])
    before = weights(ppo_args.model), weights(ppo_args.reward_model)
    ppo.main(again(ppo_args))
    reference, model = frozen[-1]
    assert not any(p.requires_grad or p.grad is not None for m in (reference, model) for p in m.parameters())
    assert equal(before[0], {k: v for k, v in reference.policy.state_dict().items() if k in before[0]})
    assert equal(before[1], model.reward_model.state_dict())
    assert not equal(before[0], weights(ppo_run))
    zero = again(ppo_args, critic_lr=0.0, output=str(Path(again(ppo_args).output).parent / "still"))
    ppo.main(zero)
    still, moved = weights(Path(zero.output) / "critic"), weights(ppo_run / "critic")
    assert not equal(still, moved)


@pytest.fixture(scope="module")
def trained_reward_model(reward_model_args, tmp_path_factory):
    """A reward model that knows its 160 pairs; the fixture of all tests has made ten updates and knows nothing."""
    output = tmp_path_factory.mktemp("trained") / "reward_model"
    reward_model.main(replace(reward_model_args, output=str(output), epochs=12, lr=3e-3))
    return output


@pytest.mark.parametrize("name, changes", [
    ("ppo", {"lr": 3e-3, "mini_batch_size": 16}), ("grpo", {"lr": 3e-3, "mini_batch_size": 16, "group_size": 4}),
    ("remax", {"lr": 6e-3})])
def test_the_policy_learns_what_the_reward_model_likes(name, changes, request, again, trained_reward_model, tmp_path):
    args = again(request.getfixturevalue(f"{name}_args"), reward_model=str(trained_reward_model), steps=40, batch_size=32,
                 micro_batch_size=16, kl_coef=0.0, **changes)
    SCRIPTS[name].main(args)
    std = json.loads((trained_reward_model / "config.json").read_text())["reward_model"]["reward_std"]
    rewards = [record["reward"] / std for record in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


# ---- GRPO ----
def test_group_advantage():
    score = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    advantage = grpo.group_advantage(score, 3)
    std = math.sqrt((4 + 1 + 9) / 2)
    assert advantage[:3].tolist() == pytest.approx([-2 / (std + 1e-4), -1 / (std + 1e-4), 3 / (std + 1e-4)])
    assert advantage[3:].tolist() == [0, 0, 0]                                 # all rewards equal: no NaN, nothing learned
    assert grpo.group_advantage(score, 3, divide_by_std=False).tolist() == [-2, -1, 3, 0, 0, 0]
    for equal in (1.7, 1000.1):                                                # whose mean is not quite the number itself
        assert (grpo.group_advantage(torch.full((8,), equal), 8) == 0).all()


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_grpo_loss_value_and_gradient(random_batch, how):
    is_response, draw = random_batch
    logp, logp_old, logp_ref, advantage = draw().requires_grad_(), draw(), draw(), draw()[:, 0]
    clip, beta, longest = 0.2, 0.05, 20
    off = torch.where(is_response, 0.0, torch.nan)
    token_loss = grpo.grpo_loss(logp, logp_old + off, logp_ref + off, advantage, is_response, clip, beta)
    tokens, answers = is_response.sum().item(), len(is_response)
    loss = grpo.loss_mean(token_loss, is_response, how, answers, tokens, longest)
    loss.backward()
    total, gradient = 0.0, torch.zeros_like(logp)
    for b, start, end in responses(is_response):
        weight = {"grpo": 1 / (end - start) / answers, "dapo": 1 / tokens, "dr_grpo": 1 / (answers * longest)}[how]
        for t in range(start, end):
            ratio, a = math.exp(logp[b, t].item() - logp_old[b, t].item()), advantage[b].item()
            ref_ratio = math.exp(logp_ref[b, t].item() - logp[b, t].item())
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            total += weight * (-min(ratio * a, clipped * a) + beta * (ref_ratio - math.log(ref_ratio) - 1))
            gradient[b, t] = weight * ((-ratio * a if ratio * a <= clipped * a else 0.0) + beta * (1 - ref_ratio))
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(logp.grad, gradient, atol=1e-12) and not logp.grad.isnan().any()


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_do_not_change_grpo(grpo_args, again, tmp_path, how):
    for name, size in (("one", 8), ("four", 2)):
        grpo.main(again(grpo_args, output=str(tmp_path / name), steps=1, ppo_epochs=1, mini_batch_size=8,
                        micro_batch_size=size, loss_normalisation=how))
    one, four = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "four"))
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-4, abs=1e-6)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3)


def test_the_answers_of_a_group_stand_together_and_are_compared(grpo_args, grpo_run):
    rows = read_lines(grpo_run / "rollouts.jsonl")
    for start in range(0, len(rows), grpo_args.group_size):
        assert len({row["prompt"] for row in rows[start:start + grpo_args.group_size]}) == 1
    assert abs(read_lines(grpo_run / "metrics.jsonl")[0]["loss"]) < 0.05       # the advantages of a group sum to 0


# ---- ReMax ----
def test_remax_loss_value_and_gradient(random_batch):
    is_response, draw = random_batch
    logp, reward_kl, score, greedy = draw().requires_grad_(), draw(), draw()[:, 0], draw()[:, 0]
    off = torch.where(is_response, 0.0, torch.nan)
    advantage = remax.remax_advantage(score, greedy, reward_kl + off, is_response)
    loss = remax.remax_loss(logp + off, advantage, is_response)
    loss.backward()
    total, count = 0.0, is_response.sum().item()
    for b, t in is_response.nonzero().tolist():
        a = reward_kl[b, t].item() + score[b].item() - greedy[b].item()
        total -= a * logp[b, t].item() / count
        assert logp.grad[b, t].item() == pytest.approx(-a / count, rel=1e-12)
    assert loss.item() == pytest.approx(total, rel=1e-12) and (logp.grad[~is_response] == 0).all()


def test_greedy_rollouts_are_the_likeliest_tokens_and_sampled_ones_are_not(remax_args):
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(remax_args.model).eval(), AutoTokenizer.from_pretrained(
        remax_args.model)
    prompt = remax.encode_prompt(tokenizer, "Is Peru an island?")
    greedy = [remax.rollout(policy, tokenizer, [prompt], 8, "padded", greedy=True)[0] for _ in range(2)]
    assert greedy[0] == greedy[1]
    for length, token in enumerate(greedy[0]):
        logits = policy(input_ids=torch.tensor([prompt + greedy[0][:length]])).logits[0, -1]
        assert logits.argmax() == token
    assert len({tuple(remax.rollout(policy, tokenizer, [prompt], 8, "padded")[0]) for _ in range(5)}) > 1


def test_a_sampled_answer_that_is_the_greedy_one_teaches_nothing(remax_args, again, monkeypatch, tmp_path):
    """R(sample) = R(greedy), and without a KL penalty the policy stays as it is."""
    rollout = remax.rollout
    monkeypatch.setattr(remax, "rollout", lambda *rest, greedy=False: rollout(*rest, greedy=True))
    remax.main(again(remax_args, kl_coef=0.0))
    assert equal(weights(remax_args.model), weights(tmp_path / "run"))


# ---- reward model ----
def test_bradley_terry_value_and_gradient():
    chosen = torch.tensor([0.5, -2.0, 30.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 1.0, -30.0], dtype=torch.float64)
    loss = reward_model.bradley_terry_loss(chosen, rejected)
    loss.backward()
    margins = (chosen - rejected).tolist()
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3, rel=1e-12)
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(m)) / 3 for m in margins], rel=1e-9)


def test_the_reward_model_learns_and_knows_its_scale(reward_model_args, trained_reward_model):
    losses = [record["loss"] for record in read_lines(trained_reward_model / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1) and sum(losses[-5:]) / 5 < 0.6
    scale = json.loads((trained_reward_model / "config.json").read_text())["reward_model"]
    tokenizer = AutoTokenizer.from_pretrained(trained_reward_model)
    data, _ = reward_model.read_pairs(reward_model_args, tokenizer, "pairs")
    model = AutoModelForSequenceClassification.from_pretrained(trained_reward_model).eval()
    scores = reward_model.sequence_scores(model, data, 8, tokenizer.pad_token_id)
    assert scores.mean().item() == pytest.approx(scale["reward_mean"], abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(scale["reward_std"], rel=1e-4)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_score_is_read_at_the_last_response_token_whatever_the_padding(reward_model_args, again, tmp_path, pad_is_eos,
                                                                           sft_run):
    """By stock transformers, with the padding that the folder names, and by ppo.py: the same number as alone."""
    start = tmp_path / "start"
    tokenizer = AutoTokenizer.from_pretrained(sft_run)
    AutoModelForCausalLM.from_pretrained(sft_run).save_pretrained(start)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(start)
    reward_model.main(again(reward_model_args, model=str(start)))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    data, _ = reward_model.read_pairs(reward_model_args, tokenizer, "pairs")
    data = data[:6]
    ids, is_token, is_response = reward_model.collate(data, tokenizer.pad_token_id, "cpu")
    mean, std = ppo.score_scale(model)
    with torch.no_grad():
        alone = torch.stack([model(input_ids=torch.tensor([[*p, *r]])).logits.squeeze() for p, r in data])
        stock = model(input_ids=ids, attention_mask=is_token).logits.squeeze(-1)
        left = torch.tensor([[tokenizer.pad_token_id] * (ids.shape[1] - len(p) - len(r)) + [*p, *r] for p, r in data])
        left_padded = model(input_ids=left, attention_mask=left != tokenizer.pad_token_id).logits.squeeze(-1)
        ours = ppo.response_reward(model, ids, is_response) * std + mean
        junk = torch.where(is_token, ids, tokenizer.eos_token_id)              # ours: whatever stands in the padding
        with_junk = ppo.response_reward(model, junk, is_response) * std + mean
    assert len({len(p) + len(r) for p, r in data}) > 1 and alone.std() > 0
    for scores in (stock, left_padded, ours, with_junk):
        assert torch.allclose(scores, alone, atol=1e-5)


def test_a_reward_model_without_a_scale_is_taken_as_it_is(reward_model_run):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_run)
    del model.config.reward_model
    assert ppo.score_scale(model) == (0.0, 1.0)


# ---- DPO ----
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_loss_value_and_gradient(smoothing):
    chosen = torch.tensor([0.5, -2.0, 30.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 1.0, -30.0], dtype=torch.float64)
    loss = dpo.dpo_loss(chosen, rejected, smoothing)
    loss.backward()

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    margins = (chosen - rejected).tolist()
    slow = sum((1 - smoothing) * math.log1p(math.exp(-m)) + smoothing * (m + math.log1p(math.exp(-m))) for m in margins)
    assert loss.item() == pytest.approx(slow / 3, rel=1e-12)
    assert chosen.grad.tolist() == pytest.approx(
        [(-(1 - smoothing) * sigmoid(-m) + smoothing * sigmoid(m)) / 3 for m in margins], rel=1e-9, abs=1e-15)


def test_dpo_starts_at_the_reference_and_leaves_it(dpo_args, dpo_run, again, tmp_path):
    dpo.main(again(dpo_args, lr=0.0, log_every=1))
    for record in read_lines(tmp_path / "run" / "metrics.jsonl"):              # the policy is the reference: no reward
        assert record["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert record["reward_chosen"] == pytest.approx(0, abs=1e-3)
    dpo.main(again(dpo_args, output=str(tmp_path / "long"), epochs=8, lr=1e-3))
    last = read_lines(tmp_path / "long" / "metrics.jsonl")[-1]
    assert last["accuracy"] > 0.8 and last["reward_chosen"] > last["reward_rejected"]


def test_answer_logp_is_a_sum_over_the_answer(sft_run, world):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft_run).eval(), AutoTokenizer.from_pretrained(sft_run)
    data, _ = reward_model.read_pairs(dpo.Args(data=str(world / "data")), tokenizer, "pairs")
    sums = dpo.reference_logp(Accelerator(), model, data[:4], 2, tokenizer.pad_token_id)
    for (prompt, response), total in zip(data[:4], sums):
        logp = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        slow = sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(response))
        assert total.item() == pytest.approx(slow, abs=1e-3)


# ---- all of them ----
SCRIPTS = {"ppo": ppo, "grpo": grpo, "remax": remax, "dpo": dpo, "reward_model": reward_model}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_seed_gives_the_same_weights_and_another_one_others(name, request, again, tmp_path):
    args, first = request.getfixturevalue(f"{name}_args"), request.getfixturevalue(f"{name}_run")
    for folder, seed in (("other", 2), ("same", 1)):
        SCRIPTS[name].main(again(args, output=str(tmp_path / folder), seed=seed))
    assert equal(weights(first), weights(tmp_path / "same"))
    assert not equal(weights(tmp_path / "same"), weights(tmp_path / "other"))
    assert not equal(weights(first), weights(args.model))
    assert "from_pretrained" in (first / "README.md").read_text()


@pytest.mark.parametrize("name", ["reward_model", "dpo"])
def test_micro_batches_do_not_change_the_update_of_pairs(name, request, again, tmp_path):
    args = request.getfixturevalue(f"{name}_args")
    for folder, size in (("one", 16), ("four", 4)):
        SCRIPTS[name].main(again(args, output=str(tmp_path / folder), batch_size=16, micro_batch_size=size))
    one, four = (read_lines(tmp_path / folder / "metrics.jsonl") for folder in ("one", "four"))
    for a, b in zip(one, four):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("name", ["ppo", "remax"])
def test_micro_batches_do_not_change_the_update_of_rollouts(name, request, again, tmp_path):
    """Rollouts of different lengths: every token of the batch weighs the same, in whichever micro-batch it falls."""
    args, sizes = request.getfixturevalue(f"{name}_args"), {"mini_batch_size": 8, "ppo_epochs": 1} if name == "ppo" else {}
    for folder, size in (("one", 8), ("four", 2)):
        SCRIPTS[name].main(again(args, output=str(tmp_path / folder), steps=1, micro_batch_size=size, **sizes))
    one, four = (read_lines(tmp_path / folder / "metrics.jsonl")[0] for folder in ("one", "four"))
    for metric in {"loss", "grad_norm", "critic_loss", "critic_grad_norm"} & set(one):
        assert one[metric] == pytest.approx(four[metric], rel=1e-3, abs=1e-6), metric


@pytest.mark.parametrize("name", ["ppo", "grpo", "remax"])
def test_the_ratio_is_1_before_the_first_update(name, request):
    for record in read_lines(request.getfixturevalue(f"{name}_run") / "metrics.jsonl"):
        assert record["ratio_error"] < 1e-4


@pytest.mark.parametrize("name", ["ppo", "grpo", "remax"])
@pytest.mark.parametrize("truncated", ["keep", "mask", "penalise"])
def test_what_main_hands_to_the_update(name, truncated, request, again, monkeypatch, trained_reward_model):
    """Advantages (and PPO's returns) of one batch, from the rollouts' scores, against loops; some responses are cut."""
    script, seen, kl_coef = SCRIPTS[name], {}, 0.3
    args = again(request.getfixturevalue(f"{name}_args"), truncated=truncated, max_response_length=12, steps=2, lr=1e-3,
                 kl_coef=kl_coef, reward_model=str(trained_reward_model), batch_size=32)
    scored, improve, rollout = script.score_rollouts, script.improve, script.rollout

    eos = AutoTokenizer.from_pretrained(args.model).eos_token_id

    def cut_some(*rest, **greedy):                             # every other answer is a cut one, the others end
        rows = [[token for token in row if token != eos][:5] or [7] for row in rollout(*rest, **greedy)]
        return [row if number % 2 else [*row, eos] for number, row in enumerate(rows)]

    monkeypatch.setattr(script, "rollout", cut_some)
    monkeypatch.setattr(script, "score_rollouts", lambda *rest: seen.update(scored=scored(*rest), rest=rest) or seen["scored"])
    monkeypatch.setattr(script, "improve", lambda accelerator, model, optimizer, batch, *rest: (
        seen.update(batch=batch), improve(accelerator, model, optimizer, batch, *rest))[1])
    script.main(args)

    ids, _, is_response, logp_old, logp_ref, *more = seen["scored"]
    rows, batch = responses(is_response), seen["batch"]
    ended = torch.tensor([ids[b, end - 1] == eos for b, _, end in rows])
    assert 0 < ended.sum() < len(ended) and (logp_old - logp_ref)[is_response].abs().max() > 1e-4
    learned = is_response & ended[:, None] if truncated == "mask" else is_response
    assert torch.equal(batch[2], learned)
    penalty = (~ended).float() if truncated == "penalise" else torch.zeros(len(ended))
    kl = kl_coef * (logp_old - logp_ref)
    if name == "ppo":
        value, score = more
        returns = torch.zeros_like(value)
        for b, start, end in rows:
            advantage = 0.0
            for t in reversed(range(start, end)):
                r = -kl[b, t] + (score[b] - penalty[b] if t == end - 1 else 0.0)
                delta = r + (value[b, t + 1] if t < end - 1 else 0.0) - value[b, t]
                advantage = delta + 0.95 * advantage
                returns[b, t] = advantage + value[b, t]
        expected = ppo.whiten(returns - value, learned)
        assert torch.allclose(batch[6][is_response], returns[is_response], atol=1e-4)          # before the whitening
        assert torch.equal(batch[5], value)
    elif name == "grpo":
        assert torch.equal(batch[4], logp_ref)
        expected = grpo.group_advantage(more[0] - penalty, args.group_size)
    else:
        score, greedy = more
        greedy_cut = torch.tensor([float(row[-1] != eos) for _, row in seen["rest"][4]])
        greedy = greedy - (greedy_cut if truncated == "penalise" else 0.0)
        expected = torch.where(is_response, -kl + (score - penalty - greedy)[:, None], 0.0)
    found = batch[5] if name == "grpo" else batch[4]
    assert torch.allclose(found, expected, atol=1e-4)


def test_dr_grpo_does_not_divide_by_the_deviation(grpo_args, again, monkeypatch):
    calls, group_advantage = [], grpo.group_advantage
    monkeypatch.setattr(grpo, "group_advantage", lambda *rest, divide_by_std: (
        calls.append(divide_by_std), group_advantage(*rest, divide_by_std=divide_by_std))[1])
    for how in ("dr_grpo", "grpo"):
        grpo.main(again(grpo_args, loss_normalisation=how, steps=1, overwrite=True))
    assert calls == [False, True]


# ---- bad input ----
@pytest.mark.parametrize("name", ["ppo", "grpo", "remax"])
def test_a_reward_model_with_another_tokenizer(name, request, again, reward_model_run, tmp_path):
    other = tmp_path / "other"
    AutoModelForSequenceClassification.from_pretrained(reward_model_run).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(reward_model_run)
    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(other)
    args = again(request.getfixturevalue(f"{name}_args"), reward_model=str(other))
    fails(lambda: SCRIPTS[name].main(args), "tokenizer or chat template is not that of")
    fails(lambda: SCRIPTS[name].main(again(args, reward_model=args.model)), "a scalar reward model is wanted here")
    fails(lambda: SCRIPTS[name].main(again(args, reward_model="nowhere/at/all")), "no model in this folder")


@pytest.mark.parametrize("name", ["ppo", "grpo", "remax"])
def test_a_reward_model_that_returns_nan(name, request, again, reward_model_run, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_run)
    torch.nn.init.constant_(model.score.weight, math.nan)
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(reward_model_run).save_pretrained(broken)
    changes = {"critic_init": "sft"} if name == "ppo" else {}
    args = again(request.getfixturevalue(f"{name}_args"), reward_model=str(broken), **changes)
    fails(lambda: SCRIPTS[name].main(args), "step 1: .*broken gives nan")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_group_sizes(grpo_args, again):
    fails(lambda: grpo.main(again(grpo_args, group_size=1)), "--group_size 1: .* at least 2")
    fails(lambda: grpo.main(again(grpo_args, group_size=3)), "--batch_size 8 is not a multiple of --group_size")


def test_a_group_of_equal_rewards_teaches_nothing(grpo_args, again, reward_model_run, tmp_path):
    flat = tmp_path / "flat"
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_run)
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(flat)
    AutoTokenizer.from_pretrained(reward_model_run).save_pretrained(flat)
    grpo.main(again(grpo_args, reward_model=str(flat), kl_coef=0.0))
    assert equal(weights(grpo_args.model), weights(tmp_path / "run"))


def test_the_gvm_refuses_such_pairs_too(gvm_args, again, tmp_path, monkeypatch):
    encode = train_gvm.encode_response
    monkeypatch.setattr(train_gvm, "encode_response", lambda tokenizer, text: encode(tokenizer, text.strip()))
    write_rows(tmp_path / "data" / "pairs.jsonl", [{"prompt": "Q?", "chosen": "The same.", "rejected": "The same. "}])
    args = again(gvm_args, data=str(tmp_path / "data"), supervision="pairs")
    fails(lambda: train_gvm.main(args), r"pairs\.jsonl:1: .* are the same tokens")


@pytest.mark.parametrize("name", ["reward_model", "dpo"])
def test_pairs_that_are_equal_after_tokenisation(name, request, again, tmp_path, capsys):
    """Two texts, the same tokens: a space at the end is lost in the tokenizer."""
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."} for i in range(20)]
    write_rows(tmp_path / "data" / "pairs.jsonl", [*rows, {"prompt": "Q?", "chosen": "The same.", "rejected": "The same. "}])
    args = again(request.getfixturevalue(f"{name}_args"), data=str(tmp_path / "data"))
    script = SCRIPTS[name]
    encode = script.encode_response
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "encode_response", lambda tokenizer, text: encode(tokenizer, text.strip()))
        fails(lambda: script.main(args), r"pairs\.jsonl:21: .* are the same tokens\. .*--bad_rows skip")
        script.main(again(args, bad_rows="skip"))
        pairs, dropped = script.read_pairs(again(args, bad_rows="skip"), AutoTokenizer.from_pretrained(args.model), "pairs")
    assert len(pairs) == 40 and dropped == 0 and "skipped 1 bad rows of 21" in capsys.readouterr().out


@pytest.mark.parametrize("name, changes, pattern", [
    ("dpo", {"label_smoothing": 0.5}, "has to be below 0.5"), ("dpo", {"batch_size": 24, "micro_batch_size": 16}, "not a multiple"),
    ("dpo", {"max_length": 4}, "pairs do not fill one batch"), ("reward_model", {"max_length": 4}, "pairs do not fill one batch"),
    ("reward_model", {"max_length": 600}, "more than the context"), ("ppo", {"max_response_length": 600}, "more than the context"),
    ("ppo", {"critic_lr": math.nan}, "--critic_lr nan"), ("grpo", {"max_prompt_length": 2}, "do not fill one batch"),
])
def test_baselines_refuse(name, changes, pattern, request, again, tmp_path):
    fails(lambda: SCRIPTS[name].main(again(request.getfixturevalue(f"{name}_args"), **changes)), pattern)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["ppo", "grpo", "remax"])
def test_what_is_no_scalar_reward_model(name, request, again, gvm_run, reward_model_run, tmp_path):
    args = request.getfixturevalue(f"{name}_args")
    fails(lambda: SCRIPTS[name].main(again(args, reward_model=str(gvm_run))), "ForTokenClassification with 1 labels; a scalar")
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_run, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(reward_model_run).save_pretrained(tmp_path / "two")
    fails(lambda: SCRIPTS[name].main(again(args, reward_model=str(tmp_path / "two"))), "with 2 labels; a scalar reward")
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_run)
    model.config.reward_model = {"reward_mean": 0.0, "reward_std": 0.0}
    model.save_pretrained(tmp_path / "flat")
    AutoTokenizer.from_pretrained(reward_model_run).save_pretrained(tmp_path / "flat")
    fails(lambda: SCRIPTS[name].main(again(args, reward_model=str(tmp_path / "flat"))), "are no scale")


def test_bf16_scores_and_samples_alike(ppo_args, dpo_args, again, tmp_path, monkeypatch):
    """Under mixed precision PPO samples in the precision it scores in, and DPO's policy starts at its reference."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    seen, rollout = [], ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda policy, *rest: (
        seen.append(policy(input_ids=torch.tensor([[5]])).logits.dtype), rollout(policy, *rest))[1])
    try:
        ppo.main(again(ppo_args, steps=1))
        dpo.main(again(dpo_args, output=str(tmp_path / "dpo"), lr=0.0, log_every=1))
    finally:
        AcceleratorState._reset_state()
    assert set(seen) == {torch.bfloat16}
    for record in read_lines(tmp_path / "dpo" / "metrics.jsonl"):
        assert max(abs(record["reward_chosen"]), abs(record["reward_rejected"])) < 1e-4


def test_a_reward_model_of_another_architecture(ppo_args, again, world, tmp_path):
    """Same tokenizer, other sizes: it can score, but the critic cannot start from it."""
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(ppo_args.reward_model)
    config.hidden_size, config.intermediate_size, config.head_dim = 16, 44, 4
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(ppo_args.reward_model).save_pretrained(tmp_path / "small")
    args = again(ppo_args, reward_model=str(tmp_path / "small"), steps=1)
    fails(lambda: ppo.main(args), "not the architecture of .*--critic_init sft")
    ppo.main(again(args, critic_init="sft"))


@pytest.mark.parametrize("name", ["dvpo", "ppo", "grpo"])
def test_a_target_kl_of_0_leaves_one_update(name, request, again, tmp_path):
    """Before the first update the KL is rounding, which must not end the batch."""
    script = {"dvpo": train_dvpo, "ppo": ppo, "grpo": grpo}[name]
    script.main(again(request.getfixturevalue(f"{name}_args"), target_kl=0.0, micro_batch_size=1, steps=2))
    for record in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert record["updates"] == 1 and record["grad_norm"] > 0
