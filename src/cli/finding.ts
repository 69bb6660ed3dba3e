/** What `arl doctor` finds. */

/** One line of its report. */
export interface Finding {
	name: string;
	value: string;
	ok: boolean;
	/** What to do, or what was tried; lines. */
	hint?: string;
}
