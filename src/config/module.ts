/** Modules that a user writes: TypeScript or JavaScript files, loaded as they are. */
import { statSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { toArlError } from "../errors.js";

/**
 * The default export of the module at `path`; what it throws while it is loaded comes as it is. `api`: what
 * `import ... from "arl"` gives there, so that it is this very program, installed or not.
 *
 * @throws ArlError `ARL_IO` where there is no such file.
 */
export async function importDefault(path: string, api: Record<string, unknown>): Promise<unknown> {
	try {
		statSync(path);
	} catch (error) {
		throw toArlError(error);
	}
	const { createJiti } = await import("jiti");
	const jiti = createJiti(import.meta.url, { fsCache: false, moduleCache: false, virtualModules: { arl: api } });
	return jiti.import(pathToFileURL(resolve(path)).href, { default: true });
}
