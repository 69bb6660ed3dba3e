/**
 * Which evaluation is the best, and when to stop early: the rules of transformers' Trainer and EarlyStoppingCallback. Knows
 * numbers alone.
 */

/** A step, and the metric after it. */
export interface Scored {
	step: number;
	value: number;
}

/** What a checkpoint keeps of the evaluations so far. */
export interface EvaluationState {
	/** The held-out rows and the metric: of others nothing is comparable. */
	key: string;
	/** The last evaluation; null: there was none. */
	last: Scored | null;
	best: Scored | null;
	/** The best evaluation of those after which a checkpoint was saved. */
	checkpoint: Scored | null;
	/** Evaluations in a row without one that was better. */
	worse: number;
}

export interface BestRules {
	key: string;
	greaterIsBetter: boolean;
	/** Null: never stop early. */
	patience: number | null;
	/** How much better an evaluation must be to count, for the patience alone. */
	threshold: number;
}

/** A state as it was before JSON, which has no NaN and no infinity: such an evaluation was made, and was not the best. */
function fromJson(state: EvaluationState): EvaluationState {
	const finite = (scored: Scored | null) => (typeof scored?.value === "number" ? scored : null);
	const { last, best, checkpoint } = state;
	return {
		...state,
		last: last && { step: last.step, value: last.value ?? Number.NaN },
		best: finite(best),
		checkpoint: finite(checkpoint),
	};
}

/** The evaluations of a run. */
export class BestTracker {
	readonly state: EvaluationState;
	private improvedLast = false;

	/** `before`: of the checkpoint that the run resumes from. It is forgotten where its key differs. */
	constructor(
		private readonly rules: BestRules,
		before: EvaluationState | undefined,
	) {
		const none = { key: rules.key, last: null, best: null, checkpoint: null, worse: 0 };
		this.state = before?.key === rules.key ? fromJson(before) : none;
	}

	/** Takes an evaluation. Returns whether it is the best so far. A value that is not a number never is. */
	add(step: number, value: number): boolean {
		const { state, rules } = this;
		const { best } = state;
		const better = this.better(value, best);
		const counts = better && (best === null || Math.abs(value - best.value) > rules.threshold);
		state.worse = counts ? 0 : state.worse + 1;
		state.last = { step, value };
		if (better) state.best = state.last;
		this.improvedLast = better;
		return better;
	}

	/** Whether the last evaluation is of this step, and the best of the run. */
	improvedAt(step: number): boolean {
		return this.improvedLast && this.state.last?.step === step;
	}

	/** A checkpoint of this step is being saved. */
	saving(step: number): void {
		const { last, checkpoint } = this.state;
		if (last?.step === step && this.better(last.value, checkpoint)) this.state.checkpoint = last;
	}

	/** `patience` evaluations in a row were not better. */
	get exhausted(): boolean {
		const { patience } = this.rules;
		return patience !== null && this.state.worse >= patience;
	}

	private better(value: number, than: Scored | null): boolean {
		if (Number.isNaN(value)) return false;
		if (than === null) return true;
		return this.rules.greaterIsBetter ? value > than.value : value < than.value;
	}
}
