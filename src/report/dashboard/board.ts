/** The runs of a dashboard: found again and read on while somebody looks. */
import { createHash } from "node:crypto";
import { resolve } from "node:path";
import { byName, findRuns } from "../runs/find-runs.js";
import { RunReader } from "../runs/read-run.js";

/** Reads between two searches for new runs. */
const SEARCH_EVERY = 5;

/** A run of the board. */
export interface BoardRun {
	/** Stable part of an address. */
	id: string;
	reader: RunReader;
	/** Grows when something of the run has changed. */
	version: number;
}

export class Board {
	readonly #folders: readonly string[];
	readonly #runs = new Map<string, BoardRun>();
	readonly #states = new Map<string, string>();
	#reads = 0;

	/** `folders`: of runs, or folders with runs below them. */
	constructor(folders: readonly string[]) {
		this.#folders = folders;
	}

	/** The runs in the order of their folders. */
	get runs(): BoardRun[] {
		return [...this.#runs.values()].sort((a, b) => byName(a.reader.folder, b.reader.folder));
	}

	/** Changes whenever something of these runs does. */
	version(runs: readonly BoardRun[]): string {
		return runs.map(({ id, version }) => `${id} ${version}`).join();
	}

	/** Reads what is new. */
	update(): void {
		if (this.#reads % SEARCH_EVERY === 0) this.#search();
		this.#reads += 1;
		for (const run of this.#runs.values()) {
			const { id, reader } = run;
			const changed = reader.update();
			// A process that dies changes no file.
			const { state } = reader;
			if (!changed && this.#states.get(id) === state) continue;
			this.#states.set(id, state);
			run.version += 1;
		}
	}

	#search(): void {
		const found = new Set(this.#folders.flatMap((folder) => findRuns(resolve(folder))));
		for (const folder of found) {
			if (this.#runs.has(folder)) continue;
			const id = createHash("sha256").update(folder).digest("hex").slice(0, 12);
			this.#runs.set(folder, { id, reader: new RunReader(folder), version: 0 });
		}
		for (const folder of this.#runs.keys()) if (!found.has(folder)) this.#runs.delete(folder);
	}
}
