/** Loads modules that a user writes, in TypeScript or JavaScript. */
import { statSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { ArlError, toArlError } from "../errors.js";

/** The exports of each entry of this package by its name: `arl`, `arl/mongo`, ... */
type Entries = Readonly<Record<string, object>>;

let loadEntries: (() => Promise<Entries>) | null = null;

/** Registers the public API for modules that import it. Each entry of the program calls this: no module below may import its own API. */
export function providePublicApi(load: () => Promise<Entries>): void {
	loadEntries = load;
}

/** The public API that the entry has registered. */
export async function publicApi(): Promise<Entries> {
	if (loadEntries === null) throw new ArlError("ARL_INTERNAL", "no entry of the program has registered its public API");
	return loadEntries();
}

/**
 * The default export of the module at `path`; rejects with what the module throws. `entries`: what it imports as `arl`,
 * `arl/mongo`, ..., so that these are this very program, installed or not.
 *
 * @throws ArlError `ARL_IO` if there is no such file.
 */
export async function importDefault(path: string, entries: Entries): Promise<unknown> {
	try {
		statSync(path);
	} catch (error) {
		throw toArlError(error);
	}
	const { createJiti } = await import("jiti");
	// Copies: it adds a default export to each.
	const virtualModules = Object.fromEntries(Object.entries(entries).map(([name, api]) => [name, { ...api }]));
	const jiti = createJiti(import.meta.url, { fsCache: false, moduleCache: false, virtualModules });
	return jiti.import(pathToFileURL(resolve(path)).href, { default: true });
}
