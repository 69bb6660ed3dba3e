/** What a run holds open, and closing it: a failure to close never hides the error that ended the run. */
import { ArlError, toArlError } from "../../errors.js";

/** Closes one thing. The text it may give is for the user: what closing has changed on the disk. */
export type Closer = () => Promise<unknown> | unknown;

/** Things to be closed, the newest first. */
export class Resources {
	private readonly closers: Closer[] = [];

	add(close: Closer): void {
		this.closers.push(close);
	}

	/**
	 * Closes all, even where one fails, and throws what ended the run: `failure`, with the failures to close as `suppressed`;
	 * where there is none, the first failure to close.
	 *
	 * @throws ArlError
	 */
	async close(failure: ArlError | null = null): Promise<void> {
		let first = failure;
		const notes: string[] = [];
		for (const close of this.closers.splice(0).reverse()) {
			try {
				const note = await close();
				if (typeof note === "string") notes.push(note);
			} catch (error) {
				const next = toArlError(error);
				if (first === null) first = next;
				else if (next !== first) first.suppressed.push(next);
			}
		}
		if (first === null) return;
		throw notes.length === 0 ? first : withNotes(first, notes);
	}
}

function withNotes(error: ArlError, notes: string[]): ArlError {
	const hint = [error.hint, ...notes].filter((text) => text !== "").join("\n");
	const noted = new ArlError(error.code, error.message, hint, { cause: error.cause ?? error });
	noted.suppressed.push(...error.suppressed);
	return noted;
}
