/** What the caller and callbacks ask of a run; the loop looks between two steps. */
import type { EvaluationMetrics } from "../../events.js";

/** Receives what an evaluation that was asked for gave; null: the run was interrupted. */
export type Answer = (metrics: EvaluationMetrics | null) => void;

export class Requests {
	private stopped = false;
	private saveWanted = false;
	private answers: Answer[] = [];

	constructor(readonly signal: AbortSignal | null) {}

	/** To end the run. */
	stop(): void {
		this.stopped = true;
	}

	/** To save a checkpoint. */
	save(): void {
		this.saveWanted = true;
	}

	/** To evaluate the held-out rows. */
	evaluate(answer: Answer = () => {}): void {
		this.answers.push(answer);
	}

	get ended(): boolean {
		return this.stopped || this.signal?.aborted === true;
	}

	/** Whether a checkpoint was asked for since the last call. */
	takeSave(): boolean {
		const wanted = this.saveWanted;
		this.saveWanted = false;
		return wanted;
	}

	/** Who asked for an evaluation since the last call; null: nobody. */
	takeEvaluations(): Answer | null {
		const answers = this.answers.splice(0);
		if (answers.length === 0) return null;
		return (metrics) => {
			for (const answer of answers) answer(metrics);
		};
	}
}
