"""Does the value model's training survive real text? Long answers, unicode, many turns, skewed scores.

Hypothesis  None about quality: a model of a million parameters that has never seen English cannot judge answers. The
            question is whether real data pass through unharmed, and how the result stands to the trivial rules "the
            longer answer wins" and "the shorter answer wins".
Method      A data folder made by prepare_data.py; a small Llama, freshly initialised, with a BPE tokenizer of its own
            trained on the folder's text; train_gvm.py straight on top of it. Held-out pair accuracy.
Command     python prepare_data.py --format hh --input hh.jsonl.gz --output runs/hh/data --split 0 0.85 0.05 0.1
            python experiments/real_data.py --data runs/hh/data --supervision pairs --output runs/hh
Result      printed, and the GVM's metrics.jsonl under --output
"""
import argparse
import json
import sys
from pathlib import Path

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import sft  # noqa: E402
import train_gvm  # noqa: E402


def write_base(folder, texts, vocabulary=4096):
    """A Llama of about 1.5 million parameters with a byte-level BPE tokenizer trained on `texts`."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")   # pad is EOS
    tokenizer.chat_template = sft.PLAIN_TEMPLATE
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=None))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--supervision", choices=["scores", "pairs"], default="scores")
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    rows = [json.loads(line) for file in Path(args.data).glob("*.jsonl") for line in file.open(encoding="utf-8")]
    texts = [row[name] for row in rows for name in ("response", "chosen", "rejected") if name in row][:20000]
    base = Path(args.output) / "base"
    if not base.exists():
        write_base(base, texts)
    train_gvm.main(train_gvm.Args(
        model=str(base), data=args.data, output=f"{args.output}/gvm", supervision=args.supervision, lr=5e-4, epochs=1,
        max_length=args.max_length, eval_every=200, overwrite=True))
    result = evaluate.evaluate_values(evaluate.ValuesArgs(models=[f"{args.output}/gvm"], data=args.data,
                                                          max_length=args.max_length))
    pairs = [(len(row["chosen"]), len(row["rejected"]))
             for row in map(json.loads, (Path(args.data) / "test_pairs.jsonl").open(encoding="utf-8"))]
    longer = sum((c > r) + 0.5 * (c == r) for c, r in pairs) / len(pairs)
    accuracy = result["models"]["gvm"]["pair_accuracy"]
    print(f"longer wins {longer:.3f}, shorter wins {1 - longer:.3f} (all {len(pairs)} held-out pairs, in characters)")
    print(f"GVM, mean value {accuracy['mean']['mean']:.3f}, last value {accuracy['last']['mean']:.3f}")


if __name__ == "__main__":
    main()
