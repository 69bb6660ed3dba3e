/** What is noticed in rows that are trained all the same: reported once by a run, a check and an inspection, with count and place. */
import { mkdtempSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import type { TrainEvent } from "../src/events.js";
import { loadNative } from "../src/native.js";
import { temporaryFolder } from "./support/folder.js";
import { arl, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

const user = { role: "user", content: "q" };
const reply = { role: "assistant", content: "a" };
const rows = [
	{ messages: [user, reply] },
	{ messages: [user, reply, reply], mask: [1] },
	{ messages: [{ ...user, mood: "x" }, reply], mask: [0] },
];

function place() {
	const { model, out } = tinyPlace(folder, 1);
	const file = join(mkdtempSync(join(folder, "noted-")), "rows.jsonl");
	writeFileSync(file, rows.map((row) => `${JSON.stringify(row)}\n`).join(""));
	return { model, file, out };
}

const noted = (file: string) => [
	`warning: ${file}:2: 1 reply follows a reply directly: each is a turn with an end of its own`,
	`note: 2 rows, the first ${file}:2: \`mask\` is not read`,
	`warning: ${file}:3: \`messages[].mood\` is not read`,
];

/** What a run reports of its rows' file. */
async function notices(args: Record<string, unknown>, file: string): Promise<string[]> {
	const events: TrainEvent[] = [];
	for await (const event of new QwenTrainer({ args: args as never }).run()) events.push(event);
	const lines = events.flatMap((event) =>
		event.type === "notice" ? [`${event.level === "warning" ? "warning" : "note"}: ${event.message}`] : [],
	);
	return lines.filter((line) => line.includes(`${file}:`));
}

describe("what is noticed in rows", () => {
	it("is reported once by a run, and again by a run whose rows were encoded before", async () => {
		const { model, file, out } = place();
		const args = {
			model_name_or_path: model,
			init_from_config: true,
			train_file: file,
			max_steps: 3,
			per_device_train_batch_size: 1,
			save_strategy: "no",
			cache_dir: join(folder, "cache"),
			device: "cpu",
		};
		for (const run of ["first", "second"]) {
			const found = await notices({ ...args, output_dir: `${out}-${run}` }, file);
			expect(found, run).toEqual(noted(file));
		}
	});

	it("is reported by data check, for people and as JSON", async () => {
		const { model, file } = place();
		const check = (...words: string[]) =>
			arl(["data", "check", "--model_name_or_path", model, "--train_file", file, ...words]);
		const { stdout, code } = await check();
		expect(code).toBe(0);
		for (const line of noted(file)) expect(stdout).toContain(`${line}\n`);
		const { notes } = JSON.parse((await check("--json")).stdout);
		expect(notes).toMatchObject([
			{ kind: "consecutive replies", subject: "", level: "warning", rows: 1, count: 1, firstLocation: `${file}:2` },
			{ kind: "unread key", subject: "mask", level: "info", rows: 2, count: 2, firstLocation: `${file}:2` },
			{ kind: "unread key", subject: "messages[].mood", rows: 1, firstLocation: `${file}:3` },
		]);
	});

	it("is reported by inspect for the row that is shown", async () => {
		const { model, file } = place();
		const inspect = (row: string) =>
			arl(["inspect", "--model_name_or_path", model, "--train_file", file, "--row", row]);
		const { stderr } = await inspect("3");
		expect(stderr).toBe(`note: ${file}:3: \`mask\` is not read\nwarning: ${file}:3: \`messages[].mood\` is not read\n`);
		expect((await inspect("1")).stderr).toBe("");
	});

	it("has a place and a sentence for every kind that the core knows", () => {
		const encoder = loadNative().TextEncoder.open({ modelDir: place().model, truncation: "error" });
		const { notes } = encoder.encode(Buffer.from(JSON.stringify(rows[1])));
		expect(notes.map(({ kind, rows: many, firstRow }) => [kind, many, firstRow])).toEqual([
			["consecutive replies", 1, 0],
			["unread key", 1, 0],
		]);
	});
});
