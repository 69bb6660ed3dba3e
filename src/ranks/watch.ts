/** Which rank holds the others up: from what each has reported of itself. A pure function. */

/** What is known of a rank. */
export interface Sign {
	/** `rank 1 (host b, pid 7)` */
	name: string;
	/** What it last reported to do. */
	phase: string;
	/** Seconds for which it has waited for other ranks' bytes; 0: it does not. */
	waiting: number;
	/** Seconds since it was last heard from. */
	silent: number;
}

/** Ranks report once a second: one that is silent for longer than this may hold up others. */
const SILENT = 5;

/** Why the run has to end, where nothing has happened for `limit` seconds; null: it continues. */
export function holdUp(signs: readonly Sign[], limit: number): string | null {
	const silent = signs.filter((sign) => sign.silent >= limit);
	const waits = signs.some((sign) => sign.waiting >= limit);
	if (silent.length === 0 && !waits) return null;
	const late = signs.filter(
		(sign) => !silent.includes(sign) && (sign.waiting === 0 || sign.silent >= Math.min(SILENT, limit)),
	);
	const culprits = silent.length > 0 ? silent : late;
	const wait = `the others have waited for it for ${Math.floor(Math.max(...signs.map((sign) => sign.waiting)))} s`;
	const others = waits && culprits.length > 0 ? `; ${wait}` : "";
	const named = culprits.map((sign) => {
		const heard =
			sign.silent >= 2 ? `has sent no sign of life for ${Math.floor(sign.silent)} s; its last phase: ` : "is ";
		return `${sign.name} ${heard}${sign.phase}`;
	});
	if (named.length > 0) return `${named.join("; ")}${others} (ddp_timeout ${limit})`;
	const each = signs.map((sign) => `${sign.name} ${sign.phase}`).join("; ");
	return `all ranks wait for each other since ${limit} s (ddp_timeout): ${each}`;
}
