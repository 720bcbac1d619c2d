"""Does the value model's training survive real text? Long answers, unicode, many turns, skewed scores.

Hypothesis  None about quality: so small a model cannot judge English. The question is whether real data pass
            through unharmed, and how the result compares with "the longer answer wins" and the reverse.
Method      A data folder made by prepare_data.py; a small Llama, freshly initialised, with a BPE tokenizer of
            its own; train_gvm.py straight on top of it. Held-out pair accuracy.
Command     python data/prepare_data.py --format hh --input hh.jsonl.gz --output runs/hh/data
            python experiments/real_data.py --data runs/hh/data --supervision pairs --output runs/hh
Result      printed, and the GVM's metrics.jsonl under --output
"""
import argparse
from pathlib import Path

import claims                                                 # first: it finds the project's root
import sft
import tokenizers
import train_gvm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_base(folder, texts):
    """A Llama of about 1.5 million parameters with a byte-level BPE tokenizer trained on `texts`."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["<|end|>"], show_progress=False)
    end = "<|end|>"                                           # and padding, as in many models
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=end)
    tokenizer.chat_template = sft.PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=None)
    ).save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--supervision", choices=["scores", "pairs"], default="scores")
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    rows = [row for file in args.data.glob("*.jsonl") for row in claims.read_lines(file)]
    write_base(args.output / "base", [row[name] for row in rows for name in ("response", "chosen", "rejected")
                                      if name in row][:20000])
    train_gvm.main(train_gvm.Args(
        model=str(args.output / "base"), data=str(args.data), output=str(args.output / "gvm"), lr=5e-4,
        epochs=1, supervision=args.supervision, max_length=args.max_length, overwrite=True))
    pairs = claims.read_lines(args.data / "test_pairs.jsonl")
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in pairs]
    longer = sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
    print(f"longer wins {longer:.3f}, shorter wins {1 - longer:.3f} (all {len(pairs)} pairs, in characters)")
    print(f"pair accuracy of the GVM: {claims.pair_accuracy(args.output / 'gvm')}")


if __name__ == "__main__":
    main()
