/** Options of adapters of low rank (LoRA), by TRL's names. */
import { boolean, integer, number, stringOrNone, strings } from "../fields.js";

export const lora = {
	use_peft: boolean({
		default: false,
		description:
			"Train adapters of low rank (LoRA) next to the frozen weights. The run leaves an adapter's folder that PEFT and vLLM load; `arl merge` makes a model of it.",
	}),
	lora_r: integer({
		default: 16,
		min: 1,
		max: 65536,
		description: "Rank of the adapters.",
	}),
	lora_alpha: number({
		default: 32,
		above: 0,
		description:
			"An adapter counts `lora_alpha / lora_r` times; with `use_rslora` `lora_alpha` over the root of `lora_r`.",
	}),
	lora_dropout: number({
		default: 0.05,
		min: 0,
		below: 1,
		description:
			"Probability with which an element of an adapter's input is dropped in training. Above 0 each layer needs passes and memory of its own; 0 is the fastest.",
	}),
	lora_target_modules: strings({
		expects: "all-linear, names of layers, or one regular expression",
		description:
			"Layers that get an adapter: all-linear (every linear layer but the head; of a mixture of experts the experts and the router too, with `lora_dropout 0`), names such as `q_proj v_proj`, of which a layer's full name is one or ends with one after a dot, or one regular expression over full names. None: q_proj and v_proj, as in PEFT.",
	}),
	lora_target_parameters: strings({
		expects: "names of parameters",
		description:
			"Parameters of experts that get an adapter, by the ends of their names: `mlp.experts.gate_up_proj mlp.experts.down_proj`. They need `lora_dropout 0`, as in PEFT.",
	}),
	lora_modules_to_save: strings({
		expects: "names of modules",
		description:
			"Modules of which a whole copy is trained and saved with the adapter, for example `embed_tokens lm_head`. If the head is tied to the embedding, a copy of either unties them.",
	}),
	use_rslora: boolean({
		default: false,
		description: "Divide `lora_alpha` by the root of the rank instead of the rank.",
	}),
	use_dora: boolean({
		default: false,
		description:
			"Train the magnitudes of the adapted layers' rows as well (DoRA). Needs `lora_dropout 0`; each step computes the layers' products once more.",
	}),
	load_in_4bit: boolean({
		default: false,
		description:
			"Keep the frozen weights of linear layers in 4 bits (NF4, with the numbers of bitsandbytes), quantized when they are read: 4.5 bits a weight, or 4.13 with `use_bnb_nested_quant`. Products take them in the type of the activations, a tile at a time. Adapters are trained next to them (QLoRA). A folder that bitsandbytes wrote in NF4 is opened so in any case.",
	}),
	use_bnb_nested_quant: boolean({
		default: false,
		description: "With `load_in_4bit`: keep the scales of such weights in 8 bits (double quantization).",
	}),
	adapter_name_or_path: stringOrNone({
		expects: "a folder",
		description:
			"Folder of an adapter, by PEFT or of an earlier run, to train on. Its adapter_config.json takes the place of `use_peft` and of the other options of adapters.",
	}),
	merge_adapter: boolean({
		default: false,
		description: "At the end, write the model with the adapter merged into it to `merged` in `output_dir`.",
	}),
};
