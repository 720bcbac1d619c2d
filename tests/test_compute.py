"""experiments/compute.py: what it counts is what torch counts, and it measures the scripts as they are."""
import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import train_dvpo

import compute


def test_floating_point_operations_are_those_that_torch_counts():
    """Of one forward and backward pass of token_logp: prompt 40, answer 24. torch does not count attention on CPU, and
    compute.py not the logits of the prompt, which nobody needs."""
    config = LlamaConfig(**compute.SHAPES["tiny"], bos_token_id=None)
    model, ids = AutoModelForCausalLM.from_config(config), torch.randint(0, 1000, (1, 64))
    with FlopCounterMode(display=False) as counter:
        train_dvpo.token_logp(model, ids, (torch.arange(64) >= 40)[None]).sum().backward()
    attention = 6 * config.num_hidden_layers * config.hidden_size * 64 ** 2
    prompt = 6 * config.vocab_size * config.hidden_size * 40
    assert compute.update_flops(config, [24], 40, 1, 1) - attention + prompt == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("shape", compute.SHAPES)
def test_weights_are_those_of_the_model(shape):
    config = LlamaConfig(**compute.SHAPES[shape], bos_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name and weight.dim() == 2)
    assert compute.body_weights(config) == matrices


def test_memory_is_seen():
    def work():
        x = torch.ones(2 ** 20)                                # 4 MiB
        y = x + x                                              # 4 more
        del x, y
        torch.ones(2 ** 20)

    assert compute.peak_memory(work, "cpu") == pytest.approx(2 ** 23, rel=0.01)


def test_lengths_are_those_of_the_table():
    lengths = {(0.0, 1000): 10, (1.0, 1000): 1000, (0.45, 1000): 270, (0.5, 1000): 295, (0.0, 4): 1}
    assert {asked: compute.answer_length(*asked) for asked in lengths} == lengths


def test_the_command_writes_a_table_and_keeps_other_ones(tmp_path, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["compute.py", "--prompt_length", "8", "--response_length", "12", "--batch_size", "8",
                                          "--mini_batch_size", "4", "--micro_batch_size", "2", "--rounds", "1", "--steps", "1",
                                          "--output", str(tmp_path), *flags])
        monkeypatch.setattr(compute, "device_speed", lambda device, dtype: (1e11, 1e10))
        compute.main()
        return json.loads((tmp_path / "compute.json").read_text())

    first = run()[0]
    assert set(first["methods"]) == set(compute.METHODS)
    for x in first["methods"].values():
        assert x["step"] == pytest.approx(x["generate"] + x["score"] + x["update"]) and min(x["generate"], x["score"], x["update"]) > 0
        assert x["utilisation"] > 0 and x["generation"] > 0 and x["tokens_per_second"] > 0 and x["peak"] > 2 ** 20
    other = "--methods", "DVPO", "--gradient_checkpointing"
    both = run(*other)
    assert both[0] == first and set(both[1]["methods"]) == {"DVPO"} and len(run(*other)) == 2  # again: replaces itself alone
