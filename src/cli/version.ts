/** This package's version. */
import { readFileSync } from "node:fs";

/** The version in package.json, which lies two folders above both `src/cli` and `dist/cli`. */
export function version(): string {
	const text = readFileSync(new URL("../../package.json", import.meta.url), "utf8");
	const { version: found } = JSON.parse(text) as { version?: unknown };
	return typeof found === "string" ? found : "unknown";
}
