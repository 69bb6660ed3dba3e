/** What this rank waits for others with: MPI's connections, and those of the engine. All of them end together. */
import { ArlError } from "../errors.js";
import type { NativeRanks } from "../native.js";

/** Connections, of which there may be none yet. */
export class Links {
	private readonly all: NativeRanks[] = [];
	private failure: string | null = null;

	constructor(first: NativeRanks | null) {
		if (first !== null) this.all.push(first);
	}

	/** Adds connections; after a failure they have failed. */
	add(ranks: NativeRanks): void {
		this.all.push(ranks);
		if (this.failure !== null) ranks.fail(this.failure);
	}

	/** Those of MPI. */
	get first(): NativeRanks {
		const [first] = this.all;
		if (first === undefined) throw new ArlError("ARL_INTERNAL", "ranks without MPI compute on CPUs");
		return first;
	}

	/** For how many seconds a call has waited for other ranks; 0: none does. */
	waiting(): number {
		return Math.max(0, ...this.all.map((ranks) => ranks.waiting()));
	}

	/** Ends every call that waits, and each later one. */
	fail(reason: string): void {
		this.failure ??= reason;
		for (const ranks of this.all) ranks.fail(reason);
	}

	/** Ends what has an end. Resolves when all ranks have called it. */
	async close(): Promise<void> {
		for (const ranks of this.all) await ranks.close();
	}
}
