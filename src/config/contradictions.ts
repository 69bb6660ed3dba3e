/** Options that contradict each other, and options that have no effect next to others. Reads valid values only. */
import { checkEvaluation } from "./check-evaluation.js";
import { checkImages } from "./check-images.js";
import { checkMesh } from "./check-mesh.js";
import type { AgentTrainingConfig, OptionName } from "./schema.js";
import { show } from "./values.js";

type Report = (line: string, hint: string) => void;
/** An option as messages name it: with its value and origin. */
type Shown = (name: OptionName) => string;

/**
 * Reports each contradiction to `add`, and appends options without effect to `notices`. `origin`: where an option was given,
 * in words; undefined: nowhere. `world`: the ranks that train, null where their number is not known; undefined: none does.
 */
export function checkTogether(
	args: AgentTrainingConfig,
	origin: (name: OptionName) => string | undefined,
	add: Report,
	notices: string[],
	world?: number | null,
): void {
	const given = (name: OptionName) => origin(name) !== undefined;
	const from = (name: OptionName) => origin(name) ?? "the default";
	const shown: Shown = (name) => `${name} ${show(args[name])} (${from(name)})`;
	if (args.max_tokens_per_micro_batch !== null) {
		if (given("per_device_train_batch_size")) {
			add(
				`${shown("per_device_train_batch_size")} contradicts ${shown("max_tokens_per_micro_batch")}: a micro-batch is counted in samples or in tokens`,
				"Give only one of them; `max_tokens_per_micro_batch none` turns packing off.",
			);
		}
		if (args.max_length !== null && args.max_length > args.max_tokens_per_micro_batch) {
			add(
				`${shown("max_length")} contradicts ${shown("max_tokens_per_micro_batch")}: a sample that long fits no micro-batch`,
				"Lower max_length or raise max_tokens_per_micro_batch.",
			);
		}
	}
	const fromDatabase = args.db_connection_string !== null;
	for (const name of ["train_weights", "train_caps"] as const) {
		const count = args[name].length;
		// A data set from code is an entry too, and only the trainer knows whether one is given.
		const entries = args.train_file.length + Number(fromDatabase) + (args.dataset === null ? 0 : 1);
		const mayBeOneMore = args.dataset === null ? 1 : 0;
		if (count === 0 || count === entries || count === entries + mayBeOneMore) continue;
		const behind = fromDatabase ? ", and db_connection_string is one entry more" : "";
		add(
			`${name} has ${count} values (${from(name)}) and train_file ${args.train_file.length} (${from("train_file")})${behind}`,
			"Give one for each entry of train_file, in the same order, then one for a data set from code, then one for a database.",
		);
	}
	for (const name of ["db_source", "db_match", "mongo_write_back", "retrained_interval"] as const) {
		if (!given(name) || fromDatabase) continue;
		const line = `${shown(name)} concerns rows of a database, and db_connection_string is not given`;
		// The interval fits in any configuration; the others show that a database was meant.
		if (name === "retrained_interval") notices.push(line);
		else add(line, "Give --db_connection_string, or set ARL_DB_CONNECTION_STRING.");
	}
	checkFollow(args, given, shown, add);
	checkSinks(args, given, add, notices);
	checkEvaluation({ args, given, shown, add, notices });
	checkAdapters(args, given, shown, add);
	checkImages({ args, given, shown, add, notices });
	if (world !== undefined) checkMesh({ args, given, shown, add, notices }, world);
	if (args.overwrite_output_dir && args.resume_from_checkpoint !== null) {
		add(
			`${shown("overwrite_output_dir")} contradicts ${shown("resume_from_checkpoint")}: one starts again, the other resumes`,
			"Give only one of them.",
		);
	}
	if (args.full_determinism && args.attention !== "own") {
		add(
			`${shown("full_determinism")} contradicts ${shown("attention")}: cuDNN's bits differ from run to run`,
			"Give only one of them.",
		);
	}
	if (args.full_determinism && args.matmul_autotune && given("matmul_autotune")) {
		add(
			`${shown("full_determinism")} contradicts ${shown("matmul_autotune")}: what is measured differs from GPU to GPU`,
			"Give only one of them.",
		);
	}
	if (args.fp16 && args.bf16 === true) {
		add(
			`${shown("fp16")} contradicts ${shown("bf16")}: a run computes in one of them`,
			"Give only one of them; bf16 needs no loss scaling and less memory.",
		);
	}
	if (args.bf16_stochastic_round && (args.fp16 || args.bf16 === false)) {
		add(
			`${shown("bf16_stochastic_round")} contradicts ${args.fp16 ? shown("fp16") : shown("bf16")}: only weights in bfloat16 are rounded so`,
			"Add --bf16, or leave bf16_stochastic_round out: other types keep exact master weights.",
		);
	}
	if (args.logits_16bit && !args.fp16 && args.bf16 === false) {
		add(
			`${shown("logits_16bit")} contradicts ${shown("bf16")}: logits are rounded to the type of the activations, which is float32`,
			"Add --bf16 or --fp16, or leave logits_16bit out.",
		);
	}
	if (args.max_steps !== -1 && given("max_steps") && given("num_train_epochs")) {
		notices.push(`${shown("num_train_epochs")} has no effect: ${shown("max_steps")} is set`);
	}
	if (args.save_strategy !== "steps" && given("save_steps")) {
		notices.push(`${shown("save_steps")} has no effect with ${shown("save_strategy")}`);
	}
	if (args.lr_scheduler_type === "constant" && args.warmup_steps > 0) {
		notices.push(
			`${shown("warmup_steps")} has no effect with ${shown("lr_scheduler_type")}; constant_with_warmup is the schedule that warms up`,
		);
	}
	if (args.train_sampling_strategy === "sequential" && given("data_seed") && args.data_seed !== null) {
		notices.push(`${shown("data_seed")} has no effect with ${shown("train_sampling_strategy")}`);
	}
}

/** What sinks need, and options of sinks that are not asked for. */
function checkSinks(
	args: AgentTrainingConfig,
	given: (name: OptionName) => boolean,
	add: Report,
	notices: string[],
): void {
	const { report_to: sinks, webhook_url: webhook } = args;
	if (sinks.includes("webhook") && webhook === null)
		add(
			"report_to webhook needs webhook_url",
			"Set ARL_WEBHOOK_URL, which no list of processes shows, or give --webhook_url.",
		);
	if (webhook !== null && !/^https?:\/\//.test(webhook)) add("webhook_url: its value is no http or https address", "");
	if (webhook !== null && !sinks.includes("webhook"))
		notices.push("webhook_url has no effect: report_to does not name webhook");
	if (given("prometheus_address") && !sinks.includes("prometheus"))
		notices.push("prometheus_address has no effect: report_to does not name prometheus");
}

const ADAPTER_OPTIONS = [
	"lora_r",
	"lora_alpha",
	"lora_dropout",
	"lora_target_modules",
	"lora_target_parameters",
	"lora_modules_to_save",
	"use_rslora",
	"use_dora",
] as const;

/** Options of adapters where there are none, or where another adapter's configuration decides. */
function checkAdapters(
	args: AgentTrainingConfig,
	given: (name: OptionName) => boolean,
	shown: Shown,
	add: Report,
): void {
	const continued = args.adapter_name_or_path !== null;
	for (const name of ADAPTER_OPTIONS) {
		if (!given(name)) continue;
		if (continued) {
			add(
				`${shown(name)} contradicts ${shown("adapter_name_or_path")}: its adapter_config.json decides`,
				"Leave it out, or train a new adapter without adapter_name_or_path.",
			);
		} else if (!args.use_peft) add(`${shown(name)} has no meaning without use_peft`, "Add --use_peft.");
	}
	const { load_in_4bit: inFourBits, use_bnb_nested_quant: nested } = args;
	if (nested && !inFourBits)
		add(`${shown("use_bnb_nested_quant")} has no meaning without load_in_4bit`, "Add --load_in_4bit.");
	if (inFourBits && !continued && !args.use_peft) {
		add(`${shown("load_in_4bit")} freezes the weights, and nothing else would be trained`, "Add --use_peft.");
	}
	if (!continued && !args.use_peft) {
		if (args.merge_adapter) add(`${shown("merge_adapter")} has no meaning without use_peft`, "Add --use_peft.");
		return;
	}
	if (args.init_from_config) {
		add(
			`${shown("init_from_config")} contradicts adapters: they would belong to random weights that are not saved`,
			"Give a model with weights.",
		);
	}
	if (args.bf16_stochastic_round) {
		add(
			`${shown("bf16_stochastic_round")} contradicts adapters, which keep exact float32 masters`,
			"Leave it out: with adapters it saves next to nothing.",
		);
	}
}

/** What `follow` needs and what contradicts it: rows that arrive during the run can be neither counted nor sampled. */
function checkFollow(args: AgentTrainingConfig, given: (name: OptionName) => boolean, shown: Shown, add: Report): void {
	if (!args.follow) {
		if (args.follow_idle !== null) add(`${shown("follow_idle")} has no meaning without follow`, "Add --follow.");
		return;
	}
	const refuse = (name: OptionName, why: string, hint: string) =>
		add(`${shown(name)} contradicts follow: ${why}`, hint);
	const needed = "Rows that arrive have neither a number nor an end.";
	if (args.db_connection_string === null) {
		add("follow: rows of a database are followed, and none is given", "Give --db_connection_string.");
	}
	if (args.max_steps === -1) add("follow needs max_steps: the length of the run and of its schedule", needed);
	if (args.train_sampling_strategy !== "sequential") {
		refuse("train_sampling_strategy", "rows are trained in the order in which they come", "Set it to sequential.");
	}
	const alone = "Follow a database alone; other rows can be imported into it with `arl mongo import`.";
	for (const name of ["train_file", "train_weights", "train_caps"] as const) {
		if (args[name].length > 0) refuse(name, "the rows of a database alone are followed", alone);
	}
	for (const name of ["dataset", "convert"] as const) {
		if (args[name] !== null) refuse(name, "the rows of a database alone are followed, as they are", alone);
	}
	const leave = "Leave it out.";
	if (given("num_train_epochs") && args.num_train_epochs !== 1) {
		refuse("num_train_epochs", "each row is trained once", leave);
	}
	if (args.max_trained_count !== 1) refuse("max_trained_count", "each row is trained once", leave);
	if (args.retrained_interval !== 1) refuse("retrained_interval", "each row is trained once", leave);
	if (args.mongo_write_back === "none") {
		refuse("mongo_write_back", "what is not counted as trained would arrive again", "Take ack or agentrl.");
	}
	const all = "all rows would have to be known before the first step";
	if (args.max_tokens_per_micro_batch !== null) {
		refuse("max_tokens_per_micro_batch", all, "Count samples with per_device_train_batch_size.");
	}
	if (args.on_bad_row === "skip") refuse("on_bad_row", all, "Keep bad rows away with --db_match.");
	if (args.truncation === "drop") refuse("truncation", all, "Take left or right.");
}
