/** Bounds how much is done at a time. */

/** Lets a number of tasks run at a time; the others wait in the order in which they came. */
export class Gate {
	private readonly waiting: (() => void)[] = [];

	/** `free`: tasks that may run at a time. */
	constructor(private free: number) {}

	/** Runs a task when its turn has come. */
	async run<T>(task: () => Promise<T>): Promise<T> {
		if (this.free > 0) this.free -= 1;
		else await new Promise<void>((resolve) => this.waiting.push(resolve));
		try {
			return await task();
		} finally {
			const next = this.waiting.shift();
			if (next) next();
			else this.free += 1;
		}
	}
}
