/** One line at the bottom of a terminal that is drawn over and over, with permanent lines above it. */
import { isTerminal } from "./terminal.js";

/** What is written to: a terminal's stream. */
export interface Terminal {
	write(text: string): unknown;
	columns?: number;
}

/** A part of the live line. The parts with the lowest `keep` go first where the line is too narrow. */
export interface Part {
	text: string;
	keep: number;
}

const REDRAW_MILLISECONDS = 100;

/** The live line. */
export class LiveLine {
	readonly #terminal: Terminal;
	readonly #now: () => number;
	#width = 0;
	#drawnAt = Number.NEGATIVE_INFINITY;
	#parts: readonly Part[] = [];

	constructor(terminal: Terminal, now: () => number = () => performance.now()) {
		this.#terminal = terminal;
		this.#now = now;
	}

	/** Shows `parts`, at most about ten times a second. */
	show(parts: readonly Part[]): void {
		this.#parts = parts;
		if (this.#now() - this.#drawnAt < REDRAW_MILLISECONDS) return;
		this.#draw();
	}

	/** Writes lines above the live one. */
	above(text: string): void {
		this.#terminal.write(`${this.#erasure()}${text}\n`);
		this.#draw();
	}

	/** Takes the live line away. */
	clear(): void {
		const erasure = this.#erasure();
		if (erasure !== "") this.#terminal.write(erasure);
		this.#parts = [];
	}

	#draw(): void {
		// The last column stays free: some terminals wrap as soon as it is filled.
		const line = fitParts(this.#parts, this.#columns() - 1);
		const erasure = this.#erasure();
		if (line === "" && erasure === "") return;
		this.#terminal.write(`${erasure}${line}`);
		this.#width = line.length;
		this.#drawnAt = this.#now();
	}

	/** What takes the drawn line away, also where the terminal was made narrower since and has wrapped it. */
	#erasure(): string {
		if (this.#width === 0) return "";
		const rows = Math.ceil(this.#width / this.#columns());
		this.#width = 0;
		return `\r${rows > 1 ? `\x1b[${rows - 1}A` : ""}\x1b[J`;
	}

	#columns(): number {
		return Math.max(10, this.#terminal.columns || 80);
	}
}

/** A live line on `stream`; null where that cannot be drawn over. */
export function liveLine(stream: NodeJS.WriteStream): LiveLine | null {
	return isTerminal(stream) ? new LiveLine(stream) : null;
}

/** The parts side by side in at most `width` columns. */
export function fitParts(parts: readonly Part[], width: number): string {
	const join = (chosen: readonly Part[]) => chosen.map(({ text }) => text).join("  ");
	let chosen = parts.filter(({ text }) => text !== "");
	while (chosen.length > 1 && join(chosen).length > width) {
		const least = Math.min(...chosen.map(({ keep }) => keep));
		const index = chosen.findLastIndex(({ keep }) => keep === least);
		chosen = chosen.filter((_, i) => i !== index);
	}
	return join(chosen).slice(0, Math.max(0, width));
}
