"""Loads adapters by PEFT next to their merged models, and says how far the logits are apart.

    python peft_logits.py BASE ADAPTER MERGED [ADAPTER MERGED ...]     needs torch, transformers, peft

One JSON line a pair: `moved` is how much the adapter changes the model's logits, `apart` how far PEFT's are from those of the merged
model, `unknown` what PEFT says of names that it misses or does not know.
"""
import json
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def main(base, pairs):
    for adapter, merged in zip(pairs[::2], pairs[1::2]):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        ids = torch.arange(40)[None] % model.config.vocab_size
        before = logits(model, ids)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = logits(PeftModel.from_pretrained(model, adapter).eval(), ids)
        whole = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), ids)
        unknown = [str(one.message) for one in said if "missing" in str(one.message) or "unexpected" in str(one.message)]
        moved, apart = (adapted - before).abs().max().item(), (adapted - whole).abs().max().item()
        print(json.dumps(dict(moved=moved, apart=apart, unknown=unknown)), flush=True)


main(sys.argv[1], sys.argv[2:])
