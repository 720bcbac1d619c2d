"""The baselines: every loss and advantage against a slow loop in float64, value and gradient; and what main() makes of them."""
import json
import math
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import equal, fails, read_lines, responses, script, weights
from test_losses import ALONE, header, junk
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
                          AutoTokenizer)

from baselines import dpo, grpo, ppo, remax, reward_model

REWARDED = ("ppo", "grpo", "remax")


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """A reward model that knows its 160 pairs; the one that all tests share has made ten updates and knows little."""
    folder = tmp_path_factory.mktemp("trained") / "reward_model"
    reward_model.main(reward_model.Args(model=str(runs("sft")), data=str(runs("sft").parent / "data"), output=str(folder),
                                        batch_size=16, epochs=12, lr=3e-3))
    return folder


# ---- PPO ----
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_advantage_from_critic(random_batch, gamma, gae_lambda):
    is_response, draw = random_batch
    value, reward = draw(), draw()
    advantage = ppo.advantage_from_critic(junk(value, is_response), junk(reward, is_response), is_response, gamma, gae_lambda)
    for b, start, end in responses(is_response):
        for t in range(start, end):
            deltas = [reward[b, k] + gamma * (value[b, k + 1] if k + 1 < end else 0) - value[b, k] for k in range(t, end)]
            slow = sum((gamma * gae_lambda) ** n * delta for n, delta in enumerate(deltas))
            assert advantage[b, t].item() == pytest.approx(slow.item(), abs=1e-12)
            if gamma == gae_lambda == 1:                       # then A + V is the return, whatever the critic says
                assert (advantage + value)[b, t].item() == pytest.approx(reward[b, t:end].sum().item(), abs=1e-12)
    assert (advantage[~is_response] == 0).all()


def test_the_worked_example_of_train_dvpo_is_ppo_s_too():
    """ppo.py's header: with a critic that says the GVM's values one token earlier, the advantages are the same."""
    example = re.search(r"= ([-\d., ]+) and r = ([\d.]+): A_t is the same", header("baselines/ppo.py"))
    value, reward = torch.tensor([[0.0, *map(float, example[1].split(","))]]), torch.tensor([[0.0, 0.0, 0.0, float(example[2])]])
    lines = re.findall(r"--gae_lambda ([\d.]+) .* = +([-\d., ]+)", header("train_dvpo.py"))
    for gae_lambda, numbers in lines:
        advantage = ppo.advantage_from_critic(value, reward, torch.tensor([[False, True, True, True]]), 1.0, float(gae_lambda))
        assert advantage[0, 1:].tolist() == pytest.approx([float(x) for x in re.findall(r"-?[\d.]+", numbers)[:3]])
    assert len(lines) == 2


def test_value_loss_value_and_gradient(random_batch):
    is_response, draw = random_batch
    value, value_old, returns, clip = junk(draw(), is_response).requires_grad_(), draw(), draw(), 0.2
    loss = ppo.value_loss(value, junk(value_old, is_response), junk(returns, is_response), is_response, clip)
    loss.backward()
    total, gradient, count = 0.0, torch.zeros_like(value), is_response.sum().item()
    for b, t in is_response.nonzero().tolist():
        v, old, target = value[b, t].item(), value_old[b, t].item(), returns[b, t].item()
        plain, clipped = (v - target) ** 2, (min(max(v, old - clip), old + clip) - target) ** 2
        total += 0.5 * max(plain, clipped)
        if plain >= clipped:                                   # else the clipped value counts, which does not move with v
            gradient[b, t] = (v - target) / count
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    assert torch.allclose(value.grad, gradient, atol=1e-12) and 0 < (gradient[is_response] == 0).sum() < count
    assert ppo.value_loss(value, value_old, returns, is_response, clip, 7).item() == pytest.approx(total / 7, rel=1e-12)


def test_values_are_read_before_the_action(runs):
    """V(s_t) does not change when token t does; it does when token t - 1 does."""
    model = ppo.ActorCritic(AutoModelForCausalLM.from_pretrained(runs("ppo")).eval(),
                            AutoModelForTokenClassification.from_pretrained(runs("ppo") / "critic").eval())
    ids, is_response = torch.randint(10, 500, (1, 9)), torch.arange(9)[None] > 2
    other = ids.clone()
    other[0, 5] += 1
    with torch.no_grad():
        (_, a), (_, b) = model(ids, is_response), model(other, is_response)
    assert torch.allclose(a[0, :6], b[0, :6], atol=1e-6) and (a[0, 6] - b[0, 6]).abs() > 1e-5


def test_a_new_critic(args, trained):
    """From the reward model: the standardised score of each prefix. From the SFT model: 0."""
    given, tokenizer = args("ppo", reward_model=trained), AutoTokenizer.from_pretrained(trained)
    model, ids = AutoModelForSequenceClassification.from_pretrained(trained).eval(), torch.randint(10, 500, (1, 9))
    model.score.bias = torch.nn.Parameter(torch.tensor([0.7]))                 # some architectures have one
    scale = model.config.reward_model
    with torch.no_grad():
        value = ppo.new_critic(given, model, scale, tokenizer, 64).eval()(input_ids=ids).logits.squeeze(-1)
        for t in range(1, 10):
            score = model(input_ids=ids[:, :t]).logits.item()
            assert value[0, t - 1].item() == pytest.approx((score - scale["reward_mean"]) / scale["reward_std"], abs=1e-4)
        zero = ppo.new_critic(args("ppo", reward_model=trained, critic_init="sft"), model, scale, tokenizer, 64)
        assert (zero.eval()(input_ids=ids).logits == 0).all()


def test_the_critic_may_start_as_a_value_model(args, runs, tmp_path):
    """Value pretraining: V(s_t) is the GVM's Q of one token earlier. It learns on, and is no GVM any more."""
    is_response = torch.zeros(2, 9, dtype=torch.bool)
    is_response[:, 3:] = True
    ids, given = torch.randint(10, 500, is_response.shape), args("ppo", critic_init=runs("gvm"), steps=1)
    tokenizer = AutoTokenizer.from_pretrained(runs("sft"))
    critic = ppo.new_critic(given, None, None, tokenizer, 64).eval()
    gvm = AutoModelForTokenClassification.from_pretrained(runs("gvm")).eval()
    model = ppo.ActorCritic(AutoModelForCausalLM.from_pretrained(runs("sft")), critic).eval()
    with torch.no_grad():
        assert torch.allclose(model(ids, is_response)[1][:, 1:], gvm(input_ids=ids).logits[:, :-1, 0], atol=1e-6)
    ppo.main(given)
    saved = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "critic")
    assert not equal(saved.state_dict(), gvm.state_dict()) and saved.config.critic and not saved.config.gvm
    other = shutil.copytree(runs("gvm"), tmp_path / "other")
    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(other)
    fails(lambda: ppo.main(args("ppo", critic_init=other, output=tmp_path / "new")), "other: another tokenizer")
    fails(lambda: ppo.main(args("ppo", critic_init=runs("dpo"), output=tmp_path / "new")), "not a trained TokenClassification")


def test_policy_and_critic_learn_and_nothing_else(args, runs, tmp_path, monkeypatch):
    scored, real = [], ppo.score_rollouts
    monkeypatch.setattr(ppo, "score_rollouts", lambda *rest: scored.append(rest) or real(*rest))
    ppo.main(args("ppo"))
    _, reference, frozen, *_ = scored[-1]
    assert not any(p.requires_grad or p.grad is not None for m in (reference, frozen) for p in m.parameters())
    assert equal(reference.state_dict(), AutoModelForCausalLM.from_pretrained(runs("sft")).state_dict())
    assert equal(frozen.state_dict(), AutoModelForSequenceClassification.from_pretrained(runs("reward_model")).state_dict())
    ppo.main(args("ppo", critic_lr=0.0, output=tmp_path / "still"))
    assert not equal(weights(tmp_path / "still" / "critic"), weights(tmp_path / "run" / "critic"))
    assert not equal(weights(tmp_path / "still"), weights(runs("sft")))


# ---- GRPO ----
def test_group_advantage():
    score = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    advantage, std = grpo.group_advantage(score, 3), math.sqrt((4 + 1 + 9) / 2)
    assert advantage[:3].tolist() == pytest.approx([-2 / (std + 1e-4), -1 / (std + 1e-4), 3 / (std + 1e-4)])
    assert advantage[3:].tolist() == [0, 0, 0]                                 # all rewards equal: no NaN, nothing learned
    assert grpo.group_advantage(score, 3, divide_by_std=False).tolist() == [-2, -1, 3, 0, 0, 0]
    for same in (1.7, 1000.1):                                                 # whose mean is not quite the number itself
        assert (grpo.group_advantage(torch.full((8,), same), 8) == 0).all()


@pytest.mark.parametrize("mode", ["grpo", "dapo", "dr_grpo"])
def test_grpo_loss_value_and_gradient(random_batch, mode):
    is_response, draw = random_batch
    logp, logp_old, logp_ref, advantage = junk(draw(), is_response).requires_grad_(), draw(), draw(), draw()[:, 0]
    clip, beta, longest = 0.2, 0.05, 20
    token_loss = grpo.grpo_loss(logp, junk(logp_old, is_response), junk(logp_ref, is_response), advantage, is_response, clip, beta)
    tokens, answers = is_response.sum().item(), len(is_response)
    loss = grpo.loss_mean(token_loss, is_response, mode, tokens / answers, longest)
    loss.backward()
    total, gradient = 0.0, torch.zeros_like(logp)
    for b, start, end in responses(is_response):
        weight = {"grpo": 1 / (end - start) / answers, "dapo": 1 / tokens, "dr_grpo": 1 / (answers * longest)}[mode]
        for t in range(start, end):
            ratio, a = math.exp(logp[b, t].item() - logp_old[b, t].item()), advantage[b].item()
            ref_ratio = math.exp(logp_ref[b, t].item() - logp[b, t].item())
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            total += weight * (-min(ratio * a, clipped * a) + beta * (ref_ratio - math.log(ref_ratio) - 1))
            gradient[b, t] = weight * ((-ratio * a if ratio * a <= clipped * a else 0.0) + beta * (1 - ref_ratio))
    assert loss.item() == pytest.approx(total, rel=1e-12) and torch.allclose(logp.grad, gradient, atol=1e-12)


@pytest.mark.parametrize("mode", ["dapo", "dr_grpo"])
def test_micro_batches_do_not_change_grpo(args, tmp_path, mode, monkeypatch):
    """And only Dr. GRPO does not divide by the deviation."""
    divided, real = [], grpo.group_advantage
    monkeypatch.setattr(grpo, "group_advantage", lambda *rest: divided.append(rest[2]) or real(*rest))
    for name, size in (("one", 8), ("four", 2)):
        grpo.main(args("grpo", output=tmp_path / name, steps=1, ppo_epochs=1, mini_batch_size=8, micro_batch_size=size,
                       loss_normalisation=mode))
    one, four = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "four"))
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-3, abs=1e-5)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3) and divided == [mode == "dapo"] * 2


def test_a_group_of_equal_rewards_teaches_nothing(args, runs, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(runs("reward_model"))
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(tmp_path / "flat")
    AutoTokenizer.from_pretrained(runs("reward_model")).save_pretrained(tmp_path / "flat")
    grpo.main(args("grpo", reward_model=tmp_path / "flat", kl_coef=0.0))
    assert equal(weights(runs("sft")), weights(tmp_path / "run"))
    prompts = [row["prompt"] for row in read_lines(tmp_path / "run" / "rollouts.jsonl")]
    assert all(len(set(prompts[start:start + 4])) == 1 for start in range(0, 24, 4)) and len(set(prompts)) > 3


# ---- ReMax ----
def test_remax_loss_value_and_gradient(random_batch):
    is_response, draw = random_batch
    logp, reward_kl, score, greedy = junk(draw(), is_response).requires_grad_(), draw(), draw()[:, 0], draw()[:, 0]
    advantage = remax.remax_advantage(score, greedy, junk(reward_kl, is_response), is_response)
    loss = remax.remax_loss(logp, advantage, is_response)
    loss.backward()
    total, count = 0.0, is_response.sum().item()
    for b, t in is_response.nonzero().tolist():
        a = reward_kl[b, t].item() + score[b].item() - greedy[b].item()
        total -= a * logp[b, t].item()
        assert logp.grad[b, t].item() == pytest.approx(-a / count, rel=1e-12)
    assert loss.item() == pytest.approx(total / count, rel=1e-12) and (logp.grad[~is_response] == 0).all()
    assert remax.remax_loss(logp, advantage, is_response, 7).item() == pytest.approx(total / 7, rel=1e-12)


def test_a_sampled_answer_that_is_the_greedy_one_teaches_nothing(args, runs, tmp_path, monkeypatch):
    """R(sample) = R(greedy), and without a KL penalty the policy stays as it is."""
    rollout = remax.rollout
    monkeypatch.setattr(remax, "rollout", lambda *rest, greedy=False: rollout(*rest, greedy=True))
    remax.main(args("remax", kl_coef=0.0))
    assert equal(weights(runs("sft")), weights(tmp_path / "run"))


# ---- reward model and DPO ----
def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss, smoothing", [(lambda c, r, e: reward_model.bradley_terry_loss(c, r), 0.0), (dpo.dpo_loss, 0.0), (dpo.dpo_loss, 0.1)])
def test_pair_losses_value_and_gradient(loss, smoothing):
    chosen = torch.tensor([0.5, -2.0, 30.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 1.0, -30.0], dtype=torch.float64, requires_grad=True)
    found = loss(chosen, rejected, smoothing)
    found.backward()
    margins = (chosen - rejected).tolist()
    slow = sum((1 - smoothing) * math.log1p(math.exp(-m)) + smoothing * (m + math.log1p(math.exp(-m))) for m in margins)
    assert found.item() == pytest.approx(slow / 3, rel=1e-12)
    assert chosen.grad.tolist() == pytest.approx([(-(1 - smoothing) * sigmoid(-m) + smoothing * sigmoid(m)) / 3 for m in margins], rel=1e-9, abs=1e-15)
    assert torch.equal(chosen.grad, -rejected.grad)


def test_the_reward_model_learns_and_knows_its_scale(args, trained):
    metrics, scale = read_lines(trained / "metrics.jsonl"), json.loads((trained / "config.json").read_text())["reward_model"]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)          # its head is zero at first
    assert sum(record["loss"] for record in metrics[-5:]) / 5 < 0.6 and metrics[-1]["pair_accuracy"] > 0.6
    tokenizer = AutoTokenizer.from_pretrained(trained)
    sequences = [sequence for pair in reward_model.read_pairs(args("reward_model"), tokenizer, "pairs") for sequence in pair]
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    scores = torch.tensor([model(input_ids=torch.tensor([[*p, *r]])).logits.item() for p, r in sequences])
    assert scores.mean().item() == pytest.approx(scale["reward_mean"], abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(scale["reward_std"], rel=1e-3)


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_the_score_is_read_at_the_last_response_token_whatever_the_padding(args, runs, tmp_path, pad_is_end):
    """By stock transformers, padded as the folder says, and by ppo.py: the same number as alone."""
    tokenizer = AutoTokenizer.from_pretrained(runs("sft"))
    if pad_is_end:
        tokenizer.pad_token = tokenizer.eos_token
    AutoModelForCausalLM.from_pretrained(runs("sft")).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    reward_model.main(args("reward_model", model=tmp_path / "start"))
    model, tokenizer = (x.from_pretrained(tmp_path / "run") for x in (AutoModelForSequenceClassification, AutoTokenizer))
    pad_id = tokenizer.pad_token_id
    assert pad_id == model.config.pad_token_id != tokenizer.eos_token_id
    sequences = [sequence for pair in reward_model.read_pairs(args("reward_model"), tokenizer, "pairs")[:3] for sequence in pair]
    ids, is_response, lengths = reward_model.collate(sequences, pad_id)
    left = torch.tensor([[pad_id] * (ids.shape[1] - len(p) - len(r)) + [*p, *r] for p, r in sequences])
    model.eval()
    with torch.no_grad():
        alone = torch.stack([model(input_ids=torch.tensor([[*p, *r]])).logits.squeeze() for p, r in sequences])
        assert len(set(lengths.tolist())) > 1 and alone.std() > 0
        for scores in (model(input_ids=ids, attention_mask=(ids != pad_id).long()).logits.squeeze(-1), ppo.response_reward(model, ids),
                       model(input_ids=left, attention_mask=(left != pad_id).long()).logits.squeeze(-1),
                       reward_model.sequence_scores(model, sequences, 2, pad_id)):
            assert torch.allclose(scores, alone, atol=1e-4)


def test_dpo_starts_at_the_reference_and_leaves_it(args, runs, tmp_path):
    dpo.main(args("dpo", lr=0.0))
    for record in read_lines(tmp_path / "run" / "metrics.jsonl"):              # the policy is the reference: no reward
        assert record["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert record["reward_chosen"] == pytest.approx(0, abs=1e-3)
    dpo.main(args("dpo", output=tmp_path / "long", epochs=4, lr=3e-3))
    last = read_lines(tmp_path / "long" / "metrics.jsonl")[-1]
    assert last["accuracy"] > 0.8 and last["reward_chosen"] > last["reward_rejected"]


def test_the_rewards_of_dpo_are_those_of_the_answers(args, runs, world, tmp_path):
    """The second update's, from the models as saved after the first: beta * (log pi(y | x) - log pi_ref(y | x))."""
    dpo.main(args("dpo", save_steps=1, epochs=1, warmup_steps=0, lr=1e-3, beta=0.3))
    tokenizer, reference = AutoTokenizer.from_pretrained(runs("sft")), AutoModelForCausalLM.from_pretrained(runs("sft")).eval()
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    policy = AutoModelForCausalLM.from_pretrained(runs("sft")).eval()
    policy.load_state_dict(weights(newest[0]), strict=False)
    policy.tie_weights()
    pairs, rewards = dpo.read_pairs(args("dpo"), tokenizer, "pairs"), {0: [], 1: []}
    for row in dpo.row_order(len(pairs), 16, 1, 1)[-1].tolist():
        for side, (prompt, response) in enumerate(pairs[row]):
            ids = torch.tensor([[*prompt, *response]])
            logps = [m(input_ids=ids).logits[0].log_softmax(-1)[len(prompt) - 1:-1].gather(1, torch.tensor(response)[:, None]).sum().item()
                     for m in (policy, reference)]
            rewards[side].append(0.3 * (logps[0] - logps[1]))
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert abs(last["reward_chosen"]) > 1e-3
    assert [last["reward_chosen"], last["reward_rejected"]] == pytest.approx([sum(x) / 16 for x in rewards.values()], abs=1e-3)


# ---- the online ones ----
@pytest.mark.parametrize("name, changes", [("ppo", {"lr": 3e-3}), ("grpo", {"lr": 3e-3}), ("remax", {"lr": 6e-3})])
def test_the_policy_learns_what_the_reward_model_likes(name, changes, args, trained, tmp_path):
    sizes = {"mini_batch_size": 16} if name != "remax" else {}
    script(name).main(args(name, reward_model=trained, steps=30, batch_size=32, micro_batch_size=16, kl_coef=0.0, **sizes, **changes))
    std = json.loads((trained / "config.json").read_text())["reward_model"]["reward_std"]
    rewards = [record["reward"] / std for record in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


@pytest.mark.parametrize("name", REWARDED)
def test_what_main_hands_to_the_update(name, args, trained, monkeypatch):
    """Advantages (and PPO's returns) of one batch, from the rollouts' scores, against loops."""
    module, seen, kl_coef = script(name), {}, 0.3
    update = "remax_update" if name == "remax" else "ppo_update"
    scored, updated = module.score_rollouts, getattr(module, update)
    monkeypatch.setattr(module, "score_rollouts", lambda *rest: seen.update(scored=scored(*rest), rest=rest) or seen["scored"])
    monkeypatch.setattr(module, update, lambda a, model, optimizer, batch, *rest: (
        seen.update(batch=batch, more=rest), updated(a, model, optimizer, batch, *rest))[1])
    module.main(args(name, steps=2, lr=1e-3, kl_coef=kl_coef, reward_model=trained, batch_size=16))
    ids, is_response, lengths, logp_old, logp_ref, *more = seen["scored"]
    batch, sequences, model = seen["batch"], seen["rest"][3], AutoModelForSequenceClassification.from_pretrained(trained).eval()
    scale = model.config.reward_model

    def scores(sequences):                                     # the stock class, one answer at a time
        with torch.no_grad():
            return torch.stack([model(input_ids=torch.tensor([[*p, *r]])).logits.squeeze() for p, r in sequences])

    score = scores(sequences)
    assert (logp_old - logp_ref)[is_response].abs().max() > 1e-4 and torch.equal(batch[1], is_response) and torch.equal(batch[2], logp_old)
    kl = kl_coef * (logp_old - logp_ref)
    if name == "ppo":
        value, returns = more[0], torch.zeros_like(more[0])
        for b, start, end in responses(is_response):
            advantage = 0.0
            for t in reversed(range(start, end)):
                r = -kl[b, t] + ((score[b] - scale["reward_mean"]) / scale["reward_std"] if t == end - 1 else 0.0)
                advantage = r + (value[b, t + 1] if t < end - 1 else 0.0) - value[b, t] + 0.95 * advantage
                returns[b, t] = advantage + value[b, t]
        found, expected = batch[3], ppo.whiten(returns - value, is_response, ALONE)
        assert torch.allclose(batch[5][is_response], returns[is_response], atol=1e-3) and torch.equal(batch[4], value)
    elif name == "grpo":
        found, expected = seen["more"][0], grpo.group_advantage(score, 4)
        assert torch.equal(batch[3], logp_ref)
    else:
        difference = (score - scores(seen["rest"][4])) / scale["reward_std"]
        found, expected = batch[3], torch.where(is_response, -kl + difference[:, None], 0.0)
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("name", REWARDED)
def test_a_reward_model_without_a_scale_is_taken_as_it_is(name, args, runs, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(runs("reward_model"))
    del model.config.reward_model
    model.save_pretrained(tmp_path / "foreign")
    AutoTokenizer.from_pretrained(runs("reward_model")).save_pretrained(tmp_path / "foreign")
    script(name).main(args(name, reward_model=tmp_path / "foreign", steps=1))
    found, wanted = (read_lines(run / "rollouts.jsonl")[0] for run in (tmp_path / "run", runs(name)))
    assert found["reward"] == pytest.approx(wanted["reward"], abs=1e-5)        # logged as the reward model says it


def test_bf16_scores_and_samples_alike(args, tmp_path, monkeypatch):
    """Under mixed precision PPO samples in the precision it scores in, and DPO's policy starts near its reference."""
    given = args("ppo", steps=1), args("dpo", output=tmp_path / "dpo", lr=0.0)         # their inputs are made before, in float32
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    seen, rollout = [], ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda policy, *rest: (
        seen.append(policy(input_ids=torch.tensor([[5]])).logits.dtype), rollout(policy, *rest))[1])
    ppo.main(given[0])
    dpo.main(given[1])
    assert set(seen) == {torch.bfloat16} and all(weight.dtype == torch.float32 for weight in weights(tmp_path / "run").values())
    for record in read_lines(tmp_path / "dpo" / "metrics.jsonl"):
        assert max(abs(record["reward_chosen"]), abs(record["reward_rejected"])) < 0.02
