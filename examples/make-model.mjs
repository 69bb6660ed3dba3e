// Writes a tiny Qwen3 with random weights, so that the examples run in seconds on any machine: node make-model.mjs FOLDER.
// A model of your own, say a folder of Qwen3-0.6B, takes its place without another change. With --sees it is a Qwen3-VL without
// weights, for --init_from_config.
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [folder, sees] = process.argv.slice(2);
if (folder === undefined || (sees ?? "--sees") !== "--sees") {
	console.error("usage: node make-model.mjs FOLDER [--sees]");
	process.exit(2);
}

/** Bytes are the tokens; these come after them. */
const SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"];
const VISION = sees ? ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"] : [];
const ADDED = [...SPECIAL, ...MARKS, ...VISION];
const [endOfText, , endOfMessage] = ADDED.map((_, i) => 256 + i);

/** Qwen's tokenizer without merges: a character for each byte, printable ones for themselves. */
function tokenizer() {
	const printable = (byte) => (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
	let next = 0x100;
	const bytes = Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
	const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: false, use_regex: false };
	const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false };
	return {
		version: "1.0",
		truncation: null,
		padding: null,
		added_tokens: ADDED.map((content, i) => ({ id: 256 + i, content, ...flags, special: !MARKS.includes(content) })),
		normalizer: { type: "NFC" },
		pre_tokenizer: byteLevel,
		post_processor: byteLevel,
		decoder: byteLevel,
		model: {
			type: "BPE",
			dropout: null,
			unk_token: null,
			continuing_subword_prefix: "",
			end_of_word_suffix: "",
			fuse_unk: false,
			byte_fallback: false,
			ignore_merges: false,
			vocab: Object.fromEntries(bytes.map((byte, id) => [byte, id])),
			merges: [],
		},
	};
}

/** The text of a message, and the same with its images. */
const TEXT = "{{- message.content if message.content is string else '' -}}";
const SEEING_TEXT = `{%- if message.content is string -%}{{- message.content -}}{%- else -%}
    {%- for part in message.content or [] -%}
        {%- if part.type in ['image', 'image_url'] -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
        {%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
{%- endif -%}`;

/** ChatML with tools, as Qwen3 writes it. */
const TEMPLATE = `{%- macro text(message) -%}${TEXT}{%- endmacro -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' -%}{{- text(messages[0]) + '\\n\\n' -}}{%- endif -%}
    {{- '<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' + text(messages[0]) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\\n' + text(message) + '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' + text(message) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- if not loop.first or text(message) -%}{{- '\\n' -}}{%- endif -%}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {%- if call.function.arguments is string -%}
                {{- call.function.arguments -}}
            {%- else -%}
                {{- call.function.arguments | tojson -}}
            {%- endif -%}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' + text(message) + '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
`;

const config = {
	architectures: ["Qwen3ForCausalLM"],
	attention_bias: false,
	bos_token_id: endOfText,
	dtype: "float32",
	eos_token_id: endOfMessage,
	head_dim: 16,
	hidden_act: "silu",
	hidden_size: 64,
	intermediate_size: 128,
	max_position_embeddings: 1024,
	model_type: "qwen3",
	num_attention_heads: 4,
	num_hidden_layers: 2,
	num_key_value_heads: 2,
	rms_norm_eps: 1e-6,
	rope_theta: 1_000_000,
	tie_word_embeddings: true,
	vocab_size: 320,
};

/** The same with a vision tower, whose tokens are squares of 16 pixels. */
function seeingConfig() {
	const id = (token) => 256 + ADDED.indexOf(token);
	const { architectures: _, model_type: __, rope_theta, tie_word_embeddings, ...text } = config;
	return {
		architectures: ["Qwen3VLForConditionalGeneration"],
		model_type: "qwen3_vl",
		dtype: "float32",
		image_token_id: id("<|image_pad|>"),
		video_token_id: id("<|video_pad|>"),
		vision_start_token_id: id("<|vision_start|>"),
		vision_end_token_id: id("<|vision_end|>"),
		tie_word_embeddings,
		text_config: {
			...text,
			model_type: "qwen3_vl_text",
			initializer_range: 0.05,
			rope_parameters: { rope_type: "default", rope_theta, mrope_interleaved: true, mrope_section: [4, 2, 2] },
		},
		vision_config: {
			model_type: "qwen3_vl",
			deepstack_visual_indexes: [0],
			depth: 2,
			hidden_act: "gelu_pytorch_tanh",
			hidden_size: 64,
			in_channels: 3,
			initializer_range: 0.05,
			intermediate_size: 128,
			num_heads: 4,
			num_position_embeddings: 64,
			out_hidden_size: config.hidden_size,
			patch_size: 8,
			spatial_merge_size: 2,
			temporal_patch_size: 2,
		},
	};
}

/** How pictures are prepared: 64 x 64 pixels stay as they are. */
const PROCESSOR = {
	image_processor_type: "Qwen2VLImageProcessorFast",
	image_mean: [0.5, 0.5, 0.5],
	image_std: [0.5, 0.5, 0.5],
	merge_size: 2,
	patch_size: 8,
	size: { shortest_edge: 1024, longest_edge: 65_536 },
	temporal_patch_size: 2,
};

/** Numbers from 0 to 1 that are the same in each run (mulberry32). */
function uniform(seed) {
	let state = seed;
	return () => {
		state = (state + 0x6d2b79f5) | 0;
		let mixed = Math.imul(state ^ (state >>> 15), state | 1);
		mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
		return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
	};
}

/** The tensors with the scale of their random values; norms are constant. */
function tensors() {
	const { hidden_size: hidden, intermediate_size: inner, head_dim: head } = config;
	const [queries, keys] = [config.num_attention_heads * head, config.num_key_value_heads * head];
	const scale = 1 / Math.sqrt(hidden);
	const layer = (i) => [
		[`model.layers.${i}.input_layernorm.weight`, [hidden], null],
		[`model.layers.${i}.self_attn.q_proj.weight`, [queries, hidden], scale],
		[`model.layers.${i}.self_attn.k_proj.weight`, [keys, hidden], scale],
		[`model.layers.${i}.self_attn.v_proj.weight`, [keys, hidden], scale],
		[`model.layers.${i}.self_attn.o_proj.weight`, [hidden, queries], scale / 4],
		[`model.layers.${i}.self_attn.q_norm.weight`, [head], null],
		[`model.layers.${i}.self_attn.k_norm.weight`, [head], null],
		[`model.layers.${i}.post_attention_layernorm.weight`, [hidden], null],
		[`model.layers.${i}.mlp.gate_proj.weight`, [inner, hidden], scale],
		[`model.layers.${i}.mlp.up_proj.weight`, [inner, hidden], scale],
		[`model.layers.${i}.mlp.down_proj.weight`, [hidden, inner], scale / 4],
	];
	const layers = Array.from({ length: config.num_hidden_layers }, (_, i) => layer(i)).flat();
	return [
		["model.embed_tokens.weight", [config.vocab_size, hidden], 0.25],
		...layers,
		["model.norm.weight", [hidden], null],
	];
}

/** A file in the format of safetensors: the length of a JSON header, the header, the values. */
function weights() {
	const random = uniform(1);
	const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
	const header = {};
	const parts = [];
	let offset = 0;
	for (const [name, shape, scale] of tensors()) {
		const count = shape.reduce((product, size) => product * size, 1);
		const values = Float32Array.from({ length: count }, () => (scale === null ? 1 : scale * normal()));
		header[name] = { dtype: "F32", shape, data_offsets: [offset, offset + values.byteLength] };
		offset += values.byteLength;
		parts.push(Buffer.from(values.buffer));
	}
	const text = JSON.stringify(header);
	const padded = Buffer.from(text.padEnd(Math.ceil(text.length / 8) * 8));
	const length = Buffer.alloc(8);
	length.writeBigUInt64LE(BigInt(padded.length));
	return Buffer.concat([length, padded, ...parts]);
}

mkdirSync(folder, { recursive: true });
const json = (value) => `${JSON.stringify(value, null, 2)}\n`;
writeFileSync(join(folder, "config.json"), json(sees ? seeingConfig() : config));
writeFileSync(join(folder, "generation_config.json"), json({ eos_token_id: [endOfMessage, endOfText] }));
writeFileSync(join(folder, "tokenizer.json"), json(tokenizer()));
writeFileSync(join(folder, "tokenizer_config.json"), json({ eos_token: "<|im_end|>", pad_token: "<|endoftext|>" }));
writeFileSync(join(folder, "chat_template.jinja"), sees ? TEMPLATE.replace(TEXT, SEEING_TEXT) : TEMPLATE);
if (sees) writeFileSync(join(folder, "preprocessor_config.json"), json(PROCESSOR));
else writeFileSync(join(folder, "model.safetensors"), weights());
console.log(`${folder}: a ${sees ? "Qwen3-VL of two layers without" : "Qwen3 of two layers with random"} weights`);
