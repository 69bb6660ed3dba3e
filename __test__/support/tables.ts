/** Files of columns for tests: written by DuckDB, and by Python where `ARL_PYTHON` names one with pyarrow and polars. */
import { spawnSync } from "node:child_process";
import { DuckDBInstance } from "@duckdb/node-api";
import { type FileOptions, openFiles } from "../../src/data/sources/open.js";
import { fakeNative } from "./fake-native.js";

/** Runs statements in a database of its own; returns the rows of the last one as objects. */
export async function duck(...statements: string[]): Promise<Record<string, unknown>[]> {
	const instance = await DuckDBInstance.create(":memory:");
	const connection = await instance.connect();
	try {
		let rows: Record<string, unknown>[] = [];
		for (const statement of statements) rows = (await connection.runAndReadAll(statement)).getRowObjectsJS();
		return rows;
	} finally {
		connection.closeSync();
		instance.closeSync();
	}
}

/** Writes what a query gives as Parquet. */
export async function duckParquet(path: string, query: string, options = ""): Promise<string> {
	await duck(`copy (${query}) to '${path}' (format parquet${options === "" ? "" : `, ${options}`})`);
	return path;
}

/** A Python with pyarrow and polars; reports on stderr that a test is skipped where there is none. */
export function python(test: string): string | null {
	const program = process.env.ARL_PYTHON;
	const reason =
		program === undefined
			? "ARL_PYTHON does not name a Python with pyarrow and polars"
			: spawnSync(program, ["-c", "import pyarrow, polars"]).status === 0
				? null
				: `${program} has no pyarrow and polars`;
	if (reason === null && program !== undefined) return program;
	process.stderr.write(`SKIPPED: ${test}: ${reason}\n`);
	return null;
}

/** Runs a Python program; throws with what it wrote where it fails. */
export function runPython(program: string, source: string, words: string[] = []): string {
	const { status, stdout, stderr } = spawnSync(program, ["-c", source, ...words], { encoding: "utf8" });
	if (status !== 0) throw new Error(stderr);
	return stdout;
}

/** The rows of files as texts, with their places and what is reported of them. */
export async function readRows(
	entries: string[],
	options: FileOptions = {},
): Promise<{ rows: string[]; places: string[]; notices: string[]; identity: string }> {
	const { source, notices } = await openFiles(fakeNative(), entries, options);
	try {
		const indexes = Array.from({ length: source.length }, (_, i) => i);
		const rows = (await source.read(indexes)).map((row) => Buffer.from(row).toString("utf8"));
		return { rows, places: indexes.map((row) => source.location(row)), notices, identity: source.identity };
	} finally {
		await source.close();
	}
}
