/** What comes out of a run, on the real core: a folder that says how the model in it was trained. */
import { cpSync, existsSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import type { AgentTrainingConfigInput } from "../src/config/schema.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, differingFiles, flags, type Place, root, sharedPath, tinyPlace } from "./support/real.js";
import { events, numbers, ofType } from "./support/run.js";

const folder = temporaryFolder();
const text = (...path: string[]) => readFileSync(join(...path), "utf8");

/** A template of ChatML with a colon behind the role, with line ends of Windows. */
const TEMPLATE = [
	"{%- for m in messages %}{{- '<|im_start|>' + m.role + ':\\n' }}",
	"{%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}",
	"{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}",
	"{%- if add_generation_prompt %}{{- '<|im_start|>assistant:\\n' }}{%- endif %}{#- é #}",
].join("\r\n");
const ROW = JSON.stringify({
	messages: [
		{ role: "user", content: "Weather?" },
		{ role: "assistant", content: "It is 18 °C." },
	],
});

/** A place whose rows the template above renders. */
function place(): Place {
	const made = tinyPlace(folder, 1);
	writeFileSync(made.file, `${Array.from({ length: 8 }, () => ROW).join("\n")}\n`);
	return made;
}

function run(at: Place, options: Partial<AgentTrainingConfigInput> = {}): QwenTrainer {
	const args = {
		model_name_or_path: at.model,
		train_file: at.file,
		output_dir: at.out,
		init_from_config: true,
		learning_rate: 1e-2,
		max_steps: 4,
		per_device_train_batch_size: 2,
		logging_steps: 1,
		save_strategy: "steps" as const,
		save_steps: 2,
		...options,
	};
	return new QwenTrainer({ args });
}

const notices = (all: Awaited<ReturnType<typeof events>>) => ofType(all, "notice").map(({ message }) => message);

describe("a template that was given", () => {
	it.each([
		["the model's own", (_: string) => {}],
		["none at all", (model: string) => rmSync(join(model, "chat_template.jinja"))],
		[
			"one among several in tokenizer_config.json",
			(model: string) => {
				renameSync(join(model, "chat_template.jinja"), join(model, "old.txt"));
				const config = JSON.parse(text(model, "tokenizer_config.json"));
				const named = ["default", "tool_use"].map((name) => ({ name, template: text(model, "old.txt") }));
				writeFileSync(
					join(model, "tokenizer_config.json"),
					JSON.stringify({ first: 1.0, chat_template: named, ...config }),
				);
			},
		],
	])("is that of the model and of every checkpoint, in place of %s", async (_, change) => {
		const at = place();
		change(at.model);
		const template = join(at.model, "..", "given.jinja");
		writeFileSync(template, TEMPLATE);
		const all = await events(run(at, { chat_template: template }));
		expect(notices(all).filter((message) => message.includes("--chat_template"))).toHaveLength(1);
		for (const out of [at.out, join(at.out, "checkpoint-2"), join(at.out, "checkpoint-4")]) {
			expect(text(out, "chat_template.jinja")).toBe(TEMPLATE);
			expect(JSON.parse(text(out, "tokenizer_config.json"))).not.toHaveProperty("chat_template");
		}
		const inspect = (words: object) =>
			arl(["inspect", ...flags({ train_file: at.file, ...words }), "--json"]).then(({ stdout }) => JSON.parse(stdout));
		const [given, exported] = await Promise.all([
			inspect({ model_name_or_path: at.model, chat_template: template }),
			inspect({ model_name_or_path: at.out }),
		]);
		expect(exported).toEqual(given);
		const rendered = exported.texts.map((part: { text: string }) => part.text).join("");
		expect(rendered).toContain("<|im_start|>user:\nWeather?<|im_end|>");
	});
});

describe("the tokens that end a reply", () => {
	/** A base model: its template ends a reply with another token than its configuration does. */
	function base(generation: Record<string, unknown> | null): Place {
		const at = place();
		const tokenizer = JSON.parse(text(at.model, "tokenizer_config.json"));
		writeFileSync(
			join(at.model, "tokenizer_config.json"),
			JSON.stringify({ ...tokenizer, eos_token: "<|endoftext|>" }),
		);
		const config = JSON.parse(text(at.model, "config.json"));
		const ids = { bos_token_id: 1019, eos_token_id: 1019, pad_token_id: 1019 };
		writeFileSync(join(at.model, "config.json"), JSON.stringify({ ...config, ...ids }));
		if (generation) writeFileSync(join(at.model, "generation_config.json"), JSON.stringify(generation));
		return at;
	}

	it.each([
		[
			{ top_p: 0.8, eos_token_id: 1019, max_new_tokens: 9 },
			{ top_p: 0.8, eos_token_id: [1021, 1019], max_new_tokens: 9 },
		],
		[null, { bos_token_id: 1019, eos_token_id: [1021, 1019], pad_token_id: 1019 }],
		[{ eos_token_id: [1019, 1021] }, { eos_token_id: [1019, 1021] }],
	])("are those that generation stops at: %j -> %j", async (before, after) => {
		const at = base(before);
		const all = await events(run(at));
		const changed = notices(all).filter((message) => message.includes("generation_config.json"));
		expect(changed).toHaveLength(JSON.stringify(before) === JSON.stringify(after) ? 0 : 1);
		for (const out of [at.out, join(at.out, "checkpoint-2")]) {
			expect(JSON.stringify(JSON.parse(text(out, "generation_config.json")))).toBe(JSON.stringify(after));
		}
		const again = await events(run({ ...at, model: at.out, out: `${at.out}-again` }));
		expect(notices(again).filter((message) => message.includes("generation_config.json"))).toEqual([]);
	});
});

describe("the model's folder", () => {
	it("may vanish during the run: checkpoints and model are whole, and the run can be resumed without it", async () => {
		const [at, whole] = [place(), place()];
		cpSync(whole.model, at.model, { recursive: true });
		const template = join(folder, "vanishing.jinja");
		writeFileSync(template, TEMPLATE);
		const options = { chat_template: template };
		const expected = await events(run(whole, options));
		const { args } = run(at, options);
		const onStep = ({ step }: { step: number }, control: { stop(): void }) => {
			if (step === 1) rmSync(at.model, { recursive: true });
			if (step === 3) control.stop();
		};
		const result = await new QwenTrainer({ args, callbacks: [{ onStep }] }).train();
		expect(result).toMatchObject({ outcome: "stopped", steps: 3 });
		expect(existsSync(at.model)).toBe(false);
		const checkpoint = "checkpoint-2";
		expect(differingFiles(join(whole.out, checkpoint), join(at.out, checkpoint))).toEqual([]);
		const rest = await events(run(at, { ...options, resume_from_checkpoint: "latest" }));
		expect(numbers(rest)).toEqual(numbers(expected).slice(3));
		expect(differingFiles(join(whole.out, "checkpoint-4"), join(at.out, "checkpoint-4"))).toEqual([]);
	});
});

describe("a pointer of Git LFS", () => {
	const POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1200000000\n";

	it.each(["model.safetensors", "tokenizer.json", "config.json", "rows.jsonl"])(
		"in place of %s is refused in the same words, before rows are encoded",
		async (name) => {
			const at = place();
			await run(at, { max_steps: 1 }).train();
			cpSync(join(at.out, "model.safetensors"), join(at.model, "model.safetensors"));
			rmSync(at.out, { recursive: true });
			writeFileSync(name === "rows.jsonl" ? at.file : join(at.model, name), POINTER);
			const error = await errorOf(run(at, { init_from_config: false }).train());
			expect(error.message).toContain(`${name}: a pointer of Git LFS in place of the file`);
			expect(error.hint.toLowerCase()).toBe("fetch the file itself: git lfs pull");
		},
	);
});

describe("experts in joined tensors", () => {
	it("give transformers' loss, and come out as they were", async (test) => {
		const joined = sharedPath("cases/fused-experts", test.task.name);
		if (joined === null) return test.skip();
		const model = join(mkdtempSync(join(folder, "joined-")), "model");
		cpSync(join(root, "assets", "model"), model, { recursive: true });
		for (const name of ["config.json", "model.safetensors"]) {
			rmSync(join(model, name));
			writeFileSync(join(model, name), readFileSync(join(joined, "model", name)));
		}
		const at = { model, file: join(joined, "rows.jsonl"), out: join(model, "..", "out") };
		const options = { init_from_config: false, train_sampling_strategy: "sequential" as const, max_steps: 1 };
		const all = await events(run(at, { ...options, per_device_train_batch_size: 4, learning_rate: 0 }));
		const [step] = ofType(all, "step");
		expect(step?.loss).toBeCloseTo(6.9921277, 4);
		expect(tensors(join(at.out, "model.safetensors"))).toEqual(tensors(join(model, "model.safetensors")));
	});
});

/** Type, shape and bytes of each tensor of a file. */
function tensors(path: string): Record<string, { dtype: string; shape: number[]; bytes: string }> {
	const file = readFileSync(path);
	const start = 8 + Number(file.readBigUInt64LE(0));
	const { __metadata__: _, ...header } = JSON.parse(file.toString("utf8", 8, start)) as Record<
		string,
		{ dtype: string; shape: number[]; data_offsets: [number, number] }
	>;
	const entries = Object.entries(header).map(
		([
			name,
			{
				dtype,
				shape,
				data_offsets: [from, to],
			},
		]) => {
			return [name, { dtype, shape, bytes: file.toString("base64", start + from, start + to) }] as const;
		},
	);
	return Object.fromEntries(entries.sort(([a], [b]) => (a < b ? -1 : 1)));
}
