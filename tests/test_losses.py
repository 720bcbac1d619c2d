"""Each loss and advantage of the stages against a slow loop written from its equation, in float64: value and gradient."""
import ast
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, responses

import sft
import train_dvpo
import train_gvm

ALONE = SimpleNamespace(reduce=lambda total: total)           # one process


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
            n_step.append(total + (gamma ** n * q[t + n] if t + n < end else 0.0))
        weight = [(1 - td_lambda) * td_lambda ** n for n in range(len(n_step) - 1)] + [td_lambda ** (len(n_step) - 1)]
        targets.append(sum(w * g for w, g in zip(weight, n_step)))
    return targets


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 0.95, 1.0])
def test_td_loss_value_and_gradient(random_batch, gamma, td_lambda):
    is_response, draw = random_batch
    is_value = train_gvm.value_positions(is_response)
    q, reward = draw().requires_grad_(), draw() * train_gvm.is_last_token(is_response)
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
    assert train_gvm.td_loss(q, reward, is_value, gamma, td_lambda, 7).item() == pytest.approx(total / 7, rel=1e-12)
    dirty = junk(q.detach(), is_value).requires_grad_()       # NaN off the mask reaches neither loss nor gradient
    loss = train_gvm.td_loss(dirty, junk(reward, is_value), is_value, gamma, td_lambda)
    loss.backward()
    assert loss.item() == pytest.approx(total / count, rel=1e-12) and torch.allclose(dirty.grad, gradient, atol=1e-12)


def test_td_lambda_0_is_equation_1_and_1_is_monte_carlo(random_batch):
    is_response, draw = random_batch
    q, reward = draw(), draw() * train_gvm.is_last_token(is_response)
    monte_carlo = train_gvm.lambda_return(q, reward, is_response, 0.9, 1.0)
    deltas = []
    for b, start, end in responses(is_response):
        for t in range(start, end):
            q_next = q[b, t + 1] if t + 1 < end else 0.0
            deltas.append(reward[b, t] + 0.9 * q_next - q[b, t])            # the bracket of Eq. (1)
            assert monte_carlo[b, t].item() == pytest.approx(0.9 ** (end - 1 - t) * reward[b, end - 1].item())
    expected = torch.stack(deltas).square().mean()
    assert torch.allclose(train_gvm.td_loss(q, reward, is_response, 0.9, 0.0), expected)


def test_value_positions_and_last_tokens(random_batch):
    is_response, _ = random_batch
    is_value, is_last = train_gvm.value_positions(is_response), train_gvm.is_last_token(is_response)
    for b, start, end in responses(is_response):
        assert is_value[b].nonzero().flatten().tolist() == list(range(start - 1, end))
        assert is_last[b].nonzero().flatten().tolist() == [end - 1]


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
    known = train_gvm.value_positions(is_response)                            # q is defined at V(s_1) and the response
    advantage = fast(junk(q, known), junk(reward_kl, is_response), is_response, gamma, gae_lambda)
    for b, start, end in responses(is_response):
        expected = slow(q[b].tolist(), reward_kl[b].tolist(), start, end, gamma, gae_lambda)
        assert advantage[b, start:end].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (advantage[~is_response] == 0).all()


def test_advantage_q_is_the_value_plus_the_tokens_own_kl(random_batch):
    is_response, draw = random_batch
    q, reward_kl = draw(), draw()
    advantage = train_dvpo.advantage_q(junk(q, is_response), junk(reward_kl, is_response), is_response)
    assert torch.equal(advantage, torch.where(is_response, q + reward_kl, 0.0))


def test_released_reproduces_the_released_code():
    """Values V = (-2.18, 0.57, -1.08), lambda 0.95: the authors' code gives the advantages (2.16, -0.62, 1.08)."""
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
    white = train_dvpo.whiten(junk(x, is_response), is_response, ALONE)
    values = x[is_response].tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    assert white[is_response].tolist() == pytest.approx([(v - mean) / deviation for v in values], abs=1e-6)
    assert (white[~is_response] == 0).all()
    equal = train_dvpo.whiten(torch.full_like(x, 0.5), is_response, ALONE)
    assert (equal == 0).all()                                                  # nothing to learn from is no NaN


def test_whiten_over_two_processes_is_whiten_over_the_whole_batch(random_batch):
    """reduce() is called for count, sum and sum of squares; here it adds what the other half would send."""
    is_response, draw = random_batch
    x = draw()
    whole, halves, mean = train_dvpo.whiten(x, is_response, ALONE), [], x[is_response].mean()
    for mine, other in ((slice(0, 1), slice(1, 4)), (slice(1, 4), slice(0, 1))):
        there = x[other][is_response[other]]
        parts = iter([len(there), there.sum(), (there - mean).square().sum()])
        two = SimpleNamespace(reduce=lambda total: total + next(parts))
        halves.append(train_dvpo.whiten(x[mine], is_response[mine], two))
    assert torch.allclose(torch.cat(halves), whole) and whole[is_response].square().mean().item() == pytest.approx(1)


# ---- policy losses ----
def test_ppo_loss_value_and_gradient(random_batch):
    is_response, draw = random_batch
    logp_old, advantage = draw(), draw()
    logp = junk(logp_old + 0.3 * draw(), is_response).requires_grad_()
    loss = train_dvpo.ppo_loss(logp, junk(logp_old, is_response), junk(advantage, is_response), is_response, 0.2)
    loss.backward()
    total, count, gradient = 0.0, is_response.sum().item(), torch.zeros_like(logp)
    for b, t in is_response.nonzero().tolist():
        ratio, a = math.exp(logp[b, t].item() - logp_old[b, t].item()), advantage[b, t].item()
        clipped = min(max(ratio, 0.8), 1.2)
        total += min(ratio * a, clipped * a)
        if ratio * a <= clipped * a:                                           # the unclipped branch has the gradient
            gradient[b, t] = -a * ratio / count
    assert loss.item() == pytest.approx(-total / count, rel=1e-12)
    assert torch.allclose(logp.grad, gradient, atol=1e-12)                     # no NaN off the mask either
    assert 0 < (gradient[is_response] == 0).sum() < count                      # both branches were tested
    loss = train_dvpo.ppo_loss(logp, logp_old, advantage, is_response, 0.2, denominator=7)
    assert loss.item() == pytest.approx(-total / 7, rel=1e-12)


def test_at_ratio_1_the_gradient_is_the_policy_gradient(random_batch):
    """Eq. (2) at theta = theta_old: its gradient is E[A_t * grad log pi], whatever epsilon is."""
    is_response, draw = random_batch
    logp, advantage = draw().requires_grad_(), draw()
    train_dvpo.ppo_loss(logp, logp.detach(), advantage, is_response, 0.2).backward()
    assert torch.allclose(logp.grad, torch.where(is_response, -advantage, 0.0) / is_response.sum())


def test_sft_loss_value_and_gradient(random_batch):
    is_response, draw = random_batch
    logp = junk(draw(), is_response).requires_grad_()
    loss = sft.sft_loss(logp, is_response)
    loss.backward()
    values = logp[is_response].tolist()
    assert loss.item() == pytest.approx(-sum(values) / len(values), rel=1e-12)
    assert torch.allclose(logp.grad, torch.where(is_response, -1 / len(values), 0.0).double(), atol=1e-12)
    assert sft.sft_loss(logp, is_response, 7).item() == pytest.approx(-sum(values) / 7, rel=1e-12)


def test_losses_refuse_other_shapes_and_masks():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(AssertionError):
        train_gvm.td_loss(x, x, mask.long(), 1.0, 0.95)
    with pytest.raises(AssertionError):
        train_gvm.td_loss(x, torch.zeros(2, 2), mask, 1.0, 0.95)
    with pytest.raises(AssertionError):
        train_dvpo.ppo_loss(x, x, torch.zeros(2, 1), mask, 0.2)


# ---- the headers of the scripts ----
def header(name):
    return ast.get_docstring(ast.parse((ROOT / name).read_text()))


def numbers(text, begins):
    """The numbers "= 0.4, -0.2, 0.8" of the header's line that begins like this."""
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith(begins))
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", re.search(r"= +(-?[\d.]+(?:, *-?[\d.]+)*)(?!.*= )", line)[1])]


def test_the_worked_example_of_train_gvm():
    text = header("train_gvm.py")
    q, mask = torch.tensor([numbers(text, "Worked example")]), torch.ones(1, 4, dtype=torch.bool)
    reward = torch.tensor([[0.0, 0.0, 0.0, float(re.search(r"Worked example, gamma = 1, r = (\d)", text)[1])]])
    for td_lambda in ("0", "0.5", "1"):
        target = train_gvm.lambda_return(q, reward, mask, 1.0, float(td_lambda))[0]
        assert target.tolist() == pytest.approx(numbers(text, f"--td_lambda {td_lambda} ")), td_lambda
    loss = train_gvm.td_loss(q, reward, mask, 1.0, 0.0).item()
    assert [loss] == pytest.approx(numbers(text, "loss of --td_lambda 0"))
    squares = [float(x) for x in re.findall(r"([\d.]+)\^2", text)]
    assert sum(x * x for x in squares) / 4 == pytest.approx(loss)


def test_the_worked_example_of_train_dvpo():
    text = header("train_dvpo.py")
    first = float(re.search(r"V\(s1\) = (-?[\d.]+);", text)[1])
    q, is_response = torch.tensor([[first, *numbers(text, "Worked example")]]), torch.tensor([[False, True, True, True]])
    zero = torch.zeros_like(q)
    assert numbers(text, "--advantage q ") == pytest.approx(train_dvpo.advantage_q(q, zero, is_response)[0, 1:].tolist())
    for gae_lambda in ("0", "0.5"):
        advantage = train_dvpo.advantage_gae(q, zero, is_response, 1.0, float(gae_lambda))[0, 1:].tolist()
        assert numbers(text, f"--advantage gae --gae_lambda {gae_lambda} ") == pytest.approx(advantage), gae_lambda


@pytest.mark.parametrize("name", ["sft.py", "train_gvm.py", "train_dvpo.py"])
def test_the_alignment_diagrams(name):
    """A prompt of two tokens and an answer of three: the rows of 1 and . are the masks that the functions make."""
    rows = {line.split()[0]: line.split()[1:7] for line in header(name).splitlines() if line.startswith("    ") and line.split()}
    _, is_response, _ = sft.collate([([1, 2], [3, 4, 5]), ([1, 2, 3], [4, 5, 6])], 0)
    masks = {"is_response": is_response[0]} | ({"is_value": train_gvm.value_positions(is_response)[0]} if "gvm" in name else {})
    for row, mask in masks.items():
        assert rows[row] == ["1" if x else "." for x in mask]
    assert rows["ids"] == ["x1", "x2", "y1", "y2", "END", "pad"]
