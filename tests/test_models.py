"""Model families as people bring them: tiny random ones, with chat templates that begin and end turns as theirs do.

SFT's last token is the one that rollouts stop at and that the value model reads (docs/models.md).
"""
import json
import math

import pytest
import torch
from conftest import fails, read_lines, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sft
import train_dvpo
import train_gvm

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
LLAMA = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
         "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
           "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
         "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
PHI3 = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
PHI4 = ("{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}")
THINK = CHATML.replace("\n{{ m['content'] }}", "\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}")
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
            "original_max_position_embeddings": 300}
# family: model type, its settings; template; EOS and pad of the tokenizer; EOS of the generation config; end of an answer
FAMILIES = {
    "llama3": ("llama", {}, LLAMA, "<|eot_id|>", None, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "qwen2.5": ("qwen2", {}, SYSTEM + CHATML, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "qwen2.5-base": ("qwen2", {}, SYSTEM + CHATML, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|im_end|>"),
    "qwen3": ("qwen3", {"head_dim": 8}, THINK, "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "mistral": ("mistral", {"sliding_window": 24}, MISTRAL, "</s>", None, "</s>", "</s>"),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 24}, GEMMA, "<eos>", "<pad>", "<eos>", "<end_of_turn>"),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 24}, GEMMA, "<eos>", "<pad>", ["<eos>", "<end_of_turn>"],
               "<end_of_turn>"),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, CHATML,
                  "<|im_end|>", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 300}, PHI3, "<|endoftext|>", "<|endoftext|>",
             ["<|endoftext|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "phi4": ("phi3", {}, PHI4, "<|im_end|>", None, "<|im_end|>", "<|im_end|>"),
    "smollm2": ("llama", {}, SYSTEM + CHATML, "<|im_end|>", "<|im_end|>", "<|im_end|>", "<|im_end|>"),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}, None, "<|endoftext|>", None, "<|endoftext|>",
             "<|endoftext|>")}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "max_position_embeddings": 512}


@pytest.fixture
def family(world, tmp_path):
    """family("gemma2"): a model folder, and the id of the token that ends an answer."""
    def make(name):
        kind, settings, template, eos, pad, declared, end = FAMILIES[name]
        tokenizer = AutoTokenizer.from_pretrained(world / "base")
        control = [word for word in ("<bos>", "<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>",
                                     "<|im_sep|>", "<start_of_turn>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]")
                   if word in (template or "") + "<bos>"]
        declared = [declared] if isinstance(declared, str) else declared
        tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys([*control, eos, pad or eos, end, *declared]))})
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<bos>", eos, pad
        tokenizer.chat_template = template
        config = AutoConfig.for_model(kind, **(SIZES if kind != "gpt2" else {}) | settings, vocab_size=len(tokenizer))
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, None
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(declared))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name, tokenizer.convert_tokens_to_ids(end)
    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_has_the_same_end_of_an_answer(name, family, args, tmp_path, monkeypatch):
    base, end = family(name)
    read = {"sft": [], "train_gvm": []}

    def remember(module):
        real = module.collate
        monkeypatch.setattr(module, "collate", lambda sequences, pad: read[module.__name__].extend(sequences) or real(sequences, pad))

    remember(sft), remember(train_gvm)
    short = {"max_length": 300, "batch_size": 16}
    for split in ("sft", "scored"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", [
            {"prompt": f"Is Peru {n} an island?", "response": f"No, {n}.", "reward": n / 9, "policy": "a"} for n in range(48)])
    write_rows(tmp_path / "data" / "rl.jsonl", [{"prompt": f"Is Peru {n} an island?"} for n in range(8)])
    sft.main(args("sft", model=base, data=tmp_path / "data", output=tmp_path / "sft", lr=1e-2, **short))
    assert end in GenerationConfig.from_pretrained(tmp_path / "sft").eos_token_id              # stock generate() stops there
    if name == "gemma3":                                       # transformers has no value model for it
        with pytest.raises(ValueError, match="Unrecognized configuration class .*Gemma3"):
            train_gvm.main(args("gvm", model=tmp_path / "sft"))
        assert not (tmp_path / "run").exists()
        return
    train_gvm.main(args("gvm", model=tmp_path / "sft", data=tmp_path / "data", output=tmp_path / "gvm", **short))
    assert {response[-1] for _, response in read["sft"]} == {response[-1] for _, response in read["train_gvm"]} == {end}
    stops = []
    real = train_dvpo.rollout
    monkeypatch.setattr(train_dvpo, "rollout", lambda *rest: stops.append(rest[3]) or real(*rest))
    train_dvpo.main(args("dvpo", model=tmp_path / "sft", gvm=tmp_path / "gvm", data=tmp_path / "data", output=tmp_path / "dvpo", steps=1))
    declared = GenerationConfig.from_pretrained(base).eos_token_id
    assert set(stops[0]) == {end, *(declared if isinstance(declared, list) else [declared])}
    assert set(stops[0]) == set(GenerationConfig.from_pretrained(tmp_path / "dvpo").eos_token_id)
    [metrics] = read_lines(tmp_path / "dvpo" / "metrics.jsonl")
    assert metrics["ratio_error"] < 1e-4 and math.isfinite(metrics["loss"])


def test_rows_beyond_the_original_context_of_longrope_are_refused(family, args, tmp_path):
    """There the longest row of a batch changes the positions of all others: log pi_old would depend on the batch."""
    base, _ = family("phi3")
    fails(lambda: sft.main(args("sft", model=base, max_length=301)), r"phi3: too small for rows of 301 tokens \(context 300\)")


def test_a_generation_config_that_cannot_be_saved(family, args, tmp_path):
    """temperature without do_sample: transformers loads it and refuses to save it, after the training."""
    base, end = family("smollm2")
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.9, "top_p": 0.6}))
    sft.main(args("sft", model=base, epochs=1))
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [end]


def test_the_context_of_a_composite_model_is_that_of_its_text(family, args, monkeypatch):
    base, _ = family("llama3")
    text = AutoConfig.for_model("llama", **SIZES | {"max_position_embeddings": 99})
    monkeypatch.setattr(type(text), "get_text_config", lambda self, **rest: text)
    fails(lambda: sft.main(args("sft", model=base, max_length=100)), "too small for rows of 100 tokens .context 99.")


def test_the_chat_template_has_to_write_messages_as_they_are(family):
    """One that shouts, ignores answers, or wants content in parts: the first token of the chat would be taken for the end."""
    base, end = family("smollm2")
    for template in (CHATML.replace("m['content']", "m['content'] | upper"), CHATML.replace("{{ m['content'] }}", ""),
                     CHATML.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")):
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        fails(lambda: sft.end_of_answer(tokenizer), "does not write messages as they are")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template, tokenizer.eos_token = "{% for m in messages %}{{ m['content'] }} {% endfor %}", None
    fails(lambda: sft.end_of_answer(tokenizer), "nothing says where an answer ends")


def test_thinking_is_switched_off_in_prompts(family):
    base, _ = family("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif %}", "assistant\n{% if not enable_thinking | default(true) %}<think>\n\n</think>"
                                             "\n\n{% endif %}{% endif %}")
    assert "</think>" in tokenizer.decode(sft.encode_prompt(tokenizer, "x"))


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_that_are_not_special(special, family, args, tmp_path):
    """add_tokens(["<|im_end|>"]): decoding leaves them in the text, and typed ones would be control tokens."""
    base, _ = family("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=special)
    tokenizer.chat_template, tokenizer.eos_token = CHATML.replace("<|im_end|>", "<|turn|>"), "<|im_end|>"
    tokenizer.save_pretrained(base)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert sft.end_of_answer(tokenizer) == end and sft.encode_prompt(tokenizer, "a<|turn|>b").count(end) == 1
    train_gvm.main(args("gvm", model=base, output=tmp_path / "gvm"))
    train_dvpo.main(args("dvpo", model=base, gvm=tmp_path / "gvm", output=tmp_path / "dvpo", steps=2, max_response_length=40))
    texts = [row["response"] for row in read_lines(tmp_path / "dvpo" / "rollouts.jsonl") if row["eos_rate"]]
    assert not any("<|turn|>" in text for text in texts)


def test_weights_that_a_checkpoint_lacks(family, args):
    base, _ = family("llama3")
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(base)     # a headless LlamaModel
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    fails(lambda: sft.main(args("sft", model=base)), "llama3: lacks weights, which would start at random: lm_head.weight")


def test_dropout_that_is_a_number_and_not_a_module(world, tmp_path):
    """OPT keeps its rates as floats and calls torch.nn.functional.dropout."""
    config = AutoConfig.for_model("opt", vocab_size=1024, hidden_size=16, ffn_dim=16, num_hidden_layers=1, dropout=0.5,
                                  num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=300)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = sft.load_model(AutoModelForCausalLM, str(tmp_path / "opt"), tokenizer, 20).train()
    ids = torch.randint(10, 500, (1, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_eos_id_of_0_and_linear_attention(family, args, monkeypatch):
    base, end = family("smollm2")
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 0}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = sft.load_model(AutoModelForCausalLM, str(base), tokenizer, 20)
    assert sorted(model.generation_config.eos_token_id) == sorted({0, end})
    monkeypatch.setattr(type(model.config), "layer_types", ["linear_attention", "full_attention"], raising=False)
    fails(lambda: sft.load_model(AutoModelForCausalLM, str(base), tokenizer, 20), "linear attention")
