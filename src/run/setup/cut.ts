/** Cuts a part of the rows off for evaluation (`eval_split`). */
import { cutByContent, SubsetSource } from "../../data/sources/content-split.js";
import type { AnySource } from "../../data/sources/source.js";
import { ArlError } from "../../errors.js";

export interface CutOptions {
	/** Of all rows. */
	share: number;
	seed: number;
	signal: AbortSignal | null;
}

/**
 * The rows that are left, how many of each entry, and those that are held out. Reads every row.
 *
 * @throws ArlError `ARL_CONFIG` for rows that are generated on demand, `ARL_DATA` where one side has none.
 */
export async function cutRows(
	source: AnySource,
	entryRows: readonly number[],
	{ share, seed, signal }: CutOptions,
): Promise<{ source: AnySource; entryRows: number[]; heldOut: AnySource }> {
	if (source.lazy) {
		throw new ArlError(
			"ARL_CONFIG",
			`eval_split: the rows of ${source.name} are generated as they are needed, and are not cut`,
			"Give the held-out rows as eval_dataset, or in files with eval_file.",
		);
	}
	const { rest, heldOut } = await cutByContent(source, share, seed, signal);
	const [empty] = [
		heldOut.length === 0 ? "holds out none" : "",
		rest.length === 0 ? "leaves none to train" : "",
	].filter(Boolean);
	if (empty) {
		throw new ArlError(
			"ARL_DATA",
			`eval_split ${share} ${empty} of the ${source.length} rows of ${source.name}`,
			"Choose another part.",
		);
	}
	const about = `eval_split ${share} ${seed}`;
	let first = 0;
	const left = entryRows.map((rows) => {
		const count = countWithin(rest, first, first + rows);
		first += rows;
		return count;
	});
	return {
		source: new SubsetSource(source, rest, `${about} rest`, true),
		entryRows: left,
		heldOut: new SubsetSource(source, heldOut, `${about} held out`, false),
	};
}

/** How many of `rows` are in [first, end). */
function countWithin(rows: Uint32Array, first: number, end: number): number {
	let count = 0;
	for (const row of rows) if (row >= first && row < end) count += 1;
	return count;
}
