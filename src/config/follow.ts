/** What `follow` needs, and what contradicts it: rows that are not there yet can be neither counted nor drawn from. */
import type { AgentTrainingConfig, OptionName } from "./schema.js";

/** Tells each contradiction. `given`: options that were set; `said`: an option with its value and origin. */
export function checkFollow(
	args: AgentTrainingConfig,
	given: ReadonlySet<OptionName>,
	said: (name: OptionName) => string,
	add: (line: string, hint: string) => void,
): void {
	if (!args.follow) {
		if (args.follow_idle !== null) add(`${said("follow_idle")} has no meaning without follow`, "Add --follow.");
		return;
	}
	const refuse = (name: OptionName, why: string, hint: string) => add(`${said(name)} contradicts follow: ${why}`, hint);
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
	if (given.has("num_train_epochs") && args.num_train_epochs !== 1) {
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
