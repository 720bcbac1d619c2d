"""What the policy samples, and where an answer ends: one notion in every stage."""
import pytest
import torch
from accelerate import Accelerator
from conftest import script
from test_masks import tiny
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GenerationConfig, GPT2Config, LlamaConfig,
                          MistralConfig)

import sft
import train_dvpo

PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 8, 9, 3]]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGS = {"llama": LlamaConfig(**SMALL), "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64),
           "mistral": MistralConfig(**SMALL, sliding_window=6), "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=6)}


# ---- sampling ----
def test_samples_are_those_of_the_policy():
    """Prompts of different lengths: first tokens, and second ones after the likeliest first, as often as pi_theta says."""
    policy, copies = tiny(AutoModelForCausalLM), 3000
    answers = train_dvpo.rollout(policy, PROMPTS * copies, 2, [1])

    def as_often_as(tokens, prompt):
        with torch.no_grad():
            said = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        seen = torch.bincount(torch.tensor(tokens), minlength=32) / len(tokens)
        assert ((seen - said).abs() < 4.5 * (said * (1 - said) / len(tokens)).sqrt() + 1 / len(tokens)).all()

    for number, prompt in enumerate(PROMPTS):
        mine = answers[number::len(PROMPTS)]
        as_often_as([answer[0] for answer in mine], prompt)
        with torch.no_grad():
            likely = policy(torch.tensor([prompt])).logits[0, -1].topk(2).indices.tolist()
        first = likely[likely[0] == 1]                         # of two rows the others have left the batch by then
        as_often_as([answer[1] for answer in mine if answer[0] == first], [*prompt, first])


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_answers_are_those_of_generate(kind):
    """Rows of different lengths that end at different times, at each of two stop ids; finished rows change no other."""
    config = CONFIGS[kind].__class__.from_dict(CONFIGS[kind].to_dict() | {
        "vocab_size": 32, "initializer_range": 0.5, "tie_word_embeddings": False})
    policy = AutoModelForCausalLM.from_config(config).eval()
    prompts = [torch.randint(2, 32, (length,)).tolist() for length in (3, 1, 6, 9, 2, 4, 7, 5)]
    before, width = [list(prompt) for prompt in prompts], max(map(len, prompts))
    free = train_dvpo.rollout(policy, prompts, 12, [], greedy=True)
    stop_ids = [free[0][2], free[3][5]]                        # tokens that do come, somewhere
    ours = train_dvpo.rollout(policy, prompts, 12, stop_ids, greedy=True)
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    is_token = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = policy.generate(padded, attention_mask=is_token, generation_config=GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=stop_ids, pad_token_id=0))[:, width:].tolist()
    for answer, row in zip(ours, theirs):
        assert answer == row[:len(answer)] and (answer[-1] in stop_ids or len(answer) == 12)
        assert not set(stop_ids) & set(answer[:-1])
    assert len(set(map(len, ours))) > 2 and prompts == before


def test_sampled_answers_stop_and_differ():
    policy = tiny(AutoModelForCausalLM)
    answers = train_dvpo.rollout(policy, PROMPTS * 50, 6, [1, 2, 3, 4])
    assert {answer[-1] for answer in answers if len(answer) < 6} == {1, 2, 3, 4}
    assert all(not {1, 2, 3, 4} & set(answer[:-1]) for answer in answers)
    assert any(len(answer) == 6 and answer[-1] > 4 for answer in answers) and len(set(map(tuple, answers[::3]))) > 10
    torch.manual_seed(0)
    first = train_dvpo.rollout(policy, PROMPTS, 6, [1])
    torch.manual_seed(0)
    assert first == train_dvpo.rollout(policy, PROMPTS, 6, [1])


# ---- the end of an answer ----
@pytest.mark.parametrize("tail", ["", "\n\n### End\n"])
def test_without_a_control_token_the_end_is_eos(world, tail):
    """Templates that write one: FAMILIES in test_models.py."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}" + tail + "{% endfor %}"
    assert sft.encode_response(tokenizer, "Yes.")[-1] == sft.end_of_answer(tokenizer) == tokenizer.eos_token_id


def test_a_base_model_without_a_template_gets_one(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.chat_template = sft.PLAIN_TEMPLATE
    assert sft.end_of_answer(tokenizer) == tokenizer.eos_token_id
    assert tokenizer.decode(sft.encode_prompt(tokenizer, "Is Peru an island?")) == "User: Is Peru an island?\nAssistant: "


@pytest.mark.parametrize("name", ["dvpo", "ppo", "grpo", "remax"])
def test_two_processes_draw_different_answers(name, args, tmp_path, monkeypatch):
    """Each has a seed of its own, and its own part of the prompts."""
    module, seen = script(name), []

    def rollout(policy, prompts, *rest, **more):
        seen.append((torch.initial_seed(), prompts))
        raise InterruptedError

    monkeypatch.setattr(module, "rollout", rollout)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for process in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", process)
        with pytest.raises(InterruptedError):
            module.main(args(name, output=tmp_path / str(process), group_size=2) if name == "grpo" else args(name, output=tmp_path / str(process)))
    (seed, prompts), (other_seed, other_prompts) = seen
    assert seed != other_seed and len(prompts) == len(other_prompts) == 4 and prompts != other_prompts
