/** Names of files that loaders of a model's folder read: transformers, PEFT, vLLM. Knows nothing of what they hold. */

const NAMES: ReadonlySet<string> = new Set([
	"config.json",
	"generation_config.json",
	"quantize_config.json",
	"hf_quant_config.json",
	"adapter_config.json",
	"adapter_model.bin",
	"tf_model.h5",
	"flax_model.msgpack",
	"tokenizer.json",
	"tokenizer.model",
	"tokenizer_config.json",
	"special_tokens_map.json",
	"added_tokens.json",
	"vocab.json",
	"merges.txt",
	"vocab.txt",
	"chat_template.jinja",
	"chat_template.json",
	"additional_chat_templates",
	"preprocessor_config.json",
	"processor_config.json",
	"video_preprocessor_config.json",
]);

/** Weights in one file or in shards, and the index that names the shards: a loader follows it wherever it finds one. */
const WEIGHTS = /\.safetensors(\.index\.json)?$|^pytorch_model.*\.bin(\.index\.json)?$|^consolidated.*\.pth$/;

/** Whether a loader of the folder would read the file, or the folder, of this name. */
export function isModelFile(name: string): boolean {
	return !name.startsWith(".") && (NAMES.has(name) || WEIGHTS.test(name));
}
