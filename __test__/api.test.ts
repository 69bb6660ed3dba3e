import { join } from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { main } from "../src/cli/commands.js";
import { ImageLoader } from "../src/images/index.js";
import { type CheckOptions, checkRows, devices, inspectRow, planMemory } from "../src/index.js";
import { errorOf } from "./support/folder.js";
import { flags, root } from "./support/real.js";

const args = {
	model_name_or_path: join(root, "assets", "model"),
	train_file: [join(root, "assets", "heldout.jsonl")],
};

/** What a command prints as JSON. */
async function printed(...words: string[]): Promise<Record<string, unknown>> {
	let stdout = "";
	vi.spyOn(process.stdout, "write").mockImplementation((text) => {
		stdout += String(text);
		return true;
	});
	vi.spyOn(process.stderr, "write").mockImplementation(() => true);
	const { train_file, ...rest } = args;
	expect(await main([...words, ...flags({ ...rest, train_file: train_file[0] ?? "" }), "--json"])).toBe(0);
	return JSON.parse(stdout);
}
afterEach(() => vi.restoreAllMocks());

describe("the public functions besides training", () => {
	it("check rows as `arl data check` does, and need no output_dir", async () => {
		const report = await checkRows(args);
		expect(report.rows).toBeGreaterThan(100);
		expect(JSON.parse(JSON.stringify(report))).toEqual(await printed("data", "check"));
	});

	it("check rows from code, and say how far they are", async () => {
		const dataset = [{ q: "a" }, { q: "" }, { q: "c" }];
		const seen: number[] = [];
		const { model_name_or_path } = args;
		const onProgress = (rows: number) => seen.push(rows);
		const options: CheckOptions<{ q: string }> = {
			dataset,
			convert: ({ q }) => ({
				messages: [
					{ role: "user", content: q },
					{ role: "assistant", content: "yes" },
				],
			}),
		};
		const report = await checkRows({ model_name_or_path }, { ...options, onProgress });
		expect(report).toMatchObject({ rows: 3, usable: 3 });
		expect(seen.at(-1)).toBe(3);
		const signal = AbortSignal.abort();
		expect((await errorOf(checkRows({ model_name_or_path }, { ...options, signal }))).code).toBe("ARL_INTERRUPTED");
	});

	it("show one row as `arl inspect` does", async () => {
		const row = await inspectRow(args, 2);
		expect(row.location).toBe(`${args.train_file[0]}:3`);
		expect(JSON.parse(JSON.stringify(row))).toEqual(await printed("inspect", "--row", "3"));
	});

	it("plan the memory of a run as `arl plan` does", async () => {
		for (const device of ["cpu", "cuda"]) {
			const plan = await planMemory({ ...args, device }, { tokens: 4096, sequences: 4 });
			const shown = await printed("plan", "--device", device, "--tokens", "4096", "--sequences", "4");
			const { fits, availableBytes: _, notices, ...same } = plan;
			expect(shown).toMatchObject(same);
			expect(plan.totalBytes).toBe(plan.categories.reduce((sum, { bytes }) => sum + bytes, 0));
			expect(fits).toBe(device === "cpu" ? true : null);
			expect(notices.length).toBe(device === "cpu" ? 0 : 1);
		}
		expect((await errorOf(planMemory({ ...args, model_name_or_path: "nowhere" }))).code).toBe("ARL_CONFIG");
	});

	it("list the devices of this machine, the CPU first", () => {
		const [cpu, ...gpus] = devices();
		expect(cpu).toMatchObject({ device: "cpu", problem: null });
		expect(cpu?.memoryBytes).toBeGreaterThan(2 ** 20);
		for (const { device } of gpus) expect(device).toMatch(/^cuda:\d+$/);
	});

	it("close what `await using` declares", async () => {
		const close = vi.spyOn(ImageLoader.prototype, "close");
		{
			await using _ = new ImageLoader();
		}
		expect(close).toHaveBeenCalledOnce();
	});
});
