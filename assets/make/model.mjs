// The small Qwen3: its configuration, and random weights from a seed as a safetensors file in Hugging Face's layout.
import { Random } from "./random.mjs";

/** `config.json` of the model. The vocabulary is padded to a multiple of 64, as matrix products like it. */
export function modelConfig({ vocabSize, endOfText, endOfMessage }) {
	return {
		architectures: ["Qwen3ForCausalLM"],
		attention_bias: false,
		attention_dropout: 0.0,
		bos_token_id: endOfText,
		dtype: "bfloat16",
		eos_token_id: endOfMessage,
		head_dim: 32,
		hidden_act: "silu",
		hidden_size: 128,
		initializer_range: 0.02,
		intermediate_size: 256,
		layer_types: Array.from({ length: 4 }, () => "full_attention"),
		max_position_embeddings: 2048,
		max_window_layers: 4,
		model_type: "qwen3",
		num_attention_heads: 4,
		num_hidden_layers: 4,
		num_key_value_heads: 2,
		pad_token_id: endOfText,
		rms_norm_eps: 1e-6,
		rope_parameters: { rope_theta: 1000000.0, rope_type: "default" },
		sliding_window: null,
		tie_word_embeddings: true,
		use_cache: true,
		use_sliding_window: false,
		vocab_size: Math.ceil(vocabSize / 64) * 64,
	};
}

/**
 * Every tensor's name and shape, in the order of the file, and the standard deviation that it starts with, or the value of a
 * norm's vector. Embeddings start large compared with what the layers add to them, so that a token stays what it is on its way
 * up; the last norm starts small, so that the first logits are small all the same.
 */
function tensorsOf(config) {
	const { hidden_size: hidden, intermediate_size: inner, head_dim: headDim } = config;
	const queries = config.num_attention_heads * headDim;
	const keys = config.num_key_value_heads * headDim;
	const deviation = 1 / Math.sqrt(hidden);
	const tensors = [{ name: "model.embed_tokens.weight", shape: [config.vocab_size, hidden], deviation: 0.5 }];
	for (let i = 0; i < config.num_hidden_layers; i++) {
		const layer = `model.layers.${i}`;
		tensors.push(
			{ name: `${layer}.input_layernorm.weight`, shape: [hidden], value: 1 },
			{ name: `${layer}.self_attn.q_proj.weight`, shape: [queries, hidden], deviation },
			{ name: `${layer}.self_attn.k_proj.weight`, shape: [keys, hidden], deviation },
			{ name: `${layer}.self_attn.v_proj.weight`, shape: [keys, hidden], deviation },
			{ name: `${layer}.self_attn.o_proj.weight`, shape: [hidden, queries], deviation: 0 },
			{ name: `${layer}.self_attn.q_norm.weight`, shape: [headDim], value: 1 },
			{ name: `${layer}.self_attn.k_norm.weight`, shape: [headDim], value: 1 },
			{ name: `${layer}.post_attention_layernorm.weight`, shape: [hidden], value: 1 },
			{ name: `${layer}.mlp.gate_proj.weight`, shape: [inner, hidden], deviation },
			{ name: `${layer}.mlp.up_proj.weight`, shape: [inner, hidden], deviation },
			{ name: `${layer}.mlp.down_proj.weight`, shape: [hidden, inner], deviation: 0 },
		);
	}
	tensors.push({ name: "model.norm.weight", shape: [hidden], value: 0.06 });
	return tensors;
}

/** What a head hands on of a token starts as a part of that token's own vector: `o_proj` as the transpose of `v_proj`. */
function copyingOutput(values, config) {
	const { hidden_size: hidden, head_dim: headDim, num_attention_heads: heads, num_key_value_heads: groups } = config;
	const out = new Float32Array(hidden * heads * headDim);
	for (let h = 0; h < hidden; h++) {
		for (let q = 0; q < heads * headDim; q++) {
			const head = Math.floor(q / headDim);
			const row = Math.floor((head * groups) / heads) * headDim + (q % headDim);
			out[h * heads * headDim + q] = 0.25 * values[row * hidden + h];
		}
	}
	return out;
}

/** A normal deviate from sums of integers alone (Irwin-Hall of 12), so that no machine's `Math.log` can differ. */
function normal(random) {
	let sum = 0;
	for (let i = 0; i < 12; i++) sum += random.next() >>> 8;
	return sum / 2 ** 24 - 6;
}

/** The upper half of a float's bits, rounded to nearest, ties to even. */
function bfloat16(value) {
	const bits = new Uint32Array(new Float32Array([value]).buffer)[0];
	return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

/** Bytes of `model.safetensors`: bf16, normal, from `seed`. */
export function randomWeights(config, seed) {
	const random = new Random(seed);
	const header = { __metadata__: { format: "pt" } };
	const parts = [];
	let offset = 0;
	let values = [];
	for (const { name, shape, deviation, value } of tensorsOf(config)) {
		let start = Float32Array.from(
			{ length: shape.reduce((a, b) => a * b, 1) },
			() => value ?? normal(random) * deviation,
		);
		if (name.endsWith("v_proj.weight")) values = start;
		if (name.endsWith("o_proj.weight")) start = copyingOutput(values, config);
		const data = Uint16Array.from(start, bfloat16);
		header[name] = { dtype: "BF16", shape, data_offsets: [offset, offset + data.byteLength] };
		offset += data.byteLength;
		parts.push(Buffer.from(data.buffer));
	}
	const text = JSON.stringify(header);
	const padded = Buffer.from(text.padEnd(Math.ceil(text.length / 8) * 8, " "));
	const length = Buffer.alloc(8);
	length.writeBigUInt64LE(BigInt(padded.length));
	return Buffer.concat([length, padded, ...parts]);
}
