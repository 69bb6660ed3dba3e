import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it, vi } from "vitest";
import { openFiles } from "../src/data/open.js";
import type { RowContent, Source } from "../src/data/source.js";
import { TextOnlySource, withoutImages } from "../src/images/drop.js";
import { loadNative } from "../src/native.js";
import { QwenTrainer } from "../src/train/trainer.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { fc, holds } from "./support/properties.js";
import { arl, flags, metricsOf, type Place, tinyPlace } from "./support/real.js";
import { events, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const drop = (text: string, columns?: Record<string, string>) => {
	const { row, images, emptied } = withoutImages(Buffer.from(text), columns);
	return { text: Buffer.from(row).toString(), images, emptied };
};
const user = (content: string, rest = "") =>
	`{"messages": [{"role":"user","content":${content}},{"role":"assistant","content":"b"}]${rest}}`;
const image = '{"type":"image_url","image_url":{"url":"https://a.example/x.png"}}';
const words = (text: string) => `{"type":"text","text":"${text}"}`;

describe("a row's text without its image parts", () => {
	it.each([
		["first", `[${image}, ${words("a")}]`, `[${words("a")}]`],
		["last", `[${words("a")} , ${image}]`, `[${words("a")}]`],
		["between", `[${words("a")}, ${image} ,\n${words("b")} ]`, `[${words("a")} ,\n${words("b")} ]`],
		[
			"several together",
			`[${image},${image}, ${words("a")},${image},${image},${words("b")},${image}]`,
			`[${words("a")},${words("b")}]`,
		],
		["alone", `[ ${image} ]`, "[  ]"],
		["of Qwen's own kind", `[{"type":"image","image":"file:///x.png"},${words("a")}]`, `[${words("a")}]`],
		["with an escaped type", `[{"\\u0074ype":"im\\u0061ge_url"},${words("a")}]`, `[${words("a")}]`],
	])("%s", (_, before, after) => {
		expect(drop(user(before)).text).toBe(user(after));
	});

	it("counts parts, and messages that are nothing else", () => {
		expect(drop(user(`[${image},${image}]`))).toMatchObject({ images: 2, emptied: 1 });
		expect(drop(user(`[${image},${words("a")}]`))).toMatchObject({ images: 1, emptied: 0 });
		expect(drop(user('"a"'))).toMatchObject({ images: 0, emptied: 0 });
	});

	it("keeps floats, large integers, key order, repeated keys, escapes and white space byte for byte", () => {
		const rest =
			' , "advantages" : {"1": 1.0}, "n":12345678901234567890, "z":1e-07, "a":"\\u00e9\\/\\"image\\"", "a": -0.0  ';
		expect(drop(user(`[${image},${words("a")}]`, rest)).text).toBe(user(`[${words("a")}]`, rest));
	});

	it("leaves alone what is no part of a message", () => {
		const tools = `,"tools":[{"type":"function","content":[{"type":"image"}],"function":{"content":[${image}]}}]`;
		const calls = `{"messages":[{"role":"assistant","tool_calls":[{"content":[${image}]}],"content":"${"image"}"}]}`;
		for (const row of [user('"an image"', tools), calls, user(`[[${image}]]`), user(`{"a":[${image}]}`)]) {
			expect(drop(row)).toEqual({ text: row, images: 0, emptied: 0 });
		}
	});

	it("keeps parts that are no images, for the core to judge", () => {
		const row = user(`[{"type":"video_url"},{"type":"image "},{"type":["image"]},{"image_url":{}},"image",null,7]`);
		expect(drop(row)).toEqual({ text: row, images: 0, emptied: 0 });
		expect(drop(user(`["image",${image},{"type":"video"}]`)).text).toBe(user(`["image",{"type":"video"}]`));
	});

	it("gives the very same bytes where there is nothing to drop", () => {
		const row = Buffer.from(user('"the image"'));
		expect(withoutImages(row).row).toBe(row);
	});

	it("finds messages in every column that the core reads them from", () => {
		const list = `[{"role":"user","content":[${image}]}]`;
		for (const name of ["messages", "conversations", "prompt", "completion", "question", "answer"]) {
			expect(drop(`{"${name}":${list}}`).images, name).toBe(1);
		}
		expect(drop(`{"conversations":[{"from":"human","value":[${image}]}]}`).images).toBe(1);
		expect(drop(`{"talk":${list}}`).images).toBe(0);
		expect(drop(`{"talk":${list}}`, { messages: "talk" }).images).toBe(1);
		expect(drop(`{"messages":${list}}`, { messages: "talk" }).images).toBe(0);
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
			`[${good}]`,
			'"image',
			'{"image',
			'{"messages":[{"content":[{"type":"image\\"',
		];
		for (const row of faults) expect(drop(row), row).toEqual({ text: row, images: 0, emptied: 0 });
	});

	it("cuts at any place of any row as a parser would", () => {
		const space = fc.constantFrom("", " ", "\n\t");
		const inner = fc.constantFrom(
			image,
			'{"x":[{"type":"text"}],"type":"image"}',
			words('\\"]'),
			'{"type":"text","text":"{"}',
			"3",
			"[]",
		);
		const part = fc.tuple(space, inner, space).map((pieces) => pieces.join(""));
		const parts = fc.oneof(
			space,
			fc.array(part, { minLength: 1, maxLength: 5 }).map((several) => several.join(",")),
		);
		const cut = (content: string) => {
			const row = user(`[${content}]`);
			const kept = JSON.parse(row).messages[0].content.filter(
				(element: { type?: string }) => element.type !== "image_url" && element.type !== "image",
			);
			const dropped = JSON.parse(drop(row).text);
			expect(dropped.messages[0].content).toEqual(kept);
			expect({ ...dropped, messages: dropped.messages.slice(1) }).toEqual({ messages: [JSON.parse(row).messages[1]] });
		};
		holds(2000, fc.property(parts, cut));
	});
});

describe("a source without images", () => {
	it("has its own identity, the same places, and counts each row once", async () => {
		const path = join(folder, "rows.jsonl");
		writeFileSync(path, `${user(`[${image},${words("a")}]`)}\n\n${user(`[${image},${image}]`)}\n${user('"a"')}\n`);
		const { source: inner } = await openFiles(loadNative(), [path]);
		const source = new TextOnlySource(inner);
		expect(source.identity).not.toBe(inner.identity);
		expect(source.location(1)).toBe(`${path}:3`);
		await source.read([0, 1]);
		const rows = await source.read([1, 2, 0]);
		expect(rows.map((row) => Buffer.from(row).includes("image"))).toEqual([false, false, false]);
		expect(source.dropped).toEqual({ images: 3, rows: 2, emptied: 1 });
		await source.close();
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

	it("drops and counts them in rows from code too", async () => {
		const content = [JSON.parse(image), { type: "text" as const, text: "a" }];
		const messages = [
			{ role: "user" as const, content },
			{ role: "assistant" as const, content: "b" },
		];
		const { model, out } = workspace(folder);
		const run = new QwenTrainer(
			{
				args: { model_name_or_path: model, output_dir: out, images: "drop", save_strategy: "no" },
				train_dataset: [{ messages }, { messages }],
			},
			() => fakeNative(),
		);
		expect(ofType(await events(run), "fill").at(-1)?.imagesDropped).toEqual({ images: 2, rows: 2, emptied: 0 });
	});

	it("drops from rows that are made as they are asked for, and passes on why one cannot be had", async () => {
		const row = Buffer.from(user(`[${image},${words("a")}]`));
		const missing = { reason: "missing", message: "gone" };
		const rows = async (indexes: Uint32Array) => Array.from(indexes, (index) => (index === 1 ? missing : row));
		const making = {
			inOrder: false,
			recheck: true,
			ahead: 7,
			take: rows,
			peek: rows,
			sync: vi.fn(),
			cancel: vi.fn(),
		};
		const inner: Source<RowContent> = {
			name: "made",
			length: 3,
			blankLines: 0,
			identity: "i",
			leftOut: 2,
			making,
			location: String,
			bytes: () => 0,
			read: (indexes) => rows(Uint32Array.from(indexes)),
			close: async () => {},
		};
		const source = new TextOnlySource(inner);
		expect(source).toMatchObject({ leftOut: 2, making: { inOrder: false, recheck: true, ahead: 7 } });
		for (const got of [
			await source.making?.take(Uint32Array.of(0, 1), 100),
			await source.making?.peek(Uint32Array.of(0, 1)),
			await source.read([0, 1]),
		]) {
			expect(got?.[1]).toBe(missing);
			expect(String(got?.[0])).not.toContain("image");
		}
		expect(source.dropped).toMatchObject({ images: 1, rows: 1 });
		source.making?.sync();
		source.making?.cancel();
		expect(making.sync).toHaveBeenCalledOnce();
		expect(making.cancel).toHaveBeenCalledOnce();
	});
});
