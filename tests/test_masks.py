"""Padding, EOS and tau: what a row's numbers may depend on, and what not."""
import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from transformers import AutoTokenizer, Gemma2Config, LlamaConfig

import evaluate
import sft
import train_dvpo
import train_gvm

SEQUENCES = [([5, 6, 7], [8, 9, 10, 1]), ([5], [11, 1]), ([5, 6, 7, 8, 9], [12, 13, 14, 15, 16, 17])]


@pytest.fixture(scope="module")
def config():
    torch.manual_seed(0)
    return LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                       pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1, initializer_range=0.5,
                       classifier_dropout=0.0)


@pytest.fixture(scope="module")
def policy(config):
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def gvm(config):
    return AutoModelForTokenClassification.from_config(config).eval()


def test_collate():
    ids, is_token, is_response = sft.collate(SEQUENCES, 0, "cpu")
    assert ids.tolist()[1] == [5, 11, 1] + [0] * 8 and ids.shape == is_token.shape == is_response.shape == (3, 11)
    for row, (prompt, response) in enumerate(SEQUENCES):
        assert ids[row][is_token[row]].tolist() == prompt + response
        assert ids[row][is_response[row]].tolist() == response


@pytest.mark.parametrize("pad_id", [0, 1])
def test_masks_do_not_depend_on_the_pad_token(pad_id):
    """pad == EOS (1): a mask made from ids would drop every EOS."""
    ids, is_token, is_response = sft.collate(SEQUENCES, pad_id, "cpu")
    assert (ids[is_response] == 1).sum() == 2 and is_token.sum() == sum(len(p) + len(r) for p, r in SEQUENCES)


@pytest.mark.parametrize("pad_id", [0, 1])
def test_eos_is_trained(policy, pad_id):
    """One gradient step on the SFT loss makes EOS likelier at the end of the answers, whichever token pads."""
    model = AutoModelForCausalLM.from_config(policy.config)
    model.load_state_dict(policy.state_dict())
    ids, is_token, is_response = sft.collate(SEQUENCES[:2], pad_id, "cpu")

    def eos_logp():
        logp = train_dvpo.token_logp(model, ids, is_response)
        return logp[train_gvm.last_token(is_response)].sum()

    before = eos_logp().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sft.sft_loss(sft.token_logp(model, ids, is_response), is_response).backward()
    optimizer.step()
    assert eos_logp().item() > before + 0.01


def test_a_rows_numbers_do_not_depend_on_its_batch_or_padding(policy, gvm):
    """Alone without padding, or in a batch, padded on the right, without a mask: the same log-probabilities and values."""
    ids, _, is_response = sft.collate(SEQUENCES, 0, "cpu")
    with torch.no_grad():
        logp = train_dvpo.token_logp(policy, ids, is_response)
        q = gvm(input_ids=ids).logits.squeeze(-1)
        for row, (prompt, response) in enumerate(SEQUENCES):
            alone, _, tail = sft.collate([(prompt, response)], 0, "cpu")
            assert torch.allclose(train_dvpo.token_logp(policy, alone, tail)[tail], logp[row][is_response[row]], atol=1e-5)
            assert torch.allclose(gvm(input_ids=alone).logits.squeeze(-1)[tail], q[row][is_response[row]], atol=1e-5)


def test_junk_in_the_padding_changes_nothing(policy, gvm):
    ids, is_token, is_response = sft.collate(SEQUENCES, 0, "cpu")
    other = torch.where(is_token, ids, 23)
    with torch.no_grad():
        for function in (lambda x: train_dvpo.token_logp(policy, x, is_response), lambda x: gvm(input_ids=x).logits.squeeze(-1)):
            assert torch.allclose(function(ids)[is_response], function(other)[is_response], atol=1e-6)


def test_token_logp_is_at_the_tokens_own_position(policy):
    prompt, response = SEQUENCES[0]
    ids, is_token, is_response = sft.collate([(prompt, response)], 0, "cpu")
    with torch.no_grad():
        logp = train_dvpo.token_logp(policy, ids, is_response)
        assert (logp[~is_response] == 0).all()
        for t, token in enumerate(prompt + response):
            if t >= len(prompt):
                seen = torch.tensor([(prompt + response)[:t]])
                assert logp[0, t].item() == pytest.approx(policy(seen).logits[0, -1].log_softmax(-1)[token].item(),
                                                          abs=1e-5)


@pytest.mark.parametrize("at_once", [2 ** 26, 32 * 5, 1])
def test_token_logp_and_its_gradient_are_those_of_the_full_logits(policy, at_once, monkeypatch):
    """In one chunk, in chunks of five positions, position by position."""
    monkeypatch.setattr(train_dvpo, "LOGITS_AT_ONCE", at_once)
    ids, is_token, is_response = sft.collate(SEQUENCES, 0, "cpu")
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    logits = policy(input_ids=ids, attention_mask=is_token).logits[:, :-1]
    full = torch.nn.functional.pad(logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1), (1, 0))
    ours = train_dvpo.token_logp(policy, ids, is_response)
    assert torch.allclose(ours[is_response], full[is_response], atol=1e-6)
    gradients = [torch.autograd.grad((logp * weight)[is_response].sum(), list(policy.parameters())) for logp in (ours, full)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients)) and gradients[0][0].abs().sum() > 0.1


def test_no_float32_copy_of_all_logits(policy, monkeypatch):
    """In a bfloat16 model float32 logits exist for a chunk at a time, forward and backward."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.shape[-1:] == (32,):
                largest.append(out.shape.numel())
            return out

    model = AutoModelForCausalLM.from_config(policy.config, dtype=torch.bfloat16).eval()
    monkeypatch.setattr(train_dvpo, "LOGITS_AT_ONCE", 32 * 2)
    ids, is_token, is_response = sft.collate(SEQUENCES, 0, "cpu")
    kept = []
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        train_dvpo.token_logp(model, ids, is_response).sum().backward()
    assert is_response.sum() > 4 and max(largest) == 32 * 2
    assert not [x for x in kept if x.dtype == torch.float32 and x.shape[-1:] == (32,)]         # none is kept for the backward pass


def test_q_is_read_after_the_action(gvm):
    """Q(tau, s_t, a_t) changes with a_t, and not with a_{t+1}."""
    def q_at(response, t):
        ids, is_token, is_response = sft.collate([([5, 6], response)], 0, "cpu")
        with torch.no_grad():
            values = train_dvpo.token_values(gvm, [([5, 6], response)], [([5, 6], response)], ids.shape[1], 0)
        return values[is_response][t].item()

    assert q_at([8, 9, 10], 1) != pytest.approx(q_at([8, 12, 10], 1))
    assert q_at([8, 9, 10], 1) == pytest.approx(q_at([8, 9, 12], 1))


def test_token_values_cut_tau_off(gvm):
    """With tau in front, each token's value is the one the GVM gives when it reads [tau | prompt | response]."""
    taus = [[20, 21], [], [22, 23, 24, 25]]
    behind = [(tau + prompt, response) for tau, (prompt, response) in zip(taus, SEQUENCES)]
    ids, _, is_response = sft.collate(SEQUENCES, 0, "cpu")
    with torch.no_grad():
        q = train_dvpo.token_values(gvm, SEQUENCES, behind, ids.shape[1], 0)
        assert q.shape == ids.shape
        for row, (prompt, response) in enumerate(behind):
            alone = gvm(torch.tensor([prompt + response])).logits[0, :, 0]
            assert torch.allclose(q[row][is_response[row]], alone[len(prompt):], atol=1e-5)
            last_prompt = len(SEQUENCES[row][0]) - 1
            assert q[row, last_prompt].item() == pytest.approx(alone[len(prompt) - 1].item(), abs=1e-5)     # V(s_1)


# ---- scores of responses ----
def test_response_scores_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    ids, _, is_response = sft.collate(SEQUENCES, 0, "cpu")
    q = torch.randn(ids.shape, generator=generator)
    scores = train_gvm.response_scores(torch.where(is_response, q, torch.nan), is_response)
    assert list(scores) == ["mean", "last", "p1", "p5", "p10", "p90", "p95", "p99"]
    for row in range(3):
        values = sorted(q[row][is_response[row]].tolist())
        assert scores["mean"][row].item() == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert scores["last"][row].item() == q[row][is_response[row]][-1].item()
        for k in (1, 5, 10, 90, 95, 99):                                      # linear between order statistics
            rank = k / 100 * (len(values) - 1)
            low = values[int(rank)]
            high = values[min(int(rank) + 1, len(values) - 1)]
            assert scores[f"p{k}"][row].item() == pytest.approx(low + (rank - int(rank)) * (high - low), abs=1e-6)


def test_pair_accuracy_counts_a_tie_half():
    assert train_gvm.pair_accuracy(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0])) == 0.625


@pytest.mark.parametrize("pad_id", [0, 1])
def test_scores_of_responses_do_not_depend_on_the_batch(config, pad_id):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config).eval()
    together = train_gvm.score_responses(model, SEQUENCES, 3, pad_id)
    for row, sequence in enumerate(SEQUENCES):
        alone = train_gvm.score_responses(model, [sequence], 1, pad_id)
        for name in together:
            assert together[name][row].item() == pytest.approx(alone[name][0].item(), abs=1e-5)


# ---- rollouts ----
@pytest.mark.parametrize("how", ["padded", "continuous"])
def test_rollout_samples_from_the_policy_whatever_its_generation_config_says(policy, how):
    """A generation_config with top_k = 1 and a repetition penalty must not change the samples, nor be changed."""
    class Tokenizer:
        pad_token_id, eos_token_id = 0, 1

    prompts = [[5, 6, 7]] * (4000 if how == "padded" else 1000)
    with torch.no_grad():
        expected = policy(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)
    policy.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1)
    before = policy.generation_config.to_dict()
    torch.manual_seed(0)
    first = torch.tensor([row[0] for row in train_dvpo.rollout(policy, Tokenizer, prompts, 2, how)])
    seen = torch.bincount(first, minlength=32) / len(prompts)
    assert (seen - expected).abs().max() < 4 * (0.25 / len(prompts)) ** 0.5    # four standard deviations of a share
    assert policy.generation_config.to_dict() == before


@pytest.mark.parametrize("how", ["padded", "continuous"])
@pytest.mark.parametrize("pad_id", [0, 1])
def test_rollout_ends_at_eos_and_keeps_what_was_sampled(policy, pad_id, how):
    class Tokenizer:
        pad_token_id, eos_token_id = pad_id, 1

    torch.manual_seed(0)
    rows = train_dvpo.rollout(policy, Tokenizer, [[5], [5, 6, 7], [9, 8]] * 50, 12, how)
    assert len(rows) == 150 and any(row[-1] == 1 for row in rows)
    for row in rows:
        assert 1 not in row[:-1] and (row[-1] == 1 or len(row) == 12)


# ---- tau ----
def test_tau_has_the_same_policy_and_another_prompt():
    trajectories = [train_gvm.Trajectory(f"q{i % 5}", ([100 + i], [200 + i, 1]), 0.0, "ab"[i % 2]) for i in range(40)]
    for row in range(40):
        for seed in range(5):
            args = train_gvm.Args(tau_pairs=2, max_length=100)
            (prompt, response), = train_gvm.with_taus([trajectories[row]], train_gvm.pool_by_policy(trajectories), args, [seed])
            assert response == [200 + row, 1] and prompt[-1] == 100 + row and len(prompt) == 7
            for question, answer in ((prompt[0], prompt[1]), (prompt[3], prompt[4])):
                other = question - 100
                assert answer == question + 100
                assert trajectories[other].policy == trajectories[row].policy
                assert trajectories[other].prompt != trajectories[row].prompt


def test_tau_is_left_out_whole_where_it_does_not_fit():
    pool = [("a", ([1] * 5, [2] * 5)), ("b", ([3] * 5, [4] * 5)), ("own", ([5], [6]))]
    for room, pairs in ((100, 2), (22, 2), (21, 1), (12, 1), (11, 0)):
        prompt, response = train_dvpo.with_tau("own", ([7], [8]), pool, 2, room, random.Random(0))
        assert len(prompt) == 10 * pairs + 1 and response == [8]


def test_too_few_rows_for_tau_is_an_error():
    with pytest.raises(SystemExit, match="tau"):
        train_gvm.with_tau("own", ([7], [8]), [("own", ([5], [6]))], 1, 100, random.Random(0))


# ---- text and tokens ----
def test_special_tokens_in_a_text_stay_text(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    ids = evaluate.encode_response(tokenizer, "Stop.<|end|> Go on.")
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_text_survives_the_tokenizer(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for text in ("Bogotá is in South America.", "a\nb\u2028c", "<b>&amp;</b> 日本 🙂 שלום", "x" * 50):
        assert tokenizer.decode(sft.encode_response(tokenizer, text)[:-1]) == text


def test_continuous_rollouts_are_the_padded_ones_where_nothing_is_random(policy):
    """In the order of the prompts; and the same seed gives the same samples, without which no run could be resumed."""
    class Tokenizer:
        pad_token_id, eos_token_id = 0, 1

    prompts = [[row % 30 + 2] * (row % 7 + 1) for row in range(40)]
    padded, continuous = (train_dvpo.rollout(policy, Tokenizer, prompts, 9, how, greedy=True) for how in ("padded", "continuous"))
    assert padded == continuous and len({tuple(row) for row in padded}) > 20
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(train_dvpo.rollout(policy, Tokenizer, prompts, 9, "continuous"))
    assert samples[0] == samples[1] != train_dvpo.rollout(policy, Tokenizer, prompts, 9, "continuous")


def test_logits_that_are_not_the_output_layers_are_refused():
    """Gemma 2 caps its logits: the output layer applied by hand would give others."""
    config = Gemma2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
                          num_key_value_heads=2, initializer_range=2.0, final_logit_softcapping=1.0)
    with pytest.raises(SystemExit, match="logits are not what its output layer gives"):
        train_dvpo.TokenLogp(AutoModelForCausalLM.from_config(config).eval())
    config.final_logit_softcapping = None
    train_dvpo.TokenLogp(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("answers, error", [({"a": SimpleNamespace(generated_tokens=[5], error="out of memory")}, "out of memory"),
                                            ({}, "some prompts have no answer")])
def test_failed_continuous_rollouts_are_no_answers(policy, monkeypatch, answers, error):
    """transformers returns what there was before an error, or leaves requests out."""
    monkeypatch.setattr(type(policy), "generate_batch", lambda *rest: answers)
    with pytest.raises(SystemExit, match=error):
        train_dvpo.rollout(policy, SimpleNamespace(pad_token_id=0, eos_token_id=1), [[5]], 4, "continuous")
