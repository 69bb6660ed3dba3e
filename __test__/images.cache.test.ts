import { fork } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { ImageCache } from "../src/images/cache.js";
import { ImageLoader } from "../src/images/loader.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { picture, type TestServer, testServer } from "./support/images.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const fresh = () => mkdtempSync(join(folder, "cache-"));
const files = (path: string) =>
	readdirSync(path, { recursive: true, withFileTypes: true })
		.filter((entry) => entry.isFile())
		.map((entry) => join(entry.parentPath, entry.name));
const bytes = (size: number, value: number) => Buffer.alloc(size, value);
const total = (path: string) => files(join(path, "blobs")).reduce((sum, file) => sum + statSync(file).size, 0);

let server: TestServer;
let png: Buffer;
beforeAll(async () => {
	server = await testServer();
	png = await picture("png");
});

describe("the cache of images", () => {
	it("serves an image that was fetched before, to another loader too, without a request", async () => {
		const own = fresh();
		const url = server.on("/kept.png", (_, response) => response.end(png));
		const options = { image_allow_private: true, image_cache_dir: own };
		for (const fragment of ["", "", "#part"]) {
			const loader = new ImageLoader(options);
			const image = await loader.load(`${url}${fragment}`);
			expect(Buffer.from(image.bytes).equals(png)).toBe(true);
			await loader.close();
		}
		expect(server.hits.get("/kept.png")).toBe(1);
	});

	it("keeps equal bytes of two URLs once, and no URL in clear", async () => {
		const own = fresh();
		const cache = new ImageCache(own, 1e9);
		await cache.put("https://a.example/x?key=s3cret", png);
		await cache.put("https://b.example/y", png);
		expect(files(join(own, "blobs"))).toHaveLength(1);
		expect(files(join(own, "urls"))).toHaveLength(2);
		expect(files(join(own, "tmp"))).toEqual([]);
		for (const file of files(own)) expect(`${file}${readFileSync(file, "latin1")}`).not.toContain("s3cret");
	});

	it("keeps nothing that is no image", async () => {
		const own = fresh();
		const url = server.on("/login.png", (_, response) => response.end("<html>"));
		const loader = new ImageLoader({ image_allow_private: true, image_cache_dir: own });
		await errorOf(loader.load(url));
		await loader.close();
		expect(files(own)).toEqual([]);
	});

	it("holds a smaller limit of bytes against what it kept", async () => {
		const own = fresh();
		const url = server.on("/large.png", (_, response) => response.end(png));
		const first = new ImageLoader({ image_allow_private: true, image_cache_dir: own });
		await first.load(url);
		const second = new ImageLoader({ image_allow_private: true, image_cache_dir: own, image_max_bytes: 20 });
		expect((await errorOf(second.load(url))).message).toContain("the limit is 20 bytes");
		await Promise.all([first.close(), second.close()]);
	});

	it("passes over blobs and entries that are damaged, and heals", async () => {
		const own = fresh();
		const cache = new ImageCache(own, 1e9);
		await cache.put("u", png);
		const [blob = ""] = files(join(own, "blobs"));
		for (const damage of [png.subarray(0, 50), Buffer.concat([png.subarray(1), bytes(1, 0)])]) {
			writeFileSync(blob, damage);
			expect(await cache.get("u")).toBe(null);
			await cache.put("u", png);
			expect(Buffer.from((await cache.get("u")) ?? []).equals(png)).toBe(true);
		}
		const [entry = ""] = files(join(own, "urls"));
		for (const text of ["", "../../../etc/passwd", "f".repeat(64)]) {
			writeFileSync(entry, text);
			expect(await cache.get("u")).toBe(null);
		}
	});

	it("stays within its bound; what was used longest ago goes first, entries with it", async () => {
		const own = fresh();
		const cache = new ImageCache(own, 1000);
		for (let i = 0; i < 40; i++) {
			await cache.put(`u${i}`, bytes(50, i));
			expect(total(own)).toBeLessThanOrEqual(1000);
			// Files of one moment have no order.
			for (const file of files(join(own, "blobs"))) {
				const value = readFileSync(file)[0] ?? 0;
				utimesSync(file, 1000 + value, 1000 + value);
			}
			await cache.get("u0");
		}
		expect(await cache.get("u0")).not.toBe(null);
		expect(await cache.get("u39")).not.toBe(null);
		expect(await cache.get("u1")).toBe(null);
		expect(files(join(own, "urls")).length).toBeLessThan(25);
		await cache.put("huge", bytes(900, 1));
		expect(await cache.get("huge")).toBe(null);
	});

	it("removes what a killed process left half-written, once it is old", async () => {
		const own = fresh();
		mkdirSync(join(own, "tmp"));
		for (const name of ["old", "new"]) writeFileSync(join(own, "tmp", name), "half");
		utimesSync(join(own, "tmp", "old"), 1, 1);
		await new ImageCache(own, 1000).put("u", png.subarray(0, 200));
		expect(files(join(own, "tmp"))).toEqual([join(own, "tmp", "new")]);
	});

	it("a folder that cannot be written to is an error of input and output", async () => {
		const file = join(fresh(), "file");
		writeFileSync(file, "");
		expect((await errorOf(new ImageCache(file, 1000).put("u", bytes(5, 1)))).code).toBe("ARL_IO");
	});

	it("serves four processes that write and read it at once, with nothing torn", async () => {
		const own = fresh();
		const script = join(own, "worker.mjs");
		writeFileSync(
			script,
			`import { ImageCache } from ${JSON.stringify(join(root, "dist", "images", "cache.js"))};
const cache = new ImageCache(${JSON.stringify(own)}, 200_000);
let seen = 0;
for (let round = 0; round < 300; round++) {
	const i = (round * 7 + process.pid) % 50;
	const kept = await cache.get("u" + i);
	if (kept === null) await cache.put("u" + i, Buffer.alloc(5000 + i, i));
	else {
		seen += 1;
		if (kept.length !== 5000 + i || kept.some((byte) => byte !== i)) process.exit(9);
	}
}
process.exit(seen > 0 ? 0 : 8);
`,
		);
		const codes = await Promise.all(
			Array.from({ length: 4 }, () => {
				const child = fork(script, { stdio: "inherit" });
				return new Promise((resolve) => child.on("exit", resolve));
			}),
		);
		expect(codes).toEqual([0, 0, 0, 0]);
		// Each process counts only its own additions between two looks: a tenth of the bound each.
		expect(total(own)).toBeLessThanOrEqual(200_000 * 1.3);
		expect(files(join(own, "tmp"))).toEqual([]);
	});
});
