/** A model that sees, trained on the real core: pictures in files, a small Qwen3-VL with random weights. */
import { execFileSync } from "node:child_process";
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { encodePng } from "../src/images/png.js";
import type { Mpirun } from "../src/launch/mpi.js";
import { temporaryFolder } from "./support/folder.js";
import { arlOnRanks, mpiruns } from "./support/ranks.js";
import { arl, differingFiles, flags, metricsOf, root } from "./support/real.js";

const folder = temporaryFolder();
const model = join(folder, "model");
const file = join(folder, "rows.jsonl");

/** A picture of one colour with a square of another. */
function square(colour: readonly number[], side: number, height: number, width: number): Buffer {
	const pixels = new Uint8Array(3 * height * width).fill(240);
	for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) pixels.set(colour, 3 * (y * width + x));
	return encodePng(pixels, height, width);
}

const options = {
	model_name_or_path: model,
	init_from_config: true,
	train_file: file,
	image_root: folder,
	per_device_train_batch_size: 2,
	gradient_accumulation_steps: 2,
	logging_steps: 1,
	threads: 2,
	learning_rate: 1e-3,
};

/** The bytes of tensors of a safetensors file, by name. */
function tensors(path: string): Map<string, Buffer> {
	const bytes = readFileSync(path);
	const start = 8 + Number(bytes.readBigUInt64LE(0));
	const header = JSON.parse(bytes.toString("utf8", 8, start)) as Record<string, { data_offsets: [number, number] }>;
	delete header.__metadata__;
	return new Map(
		Object.entries(header).map(
			([
				name,
				{
					data_offsets: [from, to],
				},
			]) => [name, bytes.subarray(start + from, start + to)],
		),
	);
}

beforeAll(() => {
	execFileSync(process.execPath, [join(root, "examples", "make-model.mjs"), model, "--sees"]);
	mkdirSync(join(folder, "pictures"));
	const colours = { red: [220, 40, 40], green: [40, 160, 70], blue: [40, 80, 220] };
	const rows = Object.entries(colours).flatMap(([name, colour], i) =>
		[8, 20].map((side) => {
			const url = `pictures/${name}-${side}.png`;
			writeFileSync(join(folder, url), square(colour, side, 48 + 16 * i, 64));
			const image = { type: "image_url", image_url: { url } };
			return [
				{ role: "user", content: [image, { type: "text", text: "Which colour?" }] },
				{ role: "assistant", content: name },
			];
		}),
	);
	const text = [
		{ role: "user", content: "Hello" },
		{ role: "assistant", content: "Hi" },
	];
	writeFileSync(file, [...rows, text].map((messages) => `${JSON.stringify({ messages })}\n`).join(""));
});

async function train(out: string, more: Record<string, string | number | boolean>) {
	const ended = await arl(["train", ...flags({ ...options, output_dir: join(folder, out), ...more })]);
	expect(ended.code, ended.stderr).toBe(0);
	return ended;
}

describe("a model that sees", () => {
	it("trains on pictures, and resumes equal in every bit to a run that was never stopped", async () => {
		const steps = { save_steps: 3, max_steps: 6 };
		const { stderr } = await train("whole", steps);
		expect(stderr).toContain("images are trained");
		expect(stderr).toMatch(/encoded 7 rows with 6 images/);
		const losses = metricsOf(join(folder, "whole")).map(({ loss = 0 }) => loss);
		expect(losses.at(-1)).toBeLessThan(losses[0] ?? 0);
		cpSync(join(folder, "whole"), join(folder, "half"), { recursive: true });
		rmSync(join(folder, "half", "checkpoint-6"), { recursive: true });
		await train("half", { ...steps, resume_from_checkpoint: join(folder, "half", "checkpoint-3") });
		const last = (out: string) => join(folder, out, "checkpoint-6");
		expect(differingFiles(last("whole"), last("half"))).toEqual([]);
	}, 120_000);

	it("sees the same in a file, a data: URL, and a column with its word in the text: the losses are equal in bits", async () => {
		const rows = readFileSync(file, "utf8")
			.trim()
			.split("\n")
			.map((line) => JSON.parse(line).messages);
		const form = (name: string, change: (messages: ReturnType<typeof JSON.parse>) => object) => {
			const path = join(folder, `${name}.jsonl`);
			writeFileSync(path, rows.map((messages) => `${JSON.stringify(change(structuredClone(messages)))}\n`).join(""));
			return train(name, { train_file: path, max_steps: 3, save_strategy: "no", images: "train" });
		};
		const urlOf = ([{ content }]: [{ content: string | { image_url?: { url: string } }[] }]) =>
			typeof content === "string" ? null : (content[0]?.image_url?.url ?? "");
		await form("files", (messages) => ({ messages }));
		await form("data-urls", (messages) => {
			const url = urlOf(messages);
			if (url === null) return { messages };
			const base64 = readFileSync(join(folder, url)).toString("base64");
			messages[0].content[0].image_url.url = `data:image/png;base64,${base64}`;
			return { messages };
		});
		await form("column", (messages) => {
			const url = urlOf(messages);
			if (url === null) return { messages, images: [] };
			messages[0].content = `<image>${messages[0].content[1].text}`;
			return { messages, images: [url] };
		});
		const numbers = (out: string) =>
			metricsOf(join(folder, out)).map(({ loss, grad_norm, num_tokens }) => ({ loss, grad_norm, num_tokens }));
		expect(numbers("files")).toHaveLength(3);
		expect(numbers("data-urls")).toEqual(numbers("files"));
		expect(numbers("column")).toEqual(numbers("files"));
	}, 120_000);

	it("ends at the step that needs a picture with damaged pixels, which data check finds before", async () => {
		const path = join(folder, "damaged.jsonl");
		const picture = square([0, 0, 0], 9, 64, 64);
		// The header stays good: the fault is in what is packed behind it.
		picture.fill(0xff, 50, 60);
		writeFileSync(join(folder, "damaged.png"), picture);
		writeFileSync(path, readFileSync(file, "utf8").replace("pictures/green-8.png", "damaged.png"));
		const options = { model_name_or_path: model, train_file: path, image_root: folder };
		const checked = await arl(["data", "check", ...flags(options)]);
		expect(checked.code).toBe(3);
		expect(checked.stdout).toContain(`${path}:3: image: messages[0].content[0]: `);
		const out = join(folder, "damaged");
		const ended = await arl([
			"train",
			...flags({ ...options, init_from_config: true, output_dir: out, max_steps: 20 }),
		]);
		expect(ended.code).toBe(3);
		expect(ended.stderr).toContain(`${path}:3: messages[0].content[0]: cannot be decoded`);
		expect(ended.stderr).toContain("`arl data check` decodes every image");
	}, 120_000);

	it("resumes after kill -9 wherever it was, equal in every bit", async () => {
		const killed = join(folder, "killed");
		const run = { ...options, output_dir: killed, save_steps: 1, max_steps: 6, resume_from_checkpoint: "latest" };
		for (const milliseconds of [400, 700, 1000]) {
			await arl(["train", ...flags(run)], (kill) => void setTimeout(() => kill("SIGKILL"), milliseconds));
		}
		const ended = await arl(["train", ...flags(run)]);
		expect(ended.code, ended.stderr).toBe(0);
		await train("never-killed", { save_steps: 1, max_steps: 6 });
		expect(differingFiles(join(killed, "checkpoint-6"), join(folder, "never-killed", "checkpoint-6"))).toEqual([]);
	}, 120_000);

	const [mpirun] = mpiruns();
	it.skipIf(mpirun === undefined)(
		"has the bits of one rank on two, which are sent the pixels",
		async () => {
			const exact = { ...options, threads: 1, device: "cpu", zero: 0, max_steps: 3, save_steps: 3 };
			const [one, two] = ["one-rank", "two-ranks"].map((name) => join(folder, name)) as [string, string];
			await train("one-rank", { ...exact, full_determinism: true });
			const words = { ...exact, gradient_accumulation_steps: 1, output_dir: two };
			const ended = await arlOnRanks(mpirun as Mpirun, 2, ["train", ...flags(words)]);
			expect(ended.code, ended.stderr).toBe(0);
			expect(differingFiles(join(two, "checkpoint-3"), join(one, "checkpoint-3"))).toEqual([]);
		},
		120_000,
	);

	it("leaves a frozen tower as it was to the bit, and trains the rest", async () => {
		await train("frozen", { save_steps: 1, max_steps: 2, freeze: "vision" });
		const [before, after] = [1, 2].map((step) =>
			tensors(join(folder, "frozen", `checkpoint-${step}`, "model.safetensors")),
		);
		const changed = (name: string) => !before?.get(name)?.equals(after?.get(name) ?? Buffer.alloc(0));
		const names = [...(before?.keys() ?? [])];
		const isTower = (name: string) => /visual\.(blocks|patch_embed|pos_embed)/.test(name);
		expect(names.filter(isTower).length).toBeGreaterThan(10);
		expect(names.filter(isTower).filter(changed)).toEqual([]);
		expect(names.filter((name) => name.includes("merger")).some(changed)).toBe(true);
		expect(names.filter((name) => name.includes("layers.0.mlp")).every(changed)).toBe(true);
	}, 120_000);

	it("trains an adapter next to its tower as the project of arl init does, and answers with it", async () => {
		const project = join(folder, "project");
		const base = join(folder, "whole");
		const made = await arl(["init", project, "--template", "images", "--model", base, "--yes"]);
		expect(made.code, made.stderr).toBe(0);
		const config = readFileSync(join(project, "arl.config.ts"), "utf8");
		const [, targets = ""] = /lora_target_modules: \[(.*)\]/.exec(config) ?? [];
		const words = {
			model_name_or_path: base,
			train_file: join(project, "data", "train.jsonl"),
			image_root: join(project, "data"),
			output_dir: join(folder, "adapter"),
			use_peft: true,
			max_steps: 2,
		};
		const names = ["--lora_target_modules", ...targets.replaceAll('"', "").split(", ")];
		const ended = await arl(["train", ...flags(words), ...names]);
		expect(ended.code, ended.stderr).toBe(0);
		const picture = ["--image", join(project, "data", "pictures", "0.png"), "--max_new_tokens", "2"];
		const adapter = ["--adapter", words.output_dir];
		const reply = await arl(["generate", "--model_name_or_path", base, ...adapter, "--prompt", "What?", ...picture]);
		expect(reply.code, reply.stderr).toBe(0);
	}, 120_000);

	it("evaluates and generates by the pictures: another one gives another loss", async () => {
		const out = join(folder, "whole");
		const evaluated = await arl([
			"eval",
			...flags({ model_name_or_path: out, eval_file: file, image_root: folder }),
			"--json",
		]);
		expect(evaluated.code, evaluated.stderr).toBe(0);
		const { eval_loss: loss } = JSON.parse(evaluated.stdout);
		const shown = [
			"--prompt",
			"Which colour?",
			"--image",
			join(folder, "pictures", "red-20.png"),
			"--max_new_tokens",
			"3",
		];
		const reply = await arl(["generate", "--model_name_or_path", out, ...shown, "--json"]);
		expect(reply.code, reply.stderr).toBe(0);
		expect(JSON.parse(reply.stdout).promptTokens).toBeGreaterThan(12);
		const other = join(folder, "other.jsonl");
		writeFileSync(other, readFileSync(file, "utf8").replaceAll("red-", "blue-").replaceAll("green-", "red-"));
		const moved = await arl([
			"eval",
			...flags({ model_name_or_path: out, eval_file: other, image_root: folder }),
			"--json",
		]);
		expect(JSON.parse(moved.stdout).eval_loss).not.toBe(loss);
	}, 120_000);
});
