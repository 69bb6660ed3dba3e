"""Writes rope.json: what transformers computes for rotary embeddings of every kind of scaling.

Needs torch and transformers: python make_rope.py. Bits of f32 are kept as integers.
"""

import json
import pathlib

import torch
from transformers import Qwen2Config, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

SHORT = [1.0 + 0.05 * i for i in range(8)]
LONG = [1.5 + 0.7 * i for i in range(8)]
CASES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default_theta_1e6": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 10000.0},
    "dynamic_fraction": {"rope_type": "dynamic", "factor": 1.1, "rope_theta": 1000000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1000000.0},
    "yarn_own_length": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    "yarn_attention_factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1000000.0,
        "attention_factor": 0.75,
    },
    "yarn_mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn_factor_null": {
        "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 500000.0,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    },
    "longrope_ratio": {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
        "original_max_position_embeddings": 32, "rope_theta": 1000000.0,
    },
}
LENGTHS = [16, 33, 200, 1000]


def bits(tensor):
    return tensor.contiguous().to(torch.float32).view(torch.int32).flatten().tolist()


cases = []
for name, parameters in CASES.items():
    for length in LENGTHS:
        config = Qwen3Config(head_dim=16, max_position_embeddings=128, rope_parameters=dict(parameters))
        # A fresh module a length: a module remembers the longest sequence it has seen.
        module = Qwen3RotaryEmbedding(config)
        positions = torch.arange(length)[None]
        cos, sin = module(torch.zeros(1, dtype=torch.float32), positions)
        rows = [0, 1, 7, length - 1]
        cases.append({
            "name": name, "rope_parameters": parameters, "length": length, "rows": rows,
            "inv_freq": bits(module.inv_freq), "attention_scaling": float(module.attention_scaling),
            "cos": bits(cos[0, rows, :8]), "sin": bits(sin[0, rows, :8]),
        })
large = Qwen3RotaryEmbedding(Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}))
assert Qwen2Config().rope_parameters["rope_theta"] == 10000.0
out = {"head_dim": 16, "max_position_embeddings": 128, "cases": cases, "inv_freq_128_1e6": bits(large.inv_freq)}
path = pathlib.Path(__file__).with_name("rope.json")
path.write_text(json.dumps(out, separators=(",", ":")) + "\n")
print(path.stat().st_size)
