/** Waits that can be cancelled: rows of a user-supplied dataset may never come. */
import { ArlError } from "../errors.js";

/** Promises awaited through `race` reject with `ARL_INTERRUPTED` once `cancel` is called. */
export class Cancellation {
	private readonly waiting = new Set<(error: Error) => void>();
	private cancelled = false;

	private error(): ArlError {
		return new ArlError("ARL_INTERRUPTED", "interrupted while rows were read");
	}

	cancel(): void {
		this.cancelled = true;
		for (const reject of this.waiting) reject(this.error());
		this.waiting.clear();
	}

	/** The promise's outcome, unless cancelled first. (`Promise.race` would keep each promise alive as long as the other.) */
	race<T>(promise: Promise<T>): Promise<T> {
		if (this.cancelled) {
			promise.catch(() => {});
			return Promise.reject(this.error());
		}
		return new Promise((resolve, reject) => {
			this.waiting.add(reject);
			promise.then(
				(value) => {
					this.waiting.delete(reject);
					resolve(value);
				},
				(error: unknown) => {
					this.waiting.delete(reject);
					reject(error);
				},
			);
		});
	}
}

/** The promise's value; undefined: it takes longer than `milliseconds`. */
export async function within<T>(promise: Promise<T>, milliseconds: number): Promise<T | undefined> {
	let timer: NodeJS.Timeout | undefined;
	const late = new Promise<undefined>((resolve) => {
		timer = setTimeout(() => resolve(undefined), milliseconds);
	});
	try {
		return await Promise.race([promise, late]);
	} finally {
		clearTimeout(timer);
	}
}

/** The promise's value; null: the signal was aborted first. */
export async function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal | null): Promise<T | null> {
	if (signal === null) return promise;
	let stop: (() => void) | undefined;
	const aborted = new Promise<null>((resolve) => {
		stop = () => resolve(null);
		signal.addEventListener("abort", stop);
	});
	try {
		return await Promise.race([promise, aborted]);
	} finally {
		if (stop) signal.removeEventListener("abort", stop);
	}
}
