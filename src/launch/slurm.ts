/** Slurm's short forms: lists of node names, and tasks per node. */
import { ArlError } from "../errors.js";

/** The names that a list stands for: `n[01-03,7],m2` is n01, n02, n03, n7, m2. */
export function expandNodes(list: string): string[] {
	return splitOutside(list).flatMap((part) => {
		const found = /^([^[\]]*)\[([^[\]]+)\](.*)$/.exec(part);
		if (found === null) {
			if (part === "" || /[[\]]/.test(part)) throw unreadable(list);
			return [part];
		}
		const [, head = "", ranges = "", tail = ""] = found;
		// A name may have several brackets: what follows the first is expanded by itself.
		const tails = tail === "" ? [""] : expandNodes(tail);
		return ranges.split(",").flatMap((range) => numbers(range, list).flatMap((n) => tails.map((t) => head + n + t)));
	});
}

/** The first name of a list. */
export function firstNode(list: string): string {
	return expandNodes(list)[0] as string;
}

/** How many tasks node `node` has: `2(x3),1` is 2, 2, 2, 1. */
export function tasksOfNode(text: string, node: number): number {
	let first = 0;
	for (const part of text.split(",")) {
		const found = /^(\d+)(?:\(x(\d+)\))?$/.exec(part);
		if (found === null) break;
		first += Number(found[2] ?? 1);
		if (node < first) return Number(found[1]);
	}
	throw new ArlError("ARL_DEVICE", `Slurm's tasks per node are ${JSON.stringify(text)}, without node ${node}`);
}

/** The parts between commas that are not in brackets. */
function splitOutside(list: string): string[] {
	return list.split(/,(?![^[]*\])/);
}

/** `01-03` is 01, 02, 03. */
function numbers(range: string, list: string): string[] {
	const found = /^(\d+)(?:-(\d+))?$/.exec(range);
	if (found === null) throw unreadable(list);
	const [, from = "", to = from] = found;
	const count = Number(to) - Number(from) + 1;
	if (count < 1 || count > 100_000) throw unreadable(list);
	return Array.from({ length: count }, (_, i) => String(Number(from) + i).padStart(from.length, "0"));
}

function unreadable(list: string): ArlError {
	return new ArlError("ARL_DEVICE", `Slurm's list of nodes ${JSON.stringify(list)} cannot be read`);
}
