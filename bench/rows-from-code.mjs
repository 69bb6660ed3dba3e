// How fast rows of code become rows of a run, without encoding them: one process, one case, one JSON line.
//
//   node bench/rows-from-code.mjs --case get|get-async|stream|spool|convert [--rows 100000] [--bytes 2000]

import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { openConverted, openDataset } from "../dist/data/sources/custom.js";
import { Scratch } from "../dist/data/sources/scratch.js";
import { takeRows } from "../dist/data/sources/source.js";
import { RowHashes } from "../dist/data/tokens/row-hashes.js";
import { loadNative } from "../dist/native.js";

const { values: a } = parseArgs({
	options: {
		case: { type: "string", default: "get" },
		rows: { type: "string", default: "100000" },
		bytes: { type: "string", default: "2000" },
	},
});
const length = Number(a.rows);
const content = "x".repeat(Number(a.bytes) - 100);
const row = (i) => ({
	messages: [
		{ role: "user", content: `${i}` },
		{ role: "assistant", content },
	],
});
async function* stream() {
	for (let i = 0; i < length; i++) yield row(i);
}

const folder = mkdtempSync(join(tmpdir(), "arl-bench-"));
const reading = (streamed) => ({
	streamed,
	ahead: 2048,
	about: () => ({ identity: "bench", ledger: new RowHashes(join(folder, "rows.hashes"), false) }),
	signal: null,
	most: Number.POSITIVE_INFINITY,
	progress: () => {},
	scratch: new Scratch(loadNative(), folder),
});
const cases = {
	get: () => openDataset({ length, get: row }, reading(null)),
	"get-async": () => openDataset({ length, get: async (i) => row(i) }, reading(null)),
	stream: () => openDataset(stream(), reading(length)),
	spool: () => openDataset(stream(), reading(null)),
	convert: () => openConverted([{ dataset: stream() }], async (value) => ({ ...value, reward: 1 }), reading(length)),
};

const started = performance.now();
const source = await cases[a.case]();
const order = Uint32Array.from({ length }, (_, i) => i);
let bytes = 0;
for (let done = 0; done < length; ) {
	const rows = await takeRows(source, order.subarray(done, done + 256), 8 * 1024 * 1024);
	for (const taken of rows) bytes += taken.length;
	done += rows.length;
}
const seconds = (performance.now() - started) / 1000;
await source.close();
rmSync(folder, { recursive: true });
console.log(
	JSON.stringify({
		case: a.case,
		processor: cpus()[0]?.model,
		rows: length,
		row_bytes: Math.round(bytes / length),
		seconds: Number(seconds.toFixed(3)),
		rows_per_s: Math.round(length / seconds),
		peak_mib: Math.round(Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))?.[1]) / 1024),
	}),
);
