#!/usr/bin/env python3
"""Makes the small cases beside this file: what transformers computes where a model's config.json is out of the ordinary.

    python generate.py OUT_DIR [CASE ...]          needs torch, transformers, safetensors; a CPU serves

Each folder holds a model (config.json, model.safetensors), a packed batch (batch.safetensors: input_ids, labels,
position_ids, cu_seqlens as int64; labels are shifted, -100 is not trained), and the numbers to match: forward.safetensors
(logits, nll, router_logits.<i> of the i-th layer with experts), grads.safetensors (of the mean nll, plus the balance loss
where the config asks for it), curve.json and trained.safetensors (20 AdamW steps on the batch). All is float32.
Sequences are run one by one, so that nothing depends on padding; each begins with a fresh rotary embedding.
"""
import json
import math
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

SMALL = dict(vocab_size=32, hidden_size=12, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, initializer_range=0.2, max_position_embeddings=64,
             use_cache=False, tie_word_embeddings=True)


def qwen2(**changes):
    small = {k: v for k, v in SMALL.items() if k != "head_dim"}
    return Qwen2Config(**{**small, "hidden_size": 16, "rope_parameters": dict(rope_type="default", rope_theta=1e4), **changes})


def qwen3(**changes):
    return Qwen3Config(**{**SMALL, "rope_parameters": dict(rope_type="default", rope_theta=1e4), **changes})


def moe(**changes):
    return Qwen3MoeConfig(**{**SMALL, "rope_parameters": dict(rope_type="default", rope_theta=1e4), "num_experts": 4,
                             "num_experts_per_tok": 2, "moe_intermediate_size": 8, **changes})


def rope(kind, **changes):
    return dict(rope_type=kind, rope_theta=1e4, **changes)


CASES = {
    # the first layer sees everything, the second one five tokens; biases on all four projections
    "window-bias": qwen3(use_sliding_window=True, sliding_window=5, max_window_layers=1, attention_bias=True,
                         intermediate_size=6),
    # Qwen2 with windows, an untied head, and heads that are not a power of two
    "qwen2-window": qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=0, tie_word_embeddings=False,
                          hidden_size=18, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=1),
    # a padding token, whose row of the embedding has no gradient from the look-up
    "odd-heads-padding": qwen3(head_dim=10, num_attention_heads=3, pad_token_id=3, rms_norm_eps=1e-5,
                               num_hidden_layers=1),
    "rope-linear": qwen3(rope_parameters=rope("linear", factor=3.0), num_hidden_layers=1),
    "rope-dynamic": qwen3(rope_parameters=rope("dynamic", factor=2.0), max_position_embeddings=8, num_hidden_layers=1),
    "rope-yarn": qwen3(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16), num_hidden_layers=1),
    "rope-llama3": qwen3(rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                             original_max_position_embeddings=32), num_hidden_layers=1),
    "rope-longrope": qwen3(rope_parameters=rope("longrope", short_factor=[1.0, 1.2, 1.5, 2.0], factor=4.0,
                                               long_factor=[1.5, 2.0, 3.0, 4.0], original_max_position_embeddings=8),
                           max_position_embeddings=32, num_hidden_layers=1),
    # the balance loss; experts in every second layer; probabilities that are not normalised
    "moe-balance": moe(output_router_logits=True, router_aux_loss_coef=0.2, decoder_sparse_step=2, norm_topk_prob=False,
                       intermediate_size=6),
    # experts in all layers but the first, an untied head, top-1
    "moe-top1": moe(mlp_only_layers=[0], num_experts_per_tok=1, norm_topk_prob=True, tie_word_embeddings=False,
                    output_router_logits=True, router_aux_loss_coef=0.05, intermediate_size=6, num_experts=3),
}
LENGTHS = [6, 9, 17]
ADAM = dict(lr=5e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, steps=20)


def make_batch(vocab, gen):
    parts = dict(input_ids=[], labels=[], position_ids=[])
    for n in LENGTHS:
        ids = torch.randint(0, vocab, (n,), generator=gen)
        labels = ids.roll(-1)
        labels[-1] = -100
        labels[: n // 4] = -100
        for key, value in zip(parts, (ids, labels, torch.arange(n))):
            parts[key].append(value)
    bounds = torch.tensor([0] + LENGTHS).cumsum(0)
    return {**{k: torch.cat(v) for k, v in parts.items()}, "cu_seqlens": bounds}


def evaluate(model, batch):
    config, logits, router = model.config, [], []
    for lo, hi in zip(batch["cu_seqlens"][:-1], batch["cu_seqlens"][1:]):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        wanted = dict(output_router_logits=True) if config.model_type == "qwen3_moe" else {}
        out = model(input_ids=batch["input_ids"][None, lo:hi], **wanted)
        logits.append(out.logits[0])
        router.append(out.router_logits if wanted else ())
    logits, router = torch.cat(logits), [torch.cat(layer) for layer in zip(*router)]
    nll = torch.nn.functional.cross_entropy(logits, batch["labels"], ignore_index=-100, reduction="none")
    loss = nll.sum() / (batch["labels"] != -100).sum()
    if router and config.output_router_logits:
        loss = loss + config.router_aux_loss_coef * load_balancing_loss_func(
            tuple(router), config.num_experts, config.num_experts_per_tok)
    return logits, nll, router, loss


def by_hub_names(tensors):
    """As the hub's files name them: each expert apart."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, half in zip(("gate", "up"), both.chunk(2)):
                    out[name.replace("gate_up_proj", f"{e}.{part}_proj.weight")] = half.contiguous().clone()
        elif name.endswith("experts.down_proj"):
            for e, one in enumerate(tensor):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = one.contiguous().clone()
        else:
            out[name] = tensor.contiguous().clone()
    return out


def make(case, folder):
    gen = torch.Generator().manual_seed(sum(map(ord, case)))
    model = AutoModelForCausalLM.from_config(CASES[case], attn_implementation="eager", dtype=torch.float32).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # ones and zeros would hide mistakes
            p.copy_(0.3 * torch.randn(p.shape, generator=gen) + (1.0 if "norm" in name else 0.0))
    os.makedirs(folder, exist_ok=True)
    model.save_pretrained(folder)
    extra = os.path.join(folder, "generation_config.json")
    if os.path.exists(extra):
        os.remove(extra)
    batch = make_batch(CASES[case].vocab_size, gen)
    save_file(batch, f"{folder}/batch.safetensors")

    logits, nll, router, loss = evaluate(model, batch)
    numbers = dict(logits=logits, nll=nll, **{f"router_logits.{i}": r for i, r in enumerate(router)})
    save_file({k: v.detach() for k, v in numbers.items()}, f"{folder}/forward.safetensors")
    loss.backward()
    save_file(by_hub_names({n: p.grad for n, p in model.named_parameters()}), f"{folder}/grads.safetensors")
    model.zero_grad()

    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=ADAM["weight_decay"]),
              dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=ADAM["betas"], eps=ADAM["eps"])
    steps = []
    for step in range(ADAM["steps"]):
        lr = ADAM["lr"] * min(1.0, step / 3) * 0.5 * (1 + math.cos(math.pi * step / ADAM["steps"]))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = evaluate(model, batch)[3]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        steps.append(dict(step=step, lr=lr, loss=loss.item(), grad_norm=norm.item()))
    with open(f"{folder}/curve.json", "w") as f:
        json.dump(dict(optimizer=ADAM, steps=steps), f)
    save_file(by_hub_names({n: p.detach() for n, p in model.named_parameters()}), f"{folder}/trained.safetensors")
    print(case, f"{steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}")


if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        make(name, os.path.join(sys.argv[1], name))
