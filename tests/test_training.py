"""The training scripts' own main(), on a tiny world: what must change, what must not, and what is written."""
import json
from pathlib import Path

import pytest
import torch
from conftest import read_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sft
import train_dvpo
import train_gvm
from baselines import dpo, grpo, ppo, remax, reward_model

RUN_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "args.json", "metrics.jsonl", "README.md"}


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_run_folders_are_whole(sft_run, gvm_run, dvpo_run):
    for run in (sft_run, gvm_run, dvpo_run):
        assert RUN_FILES <= {file.name for file in run.iterdir()} and not (run / ".saving").exists()
        assert "Made by `" in (run / "README.md").read_text()
        assert json.loads((run / "args.json").read_text())["seed"] == 1


def test_sft_learns(sft_run):
    losses = [record["loss"] for record in read_lines(sft_run / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("script, args_name", [(sft, "sft_args"), (train_gvm, "gvm_args"), (train_dvpo, "dvpo_args")])
def test_the_same_seed_gives_the_same_weights_and_another_one_others(script, args_name, again, tmp_path, request):
    args, first = request.getfixturevalue(args_name), request.getfixturevalue(args_name.replace("args", "run"))
    for name, seed in (("other", 2), ("same", 1)):
        script.main(again(args, output=str(tmp_path / name), seed=seed))
    assert equal(weights(first), weights(tmp_path / "same"))
    assert not equal(weights(tmp_path / "same"), weights(tmp_path / "other"))


@pytest.mark.parametrize("script, args", [(sft, "sft_args"), (train_gvm, "gvm_args")])
def test_micro_batches_do_not_change_the_update(script, args, again, tmp_path, request):
    """16 rows in one forward pass, or 4 x 4 accumulated: the same mean over the update's tokens."""
    args = request.getfixturevalue(args)
    for name, size in (("one", 16), ("four", 4)):
        script.main(again(args, output=str(tmp_path / name), micro_batch_size=size, lr=1e-3))
    one, four = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "four"))
    for a, b in zip(one, four):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_gvm_starts_at_zero_from_the_sft_backbone(gvm_args, again, tmp_path):
    train_gvm.main(again(gvm_args, lr=0.0))
    started, base = weights(tmp_path / "run"), weights(Path(gvm_args.model))
    assert (started["score.weight"] == 0).all()
    assert all(torch.equal(started[name], base[name]) for name in started if name.startswith("model."))


def test_the_saved_gvm_gives_the_same_numbers_in_stock_transformers(gvm_run, gvm_args, world):
    model = AutoModelForTokenClassification.from_pretrained(gvm_run).eval()
    tokenizer = AutoTokenizer.from_pretrained(gvm_run)
    pairs, _ = train_gvm.read_trajectories(gvm_args, tokenizer, "test_pairs", "pairs")
    correct, ties = 0, 0
    for chosen, rejected in zip(pairs[0::2], pairs[1::2]):
        last = [model(torch.tensor([[*prompt, *response]])).logits[0, -1, 0].item()
                for prompt, response in (chosen.sequence, rejected.sequence)]
        correct, ties = correct + (last[0] > last[1]), ties + (last[0] == last[1])
    logged = read_lines(gvm_run / "metrics.jsonl")[-1]["pair_accuracy"]["last"]
    assert logged == pytest.approx((correct + ties / 2) / (len(pairs) // 2), abs=0.5 / (len(pairs) // 2))
    made = model.config.gvm
    rewards = torch.tensor([row["reward"] for row in read_lines(world / "data" / "scored.jsonl")])
    assert made["reward_mean"] == pytest.approx(rewards.mean().item())
    assert made["reward_std"] == pytest.approx(rewards.std(correction=0).item())


@pytest.mark.parametrize("changes", [{"supervision": "pairs"}, {"tau_pairs": 2}, {"supervision": "pairs", "tau_pairs": 1},
                                     {"td_lambda": 0.0}, {"td_lambda": 1.0, "gamma": 0.9}])
def test_every_kind_of_gvm_trains_and_guides_dvpo(changes, gvm_args, dvpo_args, again, tmp_path):
    train_gvm.main(again(gvm_args, output=str(tmp_path / "gvm"), **changes))
    made = json.loads((tmp_path / "gvm" / "config.json").read_text())["gvm"]
    assert made["tau_pairs"] == changes.get("tau_pairs", 0) and made["gamma"] == changes.get("gamma", 1.0)
    if changes.get("supervision") == "pairs":
        assert (made["reward_mean"], made["reward_std"]) == (0.0, 1.0)
    train_dvpo.main(again(dvpo_args, gvm=str(tmp_path / "gvm"), output=str(tmp_path / "dvpo"), steps=1))
    assert (tmp_path / "dvpo" / "model.safetensors").exists()


def test_dvpo_reads_k_from_the_gvm(gvm_args, dvpo_args, again, tmp_path, monkeypatch):
    train_gvm.main(again(gvm_args, output=str(tmp_path / "gvm"), tau_pairs=2))
    asked, real = [], train_dvpo.with_tau
    monkeypatch.setattr(train_dvpo, "with_tau", lambda *a: asked.append((a, real(*a))) or asked[-1][1])
    train_dvpo.main(again(dvpo_args, gvm=str(tmp_path / "gvm"), output=str(tmp_path / "dvpo"), steps=1))
    assert len(asked) == 8
    for (prompt, sequence, pool, k, *_), (behind, response) in asked:
        assert k == 2 and response == sequence[1] and behind[-len(sequence[0]):] == list(sequence[0])
        tau = behind[:-len(sequence[0])]
        parts = {(*question, *answer) for other, (question, answer) in pool if other != prompt}
        assert any((*a, *b) == tuple(tau) for a in parts for b in parts if a != b)    # the batch's own other answers


# ---- every script ----
@pytest.mark.parametrize("script, fixture", [(sft, "sft_args"), (train_gvm, "gvm_args"), (train_dvpo, "dvpo_args"), (ppo, "ppo_args"),
                                             (grpo, "grpo_args"), (remax, "remax_args"), (dpo, "dpo_args"),
                                             (reward_model, "reward_model_args")], ids=lambda x: x if isinstance(x, str) else "")
def test_gradient_checkpointing_runs_layers_again_and_changes_nothing(script, fixture, request, again, tmp_path, monkeypatch):
    """transformers passes over it where a model is in eval mode; rollouts must keep their key-value cache."""
    args, calls, real = request.getfixturevalue(fixture), [], LlamaDecoderLayer.forward
    changes = {"epochs": 1} if hasattr(args, "epochs") else {"steps": 2}

    def forward(self, hidden_states, *rest, **kwargs):
        calls.append((torch.is_grad_enabled(), kwargs.get("past_key_values") is not None))
        return real(self, hidden_states, *rest, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    counts = []
    for on in (False, True):
        calls.clear()
        script.main(again(args, output=str(tmp_path / f"run{on}"), gradient_checkpointing=on, **changes))
        counts.append((sum(grad for grad, _ in calls), sum(cache for grad, cache in calls if not grad)))
    assert counts[1][0] == 2 * counts[0][0] > 0                # with gradients: every layer twice
    assert counts[1][1] == counts[0][1]                        # without: the cache as before
    one, two = weights(tmp_path / "runFalse"), weights(tmp_path / "runTrue")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


# ---- DVPO ----
def test_only_the_policy_learns(dvpo_args, dvpo_run, again, monkeypatch):
    """Before and after main(): GVM and reference bit-identical in memory and without gradients, the policy changed."""
    models, real, optimized = [], train_dvpo.load, []
    monkeypatch.setattr(train_dvpo, "load", lambda *a, **k: models.append(real(*a, **k)) or models[-1])
    optimizer = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **k: optimized.append(list(p)) or optimizer(optimized[-1], **k))
    train_dvpo.main(again(dvpo_args))
    policy, reference, gvm = [model for model in models if isinstance(model, torch.nn.Module)]
    start = AutoModelForCausalLM.from_pretrained(dvpo_args.model).state_dict()
    assert equal(reference.state_dict(), start) and not equal(policy.state_dict(), start)
    assert equal(gvm.state_dict(), AutoModelForTokenClassification.from_pretrained(dvpo_args.gvm).state_dict())
    assert not any(p.requires_grad or p.grad is not None for model in (reference, gvm) for p in model.parameters())
    assert len(optimized) == 1 and {id(p) for p in optimized[0]} == {id(p) for p in policy.parameters()}


def test_the_ratio_is_1_before_the_first_update_of_every_batch(dvpo_run):
    assert [record["ratio_error"] for record in read_lines(dvpo_run / "metrics.jsonl")] == pytest.approx([0] * 3, abs=1e-5)


def test_a_ratio_that_is_not_1_stops_the_run(dvpo_args, again, monkeypatch):
    """As dropout, or log-probabilities from another code path, would make it."""
    real = train_dvpo.token_logp
    monkeypatch.setattr(train_dvpo, "token_logp", lambda m, *a: real(m, *a) + 0.01 * torch.is_grad_enabled())
    with pytest.raises(SystemExit, match="ratio differs from 1"):
        train_dvpo.main(again(dvpo_args))


def test_the_rollouts_and_metrics_are_logged(dvpo_run):
    metrics, rollouts = read_lines(dvpo_run / "metrics.jsonl"), read_lines(dvpo_run / "rollouts.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3] and len(rollouts) == 24
    for record in metrics:
        mine = [row for row in rollouts if row["step"] == record["step"]]
        assert record["value"] == pytest.approx(sum(row["value"] for row in mine) / 8, abs=1e-3)
        assert record["kl"] == pytest.approx(sum(row["kl"] for row in mine) / 8, abs=1e-3)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] != 0


@pytest.mark.parametrize("changes", [{"advantage": "q"}, {"advantage": "gae"}, {"advantage": "released"},
                                     {"truncated": "mask"}, {"truncated": "penalise"}])
def test_every_kind_of_advantage_and_truncation_trains(changes, dvpo_args, again, tmp_path):
    train_dvpo.main(again(dvpo_args, steps=2, max_response_length=8, **changes))
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())


def test_a_batch_in_which_every_response_is_cut_teaches_nothing_when_masked(dvpo_args, again, tmp_path):
    train_dvpo.main(again(dvpo_args, steps=2, max_response_length=2, truncated="mask"))
    assert equal(weights(tmp_path / "run"), weights(Path(dvpo_args.model)))


def test_the_target_kl_ends_the_epochs(dvpo_args, again, tmp_path):
    for name, target in (("low", 1e-9), ("high", 1e9)):
        train_dvpo.main(again(dvpo_args, output=str(tmp_path / name), target_kl=target, ppo_epochs=4, lr=1e-3))
    low, high = ([record["updates"] for record in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("low", "high"))
    assert low == [1, 1, 1] and high == [8, 8, 8]                            # updates until it was passed, of 4 x 2


def test_a_gvm_with_a_zero_head_teaches_nothing(gvm_args, dvpo_args, again, tmp_path):
    """Q = 0 everywhere, KL = 0 at the start: no advantage, no gradient, and the policy stays the SFT model, bit by bit."""
    train_gvm.main(again(gvm_args, output=str(tmp_path / "gvm"), lr=0.0))
    train_dvpo.main(again(dvpo_args, gvm=str(tmp_path / "gvm"), output=str(tmp_path / "dvpo")))
    assert equal(weights(tmp_path / "dvpo"), weights(Path(dvpo_args.model)))


def test_dvpo_raises_what_the_gvm_values(gvm_args, dvpo_args, again, tmp_path):
    """The policy drifts to what the frozen GVM likes, whatever that is."""
    train_dvpo.main(again(dvpo_args, steps=30, batch_size=32, mini_batch_size=32, micro_batch_size=32, lr=5e-3,
                          kl_coef=0.0, max_response_length=16))
    values = [record["value"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert min(values[-5:]) > max(values[:5])


def test_a_gradient_that_is_not_finite_stops_before_the_weights(dvpo_args, gvm_args, sft_args, again, tmp_path, monkeypatch):
    for name, script, loss, args in (("sft", sft, "sft_loss", sft_args), ("gvm", train_gvm, "td_loss", gvm_args),
                                     ("dvpo", train_dvpo, "ppo_loss", dvpo_args)):
        real = getattr(script, loss)
        monkeypatch.setattr(script, loss, lambda *a, real=real: real(*a) * torch.nan)
        with pytest.raises(SystemExit, match="gradient norm nan at (update|step) 1, rows .*weights before it"):
            script.main(again(args, output=str(tmp_path / name)))
        saved = weights(tmp_path / name / "checkpoints" / "before_nan")
        assert all(torch.isfinite(w).all() for w in saved.values())
        assert not (tmp_path / name / "model.safetensors").exists()            # nothing that looks finished
