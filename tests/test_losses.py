"""Each loss and advantage against a slow loop written from its equation, in float64: value and gradient."""
import math

import pytest
import torch

import sft
import train_dvpo
import train_gvm


def responses(is_response):
    """[(row, first token, one past the last token), ...]"""
    return [(b, row.nonzero()[0].item(), row.nonzero()[-1].item() + 1) for b, row in enumerate(is_response)]


def junk(x, mask):
    """x with NaN wherever the mask is False."""
    return torch.where(mask, x, torch.nan)


# ---- the GVM's loss ----
def slow_lambda_return(q, reward, start, end, gamma, td_lambda):
    """Forward view, straight from the definition: the weighted mean of all n-step returns. q, reward: lists."""
    targets = []
    for t in range(start, end):
        n_step = []
        for n in range(1, end - t + 1):
            total = sum(gamma ** k * reward[t + k] for k in range(n))
            bootstrap = gamma ** n * q[t + n] if t + n < end else 0.0
            n_step.append(total + bootstrap)
        weights = [(1 - td_lambda) * td_lambda ** n for n in range(len(n_step) - 1)] + [td_lambda ** (len(n_step) - 1)]
        targets.append(sum(w * g for w, g in zip(weights, n_step)))
    return targets


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 0.95, 1.0])
def test_td_loss_value_and_gradient(random_batch, gamma, td_lambda):
    is_response, draw = random_batch
    is_value = train_gvm.value_positions(is_response)
    q, reward = draw().requires_grad_(), draw() * train_gvm.last_token(is_response)
    loss = train_gvm.td_loss(q, reward, is_value, gamma, td_lambda)
    loss.backward()

    total, count, gradient = 0.0, is_value.sum().item(), torch.zeros_like(q)
    for b, start, end in responses(is_value):
        targets = slow_lambda_return(q[b].tolist(), reward[b].tolist(), start, end, gamma, td_lambda)
        for t, target in zip(range(start, end), targets):
            total += (target - q[b, t].item()) ** 2
            gradient[b, t] = -2 * (target - q[b, t].item()) / count         # no gradient through the target
    assert loss.item() == pytest.approx(total / count, rel=1e-12)
    assert torch.allclose(q.grad, gradient, atol=1e-12)


def test_td_lambda_0_is_equation_1(random_batch):
    is_response, draw = random_batch
    q, reward = draw(), draw() * train_gvm.last_token(is_response)
    deltas = []
    for b, start, end in responses(is_response):
        for t in range(start, end):
            q_next = q[b, t + 1] if t + 1 < end else 0.0
            deltas.append(reward[b, t] + 0.9 * q_next - q[b, t])              # the bracket of Eq. (1)
    expected = torch.stack(deltas).square().mean()
    assert torch.allclose(train_gvm.td_loss(q, reward, is_response, 0.9, 0.0), expected)


def test_td_lambda_1_is_the_monte_carlo_return(random_batch):
    is_response, draw = random_batch
    reward = draw() * train_gvm.last_token(is_response)
    target = train_gvm.lambda_return(draw(), reward, is_response, 0.9, 1.0)
    for b, start, end in responses(is_response):
        for t in range(start, end):
            assert target[b, t].item() == pytest.approx(0.9 ** (end - 1 - t) * reward[b, end - 1].item())


def test_td_loss_ignores_what_is_off_the_mask(random_batch):
    is_response, draw = random_batch
    is_value = train_gvm.value_positions(is_response)
    q, reward = draw(), draw() * train_gvm.last_token(is_response)
    clean = train_gvm.td_loss(q, reward, is_value, 1.0, 0.95)
    dirty_q = junk(q, is_value).requires_grad_()
    dirty = train_gvm.td_loss(dirty_q, junk(reward, is_value), is_value, 1.0, 0.95)
    dirty.backward()
    assert torch.equal(clean, dirty) and torch.isfinite(dirty_q.grad).all()


def test_value_positions_and_last_token(random_batch):
    is_response, _ = random_batch
    is_value, is_last = train_gvm.value_positions(is_response), train_gvm.last_token(is_response)
    for b, start, end in responses(is_response):
        assert is_value[b].nonzero().flatten().tolist() == list(range(start - 1, end))
        assert is_last[b].nonzero().flatten().tolist() == [end - 1]
    assert torch.equal(train_dvpo.last_token(is_response), is_last)


# ---- advantages ----
def slow_gae(q, reward_kl, start, end, gamma, gae_lambda):
    """A_t = sum_l (gamma * lambda)^l * delta_{t+l}, delta_t = r^KL_t + Q_t - V(s_t), V(s_t) = Q_{t-1} / gamma."""
    delta = {t: reward_kl[t] + q[t] - q[t - 1] / gamma for t in range(start, end)}
    return [sum((gamma * gae_lambda) ** (u - t) * delta[u] for u in range(t, end)) for t in range(start, end)]


def slow_released(q, reward_kl, start, end, gamma, gae_lambda):
    """The same with delta_t = r^KL_t + gamma * V(s_{t+1}) - V(s_t), and V = 0 past the end."""
    v = {t: q[t - 1] / gamma for t in range(start, end)} | {end: 0.0}         # Q(s_{t-1}, a_{t-1}) = gamma * V(s_t)
    delta = {t: reward_kl[t] + gamma * v[t + 1] - v[t] for t in range(start, end)}
    return [sum((gamma * gae_lambda) ** (u - t) * delta[u] for u in range(t, end)) for t in range(start, end)]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("fast, slow", [(train_dvpo.advantage_gae, slow_gae),
                                        (train_dvpo.advantage_released, slow_released)])
def test_gae_and_released(random_batch, fast, slow, gamma, gae_lambda):
    is_response, draw = random_batch
    q, reward_kl = draw(), draw()
    advantage = fast(q, reward_kl, is_response, gamma, gae_lambda)
    for b, start, end in responses(is_response):
        expected = slow(q[b].tolist(), reward_kl[b].tolist(), start, end, gamma, gae_lambda)
        assert advantage[b, start:end].tolist() == pytest.approx(expected)
    assert (advantage[~is_response] == 0).all()
    known = train_gvm.value_positions(is_response)                            # q is defined at V(s_1) and the response
    dirty = fast(junk(q, known), junk(reward_kl, is_response), is_response, gamma, gae_lambda)
    assert torch.equal(dirty, advantage)


def test_gae_ends_of_the_range(random_batch):
    is_response, draw = random_batch
    q, zero = draw(), torch.zeros(is_response.shape, dtype=torch.float64)
    at_0 = train_dvpo.advantage_gae(q, zero, is_response, 1.0, 0.0)
    at_1 = train_dvpo.advantage_gae(q, zero, is_response, 1.0, 1.0)
    for b, start, end in responses(is_response):
        for t in range(start, end):
            assert at_0[b, t].item() == pytest.approx((q[b, t] - q[b, t - 1]).item())         # Q(s, a) - V(s)
            assert at_1[b, t].item() == pytest.approx((q[b, end - 1] - q[b, t - 1]).item())   # Q_T - V(s_t)


def test_advantage_q_is_the_value_plus_the_tokens_own_kl(random_batch):
    is_response, draw = random_batch
    q, reward_kl = draw(), draw()
    advantage = train_dvpo.advantage_q(junk(q, is_response), junk(reward_kl, is_response), is_response)
    assert torch.equal(advantage[is_response], (q + reward_kl)[is_response]) and (advantage[~is_response] == 0).all()


def test_released_reproduces_the_worked_example():
    """Values V = (-2.18, 0.57, -1.08), lambda 0.95: the released code's advantages are (2.16, -0.62, 1.08)."""
    q = torch.tensor([[-2.18, 0.57, -1.08, 9.0]])                              # V(s_t) is read one position earlier
    is_response = torch.tensor([[False, True, True, True]])
    advantage = train_dvpo.advantage_released(q, torch.zeros_like(q), is_response, 1.0, 0.95)
    assert advantage[0, 1:].tolist() == pytest.approx([2.16, -0.62, 1.08], abs=0.005)


def test_kl_reward(random_batch):
    is_response, draw = random_batch
    logp_old, logp_ref = draw(), draw()
    reward = train_dvpo.kl_reward(junk(logp_old, is_response), logp_ref, is_response, 0.05)
    for b, start, end in responses(is_response):
        for t in range(start, end):                    # a token that the policy likes more than the reference: a cost
            assert reward[b, t].item() == pytest.approx(-0.05 * (logp_old[b, t] - logp_ref[b, t]).item())
    assert (reward[~is_response] == 0).all()


def test_whiten(random_batch):
    is_response, draw = random_batch
    x = 3 + 2 * draw()
    white = train_dvpo.whiten(junk(x, is_response), is_response)
    values = x[is_response]
    deviation = math.sqrt(sum((v - values.mean()) ** 2 for v in values) / len(values))
    assert torch.allclose(white[is_response], (values - values.mean()) / deviation)
    assert (white[~is_response] == 0).all()
    none = train_dvpo.whiten(x, torch.zeros_like(is_response))
    assert (none == 0).all()                                                   # nothing to learn from is no NaN


def test_whiten_over_two_processes_is_whiten_over_the_whole_batch(random_batch):
    """`reduce` is called for count, sum and sum of squares; here it adds what the other half would send."""
    is_response, draw = random_batch
    x = draw()
    whole, halves = train_dvpo.whiten(x, is_response), []
    mean = x[is_response].mean()
    for mine, other in ((slice(0, 1), slice(1, 4)), (slice(1, 4), slice(0, 1))):
        there = x[other][is_response[other]]
        parts = iter([len(there), there.sum(), (there - mean).square().sum()])
        halves.append(train_dvpo.whiten(x[mine], is_response[mine], lambda total: total + next(parts)))
    assert torch.allclose(torch.cat(halves), whole)


# ---- policy losses ----
def test_ppo_loss_value_and_gradient(random_batch):
    is_response, draw = random_batch
    logp_old, advantage = draw(), draw()
    logp = (logp_old + 0.3 * draw()).requires_grad_()
    loss = train_dvpo.ppo_loss(logp, logp_old, advantage, is_response, 0.2)
    loss.backward()
    total, count, gradient = 0.0, is_response.sum().item(), torch.zeros_like(logp)
    for b, start, end in responses(is_response):
        for t in range(start, end):
            ratio, a = math.exp(logp[b, t].item() - logp_old[b, t].item()), advantage[b, t].item()
            clipped = min(max(ratio, 0.8), 1.2)
            total += min(ratio * a, clipped * a)
            if ratio * a <= clipped * a:                                       # the unclipped branch has the gradient
                gradient[b, t] = -a * ratio / count
    assert loss.item() == pytest.approx(-total / count, rel=1e-12)
    assert torch.allclose(logp.grad, gradient, atol=1e-12)
    assert 0 < (gradient[is_response] == 0).sum() < count                      # both branches were tested


def test_ppo_loss_ignores_what_is_off_the_mask(random_batch):
    is_response, draw = random_batch
    logp, logp_old, advantage = draw(), draw(), draw()
    clean = train_dvpo.ppo_loss(logp, logp_old, advantage, is_response, 0.2)
    dirty_logp = junk(logp, is_response).requires_grad_()
    dirty = train_dvpo.ppo_loss(dirty_logp, logp_old, junk(advantage, is_response), is_response, 0.2)
    dirty.backward()
    assert torch.equal(clean, dirty)
    assert torch.isfinite(dirty_logp.grad[is_response]).all() and (dirty_logp.grad[~is_response] == 0).all()


def test_at_ratio_1_the_gradient_is_the_policy_gradient(random_batch):
    """Eq. (2) at theta = theta_old: its gradient is E[A_t * grad log pi], whatever epsilon is."""
    is_response, draw = random_batch
    logp, advantage = draw().requires_grad_(), draw()
    train_dvpo.ppo_loss(logp, logp.detach(), advantage, is_response, 0.2).backward()
    assert torch.allclose(logp.grad, torch.where(is_response, -advantage, 0.0) / is_response.sum())


def test_sft_loss_value_and_gradient(random_batch):
    is_response, _ = random_batch
    generator = torch.Generator().manual_seed(1)
    logp = torch.randn(*is_response.shape, generator=generator, dtype=torch.float64).requires_grad_()
    loss = sft.sft_loss(logp, is_response)
    loss.backward()
    total, gradient = 0.0, torch.zeros_like(logp)
    for b, start, end in responses(is_response):
        for t in range(start, end):
            total -= logp[b, t].item()
            gradient[b, t] = -1 / is_response.sum()
    assert loss.item() == pytest.approx(total / is_response.sum().item(), rel=1e-6)
    assert torch.allclose(logp.grad, gradient, atol=1e-7)


@pytest.mark.parametrize("loss, tensors", [
    (train_gvm.td_loss, 2), (train_dvpo.ppo_loss, 3)])
def test_losses_refuse_other_shapes_and_masks(loss, tensors):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    rest = (1.0, 0.95) if loss is train_gvm.td_loss else (0.2,)
    loss(*[x] * tensors, mask, *rest)
    with pytest.raises(AssertionError):
        loss(*[x] * tensors, mask.long(), *rest)
    with pytest.raises(AssertionError):
        loss(*[x] * (tensors - 1), torch.zeros(2, 2), mask, *rest)
