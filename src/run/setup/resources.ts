/** What a run holds open, and closing it: a failure to close never hides the error that ended the run. */
import { ArlError, toArlError } from "../../errors.js";

/** Closes one thing. A text that it returns is for the user: what closing has changed on the disk. */
export type Closer = () => Promise<unknown> | unknown;

/** Things to close, the newest first. */
export class Resources {
	private readonly closers: Closer[] = [];
	private kept = false;

	add(close: Closer): void {
		this.closers.push(close);
	}

	/** Adds the removal of what preparing the run creates on the disk. It is skipped once {@link keep} was called. */
	addUndo(remove: Closer): void {
		this.add(() => this.kept || remove());
	}

	/** The run begins: what preparing it has created on the disk stays there. */
	keep(): void {
		this.kept = true;
	}

	/**
	 * Closes everything, even where one thing fails to close, and throws what ended the run: `failure`, with the failures to
	 * close as `suppressed`; without one, the first failure to close.
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
