/** The tokens at which a model ends its text, where transformers looks for them. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { exists } from "../../disk/folders.js";
import { ArlError, toArlError } from "../../errors.js";

/** `eos_token_id` of `generation_config.json`; where there is no such file, of `config.json`. Empty: none is named. */
export async function endTokens(modelDir: string): Promise<number[]> {
	const generation = join(modelDir, "generation_config.json");
	const path = (await exists(generation)) ? generation : join(modelDir, "config.json");
	const text = await readFile(path, "utf8").catch((error: unknown) => {
		throw toArlError(error);
	});
	let ids: unknown;
	try {
		ids = (JSON.parse(text) as { eos_token_id?: unknown } | null)?.eos_token_id ?? [];
	} catch {
		throw new ArlError("ARL_CONFIG", `${path}: not valid JSON`);
	}
	const list: unknown[] = Array.isArray(ids) ? ids : [ids];
	if (list.every((id): id is number => Number.isInteger(id) && Number(id) >= 0 && Number(id) < 2 ** 31)) return list;
	throw new ArlError(
		"ARL_CONFIG",
		`${path}: eos_token_id is ${JSON.stringify(ids)}; expected a token id or a list of them`,
	);
}
