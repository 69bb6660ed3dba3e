// How fast files of rows are opened: from the file to rows that can be read at random, on one core. Writes chat rows of about
// 3 kB once in each format (DuckDB writes Parquet with structs and lists), opens each in a process of its own, and prints one
// JSON line a case.
//
//   node bench/rows.mjs [--rows 20000] [--dir DIR] [--only NAME]

import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { gzipSync } from "node:zlib";

const { values: a } = parseArgs({
	options: {
		rows: { type: "string", default: "20000" },
		dir: { type: "string" },
		only: { type: "string" },
		open: { type: "string" },
	},
});

/** Peak resident memory in MiB, as the kernel counts it. */
async function peakMib() {
	const { readFileSync } = await import("node:fs");
	try {
		return Math.round(Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]) / 1024);
	} catch {
		return Math.round(process.resourceUsage().maxRSS / 1024);
	}
}

async function openOnce(path) {
	const { openFiles } = await import("../dist/data/sources/open.js");
	const { loadNative } = await import("../dist/native.js");
	const native = loadNative();
	const before = await peakMib();
	const cpu = process.cpuUsage();
	const started = performance.now();
	const { source } = await openFiles(native, [path]);
	const seconds = (performance.now() - started) / 1000;
	const { user, system } = process.cpuUsage(cpu);
	let bytes = 0;
	for (let row = 0; row < source.length; row++) bytes += source.bytes(row);
	const line = {
		rows: source.length,
		bytesPerRow: Math.round(bytes / source.length),
		seconds: Number(seconds.toFixed(3)),
		cpuSeconds: Number(((user + system) / 1e6).toFixed(3)),
		rowsPerSecond: Math.round(source.length / seconds),
		rowsPerCpuSecond: Math.round((source.length * 1e6) / (user + system)),
		peakMib: await peakMib(),
		peakMibBefore: before,
	};
	await source.close();
	process.stdout.write(JSON.stringify(line));
}

function* chatRows(count) {
	let state = 1;
	const random = (below) => {
		state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
		return Math.floor((state / 2 ** 32) * below);
	};
	const syllables = ["ka", "to", "ri", "me", "shi", "lo", "ven", "dra", "qu", "el", "ost", "um"];
	const words = Array.from({ length: 4000 }, () =>
		Array.from({ length: 1 + random(4) }, () => syllables[random(syllables.length)]).join(""),
	);
	const text = (length) => {
		let out = "";
		while (out.length < length) out += `${words[random(words.length)]}${random(12) === 0 ? '.\n"' : " "}`;
		return out;
	};
	for (let row = 0; row < count; row++) {
		const messages = [
			{ role: "system", content: text(200) },
			{ role: "user", content: text(300 + random(600)) },
			{ role: "assistant", content: text(400 + random(1200)) },
			{ role: "user", content: text(100 + random(300)) },
			{ role: "assistant", content: text(300 + random(800)) },
		];
		yield JSON.stringify({ messages, record_id: `row-${row}`, reward: 0.5 });
	}
}

async function writeAll(dir, count) {
	const lines = [...chatRows(count)];
	const jsonl = join(dir, "rows.jsonl");
	writeFileSync(jsonl, `${lines.join("\n")}\n`);
	writeFileSync(join(dir, "rows.jsonl.gz"), gzipSync(`${lines.join("\n")}\n`, { level: 4 }));
	const quoted = (value) => `"${value.replaceAll('"', '""')}"`;
	const csv = lines.map((line) => {
		const { messages, record_id, reward } = JSON.parse(line);
		return `${quoted(JSON.stringify(messages))},${record_id},${reward}`;
	});
	writeFileSync(join(dir, "rows.csv"), `messages,record_id,reward\n${csv.join("\n")}\n`);
	const { DuckDBInstance } = await import("@duckdb/node-api");
	const connection = await (await DuckDBInstance.create(":memory:")).connect();
	const rows = `(select * from read_json('${jsonl}', format = 'newline_delimited'))`;
	for (const [name, options] of [
		["zstd", "codec zstd, row_group_size 10000"],
		["snappy", "codec snappy, row_group_size 10000"],
		["one-group", `codec zstd, row_group_size ${2048 * Math.ceil(count / 2048)}`],
	]) {
		await connection.run(`copy ${rows} to '${join(dir, `${name}.parquet`)}' (format parquet, ${options})`);
	}
	const { writeParquet } = await import("../dist/data/sources/parquet/write.js");
	await writeParquet(join(dir, "json-text.parquet"), lines);
}

async function all() {
	const dir = a.dir ?? mkdtempSync(join(tmpdir(), "arl-bench-"));
	const machine = `${cpus()[0]?.model.trim()} x${cpus().length}`;
	try {
		if (!existsSync(join(dir, "rows.csv"))) await writeAll(dir, Number(a.rows));
		for (const file of [
			"rows.jsonl",
			"rows.jsonl.gz",
			"zstd.parquet",
			"snappy.parquet",
			"one-group.parquet",
			"json-text.parquet",
			"rows.csv",
		]) {
			if (a.only !== undefined && a.only !== file) continue;
			const path = join(dir, file);
			const output = execFileSync(process.execPath, [fileURLToPath(import.meta.url), "--open", path], {
				encoding: "utf8",
			});
			const fileMb = Number((statSync(path).size / 1e6).toFixed(1));
			console.log(JSON.stringify({ file, fileMb, ...JSON.parse(output), machine, node: process.version }));
		}
	} finally {
		if (a.dir === undefined) rmSync(dir, { recursive: true, force: true });
	}
}

await (a.open === undefined ? all() : openOnce(a.open));
