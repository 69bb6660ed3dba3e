import { closeSync, mkdtempSync, openSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { RowHashes } from "../src/data/tokens/row-hashes.js";
import { writeAll } from "../src/disk/write-all.js";
import { ArlError } from "../src/errors.js";
import { LeaseLog } from "../src/mongo/lease-log.js";
import { MetricsFile } from "../src/report/metrics.js";

/** What the system does with a write: takes at most so many bytes, and refuses once it has taken `room`. */
const system = vi.hoisted(() => ({ most: Number.POSITIVE_INFINITY, room: Number.POSITIVE_INFINITY }));

vi.mock("node:fs", async (original) => {
	const fs = await original<typeof import("node:fs")>();
	const writeSync = (file: number, bytes: Uint8Array, from = 0, length = bytes.length, at: number | null = null) => {
		if (system.room === 0)
			throw Object.assign(new Error("ENOSPC: no space left, write"), { code: "ENOSPC", syscall: "write" });
		const taken = fs.writeSync(file, bytes, from, Math.min(length, system.most, system.room), at);
		system.room -= taken;
		return taken;
	};
	return { ...fs, writeSync, default: { ...fs, writeSync } };
});

const folder = mkdtempSync(join(tmpdir(), "arl-write-"));
afterEach(() => {
	system.most = system.room = Number.POSITIVE_INFINITY;
});

describe("a system that takes a few bytes of a write at a time", () => {
	it("gets all of them, in their order and at their place", () => {
		system.most = 3;
		const path = join(folder, "whole");
		const file = openSync(path, "w+");
		writeAll(file, Buffer.from("0123456789"));
		writeAll(file, Buffer.from("abcd"), 4);
		writeAll(file, Buffer.alloc(0));
		closeSync(file);
		expect(readFileSync(path, "utf8")).toBe("0123abcd89");
	});

	it("loses no part of a line of metrics, of a row's hash, of a lease", async () => {
		system.most = 5;
		const metrics = MetricsFile.open(join(folder, "metrics.jsonl"));
		metrics.write({ step: 1, loss: 0.123456789 });
		metrics.close();
		expect(readFileSync(metrics.path, "utf8")).toBe('{"step":1,"loss":0.123456789}\n');

		const path = join(folder, "rows.hashes");
		const ledger = new RowHashes(path, false);
		for (let i = 0; i < 4; i++) ledger.note(i, Buffer.from(`row ${i}`), `[${i}]`);
		ledger.close();
		expect(readFileSync(path)).toHaveLength(64);
		const again = new RowHashes(path, false);
		for (let i = 0; i < 4; i++) again.note(i, Buffer.from(`row ${i}`), `[${i}]`);
		again.close();

		const list = new LeaseLog("0a", "db", "Record");
		await list.begin(folder);
		for (let i = 0; i < 4; i++) list.pushNone(i + 1);
		list.close();
		const lines = readFileSync(join(folder, ".arl-rows", "0a.claims"), "utf8")
			.trim()
			.split("\n");
		expect(lines).toHaveLength(5);
		for (const line of lines.slice(1)) expect(line).toMatch(/^0 +\d+ 0$/);
	});
});

describe("a system that refuses in the middle of a line of metrics", () => {
	it("leaves the lines before it whole, names the file, and the next line follows them", () => {
		const metrics = MetricsFile.open(join(folder, "full.jsonl"));
		metrics.write({ step: 1 });
		system.room = 4;
		let error: unknown;
		try {
			metrics.write({ step: 2 });
		} catch (thrown) {
			error = thrown;
		}
		expect(error).toBeInstanceOf(ArlError);
		expect(error).toMatchObject({ code: "ARL_IO", message: `${metrics.path}: ENOSPC: no space left, write` });
		expect(readFileSync(metrics.path, "utf8")).toBe('{"step":1}\n');
		system.room = Number.POSITIVE_INFINITY;
		metrics.write({ step: 2 });
		metrics.close();
		expect(readFileSync(metrics.path, "utf8")).toBe('{"step":1}\n{"step":2}\n');
	});
});
