"""Padding, EOS and tau: what a row's numbers may depend on, and what not."""
import random
from collections import Counter

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, GPT2Config,
                          LlamaConfig)

import sft
import train_dvpo
import train_gvm

SEQUENCES = [([5, 6, 7], [8, 9, 10, 1]), ([5], [11, 1]), ([5, 6, 7, 8, 9], [12, 13, 14, 15, 16, 17])]


def tiny(auto_class, kind="llama"):
    """A model with a vocabulary of 32, made anew, the same one each time."""
    torch.manual_seed(0)
    shared = {"vocab_size": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_labels": 1,
              "initializer_range": 0.5}
    if kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **shared)
    else:
        config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **shared)
    return auto_class.from_config(config).eval()


@pytest.fixture(params=["llama", "gpt2"])
def policy(request):
    return tiny(AutoModelForCausalLM, request.param)


@pytest.fixture(params=["llama", "gpt2"])
def gvm(request):
    return tiny(AutoModelForTokenClassification, request.param)


# ---- batches ----
@pytest.mark.parametrize("pad_id", [0, 1])
def test_collate(pad_id):
    """pad == EOS (1): a mask made from ids would drop every EOS."""
    ids, is_response, lengths = sft.collate(SEQUENCES, pad_id)
    assert ids.tolist()[1] == [5, 11, 1] + [pad_id] * 8 and ids.shape == is_response.shape == (3, 11)
    for row, (prompt, response) in enumerate(SEQUENCES):
        assert ids[row, :lengths[row]].tolist() == prompt + response
        assert ids[row][is_response[row]].tolist() == response
    assert (ids[is_response] == 1).sum() == 2


@pytest.mark.parametrize("pad_id", [0, 1])
def test_eos_is_trained(pad_id):
    """One gradient step on the SFT loss makes EOS likelier at the end of the answers, whichever token pads."""
    model = tiny(AutoModelForCausalLM)
    ids, is_response, _ = sft.collate(SEQUENCES[:2], pad_id)

    def eos_logp():
        return sft.token_logp(model, ids, is_response)[train_gvm.is_last_token(is_response)].sum()

    before = eos_logp().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sft.sft_loss(sft.token_logp(model, ids, is_response), is_response).backward()
    optimizer.step()
    assert eos_logp().item() > before + 0.01


def test_every_row_of_an_epoch_is_read_once():
    updates = sft.row_order(11, 4, 3, seed=5)
    assert updates.shape == (6, 4)                             # the incomplete last batch is left out
    epochs = updates.view(3, 8).tolist()
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(11)) for epoch in epochs) and epochs[0] != epochs[1]
    assert torch.equal(updates, sft.row_order(11, 4, 3, seed=5)) and not torch.equal(updates, sft.row_order(11, 4, 3, seed=6))


# ---- log-probabilities and values ----
def test_log_probabilities_do_not_depend_on_the_batch(policy):
    """Alone without padding, or in a batch with anything in the padding: the same numbers."""
    ids, is_response, lengths = sft.collate(SEQUENCES, 0)
    junk = torch.where(torch.arange(ids.shape[1]) < lengths[:, None], ids, 23)
    with torch.no_grad():
        logp, with_junk = (train_dvpo.token_logp(policy, x, is_response) for x in (ids, junk))
        assert torch.allclose(logp, with_junk, atol=1e-5) and (logp[~is_response] == 0).all()
        for row, (prompt, response) in enumerate(SEQUENCES):
            for t, token in enumerate(response):
                said = policy(torch.tensor([prompt + response[:t]])).logits[0, -1].log_softmax(-1)
                assert logp[row, len(prompt) + t].item() == pytest.approx(said[token].item(), abs=1e-4)


def test_the_gradient_of_token_logp_is_that_of_the_full_logits(policy):
    ids, is_response, _ = sft.collate(SEQUENCES, 0)
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    logits = policy(input_ids=ids).logits[:, :-1]
    full = torch.nn.functional.pad(logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1), (1, 0))
    ours = train_dvpo.token_logp(policy, ids, is_response)
    gradients = [torch.autograd.grad((logp * weight)[is_response].sum(), list(policy.parameters())) for logp in (ours, full)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients)) and gradients[0][0].abs().sum() > 0.1


def test_a_row_without_a_prompt_is_refused():
    with pytest.raises(AssertionError, match="begins with its answer"):
        train_dvpo.token_logp(None, torch.ones(1, 2).long(), torch.ones(1, 2).bool())


def test_values_do_not_depend_on_the_batch_and_tau_is_cut_off(gvm):
    """With tau in front, each token's value is the one that the GVM gives when it reads [tau | prompt | response]."""
    taus = [[20, 21], [], [22, 23, 24, 25]]
    with torch.no_grad():
        q = train_dvpo.token_values(gvm, SEQUENCES, taus, 0)
        assert q.shape[1] >= 11
        for row, (tau, (prompt, response)) in enumerate(zip(taus, SEQUENCES)):
            alone = gvm(torch.tensor([tau + prompt + response])).logits[0, len(tau):, 0]
            assert torch.allclose(q[row, :len(alone)], alone, atol=1e-4)


def test_q_is_read_after_the_action(gvm):
    """Q(tau, s_t, a_t) changes with a_t, and not with a_{t+1}."""
    def second(response):
        with torch.no_grad():
            return train_dvpo.token_values(gvm, [([5, 6], response)], [[]], 0)[0, 3].item()

    assert second([8, 9, 10]) != pytest.approx(second([8, 12, 10]), abs=1e-3)
    assert second([8, 9, 10]) == pytest.approx(second([8, 9, 12]), abs=1e-5)


@pytest.mark.parametrize("micro_size", [1, 2, 3])
def test_the_scores_of_rollouts_stand_in_their_own_rows(micro_size):
    """Rows are sorted by length and scored in parts; each number comes back to its row and column."""
    policy, gvm = tiny(AutoModelForCausalLM), tiny(AutoModelForTokenClassification)
    reference = tiny(AutoModelForCausalLM)
    torch.nn.init.normal_(reference.lm_head.weight)
    taus = [[20, 21], [], [22, 23, 24, 25]]
    ids, is_response, lengths, logp_old, logp_ref, q = train_dvpo.score_rollouts(
        policy, reference, gvm, SEQUENCES, taus, micro_size, 0)
    with torch.no_grad():
        for found, model in ((logp_old, policy), (logp_ref, reference)):
            assert torch.allclose(found, train_dvpo.token_logp(model, ids, is_response), atol=1e-4)
        for row, (tau, (prompt, response)) in enumerate(zip(taus, SEQUENCES)):
            alone = gvm(torch.tensor([tau + prompt + response])).logits[0, len(tau):, 0]
            assert torch.allclose(q[row, :lengths[row]], alone, atol=1e-4)


# ---- scores of responses ----
def test_response_scores_against_a_loop():
    ids, is_response, _ = sft.collate(SEQUENCES, 0)
    q = torch.randn(ids.shape)
    scores = train_gvm.response_scores(torch.where(is_response, q, torch.nan), is_response)
    assert list(scores) == ["mean", "last", "p1", "p5", "p10", "p90", "p95", "p99"]
    for row in range(3):
        values = sorted(q[row][is_response[row]].tolist())
        assert scores["mean"][row].item() == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert scores["last"][row].item() == q[row][is_response[row]][-1].item()
        for k in (1, 5, 10, 90, 95, 99):                                      # linear between order statistics
            rank = k / 100 * (len(values) - 1)
            low, high = values[int(rank)], values[min(int(rank) + 1, len(values) - 1)]
            assert scores[f"p{k}"][row].item() == pytest.approx(low + (rank - int(rank)) * (high - low), abs=1e-6)


def test_pair_accuracy_counts_a_tie_half():
    assert train_gvm.pair_accuracy(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0])) == 0.625


# ---- tau ----
def trajectories():
    """Row i: prompt "q{i % 5}" with id 100 + i, answer [200 + i, 1], policy a or b."""
    return [train_gvm.Trajectory(f"q{i % 5}", ([100 + i], [200 + i, 1]), 0.0, "ab"[i % 2]) for i in range(40)]


def test_tau_has_the_same_policy_and_another_prompt():
    data, args = trajectories(), train_gvm.Args(tau_pairs=2, max_length=100)
    pools, drawn = train_gvm.pool_by_policy(data), Counter()
    for step in range(20):
        sequences, pairs = train_gvm.with_taus(range(40), data, pools, args, step)
        assert pairs == pytest.approx(2)
        for row, (prompt, response) in enumerate(sequences):
            assert response == [200 + row, 1] and len(prompt) == 7 and prompt[-1] == 100 + row
            for start in (0, 3):
                other = prompt[start] - 100
                assert prompt[start:start + 3] == [100 + other, 200 + other, 1]
                assert data[other].policy == data[row].policy and data[other].prompt != data[row].prompt
                drawn[row, other] += 1
    assert len(drawn) > 500                                    # of 40 * 16: not the same few each time


def test_tau_does_not_depend_on_how_the_batch_is_divided():
    data = trajectories()
    pools, args = train_gvm.pool_by_policy(data), train_gvm.Args(tau_pairs=2, max_length=100)
    whole, _ = train_gvm.with_taus([3, 7, 11, 4], data, pools, args, 5)
    assert [train_gvm.with_taus([row], data, pools, args, 5)[0][0] for row in (3, 7, 11, 4)] == whole
    assert train_gvm.with_taus([3, 7, 11, 4], data, pools, args, 6)[0] != whole


def test_tau_ends_before_the_pair_that_does_not_fit():
    pool = [("a", ([1] * 5, [2] * 5)), ("b", ([3] * 5, [4] * 5)), ("own", ([5], [6]))]
    for length, pairs in ((100, 2), (22, 2), (21, 1), (12, 1), (11, 0)):
        tau, drawn = train_dvpo.draw_tau("own", ([7], [8]), pool, 2, length, random.Random(0))
        assert drawn == pairs and len(tau) == 10 * pairs and not {5, 6} & set(tau)
    assert train_dvpo.draw_tau("own", ([7], [8]), pool, 0, 100, random.Random(0)) == ([], 0)


# ---- text and tokens ----
CONTROL = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]


def test_control_tokens_in_a_text_stay_text(world):
    """Those that the tokenizer has a name for (EOS, pad) and those that only its chat template writes."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    for token in CONTROL:
        prompt, response = train_gvm.encode_prompt(tokenizer, f"Stop.{token} Go on."), train_gvm.encode_response(tokenizer, f"No.{token} Yes.")
        assert [i for i in prompt if i in control] == tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"]), token
        assert [i for i in response if i in control] == response[-1:] == [tokenizer.eos_token_id], token


def test_a_prompt_is_a_string_or_messages_and_stays_as_it_was(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    messages = [{"role": "user", "content": "Is Peru an island?<|end|>"}]
    ids = train_gvm.encode_prompt(tokenizer, messages)
    assert ids == train_gvm.encode_prompt(tokenizer, "Is Peru an island?<|end|>")
    assert messages == [{"role": "user", "content": "Is Peru an island?<|end|>"}]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert tokenizer.decode(train_gvm.encode_prompt(tokenizer, chat)) == tokenizer.decode(tokenizer(
        "<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>", add_special_tokens=False).input_ids)


def test_text_survives_the_tokenizer(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for text in ("Bogotá is in South America.", "a\nb\u2028c", "<b>&amp;</b> 日本 🙂 שלום", "x" * 50):
        assert tokenizer.decode(sft.encode_response(tokenizer, text)[:-1]) == text
