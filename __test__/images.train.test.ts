/** Training with images on the fake core: which rows' images are trained, how bad ones end, and when pixels are read. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { beforeAll, describe, expect, it } from "vitest";
import { createTrainer } from "../src/api/trainer.js";
import type { RecordData } from "../src/data/sources/record.js";
import type { EngineOptions, MicroBatch } from "../src/native.js";
import { type Faults, fakeNative, writeFakeModel } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { picture, type TestServer, testServer } from "./support/images.js";
import { events, type Options, ofType, trainer } from "./support/run.js";

const folder = temporaryFolder();

interface Place {
	model: string;
	file: string;
	out: string;
	pictures: string;
}

const record = (urls: readonly string[], text: string): RecordData => ({
	messages: [
		{
			role: "user",
			content: [
				...urls.map((url) => ({ type: "image_url" as const, image_url: { url } })),
				{ type: "text", text: "?" },
			],
		},
		{ role: "assistant", content: text },
	],
});

/** A model that sees, `rows` rows, and a folder of pictures. */
function seeingPlace(rows: readonly (readonly string[])[], tower = true): Place {
	const place = mkdtempSync(join(folder, "see-"));
	const model = join(place, "model");
	const pictures = join(place, "pictures");
	mkdirSync(model);
	mkdirSync(pictures);
	writeFakeModel(model, tower ? { vision_config: { depth: 1 } } : {});
	const file = join(place, "rows.jsonl");
	const url = (name: string) => (name.includes(":") ? name : pathToFileURL(join(pictures, name)).href);
	const lines = rows.map((names, i) => JSON.stringify(record(names.map(url), `answer ${i}`)));
	writeFileSync(file, `${lines.join("\n")}\n`);
	return { model, file, out: join(place, "out"), pictures };
}

/** A run on such a place: its steps' batches, and the options of its engine. */
function watched(place: Place, options: Options = {}, faults: Faults = {}) {
	const seen: MicroBatch[][] = [];
	const opened: EngineOptions[] = [];
	const native = fakeNative({
		...faults,
		onStep: (step, batches) => {
			seen.push(batches);
			return faults.onStep?.(step, batches);
		},
		onOpen: (engine) => void opened.push(engine),
	});
	const run = trainer(
		place,
		{
			image_root: place.pictures,
			train_sampling_strategy: "sequential",
			gradient_accumulation_steps: 1,
			num_train_epochs: 1,
			...options,
		},
		native,
	);
	return { seen, opened, native, run };
}

/** Sizes and first bytes of the pixels of each step. */
const pixelsOf = (seen: readonly MicroBatch[][]) =>
	seen.map((batches) =>
		batches.flatMap(({ images = [] }) => images.map(({ pixels, height, width }) => [height, width, pixels[0]])),
	);

let png: Buffer;
let wide: Buffer;
let server: TestServer;
beforeAll(async () => {
	[png, wide] = [await picture("png", 8, 6), await picture("png", 16, 2)];
	server = await testServer();
});

/** The same picture with another last byte, which the fake core paints all pixels with. */
const marked = (bytes: Buffer, mark: number) => Buffer.concat([bytes, Buffer.of(mark)]);

describe("rows with images", () => {
	it("are trained where the model has a tower and one of the first rows has an image: pixels arrive in their order", async () => {
		const place = seeingPlace([["a.png", "b.png"], [], ["b.png"], ["a.png"]]);
		writeFileSync(join(place.pictures, "a.png"), marked(png, 1));
		writeFileSync(join(place.pictures, "b.png"), marked(wide, 2));
		const { seen, opened, run } = watched(place);
		const all = await events(run);
		const [a, b] = [
			[6, 8, 1],
			[2, 16, 2],
		];
		expect(pixelsOf(seen)).toEqual([
			[a, b],
			[b, a],
		]);
		expect(opened[0]).toMatchObject({ vision: true, freeze: [], maxPatches: 48 + 32, maxImages: 2 });
		expect(ofType(all, "fill").at(-1)).toMatchObject({ images: 4, rows: 4 });
		expect(ofType(all, "check").find(({ name }) => name === "images")?.message).toContain("images are trained");
	});

	it("take paths that start at image_root, and what is frozen reaches the engine", async () => {
		const place = seeingPlace([["x:x"]]);
		writeFileSync(place.file, `${JSON.stringify(record(["deep/a.png"], "y"))}\n`);
		mkdirSync(join(place.pictures, "deep"));
		writeFileSync(join(place.pictures, "deep", "a.png"), png);
		const { seen, opened, run } = watched(place, { freeze: ["vision"], per_device_train_batch_size: 1 });
		await run.train();
		expect(pixelsOf(seen)).toHaveLength(1);
		expect(opened[0]).toMatchObject({ vision: true, freeze: ["vision"] });
	});

	it("are refused by a model that reads text, and where none of the first rows has an image", async () => {
		const blind = seeingPlace([["a.png"]], false);
		const refused = await errorOf(watched(blind).run.train());
		expect(refused.message).toContain("image");
		expect(refused.hint).toContain("--images drop");
		const late = seeingPlace([...Array.from({ length: 40 }, () => []), ["a.png"]]);
		writeFileSync(join(late.pictures, "a.png"), png);
		const missed = await errorOf(watched(late).run.train());
		expect(missed.message).toContain(":41: image");
		expect(missed.hint).toContain("--images train");
		const { seen, run } = watched(late, { images: "train", overwrite_output_dir: true });
		await run.train();
		expect(pixelsOf(seen).flat()).toHaveLength(1);
	});

	it("leave a tower that no row needs to itself", async () => {
		const place = seeingPlace([[], []]);
		const { opened, run } = watched(place, { freeze: ["vision"] });
		const all = await events(run);
		expect(opened[0]).not.toHaveProperty("vision");
		expect(
			ofType(all, "notice")
				.map(({ message }) => message)
				.join("\n"),
		).toContain("freeze vision has no effect");
		const { run: nothing } = watched(seeingPlace([[], []]), { freeze: ["language"] });
		expect((await errorOf(nothing.train())).message).toContain("nothing would be");
	});

	it("cannot be trained by force on a model without a tower, nor can one be frozen", async () => {
		const place = seeingPlace([["a.png"]], false);
		const error = await errorOf(watched(place, { images: "train" }).run.train());
		expect(error).toMatchObject({ code: "ARL_CONFIG" });
		expect(error.message).toContain("has no vision_config");
		const frozen = await errorOf(watched(place, { freeze: ["vision"] }).run.train());
		expect(frozen.message).toContain("freeze vision");
	});
});

describe("bad images", () => {
	it("make bad rows with place and reason: missing, no image, truncated, a page that does not answer", async () => {
		const hanging = server.on("/hang.png", () => {});
		const place = seeingPlace([["ok.png"], ["none.png"], ["text.png"], ["cut.png"], ["ok.png", hanging], ["ok.png"]]);
		writeFileSync(join(place.pictures, "ok.png"), png);
		writeFileSync(join(place.pictures, "text.png"), "words");
		writeFileSync(join(place.pictures, "cut.png"), png.subarray(0, png.length - 20));
		const options = { image_allow_private: true, image_timeout: 0.05 };
		const error = await errorOf(watched(place, options).run.train());
		expect(error.code).toBe("ARL_DATA");
		const lines = error.message.split("\n");
		expect(lines[0]).toContain("4 of 6 rows cannot be used (4 image)");
		const placed = (row: number) => lines.find((line) => line.startsWith(`${place.file}:${row}: image: `)) ?? "";
		expect(placed(2)).toContain("ENOENT");
		expect(placed(3)).toContain("not a supported image: this is text");
		expect(placed(4)).toContain("damaged or truncated");
		expect(placed(5)).toContain("no complete response within 0.05 s, 5 times");
	}, 60_000);

	it("leave their rows out with on_bad_row skip", async () => {
		const place = seeingPlace([["ok.png"], ["none.png"], ["ok.png"]]);
		writeFileSync(join(place.pictures, "ok.png"), png);
		const { seen, run } = watched(place, { on_bad_row: "skip" });
		const all = await events(run);
		expect(ofType(all, "rows_skipped")[0]?.reasons).toEqual({ image: 1 });
		expect(pixelsOf(seen)).toEqual([[expect.anything(), expect.anything()]]);
	});

	it("that change or vanish while the run trains end it with the row's place", async () => {
		for (const [spoil, message] of [
			[(path: string) => writeFileSync(path, marked(png, 7)), "changed since its tokens were made: it has other bytes"],
			[(path: string) => rmSync(path), "cannot be read any more"],
		] as const) {
			const place = seeingPlace([["a.png"], ["a.png"], ["a.png"], ["a.png"]]);
			const path = join(place.pictures, "a.png");
			writeFileSync(path, png);
			const { run } = watched(
				place,
				{ num_train_epochs: 4, per_device_train_batch_size: 1 },
				{
					onStep: (step) => {
						if (step === 4) spoil(path);
						return undefined;
					},
				},
			);
			const error = await errorOf(run.train());
			expect(error.code).toBe("ARL_DATA");
			expect(error.message).toMatch(new RegExp(`^${place.file}:\\d: messages\\[0\\]: ${message}`));
			expect(error.hint).not.toBe("");
		}
	});
});

describe("pixels", () => {
	it("of the next step are read while the engine computes, and no further ahead than one step more", async () => {
		const names = Array.from({ length: 6 }, (_, i) => [`${i}.png`]);
		const place = seeingPlace(names);
		for (const [i, [name = ""]] of names.entries()) writeFileSync(join(place.pictures, name), marked(png, 10 + i));
		const heard: string[] = [];
		const { run } = watched(
			place,
			{ per_device_train_batch_size: 1 },
			{
				stepMs: 60,
				onQueue: (what) => void (/^finish(ed)? /.test(what) && heard.push(what)),
				onPrepare: (bytes) => void heard.push(`read ${(bytes.at(-1) ?? 0) - 9}`),
			},
		);
		await run.train();
		const at = (what: string) => heard.indexOf(what);
		for (let step = 1; step < 6; step++)
			expect(at(`read ${step + 1}`), heard.join()).toBeLessThan(at(`finished ${step}`));
		for (let step = 1; step < 4; step++)
			expect(at(`read ${step + 3}`), heard.join()).toBeGreaterThan(at(`finish ${step}`));
		expect(heard.filter((what) => what.startsWith("read"))).toHaveLength(6);
	});

	it("from the network are fetched once, whatever the number of epochs", async () => {
		const url = server.on("/once.png", (_, response) => response.end(png));
		const place = seeingPlace([[url], [url]]);
		const { seen, run } = watched(place, { image_allow_private: true, num_train_epochs: 3 });
		await run.train();
		expect(pixelsOf(seen).flat()).toHaveLength(6);
		expect(server.hits.get("/once.png")).toBe(1);
	});

	it("of rows that come only once are read from what was kept of these rows", async () => {
		const place = seeingPlace([]);
		const data = `data:image/png;base64,${png.toString("base64")}`;
		let asked = 0;
		const rows = async function* () {
			for (let i = 0; i < 3; i++) {
				asked += 1;
				yield record(i === 1 ? [] : [data], `answer ${i}`);
			}
		};
		const seen: MicroBatch[][] = [];
		const native = fakeNative({
			onStep: (_, batches) => {
				seen.push(batches);
				return undefined;
			},
		});
		const args = {
			model_name_or_path: place.model,
			output_dir: place.out,
			train_sampling_strategy: "sequential" as const,
			per_device_train_batch_size: 1,
			max_steps: 6,
			save_strategy: "no" as const,
		};
		await createTrainer({ args, train_dataset: rows() }, () => native).train();
		expect(asked).toBe(3);
		expect(pixelsOf(seen).map(({ length }) => length)).toEqual([1, 0, 1, 1, 0, 1]);
	});

	it("arrive after resuming as in a run that was never stopped", async () => {
		const place = seeingPlace([["a.png"], [], ["b.png"], ["a.png", "b.png"]]);
		writeFileSync(join(place.pictures, "a.png"), marked(png, 1));
		writeFileSync(join(place.pictures, "b.png"), marked(wide, 2));
		const options = { num_train_epochs: 2, save_strategy: "steps" as const, save_steps: 2 };
		const whole = watched(place, options);
		await whole.run.train();
		const half = { ...place, out: `${place.out}-2` };
		const disk = new Map();
		const part = (more: Options) => {
			const seen: MicroBatch[][] = [];
			const native = fakeNative({ onStep: (_, batches) => void seen.push(batches) as undefined }, disk);
			const run = trainer(
				half,
				{
					...{ image_root: place.pictures, train_sampling_strategy: "sequential", gradient_accumulation_steps: 1 },
					...options,
					...more,
				},
				native,
			);
			return { seen, run };
		};
		const first = part({});
		for await (const event of first.run.run()) if (event.type === "saved" && event.step === 2) break;
		const second = part({ resume_from_checkpoint: true });
		await second.run.train();
		expect(pixelsOf(second.seen)).toEqual(pixelsOf(whole.seen).slice(2));
	});
});
