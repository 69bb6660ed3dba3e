/** How values of options are shown, secrets that are not, and the nearest known name. */

/** A value as errors and `--print_config` show it, short and without secrets. */
export function show(value: unknown): string {
	if (value === null || value === undefined) return "none";
	if (typeof value === "number") return String(value);
	if (typeof value === "string") return shorten(redact(JSON.stringify(value)));
	try {
		return shorten(redact(JSON.stringify(value) ?? String(value)));
	} catch {
		return `a value of type ${typeof value}`;
	}
}

function shorten(text: string): string {
	return text.length > 120 ? `${text.slice(0, 117)}...` : text;
}

/** Hides user names and passwords in addresses, and the values of names that sound secret. */
export function redact(text: string): string {
	return text
		.replace(/(mongodb(?:\+srv)?:\/\/)[^\s"']*@/gi, "$1***@")
		.replace(/([a-z][a-z0-9+.-]*:\/\/)[^/@\s"']*@/gi, "$1***@")
		.replace(
			/\b((?:[\w-]*_)?(?:token|password|secret|api_?key|connection_string)["']?\s*[=:]\s*["']?)[^\s"',;}]+/gi,
			"$1***",
		);
}

/** Whether a name is that of a secret, known here or not. */
export function soundsSecret(name: string): boolean {
	return /token$|password|secret|api_?key|connection_string|credential/i.test(name);
}

/** The name among `names` nearest to `name`, if one is near enough to be meant. */
export function nearest(name: string, names: Iterable<string>): string | undefined {
	const wanted = plain(name);
	let best: string | undefined;
	let bestDistance = Math.max(2, Math.floor(wanted.length / 3)) + 1;
	for (const candidate of names) {
		const distance = editDistance(wanted, plain(candidate), bestDistance);
		if (distance < bestDistance) {
			best = candidate;
			bestDistance = distance;
		}
	}
	return best;
}

function plain(name: string): string {
	return name.toLowerCase().replaceAll("-", "_").slice(0, 80);
}

/** Edits (insert, delete, replace, swap of neighbours) from `a` to `b`, counted up to `limit`. */
export function editDistance(a: string, b: string, limit: number): number {
	if (Math.abs(a.length - b.length) >= limit) return limit;
	let before: number[] = [];
	let previous = Array.from({ length: b.length + 1 }, (_, j) => j);
	for (let i = 1; i <= a.length; i++) {
		const current = [i];
		for (let j = 1; j <= b.length; j++) {
			const same = a[i - 1] === b[j - 1] ? 0 : 1;
			let cost = Math.min(at(previous, j) + 1, at(current, j - 1) + 1, at(previous, j - 1) + same);
			if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1])
				cost = Math.min(cost, at(before, j - 2) + 1);
			current.push(cost);
		}
		before = previous;
		previous = current;
	}
	return at(previous, b.length);
}

function at(row: number[], index: number): number {
	return row[index] ?? Number.POSITIVE_INFINITY;
}
