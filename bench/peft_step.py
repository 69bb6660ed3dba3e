#!/usr/bin/env python3
"""The training step of an adapter as a user of PEFT has it, on the work of `bench/step.mjs --lora R`: the same tokens, every
token trained, clip at 1.0, AdamW. Prints one JSON line.

    python bench/peft_step.py --config DIR --lora 16 [--tokens 2048] [--seq 512] [--steps 5] [--warmup 2] [--dtype fp32|bf16]
"""

import argparse
import json
import resource
import statistics
import time

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--lora", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    return parser.parse_args()


def main():
    a = arguments()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(a.config)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    base.config.use_cache = False
    adapters = peft.LoraConfig(r=a.lora, lora_alpha=2 * a.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, adapters)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    seconds, losses = [], []
    for step in range(a.steps + a.warmup):
        ids = torch.randint(0, config.vocab_size, (a.tokens // a.seq, a.seq), generator=generator)
        targets = torch.cat([ids[:, 1:], ids[:, :1]], 1).reshape(-1)
        start = time.perf_counter()
        logits = model(input_ids=ids).logits.reshape(-1, config.vocab_size)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step >= a.warmup:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {
        "peer": "peft",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "dtype": a.dtype,
        "lora": a.lora,
        "tokens": a.tokens,
        "seq": a.seq,
        "step_s": round(median, 4),
        "tokens_per_s": round(a.tokens / median, 1),
        "peak_gib": round(peak, 2),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
