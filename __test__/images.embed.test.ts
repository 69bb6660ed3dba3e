import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { imageType } from "../src/data/mime.js";
import { imagesToBase64InText } from "../src/images/embed.js";
import { ImageLoader } from "../src/images/loader.js";
import { errorOf } from "./support/folder.js";
import { picture, type TestServer, testServer } from "./support/images.js";

let server: TestServer;
let png: Buffer;
let url: string;
let loader: ImageLoader;
beforeAll(async () => {
	server = await testServer();
	png = await picture("png");
	url = server.on("/x.png", (_, response) => response.end(png));
	loader = new ImageLoader({ image_allow_private: true });
});
afterAll(() => loader.close());

describe("a row's text whose images become base64", () => {
	const embed = async (row: string) =>
		Buffer.from((await imagesToBase64InText(Buffer.from(row), loader)).row).toString();

	it("changes in the URLs only: floats, large integers, key order, escapes and white space stay", async () => {
		const row = (first: string, second: string) =>
			`{ "reward":1.0,"n":12345678901234567890, "messages": [{"role":"user","content":[{"image_url" : {"url":${first}, "detail":"low" } ,"type":"image_url"},` +
			`{"type":"text","text":"${"http://not.an/image"}"}, {"type":"image_url","image_url":${second}}]},{"role":"assistant","content":"\\u00e9"}], "advantages":{"1":-0.0}}\n`;
		const data = JSON.stringify(`data:image/png;base64,${png.toString("base64")}`);
		const escaped = JSON.stringify(url).replaceAll("/", "\\/");
		expect(await embed(row(JSON.stringify(url), escaped))).toBe(row(data, data));
	});

	it("gives the very same bytes for a row without images", async () => {
		for (const text of ['{"messages":[{"role":"user","content":"image_url"}]}', "no json", ""]) {
			const row = Buffer.from(text);
			expect((await imagesToBase64InText(row, loader)).row).toBe(row);
		}
	});

	it("normalises data URLs by their bytes", async () => {
		const row = (href: string) =>
			`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"${href}"}}]}]}`;
		expect(await embed(row(`data:text/plain;base64,${png.toString("base64")}`))).toBe(
			row(`data:image/png;base64,${png.toString("base64")}`),
		);
	});

	it.each([
		['{"url":"x"}', "messages[1].content[0]: x: not a URL"],
		["{}", "messages[1].content[0]: a part of type image_url without a URL"],
		['{"url":null}', "messages[1].content[0]: a part of type image_url without a URL"],
		["7", "messages[1].content[0]: a part of type image_url without a URL"],
	])("names the part: %s", async (part, message) => {
		const row = `{"messages":[{"role":"system","content":"a"},{"role":"user","content":[{"type":"image_url","image_url":${part}}]}]}`;
		expect(await errorOf(embed(row))).toMatchObject({ code: "ARL_DATA", message });
	});
});

describe("images of more pixels than max_pixels", () => {
	const scaled = async (bytes: Buffer, max_pixels: number) => {
		const made = new ImageLoader({ max_pixels });
		return made.load(`data:;base64,${bytes.toString("base64")}`);
	};

	it.each(["png", "jpeg", "webp"] as const)("are made smaller as %s, with their shape", async (format) => {
		const image = await scaled(await picture(format, 400, 300), 10_000);
		expect(image).toMatchObject({ content_type: `image/${format}`, width: 115, height: 86 });
		const { width, height } = await sharp(image.bytes).metadata();
		expect({ width, height }).toEqual({ width: 115, height: 86 });
	});

	it.each(["gif", "tiff", "avif"] as const)("become PNG from %s", async (format) => {
		const image = await scaled(await picture(format, 60, 40), 600);
		expect(image).toMatchObject({ content_type: "image/png", width: 30, height: 20 });
		expect(imageType(image.bytes)).toBe("image/png");
	});

	it("stay byte for byte where they have no more", async () => {
		expect(Buffer.from((await scaled(png, 48)).bytes).equals(png)).toBe(true);
		expect((await scaled(png, 47)).width).toBeLessThan(8);
	});

	it("are turned as they are to be shown", async () => {
		// Left half black, right half white, to be turned by a quarter: then the upper half is black.
		const half = await sharp({ create: { width: 40, height: 20, channels: 3, background: "white" } })
			.composite([{ input: { create: { width: 20, height: 20, channels: 3, background: "black" } }, left: 0, top: 0 }])
			.withMetadata({ orientation: 6 })
			.jpeg()
			.toBuffer();
		const image = await scaled(half, 200);
		expect(image).toMatchObject({ width: 10, height: 20 });
		const { data } = await sharp(image.bytes).greyscale().raw().toBuffer({ resolveWithObject: true });
		expect(data[5] ?? 255).toBeLessThan(40);
		expect(data[195] ?? 0).toBeGreaterThan(215);
	});

	it("that cannot be decoded are refused by their URL", async () => {
		const broken = Buffer.from(png);
		broken.fill(0, broken.indexOf("IDAT") + 8, broken.indexOf("IDAT") + 20);
		const error = await errorOf(scaled(broken, 10));
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toMatch(/^data:;base64,.*\.\.\.: the image\/png cannot be scaled down: /);
	});

	it("without sharp say how to get it, and only when one has to be made smaller", async () => {
		vi.doMock("sharp", () => {
			throw new Error("Cannot find package 'sharp'");
		});
		try {
			expect((await scaled(png, 48)).width).toBe(8);
			const error = await errorOf(scaled(png, 20));
			expect(error.code).toBe("ARL_CONFIG");
			expect(error.hint).toContain("npm install sharp");
		} finally {
			vi.doUnmock("sharp");
		}
	});
});
