"""Our formulas against trl's and verl's own functions, on random inputs: `make test-peers`, in an environment of its own.

Not collected by `make test`: it needs trl 1.12.0 (the last with PPO) and verl 0.9.1. Where the peers do something else on
purpose, the test holds the difference: that it is just the one which is named here, and no other.
"""
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.experimental.ppo.ppo_trainer import masked_mean, masked_var, masked_whiten
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import selective_log_softmax
from verl.trainer.ppo import core_algos as verl

import train_dvpo
from baselines import dpo, grpo, ppo, remax, reward_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ALONE = SimpleNamespace(reduce=lambda total: total)           # one process


@pytest.fixture(params=range(3))
def batch(request):
    """is_response (B, L), its float form, and draws of a shape, in float32. Responses end before the row does."""
    generator = torch.Generator().manual_seed(request.param)
    start = torch.randint(1, 4, (6, 1), generator=generator)
    end = start + torch.randint(1, 12, (6, 1), generator=generator)
    position = torch.arange(16)
    is_response = (start <= position) & (position < end)
    return is_response, is_response.float(), lambda *shape: torch.randn(*(shape or is_response.shape), generator=generator)


def test_masked_mean(batch):
    """The mean that our losses take: with the ratio at 1, the loss is minus the advantage's mean."""
    is_response, mask, draw = batch
    x, logp = draw(), draw()
    torch.testing.assert_close(-train_dvpo.ppo_loss(logp, logp, x, is_response, 0.2), masked_mean(x, mask.bool()), **CLOSE)


def test_whitening(batch):
    """trl and verl divide by the sample's deviation (n - 1), we by the batch's (n), as OpenRLHF does."""
    is_response, mask, draw = batch
    x, n = draw(), is_response.sum()
    ours = train_dvpo.whiten(x, is_response, ALONE) * ((n - 1) / n).sqrt()
    torch.testing.assert_close(ours, torch.where(is_response, masked_whiten(x, is_response), 0.0), **CLOSE)
    torch.testing.assert_close(masked_var(train_dvpo.whiten(x, is_response, ALONE), is_response), n / (n - 1), **CLOSE)


def says(logits):
    """A model whose logits are these."""
    return lambda **_: SimpleNamespace(logits=logits)


def test_log_probabilities(batch):
    _, _, draw = batch
    logits, ids = draw(3, 9, 50), torch.randint(0, 50, (3, 9))
    ours = train_dvpo.token_logp(says(logits), ids, torch.arange(9).expand(3, 9) > 0)
    torch.testing.assert_close(ours[:, 1:], selective_log_softmax(logits[:, :-1], ids[:, 1:]), **CLOSE)


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5)])
def test_gae(batch, gamma, gae_lambda):
    """verl carries the state of the token before over gaps in the mask; ours starts anew. Responses have no gaps."""
    is_response, mask, draw = batch
    value, reward = draw() * mask, draw() * mask
    ours = ppo.advantage_from_critic(value, reward, is_response, gamma, gae_lambda)
    whitened, returns = verl.compute_gae_advantage_return(reward, value, mask, gamma, gae_lambda)
    torch.testing.assert_close((ours + value) * mask, returns * mask, **CLOSE)
    n = is_response.sum()
    torch.testing.assert_close(ppo.whiten(ours, is_response, ALONE) * ((n - 1) / n).sqrt(), whitened * mask, **CLOSE)


def test_value_loss(batch):
    is_response, mask, draw = batch
    value, old, returns = draw(), draw(), draw()
    theirs, _ = verl.compute_value_loss(value, returns, old, mask, 0.2)
    torch.testing.assert_close(ppo.value_loss(value, old, returns, is_response, 0.2), theirs, **CLOSE)


class Config(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def actor(clip_ratio_c):
    return Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=clip_ratio_c,
                  global_batch_info={})


def test_clipped_loss(batch):
    is_response, mask, draw = batch
    logp, old, advantage = draw().requires_grad_(), draw(), draw()
    theirs, _ = verl.compute_policy_loss_vanilla(old, logp, advantage, mask, "token-mean", actor(clip_ratio_c=1e9))
    ours = train_dvpo.ppo_loss(logp, old, advantage, is_response, 0.2)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0], **CLOSE)


def test_verl_clips_twice(batch):
    """verl's default bounds the loss of a negative advantage at 3 |A| (dual clip); Eq. (2) does not."""
    is_response, mask, draw = batch
    logp, old, advantage = 2 * draw(), draw(), draw()
    theirs, _ = verl.compute_policy_loss_vanilla(old, logp, advantage, mask, "token-mean", actor(clip_ratio_c=3.0))
    ratio = (logp - old).exp()
    bounded = is_response & (advantage < 0) & (ratio > 3)
    excess = torch.where(bounded, (ratio - 3) * -advantage, 0.0).sum() / is_response.sum()
    assert bounded.any()
    torch.testing.assert_close(train_dvpo.ppo_loss(logp, old, advantage, is_response, 0.2) - excess, theirs, **CLOSE)


def test_k1_and_k3(batch):
    is_response, mask, draw = batch
    logp, ref = draw(), draw()
    k1 = -train_dvpo.kl_reward(logp, ref, is_response, 1.0)
    torch.testing.assert_close(k1, verl.kl_penalty(logp, ref, "kl") * mask, **CLOSE)
    k3 = grpo.grpo_loss(logp, logp, ref, torch.zeros(len(logp)), is_response, 0.2, 1.0)
    theirs = verl.kl_penalty(logp, ref, "low_var_kl")                  # clamps at 10
    torch.testing.assert_close(k3.clamp(max=10), theirs * mask, **CLOSE)


@pytest.mark.parametrize("divide", [True, False])
def test_grpo_advantage(batch, divide):
    """The constant beside the deviation: ours and trl's 1e-4, verl's 1e-6; given ours, the same numbers."""
    is_response, mask, draw = batch
    score = draw(6)
    reward = train_dvpo.is_last_token(is_response) * score[:, None]
    theirs, _ = verl.compute_grpo_outcome_advantage(reward, mask, np.array([0, 0, 0, 1, 1, 1]), epsilon=1e-4,
                                                    norm_adv_by_std_in_grpo=divide)
    torch.testing.assert_close(grpo.group_advantage(score, 3, divide)[:, None] * mask, theirs, **CLOSE)


@pytest.mark.parametrize("ours, theirs", [("grpo", "seq-mean-token-mean"), ("dapo", "token-mean"),
                                          ("dr_grpo", "seq-mean-token-sum-norm")])
def test_loss_means(batch, ours, theirs):
    is_response, mask, draw = batch
    x = draw() * mask
    a = grpo.loss_mean(x, is_response, ours, is_response.sum() / len(x), 16)
    torch.testing.assert_close(a, verl.agg_loss(x, mask, theirs, loss_scale_factor=16), **CLOSE)


def test_remax_advantage(batch):
    """verl adds the KL rewards from the token on, we (and the original) the token's own; the same without a penalty."""
    is_response, mask, draw = batch
    score, greedy, reward_kl = draw(6), draw(6), draw() * mask
    reward = train_dvpo.is_last_token(is_response) * score[:, None]
    theirs, _ = verl.compute_remax_outcome_advantage(reward, greedy, mask)
    torch.testing.assert_close(remax.remax_advantage(score, greedy, 0 * reward_kl, is_response), theirs * mask, **CLOSE)
    theirs, _ = verl.compute_remax_outcome_advantage(reward + reward_kl, greedy, mask)
    later = reward_kl.flip(-1).cumsum(-1).flip(-1) - reward_kl
    ours = remax.remax_advantage(score, greedy, reward_kl, is_response)
    torch.testing.assert_close((ours + later) * mask, theirs * mask, **CLOSE)


def trainer(**settings):
    """What trl's loss functions ask of their trainer."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(model=SimpleNamespace(training=False), accelerator=accelerator, _metrics={
        "eval": defaultdict(list)}, _total_train_tokens=0, **settings)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_loss(batch, smoothing):
    """trl's smoothed loss ("robust", Chowdhury et al., 2024) is another one than ours (conservative, Mitchell, 2023)."""
    is_response, mask, draw = batch
    ids, beta = torch.randint(0, 50, is_response.shape), 0.3
    logits, ref = draw(*is_response.shape, 50), draw(6)
    answer_logp = dpo.token_logp(says(logits), ids, is_response).sum(-1)
    reward = beta * (answer_logp - ref)                                # trl's batch: all chosen, then all rejected
    ours = dpo.dpo_loss(reward[:3], reward[3:], smoothing)
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": mask, "ref_chosen_logps": ref[:3],
              "ref_rejected_logps": ref[3:]}
    stub = trainer(aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
                   beta=beta, loss_types=["robust" if smoothing else "sigmoid"], loss_weights=[1.0], use_weighting=False,
                   label_smoothing=smoothing)
    theirs = DPOTrainer._compute_loss(stub, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    if smoothing:
        flipped = -torch.nn.functional.logsigmoid(reward[3:] - reward[:3]).mean()
        theirs = theirs * (1 - 2 * smoothing) + 2 * smoothing * flipped
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert math.isfinite(ours)


def test_bradley_terry_loss(batch):
    score = 3 * batch[2](6)
    stub = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=score[:, None]),
                                        {"attention_mask": torch.ones(6, 1)})
    torch.testing.assert_close(reward_model.bradley_terry_loss(score[:3], score[3:]), theirs, **CLOSE)
