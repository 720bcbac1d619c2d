"""The scripts' own main(), on a tiny world: what must change, what must not, and what is written."""
import json
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, equal, fails, read_lines, responses, script, weights, without_seconds
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sft
import train_dvpo
import train_gvm

ONLINE = ("dvpo", "ppo", "grpo", "remax")
RUN_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "args.json", "metrics.jsonl", "README.md"}


# ---- every script ----
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_is_a_model_folder_with_its_story(name, runs):
    run = runs(name)
    assert RUN_FILES <= {file.name for file in run.iterdir()}
    assert (run / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    args, metrics = json.loads((run / "args.json").read_text()), read_lines(run / "metrics.jsonl")
    assert args["seed"] == 1 and args["output"] == str(run)
    assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1)) and len(metrics) > 2
    timed = {"seconds_generate", "seconds_score", "seconds_update"} if name in ONLINE else {"seconds"}
    for record in metrics:
        assert {key for key in record if "seconds" in key} == timed and all(record[key] > 0 for key in timed)
    assert not equal(weights(run), weights(args["model"]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_seed_gives_the_same_run_and_another_one_another(name, runs, args, tmp_path):
    for folder, seed in (("other", 2), ("same", 1)):
        script(name).main(args(name, output=tmp_path / folder, seed=seed))
    assert equal(weights(runs(name)), weights(tmp_path / "same"))
    assert without_seconds(runs(name)) == without_seconds(tmp_path / "same")
    assert not equal(weights(tmp_path / "same"), weights(tmp_path / "other"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_micro_batches_do_not_change_the_update(name, args, tmp_path):
    """One forward pass or four, accumulated: every token weighs the same, in whichever micro-batch it falls."""
    fields = script(name).Args.__dataclass_fields__
    sizes = {"steps": 1, "mini_batch_size": 8, "ppo_epochs": 1} if name in ONLINE else {"epochs": 1}
    sizes = {field: size for field, size in sizes.items() if field in fields}
    for folder, micro in (("one", 16), ("four", 2 if name in ONLINE else 4)):
        script(name).main(args(name, output=tmp_path / folder, micro_batch_size=micro, **sizes))
    one, four = (without_seconds(tmp_path / folder) for folder in ("one", "four"))
    for metric in one[0]:
        assert one[0][metric] == pytest.approx(four[0][metric], rel=1e-3, abs=1e-5), metric
    a, b = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert max((a[key] - b[key]).abs().max() for key in a) < (2e-3 if name in ONLINE else 1e-2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_gradient_checkpointing_runs_layers_again_and_changes_nothing(name, args, tmp_path, monkeypatch):
    """transformers passes over it where a model is in eval mode; rollouts must keep their key-value cache."""
    calls, real = [], LlamaDecoderLayer.forward
    changes = {"steps": 2} if name in ONLINE else {"epochs": 1}

    def forward(self, hidden_states, *rest, **kwargs):
        calls.append((torch.is_grad_enabled(), kwargs.get("past_key_values") is not None))
        return real(self, hidden_states, *rest, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    counts = []
    for on in (False, True):
        calls.clear()
        script(name).main(args(name, output=tmp_path / str(on), gradient_checkpointing=on, **changes))
        counts.append((sum(grad for grad, _ in calls), sum(cache for grad, cache in calls if not grad)))
    assert counts[1][0] == 2 * counts[0][0] > 0                # with gradients: every layer twice
    assert counts[1][1] == counts[0][1]                        # without: the cache as before
    one, two = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gradient_that_is_not_finite_ends_the_run(name, args, tmp_path, monkeypatch):
    loss = {"sft": "sft_loss", "gvm": "td_loss", "dvpo": "ppo_loss", "ppo": "ppo_loss", "grpo": "grpo_loss", "remax": "remax_loss",
            "dpo": "dpo_loss", "reward_model": "bradley_terry_loss"}[name]
    real = getattr(script(name), loss)
    monkeypatch.setattr(script(name), loss, lambda *rest: real(*rest) * torch.nan)
    fails(lambda: script(name).main(args(name)), "gradient norm nan")
    assert not (tmp_path / "run" / "model.safetensors").exists()               # nothing that looks finished


# ---- SFT and the GVM ----
def test_sft_learns(runs):
    losses = [record["loss"] for record in read_lines(runs("sft") / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


def test_the_first_update_of_sft_is_known_from_the_base_model(args, runs, world):
    given = args("sft")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world / "base"), AutoTokenizer.from_pretrained(world / "base")
    rows, logps = read_lines(world / "data" / "sft.jsonl"), []
    for row in sft.row_order(160, 16, given.epochs, given.seed)[0].tolist():
        prompt = tokenizer(f"<|user|>{rows[row]['prompt']}<|assistant|>").input_ids
        response = [*tokenizer(rows[row]["response"]).input_ids, tokenizer.eos_token_id]
        said = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        logps += [said[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
    assert read_lines(runs("sft") / "metrics.jsonl")[0]["loss"] == pytest.approx(-sum(logps) / len(logps), rel=1e-4)


@pytest.mark.parametrize("supervision, tau_pairs", [("scores", 0), ("pairs", 0), ("scores", 1)])
@pytest.mark.parametrize("td_lambda", [0.0, 0.9, 1.0])
def test_the_first_update_of_the_gvm_is_known_from_the_data(supervision, tau_pairs, td_lambda, args, world):
    """The head is zero, so is q: the loss is the mean over value positions of the squared target (gamma * lambda)^(T-t) * r."""
    given = args("gvm", supervision=supervision, tau_pairs=tau_pairs, td_lambda=td_lambda, gamma=0.95, micro_batch_size=4)
    train_gvm.main(given)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if supervision == "scores":
        rows = read_lines(world / "data" / "scored.jsonl")
        scores = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
        scores, texts = (scores - scores.mean()) / scores.std(correction=0), [row["response"] for row in rows]
    else:
        rows = read_lines(world / "data" / "pairs.jsonl")
        texts = [row[side] for row in rows for side in ("chosen", "rejected")]
        scores = torch.tensor([1.0, -1.0] * len(rows))
    total, count = 0.0, 0
    for row in train_gvm.row_order(len(texts), 16, 1, given.seed)[0].tolist():
        length = len(tokenizer(texts[row]).input_ids) + 1                      # of the answer: with its end
        total += sum((scores[row].item() * (0.95 * td_lambda) ** n) ** 2 for n in range(length)) + (
            scores[row].item() * (0.95 * td_lambda) ** length) ** 2            # V(s_1)
        count += length + 1
    assert read_lines(Path(given.output) / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_gvm_starts_at_zero_from_the_sft_backbone(args, tmp_path):
    given = args("gvm", lr=0.0)
    train_gvm.main(given)
    started, base = weights(tmp_path / "run"), weights(given.model)
    assert (started["score.weight"] == 0).all() and (started["score.bias"] == 0).all()
    assert all(torch.equal(started[name], base[name]) for name in started if name.startswith("model."))


def test_the_saved_gvm_gives_the_same_numbers_in_stock_transformers(runs, args, world):
    model = AutoModelForTokenClassification.from_pretrained(runs("gvm")).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs("gvm"))
    pairs = train_gvm.read_trajectories(args("gvm"), tokenizer, "test_pairs", "pairs")
    with torch.no_grad():
        last = [model(torch.tensor([[*answer.sequence[0], *answer.sequence[1]]])).logits[0, -1, 0].item() for answer in pairs]
    ranked = sum(a > b for a, b in zip(last[0::2], last[1::2])) / (len(pairs) // 2)
    logged = read_lines(runs("gvm") / "metrics.jsonl")[-1]["pair_accuracy/last"]
    assert len(pairs) == 320 and logged == pytest.approx(ranked, abs=1.1 / 160)           # rounding may decide a tie
    made, rewards = model.config.gvm, torch.tensor([row["reward"] for row in read_lines(world / "data" / "scored.jsonl")])
    assert made["reward_mean"] == pytest.approx(rewards.mean().item())
    assert made["reward_std"] == pytest.approx(rewards.std(correction=0).item())


def test_rows_that_are_too_long_are_dropped_and_counted(args, world, capsys):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    lengths = [len(train_gvm.encode_prompt(tokenizer, row["prompt"])) + len(train_gvm.encode_response(tokenizer, row["response"]))
               for row in read_lines(world / "data" / "scored.jsonl")]
    limit = sorted(lengths)[100]
    kept = train_gvm.read_trajectories(args("gvm", max_length=limit), tokenizer, "scored", "scores")
    assert max(sum(map(len, answer.sequence)) for answer in kept) == limit
    assert len(kept) == sum(length <= limit for length in lengths) < 160
    assert f"{160 - len(kept)} longer than --max_length" in capsys.readouterr().out


# ---- DVPO ----
@pytest.mark.parametrize("changes", [{"supervision": "pairs", "tau_pairs": 1}, {"td_lambda": 1.0, "gamma": 0.9, "tau_pairs": 2}])
def test_every_kind_of_gvm_guides_dvpo(changes, args, tmp_path, monkeypatch):
    """gamma, K and the scale of the scores are the GVM's; tau is made of the batch's own other answers."""
    train_gvm.main(args("gvm", output=tmp_path / "gvm", **changes))
    made = json.loads((tmp_path / "gvm" / "config.json").read_text())["gvm"]
    assert {name: made[name] for name in changes} == changes
    assert ((made["reward_mean"], made["reward_std"]) == (0.0, 1.0)) == ("supervision" in changes)
    scored, real, gammas = [], train_dvpo.score_rollouts, []
    monkeypatch.setattr(train_dvpo, "score_rollouts", lambda *rest: scored.append(rest) or real(*rest))
    monkeypatch.setattr(train_dvpo, "advantage_gae", lambda q, kl, mask, gamma, *rest: gammas.append(gamma) or q * mask)
    train_dvpo.main(args("dvpo", gvm=tmp_path / "gvm", output=tmp_path / "dvpo", steps=1))
    (_, _, _, sequences, taus, *_), = scored
    assert gammas == [made["gamma"]] and len(taus) == 8
    for (prompt, _), tau in zip(sequences, taus):
        pairs = {(*question, *answer) for question, answer in sequences if question != prompt}
        assert any(tuple(tau) == sum(chosen, ()) for chosen in
                   ([(a,) for a in pairs] if made["tau_pairs"] == 1 else [(a, b) for a in pairs for b in pairs if a != b]))


def test_the_paper_to_the_letter(args, tmp_path, monkeypatch):
    """--td_lambda 0, --advantage q --whiten false: what the update gets is Q + r^KL, exactly, and Q is the GVM's."""
    train_gvm.main(args("gvm", output=tmp_path / "gvm", td_lambda=0.0))
    seen, scored, update = [], train_dvpo.score_rollouts, train_dvpo.ppo_update
    monkeypatch.setattr(train_dvpo, "score_rollouts", lambda *rest: seen.append([*scored(*rest), rest[3]]) or seen[-1][:-1])
    monkeypatch.setattr(train_dvpo, "ppo_update", lambda a, policy, optimizer, batch, *rest: (
        seen[-1].append(batch), update(a, policy, optimizer, batch, *rest))[1])
    train_dvpo.main(args("dvpo", gvm=tmp_path / "gvm", advantage="q", whiten=False, lr=1e-2, kl_coef=0.3, steps=2))
    gvm = AutoModelForTokenClassification.from_pretrained(tmp_path / "gvm").eval()
    scale, values = gvm.config.gvm, [row["value"] for row in read_lines(tmp_path / "run" / "rollouts.jsonl")]
    for ids, is_response, lengths, logp_old, logp_ref, q, sequences, batch in seen:
        assert torch.equal(batch[0], ids) and torch.equal(batch[1], is_response) and torch.equal(batch[2], logp_old)
        assert torch.equal(batch[3], torch.where(is_response, q - 0.3 * (logp_old - logp_ref), 0.0))
        for (b, start, end), (prompt, response) in zip(responses(is_response), sequences):
            alone = gvm(torch.tensor([[*prompt, *response]])).logits[0, start:, 0]
            assert (start, end) == (len(prompt), len(prompt) + len(response)) and torch.allclose(q[b, start:end], alone, atol=1e-4)
            assert values.pop(0) == pytest.approx(alone[-1].item() * scale["reward_std"] + scale["reward_mean"], abs=1e-4)
    assert (seen[1][3] - seen[1][4]).abs().max() > 1e-3        # in the second step the policy is another one


@pytest.mark.parametrize("advantage", ["gae", "released"])
def test_advantages_are_whitened_by_default(advantage, args, monkeypatch):
    seen, update = [], train_dvpo.ppo_update
    monkeypatch.setattr(train_dvpo, "ppo_update", lambda a, policy, optimizer, batch, *rest: (
        seen.append(batch), update(a, policy, optimizer, batch, *rest))[1])
    train_dvpo.main(args("dvpo", advantage=advantage, steps=2))
    for _, is_response, _, x in seen:
        assert x[is_response].mean().item() == pytest.approx(0, abs=1e-4) and x[is_response].std(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert (x[~is_response] == 0).all()


def test_only_the_policy_learns(args, runs, monkeypatch):
    """Before and after main(): GVM and reference bit-identical in memory and without gradients, the policy changed."""
    models, real, optimized, optimizer = [], train_dvpo.load_model, [], torch.optim.AdamW
    monkeypatch.setattr(train_dvpo, "load_model", lambda *a, **k: models.append(real(*a, **k)) or models[-1])
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **k: optimized.append(list(p)) or optimizer(optimized[-1], **k))
    train_dvpo.main(args("dvpo"))
    policy, reference, gvm = models
    start = AutoModelForCausalLM.from_pretrained(runs("sft")).state_dict()
    assert equal(reference.state_dict(), start) and not equal(policy.state_dict(), start)
    assert equal(gvm.state_dict(), AutoModelForTokenClassification.from_pretrained(runs("gvm")).state_dict())
    assert not any(p.requires_grad or p.grad is not None for model in (reference, gvm) for p in model.parameters())
    assert len(optimized) == 1 and {id(p) for p in optimized[0]} == {id(p) for p in policy.parameters()}


@pytest.mark.parametrize("name", ["dvpo", "ppo", "grpo"])
def test_the_first_ratio_is_1_or_the_run_ends(name, runs, args, monkeypatch):
    """Not 1, as dropout would make it, or log-probabilities from another code path."""
    assert all(record["ratio_error"] < 1e-4 for record in read_lines(runs(name) / "metrics.jsonl"))
    real = script(name).token_logp
    monkeypatch.setattr(script(name), "token_logp", lambda m, *a: real(m, *a) + 0.01 * torch.is_grad_enabled())
    fails(lambda: script(name).main(args(name)), "the first ratio is 0.01 away from 1")


@pytest.mark.parametrize("name", ONLINE)
def test_rollouts_and_metrics_tell_the_same(name, runs):
    metrics, rollouts = read_lines(runs(name) / "metrics.jsonl"), read_lines(runs(name) / "rollouts.jsonl")
    assert len(rollouts) == 24
    for record in metrics:
        mine = [row for row in rollouts if row["step"] == record["step"]]
        for metric in set(mine[0]) & set(record) - {"step"}:
            assert record[metric] == pytest.approx(sum(row[metric] for row in mine) / 8, abs=1e-3), metric
        assert {"value" if name == "dvpo" else "reward", "kl", "entropy", "response_length", "eos_rate"} <= set(mine[0]) & set(record)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(metrics[-1]["kl"]) > 1e-4


@pytest.mark.parametrize("name", ["dvpo", "ppo", "grpo"])
def test_the_target_kl_ends_the_epochs(name, args, tmp_path):
    for folder, target in (("low", 1e-9), ("high", 1e9)):
        script(name).main(args(name, output=tmp_path / folder, target_kl=target, ppo_epochs=4, lr=1e-3, steps=2))
    low, high = ([record["updates"] for record in read_lines(tmp_path / folder / "metrics.jsonl")] for folder in ("low", "high"))
    assert low == [2, 2] and high == [8, 8]                    # of 4 epochs of 2 mini-batches


def test_a_gvm_with_a_zero_head_teaches_nothing(args, tmp_path):
    """Q = 0 everywhere, KL = 0 at the start: no advantage, no gradient, and the policy stays the SFT model, bit by bit."""
    train_gvm.main(args("gvm", output=tmp_path / "gvm", lr=0.0))
    given = args("dvpo", gvm=tmp_path / "gvm")
    train_dvpo.main(given)
    assert equal(weights(tmp_path / "run"), weights(given.model))


def test_dvpo_raises_what_the_gvm_values(args, tmp_path):
    """The policy drifts to what the frozen GVM likes, whatever that is."""
    train_dvpo.main(args("dvpo", steps=25, batch_size=32, mini_batch_size=32, micro_batch_size=32, lr=5e-3, kl_coef=0.0,
                         max_response_length=16))
    values = [record["value"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert min(values[-5:]) > max(values[:5])
