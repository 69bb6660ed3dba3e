/** Loads modules that a user writes, in TypeScript or JavaScript. */
import { statSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { ArlError, toArlError } from "../errors.js";

/** The names that `import ... from "arl"` offers. */
type Api = Record<string, unknown>;

let loadApi: (() => Promise<Api>) | null = null;

/** Registers the public API for modules that import it. Each entry of the program calls this: no module below may import its own API. */
export function providePublicApi(load: () => Promise<Api>): void {
	loadApi = load;
}

/** The public API that the entry has registered. */
export async function publicApi(): Promise<Api> {
	if (loadApi === null) throw new ArlError("ARL_INTERNAL", "no entry of the program has registered its public API");
	return { ...(await loadApi()) };
}

/**
 * The default export of the module at `path`; rethrows what the module throws while it loads. `api`: what
 * `import ... from "arl"` returns there, so that it is this very program, installed or not.
 *
 * @throws ArlError `ARL_IO` if the file does not exist.
 */
export async function importDefault(path: string, api: Api): Promise<unknown> {
	try {
		statSync(path);
	} catch (error) {
		throw toArlError(error);
	}
	const { createJiti } = await import("jiti");
	const jiti = createJiti(import.meta.url, { fsCache: false, moduleCache: false, virtualModules: { arl: api } });
	return jiti.import(pathToFileURL(resolve(path)).href, { default: true });
}
