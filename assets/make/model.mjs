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
		initializer_range: 0.05,
		intermediate_size: 320,
		layer_types: Array.from({ length: 4 }, () => "full_attention"),
		max_position_embeddings: 2048,
		max_window_layers: 4,
		model_type: "qwen3",
		num_attention_heads: 4,
		num_hidden_layers: 4,
		num_key_value_heads: 2,
		pad_token_id: endOfText,
		rms_norm_eps: 1e-6,
		rope_parameters: { rope_theta: 10000.0, rope_type: "default" },
		sliding_window: null,
		tie_word_embeddings: true,
		use_cache: true,
		use_sliding_window: false,
		vocab_size: Math.ceil(vocabSize / 64) * 64,
	};
}

/** Every tensor's name and shape, in the order of the file. Norms are vectors of ones. */
function tensorsOf(config) {
	const { hidden_size: hidden, intermediate_size: inner, head_dim: headDim } = config;
	const queries = config.num_attention_heads * headDim;
	const keys = config.num_key_value_heads * headDim;
	const tensors = [["model.embed_tokens.weight", [config.vocab_size, hidden]]];
	for (let i = 0; i < config.num_hidden_layers; i++) {
		const layer = `model.layers.${i}`;
		tensors.push(
			[`${layer}.input_layernorm.weight`, [hidden]],
			[`${layer}.self_attn.q_proj.weight`, [queries, hidden]],
			[`${layer}.self_attn.k_proj.weight`, [keys, hidden]],
			[`${layer}.self_attn.v_proj.weight`, [keys, hidden]],
			[`${layer}.self_attn.o_proj.weight`, [hidden, queries]],
			[`${layer}.self_attn.q_norm.weight`, [headDim]],
			[`${layer}.self_attn.k_norm.weight`, [headDim]],
			[`${layer}.post_attention_layernorm.weight`, [hidden]],
			[`${layer}.mlp.gate_proj.weight`, [inner, hidden]],
			[`${layer}.mlp.up_proj.weight`, [inner, hidden]],
			[`${layer}.mlp.down_proj.weight`, [hidden, inner]],
		);
	}
	tensors.push(["model.norm.weight", [hidden]]);
	return tensors;
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

/** Bytes of `model.safetensors`: bf16, normal with the configuration's `initializer_range`. */
export function randomWeights(config, seed) {
	const random = new Random(seed);
	const header = { __metadata__: { format: "pt" } };
	const parts = [];
	let offset = 0;
	for (const [name, shape] of tensorsOf(config)) {
		const data = new Uint16Array(shape.reduce((a, b) => a * b, 1));
		for (let i = 0; i < data.length; i++) data[i] = bfloat16(shape.length === 1 ? 1 : normal(random) * config.initializer_range);
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
