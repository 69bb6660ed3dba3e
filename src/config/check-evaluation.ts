/** Options of the evaluation that contradict each other or others, and those without effect. Reads valid values only. */
import { evalSources } from "./eval-sources.js";
import { METRIC_SCHEDULE_NAMES } from "./options/training.js";
import type { AgentTrainingConfig, OptionName } from "./schema.js";

export interface Checks {
	args: AgentTrainingConfig;
	given: (name: OptionName) => boolean;
	/** An option as messages name it: with its value and origin. */
	shown: (name: OptionName) => string;
	add: (line: string, hint: string) => void;
	notices: string[];
}

/** Reports each contradiction, and options without effect. */
export function checkEvaluation(checks: Checks): void {
	const { args, given, shown, add, notices } = checks;
	checkNames(checks);
	checkSplit(checks);
	if (args.eval_metric !== null && args.eval_generate === 0)
		add(`${shown("eval_metric")} is a metric of generated replies`, "Add --eval_generate N.");
	if (args.eval_strategy === "no") {
		for (const name of ["load_best_model_at_end", "early_stopping_patience"] as const) {
			if (args[name] !== null && args[name] !== false)
				add(`${shown(name)} needs evaluations, and ${shown("eval_strategy")}`, "Set eval_strategy to steps or epoch.");
		}
		if (followsEvaluations(args)) {
			add(
				`${shown("lr_scheduler_type")} follows evaluations, and ${shown("eval_strategy")}`,
				"Set eval_strategy to steps or epoch.",
			);
		}
		if (args.save_strategy === "best") {
			add(
				`${shown("save_strategy")} saves after an evaluation that is the best so far, and ${shown("eval_strategy")}`,
				"Set eval_strategy to steps or epoch.",
			);
		}
		for (const name of ["eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"] as const) {
			if (given(name)) notices.push(`${shown(name)} has no effect with ${shown("eval_strategy")}`);
		}
		for (const name of ["eval_file", "eval_split"] as const) {
			const rows = args[name];
			if (rows === null || (Array.isArray(rows) && rows.length === 0) || args.eval_on_start) continue;
			notices.push(`${shown(name)} is evaluated only on request with ${shown("eval_strategy")}`);
		}
		return;
	}
	if (followsEvaluations(args) && args.warmup_steps > 0)
		notices.push(`${shown("warmup_steps")} has no effect with ${shown("lr_scheduler_type")}`);
	if (args.eval_strategy !== "steps" && given("eval_steps"))
		notices.push(`${shown("eval_steps")} has no effect with ${shown("eval_strategy")}`);
	if (args.early_stopping_patience === null && given("early_stopping_threshold"))
		notices.push(`${shown("early_stopping_threshold")} has no effect without early_stopping_patience`);
	if (args.load_best_model_at_end) checkSaves(checks);
}

/** Whether the schedule of the learning rate follows evaluations. */
export function followsEvaluations({
	lr_scheduler_type: name,
}: Pick<AgentTrainingConfig, "lr_scheduler_type">): boolean {
	return (METRIC_SCHEDULE_NAMES as readonly string[]).includes(name);
}

/** Rows are held out of those that are trained, or others are given; and a row of the one split is not one of the other. */
function checkSplit({ args, shown, add }: Checks): void {
	if (args.eval_split === null) return;
	if (args.eval_file.length > 0) {
		add(`${shown("eval_split")} contradicts ${shown("eval_file")}`, "Give one of them.");
	}
	if (typeof args.eval_split === "string") {
		if (args.split !== null && args.split !== args.eval_split) return;
		add(
			`${shown("eval_split")} contradicts ${shown("split")}: the held-out rows would be trained`,
			"Name two different splits.",
		);
	} else if (args.db_connection_string !== null) {
		add(
			`${shown("eval_split")}: rows of a database are not cut`,
			"Name a split of its documents, for example --eval_split validation, or import rows with a split.",
		);
	}
}

/** Two sources of one name would have one figure. */
function checkNames({ args, shown, add }: Checks): void {
	const names = evalSources(args.eval_file).map(({ name }) => name);
	const twice = names.find((name, i) => names.indexOf(name) !== i);
	if (twice === undefined) return;
	add(
		`${shown("eval_file")}: two entries are named ${twice}`,
		"Give each a name of its own: --eval_file NAME=PATH ...",
	);
}

/** With `load_best_model_at_end` every evaluation that may be the best has a checkpoint, as transformers demands. */
function checkSaves({ args, shown, add }: Checks): void {
	if (args.save_strategy === "best") return;
	if (args.save_strategy !== args.eval_strategy) {
		add(
			`${shown("load_best_model_at_end")} needs a checkpoint where an evaluation is: ${shown("save_strategy")} and ${shown("eval_strategy")} differ`,
			"Give both the same value, or set save_strategy to best.",
		);
		return;
	}
	if (args.save_strategy !== "steps") return;
	const evalSteps = args.eval_steps ?? args.logging_steps;
	const times = args.save_steps / evalSteps;
	const sameKind = args.save_steps < 1 === evalSteps < 1;
	if (sameKind && Math.abs(times - Math.round(times)) < 1e-9 && Math.round(times) > 0) return;
	const shownSteps = args.eval_steps === null ? shown("logging_steps") : shown("eval_steps");
	add(
		`${shown("load_best_model_at_end")} needs an evaluation for each checkpoint: ${shown("save_steps")} is no multiple of ${shownSteps}`,
		"Make save_steps a multiple of eval_steps, or set save_strategy to best.",
	);
}
