"""experiments/compute.py: what it counts is what torch counts, and it measures the scripts as they are."""
import json
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import train_dvpo

sys.path.insert(0, str(ROOT / "experiments"))
import compute  # noqa: E402


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(**compute.SHAPES["tiny"], bos_token_id=None)


def test_floating_point_operations_are_those_that_torch_counts(config):
    """Of one forward and backward pass of token_logp: prompt 40, answer 24. torch does not count attention on CPU."""
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 1000, (1, 64))
    with FlopCounterMode(display=False) as counter:
        train_dvpo.token_logp(model, ids, (torch.arange(64) >= 40)[None]).sum().backward()
    attention = 6 * config.num_hidden_layers * config.hidden_size * 64 ** 2
    assert compute.update_flops(config, [24], 40, 1, 1) - attention == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_weights_are_those_of_the_model():
    for shape in ("tiny", "llama-3.2-3b"):
        config = LlamaConfig(**compute.SHAPES[shape], bos_token_id=None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        matrices = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name and weight.dim() == 2)
        assert compute.body_weights(config) == matrices


def test_the_naive_way_gives_the_same_log_probabilities(config):
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 1000, (3, 20))
    is_token = torch.arange(20) < torch.tensor([20, 12, 15])[:, None]
    is_response = is_token & (torch.arange(20) >= 8)
    ours, theirs = (f(model, ids, is_response) for f in (train_dvpo.token_logp, compute.full_logits_logp))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_memory_is_seen():
    def work():
        x = torch.ones(2 ** 20)                                # 4 MiB
        y = x + x                                              # 4 more
        del x, y
        torch.ones(2 ** 20)

    assert compute.peak_memory(work, "cpu") == pytest.approx(2 ** 23, rel=0.01)


def test_lengths_are_those_of_the_table():
    assert compute.answer_length(0.0, 1000) == 10 and compute.answer_length(1.0, 1000) == 1000
    assert compute.answer_length(0.45, 1000) == 270 and compute.answer_length(0.5, 1000) == 295
    assert compute.answer_length(0.0, 4) == 1


def test_the_command_writes_a_table_and_keeps_other_ones(tmp_path, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["compute.py", "--prompt_length", "8", "--response_length", "12", "--batch_size", "8",
                                          "--mini_batch_size", "4", "--micro_batch_size", "2", "--rounds", "1", "--steps", "1",
                                          "--output", str(tmp_path), *flags])
        compute.main()
        return json.loads((tmp_path / "compute.json").read_text())

    first = run()[0]
    assert set(first["methods"]) == set(compute.METHODS)
    for x in first["methods"].values():
        assert x["step"] == pytest.approx(x["generate"] + x["score"] + x["update"]) and min(x["generate"], x["score"], x["update"]) > 0
        assert 0 < x["utilisation"] < 1 and 0 < x["generation"] < 1 and x["tokens_per_second"] > 0
    other = "--methods", "DVPO", "--rollout", "continuous", "--gradient_checkpointing"
    both = run(*other)
    assert both[0] == first and set(both[1]["methods"]) == {"DVPO"} and len(run(*other)) == 2  # again: replaces itself alone
