import { mkdirSync, mkdtempSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { beforeAll, describe, expect, it } from "vitest";
import { dataUrlBytes, toDataUrl } from "../src/images/data-url.js";
import { imagesToBase64, loadImage } from "../src/images/embed.js";
import { showUrl } from "../src/images/show.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { picture } from "./support/images.js";

const folder = temporaryFolder();
let png: Buffer;
beforeAll(async () => {
	png = await picture("png");
});
const percent = (bytes: Buffer) => [...bytes].map((byte) => `%${byte.toString(16).padStart(2, "0")}`).join("");

describe("a data URL", () => {
	it("is read with base64, percent-encoding, both, and neither", async () => {
		const base64 = png.toString("base64");
		for (const url of [
			`data:image/png;base64,${base64}`,
			`data:;base64,${base64}`,
			`DATA:text/html;charset=utf-8;BASE64 ,${base64}`,
			`data:image/png;base64,${base64.replace(/=+$/, "")}`,
			`data:image/png;base64,${base64.replace(/(.{40})/g, "$1\n ")}`,
			`data:image/png;base64,${base64.replaceAll("+", "-").replaceAll("/", "_")}`,
			`data:image/png;base64,${base64.replaceAll("+", "%2B").replaceAll("/", "%2f").replaceAll("=", "%3D")}`,
			`data:image/png,${percent(png)}`,
			`  data:image/png;base64,${base64}#fragment  `,
		]) {
			const image = await loadImage(url);
			expect(image, url.slice(0, 40)).toMatchObject({ content_type: "image/png", width: 8, height: 6 });
			expect(Buffer.from(image.bytes).equals(png)).toBe(true);
		}
		expect(Buffer.from(dataUrlBytes("data:,a%20b%C3%A9é?x")).toString()).toBe("a béé?x");
	});

	it.each([
		["data:image/png;base64", "a data URL without a comma"],
		["data:image/png;base64,AA*A", '"*" at 2 is not base64'],
		["data:image/png;base64,AAAAA", "base64 of 5 characters, which is not a whole number of bytes"],
		["data:image/png;base64,AA=", "base64 of 3 characters, which is not a whole number of bytes"],
		["data:image/png;base64,AA=A", '"=" at 2 is not base64'],
		["data:image/png,%4", '"%4" at 0 is not percent-encoding'],
		["data:image/png,ab%zz", '"%zz" at 2 is not percent-encoding'],
		["data:image/png;base64,", "not a supported image: this is nothing (0 bytes)"],
		["data:image/png;base64,SGVsbG8=", "not a supported image: this is text"],
	])("%s is refused: %s", async (url, message) => {
		const error = await errorOf(loadImage(url));
		expect(error).toMatchObject({ code: "ARL_DATA" });
		expect(error.message).toBe(`${url}: ${message}`);
	});

	it("is bounded like any other, and shown by its beginning only", async () => {
		const url = `data:image/png;base64,${Buffer.concat([png, Buffer.alloc(1500)]).toString("base64")}`;
		const error = await errorOf(loadImage(url, { image_max_bytes: 1000 }));
		expect(error.message).toMatch(/^data:image\/png;base64,.{18}\.\.\.: \d+ bytes; the limit is 1000 bytes$/);
		const long = `data:image/png,${"a".repeat(100_000)}`;
		expect((await errorOf(loadImage(long, { image_max_bytes: 1000 }))).message).toContain(
			"larger than the limit of 1000 bytes",
		);
	});

	it("of an image says what its bytes are, and reads back", async () => {
		const jpeg = await picture("jpeg");
		const { bytes } = await loadImage(toDataUrl({ bytes: jpeg, content_type: "image/wrong" }));
		expect(Buffer.from(bytes).equals(jpeg)).toBe(true);
	});
});

describe("a file URL", () => {
	const make = () => {
		const own = mkdtempSync(join(folder, "files-"));
		const top = join(own, "images");
		mkdirSync(join(top, "deep"), { recursive: true });
		writeFileSync(join(top, "deep", "a b.png"), png);
		writeFileSync(join(own, "outside.png"), png);
		return { own, top };
	};

	it("is refused unless a folder is allowed", async () => {
		const { top } = make();
		const error = await errorOf(loadImage(pathToFileURL(join(top, "deep", "a b.png")).href));
		expect(error.message).toMatch(/a%20b\.png: reading images from files is not allowed$/);
		expect(error.hint).toContain("image_root");
	});

	it("is read from under the folder, through links that stay there", async () => {
		const { top } = make();
		symlinkSync(join(top, "deep"), join(top, "link"));
		for (const name of ["deep/a b.png", "link/a b.png", "deep/../deep/a b.png"]) {
			const href = pathToFileURL(join(top, name)).href.replace("deep/deep", "deep/../deep");
			expect((await loadImage(href, { image_root: top })).content_type).toBe("image/png");
		}
		expect(
			(await loadImage(pathToFileURL(join(top, "link/a b.png")).href, { image_root: join(top, "link") })).width,
		).toBe(8);
		expect((await loadImage(pathToFileURL(join(top, "link/a b.png")).href, { image_root: "/" })).width).toBe(8);
	});

	it("leads nowhere else: not above, not by links, not to a folder of the same beginning", async () => {
		const { own, top } = make();
		symlinkSync(join(own, "outside.png"), join(top, "out.png"));
		symlinkSync(own, join(top, "up"));
		symlinkSync("/etc", join(top, "etc"));
		mkdirSync(`${top}-other`);
		writeFileSync(join(`${top}-other`, "x.png"), png);
		const base = pathToFileURL(top).href;
		for (const path of [
			...["/out.png", "/up/outside.png", "/../outside.png", "/%2e%2e/outside.png", "/etc/passwd", "-other/x.png", ""],
		]) {
			const error = await errorOf(loadImage(`${base}${path}`, { image_root: top }));
			expect(error.message, path).toContain(`the file is not under ${top}`);
		}
	});

	it.each([
		["/missing.png", "no such file"],
		["/deep", "not a file"],
		["/deep%2fa%20b.png", "must not include encoded / characters"],
		["/dead", "no such file"],
		["/loop", "too many symbolic links"],
	])("%s: %s", async (path, message) => {
		const { top } = make();
		symlinkSync(join(top, "gone"), join(top, "dead"));
		symlinkSync(join(top, "loop"), join(top, "loop"));
		const error = await errorOf(loadImage(`${pathToFileURL(top).href}${path}`, { image_root: top }));
		expect(error.code).toBe("ARL_DATA");
		expect(error.message).toContain(message);
	});

	it("does not name another machine, and its folder must be there", async () => {
		const error = await errorOf(loadImage("file://server/share/x.png", { image_root: folder }));
		expect(error.message).toContain("File URL host");
		const missing = await errorOf(loadImage("file:///x.png", { image_root: join(folder, "none") }));
		expect(missing.code).toBe("ARL_CONFIG");
	});

	it("is bounded, and devices are no files", async () => {
		const { top } = make();
		const url = pathToFileURL(join(top, "deep", "a b.png")).href;
		const error = await errorOf(loadImage(url, { image_root: top, image_max_bytes: 20 }));
		expect(error.message).toContain(`${png.length} bytes; the limit is 20 bytes`);
		expect((await errorOf(loadImage("file:///dev/zero", { image_root: "/" }))).message).toContain("not a file");
	});
});

describe("any other URL", () => {
	it.each([
		["images/a.png", "not a URL"],
		["", "not a URL"],
		["//host/a.png", "not a URL"],
		["ftp://host/a.png", "images are not read from ftp: URLs"],
		["javascript:alert(1)", "images are not read from javascript: URLs"],
		["s3://bucket/a.png", "images are not read from s3: URLs"],
		["http://", "not a URL"],
		["http://1.2.3.4.5/x", "not a URL"],
		["http://256.1.1.1/x", "not a URL"],
	])("%j is refused: %s", async (url, message) => {
		const error = await errorOf(loadImage(url));
		expect(error).toMatchObject({ code: "ARL_DATA", message: `${url}: ${message}` });
	});

	it("is shown without what may be a secret", () => {
		expect(showUrl("https://u:p@h.example/a.png?sig=1#k")).toBe("https://h.example/a.png?...");
		expect(showUrl("https://u:p@q@h.example/a@b.png")).toBe("https://h.example/a@b.png");
		expect(showUrl("https:\\\\u:p@h.example/a")).toBe("https:\\\\h.example/a");
		expect(showUrl("u:p@h/a")).not.toContain("p@");
		expect(showUrl(`https://h/${"a".repeat(500)}`)).toHaveLength(203);
	});
});

describe("a row whose images become base64", () => {
	it("stays itself, and names the part whose image cannot be had", async () => {
		const url = `data:,${percent(png)}`;
		const row = {
			messages: [
				{
					role: "user" as const,
					content: [
						{ type: "text" as const, text: "a" },
						{ type: "image_url" as const, image_url: { url, detail: "low" } },
					],
				},
				{ role: "assistant" as const, content: "b" },
			],
			reward: 0.5,
		};
		const before = JSON.stringify(row);
		const embedded = await imagesToBase64(row);
		expect(JSON.stringify(row)).toBe(before);
		expect(JSON.stringify(embedded)).toBe(before.replace(url, `data:image/png;base64,${png.toString("base64")}`));
		const bad = {
			messages: [{ role: "user" as const, content: [{ type: "image_url" as const, image_url: { url: "x" } }] }],
		};
		expect((await errorOf(imagesToBase64(bad))).message).toBe("messages[0].content[0]: x: not a URL");
		const none = JSON.parse('{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}');
		expect((await errorOf(imagesToBase64(none))).message).toBe(
			"messages[0].content[0]: a part of type image_url without a URL",
		);
	});
});
