import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import type { RecordData } from "../src/data/sources/record.js";
import { loadNative } from "../src/native.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { fc, holds } from "./support/properties.js";
import { arl, flags, metricsOf, type Place, root, tinyPlace } from "./support/real.js";
import { events, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const user = (content: string, rest = "") =>
	`{"messages": [{"role":"user","content":${content}},{"role":"assistant","content":"b"}]${rest}}`;
const image = '{"type":"image_url","image_url":{"url":"https://a.example/x.png"}}';
const words = (text: string) => `{"type":"text","text":"${text}"}`;

describe("a row's text without its image parts", () => {
	const model = { modelDir: join(root, "assets", "model"), truncation: "error" as const };
	const dropping = loadNative().TextEncoder.open({ ...model, images: "drop" });
	const strict = loadNative().TextEncoder.open(model);
	const encoded = (row: string) => dropping.encode(Buffer.from(row));
	const counts = (row: string) => encoded(row).notes.map(({ kind, count }) => [kind, count]);

	it("is the text of the row that never had any, whatever else is in it", () => {
		const rest =
			' , "tools" : [{"n": 1.0, "big":12345678901234567890, "z":1e-07, "a":"\\u00e9\\/\\"image\\"", "type":"image", "a": -0.0}] ';
		const { text, inputIds } = encoded(user(`[${image},${words("a")}]`, rest));
		expect(text).toContain('12345678901234567890, "z": 1e-07');
		expect(text).toBe(strict.encode(Buffer.from(user(`[${words("a")}]`, rest))).text);
		expect(inputIds).toEqual(strict.encode(Buffer.from(user('"a"', rest))).inputIds);
	});

	it("counts parts, and messages that are nothing else", () => {
		expect(counts(user(`[${image},${image}]`))).toEqual([
			["dropped images", 2],
			["emptied messages", 1],
		]);
		expect(counts(user(`[${image},${words("a")}]`))).toEqual([["dropped images", 1]]);
		expect(counts(user('"the image"'))).toEqual([]);
	});

	it("makes no good row of one that is no JSON", () => {
		const good = user(`[${image},${words("a")}]`);
		const faults = [
			good.slice(0, -1),
			`${good.slice(0, 60)},,${good.slice(60)}`,
			user(`[{"type":"image_url","x":[,]},${words("a")}]`),
			user(`[{"type":"image_url" "x":1},${words("a")}]`),
			user(`[${image},]`),
			user(`[,${image}]`),
			user(`[${image} ${words("a")}]`),
			user(`[${image},${words("a")}`),
			'{"messages":[{"content":[{"type":"image\\"',
		];
		for (const row of faults) expect(() => encoded(row), row).toThrow(/not json/);
	});

	it("is what a filter of the parsed row leaves, at any place of any row", () => {
		const space = fc.constantFrom("", " ", "\n\t");
		const inner = fc.constantFrom(
			image,
			'{"x":[{"type":"text"}],"type":"image"}',
			words('\\"]'),
			words("{"),
			words("|"),
		);
		const part = fc.tuple(space, inner, space).map((pieces) => pieces.join(""));
		const parts = fc.oneof(
			space,
			fc.array(part, { minLength: 1, maxLength: 5 }).map((several) => several.join(",")),
		);
		const filter = (content: string) => {
			const row = user(`[${content}]`);
			const { messages } = JSON.parse(row);
			const kept = messages[0].content.filter(({ type }: { type: string }) => type === "text");
			const left = { messages: [{ role: "user", content: kept }, messages[1]] };
			expect(encoded(row).text, row).toBe(strict.encode(Buffer.from(JSON.stringify(left))).text);
		};
		holds(2000, fc.property(parts, filter));
	});
});

describe("a text-only model that is handed images", () => {
	let place: Place;
	const textRow = (content: unknown) =>
		JSON.stringify({
			messages: [
				{ role: "user", content },
				{ role: "assistant", content: "Yes." },
			],
		});
	const run = (file: string, out: string, more: Record<string, string | number> = {}) =>
		arl([
			"train",
			...flags({ model_name_or_path: place.model, init_from_config: true, train_file: file, output_dir: out }),
			...flags({ max_steps: 4, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: "no", ...more }),
		]);
	const write = (name: string, rows: string[]) => {
		const path = join(folder, name);
		writeFileSync(path, `${rows.join("\n")}\n`);
		return path;
	};
	beforeAll(() => {
		place = tinyPlace(folder, 4);
	});

	it("refuses with the row's place, and says what to do", async () => {
		const file = write("refused.jsonl", [textRow("a"), textRow([JSON.parse(words("a")), JSON.parse(image)])]);
		const { code, stderr } = await run(file, join(folder, "refused"));
		expect(code).toBe(3);
		expect(stderr).toContain(`${file}:2: image: messages[0].content[1]: a part of type image_url`);
		expect(stderr).toContain("--images drop");
	});

	it("with --images drop trains what the same rows without images give, in bits, and tells how many", async () => {
		const part = (text: string) => ({ type: "text", text });
		const pictures = [JSON.parse(image), { type: "image", image: "file:///nowhere.png" }];
		const withImages = write("with.jsonl", [
			textRow([pictures[0], part("What is this?"), pictures[1], part(" And that?")]),
			textRow([part("Look: "), pictures[0]]),
			textRow("Plain."),
			textRow([pictures[0]]),
		]);
		// A list of texts is their texts one behind the other, as templates that know parts write them.
		const plain = write("plain.jsonl", [
			textRow("What is this? And that?"),
			textRow("Look: "),
			textRow("Plain."),
			textRow(""),
		]);
		const [a, b] = [join(folder, "with"), join(folder, "plain")];
		const dropped = await run(withImages, a, { images: "drop" });
		expect(dropped.stderr).toMatch(/4 images of 3 rows dropped \(1 message is empty\)/);
		expect(dropped.code).toBe(0);
		expect((await run(plain, b)).code).toBe(0);
		const losses = (out: string) =>
			metricsOf(out).map(({ loss, grad_norm, num_tokens }) => ({ loss, grad_norm, num_tokens }));
		expect(losses(a)).toEqual(losses(b));
		expect(losses(a)).toHaveLength(4);
	});

	it("tells nothing of images where none were dropped", async () => {
		const all = await events(trainer(workspace(folder)));
		expect(ofType(all, "fill").every((event) => event.imagesDropped === undefined)).toBe(true);
		const none = await events(trainer(workspace(folder), { images: "drop" }));
		expect(ofType(none, "fill").at(-1)?.imagesDropped).toEqual({ images: 0, rows: 0, emptied: 0 });
	});

	it("is part of what a resumed run must share", async () => {
		const place = workspace(folder);
		const native = fakeNative();
		await events(trainer(place, { images: "drop", save_strategy: "steps", save_steps: 1, max_steps: 1 }, native));
		const error = await errorOf(
			events(trainer(place, { resume_from_checkpoint: true, max_steps: 2, save_strategy: "no" }, native)),
		);
		expect(error.code).toBe("ARL_STATE");
		expect(error.message).toContain("images: drop -> none");
	});

	it("tells of images in rows whose tokens are there already", async () => {
		const file = write("again.jsonl", [textRow([JSON.parse(words("a")), JSON.parse(image)])]);
		const options = { images: "drop", max_steps: 1, cache_dir: join(folder, "again-cache") };
		expect((await run(file, join(folder, "again-1"), options)).stderr).toContain("1 image of 1 row dropped");
		const { code, stderr } = await run(file, join(folder, "again-2"), options);
		expect(code).toBe(0);
		expect(stderr).toContain(`${file}:1: left out 1 image`);
	});

	it("refuses images and videos of columns, and with --images drop trains the text of the images' row", async () => {
		const row = (word: string, column: string) =>
			JSON.stringify({ ...JSON.parse(textRow(`<${word}>Look`)), [column]: ["nowhere"] });
		const images = write("column.jsonl", [row("image", "images")]);
		const videos = write("videos.jsonl", [row("video", "videos")]);
		expect((await run(images, join(folder, "column-1"))).stderr).toContain("`images` has 1 image");
		const dropped = await run(images, join(folder, "column-2"), { images: "drop" });
		expect(dropped.stderr).toContain("1 image of 1 row dropped");
		expect(dropped.code).toBe(0);
		const refused = await run(videos, join(folder, "column-3"), { images: "drop" });
		expect(refused.stderr).toContain("image: `videos` has 1 video; this model reads text only");
		expect(refused.code).toBe(3);
	});

	const content = [JSON.parse(image), { type: "text" as const, text: "a" }];
	const record: RecordData = {
		messages: [
			{ role: "user", content },
			{ role: "assistant", content: "b" },
		],
	};
	const args = (out: string) => ({
		model_name_or_path: place.model,
		init_from_config: true,
		output_dir: join(folder, out),
		images: "drop" as const,
		save_strategy: "no" as const,
		max_steps: 2,
		per_device_train_batch_size: 1,
	});

	it("drops and counts them in rows from code too", async () => {
		const run = new QwenTrainer({ args: args("code"), train_dataset: [record, record] });
		expect(ofType(await events(run), "fill").at(-1)?.imagesDropped).toEqual({ images: 2, rows: 2, emptied: 0 });
	});

	it("drops them from a stream without a length", async () => {
		const rows = async function* () {
			for (let i = 0; i < 3; i++) yield record;
		};
		const run = new QwenTrainer({
			args: { ...args("stream"), train_sampling_strategy: "sequential" as const, max_steps: 4 },
			train_dataset: rows(),
		});
		const all = await events(run);
		expect(ofType(all, "fill").at(-1)?.imagesDropped).toEqual({ images: 3, rows: 3, emptied: 0 });
		expect(ofType(all, "step")).toHaveLength(4);
	});
});
