/** Configuration files: YAML, JSON, and modules (`arl.config.ts`). Reads and parses them; other modules check the values. */
import { existsSync, readFileSync, statSync } from "node:fs";
import { extname, resolve } from "node:path";
import { ArlError, messageOf, toArlError } from "../errors.js";
import { importDefault } from "./module.js";
import type { Layer } from "./resolve.js";
import { defineConfig } from "./schema.js";
import { redact } from "./values.js";

/** Names that are tried in the working directory if no file is named. */
const CONFIG_NAMES = [
	"arl.config.ts",
	"arl.config.mts",
	"arl.config.js",
	"arl.config.mjs",
	"arl.config.yaml",
	"arl.config.yml",
	"arl.config.json",
] as const;

const MAX_BYTES = 1 << 20;

/** The configuration file of the working directory, if there is one. */
export function findConfig(folder: string = process.cwd()): string | undefined {
	return CONFIG_NAMES.find((name) => existsSync(resolve(folder, name)));
}

/**
 * Reads a configuration file.
 *
 * @throws ArlError `ARL_CONFIG` with the line of a syntax error; `ARL_IO` if the file cannot be read.
 */
export async function loadConfigFile(path: string): Promise<Layer> {
	const type = extname(path).toLowerCase();
	const text = () => readText(path);
	switch (type) {
		case ".yaml":
		case ".yml":
			return layer(path, await parseYaml(path, text()));
		case ".json":
			return layer(path, parseJson(path, text()));
		case ".ts":
		case ".mts":
		case ".js":
		case ".mjs":
			text();
			return layer(path, await importModule(path));
		default:
			throw new ArlError(
				"ARL_CONFIG",
				`${redact(path)}: the name is not that of a configuration file`,
				"A configuration file ends in .yaml, .yml, .json, .ts, .mts, .js or .mjs. Rows are given with --train_file.",
			);
	}
}

function readText(path: string): string {
	try {
		const info = statSync(path);
		if (info.isDirectory()) throw new ArlError("ARL_CONFIG", `${path}: a folder, not a configuration file`);
		if (info.size > MAX_BYTES) {
			throw new ArlError("ARL_CONFIG", `${path}: too large for a configuration file (${info.size} bytes)`);
		}
		return new TextDecoder("utf-8", { fatal: true }).decode(readFileSync(path));
	} catch (error) {
		if (error instanceof TypeError) throw new ArlError("ARL_CONFIG", `${path}: not text in UTF-8`);
		throw toArlError(error);
	}
}

function layer(path: string, value: unknown): Layer {
	if (value === null || value === undefined) return { origin: path, values: [] };
	if (typeof value !== "object" || Array.isArray(value)) {
		throw new ArlError(
			"ARL_CONFIG",
			`${path}: expected options by name, found ${Array.isArray(value) ? "a list" : typeof value}`,
		);
	}
	return { origin: path, values: Object.entries(value).filter(([name]) => name !== "$schema") };
}

async function parseYaml(path: string, text: string): Promise<unknown> {
	const { parseDocument, LineCounter } = await import("yaml");
	const lineCounter = new LineCounter();
	const document = parseDocument(text, { lineCounter, prettyErrors: false, uniqueKeys: true, logLevel: "silent" });
	const [error] = [...document.errors, ...document.warnings];
	if (error) {
		const { line, col } = lineCounter.linePos(error.pos[0]);
		throw new ArlError("ARL_CONFIG", `${path}:${line}:${col}: ${redact(error.message)}`);
	}
	try {
		return document.toJS({ maxAliasCount: 20 });
	} catch (cause) {
		throw new ArlError("ARL_CONFIG", `${path}: ${redact(messageOf(cause))}`);
	}
}

function parseJson(path: string, text: string): unknown {
	try {
		return JSON.parse(text.startsWith("\ufeff") ? text.slice(1) : text);
	} catch (error) {
		const message = messageOf(error);
		const position = /position (\d+)/.exec(message)?.[1];
		const at = position === undefined ? "" : `:${text.slice(0, Number(position)).split("\n").length}`;
		// The parser's own message quotes the text around the error, which may hold a secret.
		throw new ArlError("ARL_CONFIG", `${path}${at}: not JSON: ${redact(message.replace(/, (\.\.\.)?".*$/s, ""))}`);
	}
}

async function importModule(path: string): Promise<unknown> {
	try {
		const loaded = await importDefault(path, { arl: { defineConfig } });
		return typeof loaded === "function" ? await loaded() : loaded;
	} catch (error) {
		const message = messageOf(error);
		throw new ArlError(
			"ARL_CONFIG",
			`${path}: ${redact(message)}`,
			"The file is a module; its default export is an object of options.",
			{
				cause: error,
			},
		);
	}
}
