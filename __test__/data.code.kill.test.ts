import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { KILLS } from "./support/kills.js";
import { arl, differingFiles, flags, metricsOf, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();

/** The steps whose checkpoint a kill waits for, one after the other: in both epochs, and in the middle of the first one first. */
const STEPS = [4, 10, 2, 8, 6];
/** Kills for each kind of rows. */
const EACH = Math.ceil(KILLS / 8);

/** Modules over the rows of `file`: what each adds to the command line. */
function modules(file: string): Record<string, Record<string, string | number>> {
	const rows = readFileSync(file, "utf8").trim();
	const write = (name: string, content: string) => {
		const path = `${file}.${name}.ts`;
		writeFileSync(path, content);
		return path;
	};
	const lines = `const rows = ${JSON.stringify(rows)}.split("\\n");\n`;
	const byIndex = `${lines}export default { length: rows.length, get: async (i: number) => JSON.parse(rows[i]) };`;
	const asStream = `${lines}export default async function* () { for (const row of rows) yield JSON.parse(row); }`;
	return {
		"by index": { dataset: write("index", byIndex) },
		"a shuffled stream": { dataset: write("shuffled", asStream) },
		"a stream in order": { dataset: write("stream", asStream), train_sampling_strategy: "sequential", max_steps: 14 },
		converted: { train_file: file, convert: write("convert", "export default async (row: object) => row;") },
	};
}

describe("rows from code, on the real core", () => {
	const place = tinyPlace(folder, 36);
	const kinds = Object.entries(modules(place.file));
	/** The folders of the runs from the file that were never stopped, by their options. */
	const wholes = new Map<string, string>();
	it.each(kinds)(
		"%s: trained as from the file, and after kill -9 in the middle of an epoch",
		async (kind, rows) => {
			const options = {
				model_name_or_path: place.model,
				init_from_config: true,
				per_device_train_batch_size: 2,
				gradient_accumulation_steps: 2,
				learning_rate: 1e-2,
				save_steps: 2,
				logging_steps: 1,
				threads: 1,
				...(rows.max_steps === undefined && { num_train_epochs: 2 }),
			};
			const name = kind.replaceAll(" ", "-");
			const { dataset: _, convert: __, ...same } = rows;
			const fromFile = { ...options, ...same, train_file: place.file };
			const key = JSON.stringify(fromFile);
			const whole = wholes.get(key) ?? `${place.out}-file-${wholes.size}`;
			if (!wholes.has(key)) {
				const expected = await arl(["train", ...flags({ ...fromFile, output_dir: whole })]);
				expect(expected.code, expected.stderr).toBe(0);
				wholes.set(key, whole);
			}
			const losses = (at: string) => metricsOf(at).map(({ step, loss, grad_norm }) => [step, loss, grad_norm]);
			for (let i = 0; i < EACH; i++) {
				const out = `${place.out}-${name}-${i}`;
				const last = `checkpoint-${STEPS[i % STEPS.length]}`;
				const command = ["train", ...flags({ ...options, ...rows, output_dir: out })];
				let timer: NodeJS.Timeout | undefined;
				const killed = await arl(command, (kill) => {
					timer = setInterval(() => existsSync(join(out, last)) && kill("SIGKILL"), 2);
				});
				clearInterval(timer);
				expect(killed.signal, killed.stderr).toBe("SIGKILL");
				const resumed = await arl([...command, "--resume_from_checkpoint", "latest"]);
				expect(resumed.code, resumed.stderr).toBe(0);
				expect(losses(out), last).toEqual(losses(whole));
				for (const checkpoint of readdirSync(whole).filter((entry) => /^checkpoint-\d+$/.test(entry))) {
					expect(differingFiles(join(whole, checkpoint), join(out, checkpoint)), `${last}, ${checkpoint}`).toEqual([]);
				}
			}
		},
		120_000 * EACH,
	);
});
