import { existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { picture, type TestServer, testServer } from "./support/images.js";
import { arl, flags } from "./support/real.js";

const folder = temporaryFolder();
let server: TestServer;
let png: Buffer;
beforeAll(async () => {
	server = await testServer();
	png = await picture("png", 40, 30);
});

const row = (url: string, rest = "") =>
	`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"${url}"}},{"type":"text","text":"?"}]},{"role":"assistant","content":"!"}]${rest}}`;
const place = (rows: string) => {
	const own = mkdtempSync(join(folder, "images-"));
	writeFileSync(join(own, "rows.jsonl"), rows);
	return { own, file: join(own, "rows.jsonl"), out: join(own, "out.jsonl") };
};
const run = (file: string, out: string, more: Record<string, string | number | boolean> = {}, words: string[] = []) =>
	arl(["images", ...flags({ train_file: file, out, ...more }), "--image_allow_private", ...words]);

describe("arl images", () => {
	it("writes rows in their order with the images in them, and nothing else changed", async () => {
		const urls = Array.from({ length: 80 }, (_, i) =>
			server.on(`/${i}.png`, (_request, response, hit) => {
				// The first rows are the slowest: order must not be the order of arrival.
				if (i % 10 === 0 && hit === 1) response.writeHead(503, { "retry-after": "0" }).end();
				else setTimeout(() => response.end(png), i < 3 ? 100 : 0);
			}),
		);
		const rest = (i: number) => `, "n": ${i}.0, "advantages": {"1": 1e-07}`;
		const { own, file, out } = place(urls.map((url, i) => row(url, rest(i))).join("\n"));
		const { code, stderr } = await run(file, out, { image_cache_dir: join(own, "cache") });
		expect(stderr).toBe(`wrote 80 rows with 80 images to ${out}\n`);
		expect(code).toBe(0);
		const data = `data:image/png;base64,${png.toString("base64")}`;
		expect(readFileSync(out, "utf8")).toBe(urls.map((_, i) => `${row(data, rest(i))}\n`).join(""));
		// From the cache: the server is not asked again.
		const before = server.hits.get("/5.png");
		expect((await run(file, join(own, "again.jsonl"), { image_cache_dir: join(own, "cache") })).code).toBe(0);
		expect(server.hits.get("/5.png")).toBe(before);
		expect(readFileSync(join(own, "again.jsonl"), "utf8")).toBe(readFileSync(out, "utf8"));
	});

	it("writes nothing where an image cannot be had, and names every row", async () => {
		server.on("/good.png", (_, response) => response.end(png));
		const { own, file, out } = place(
			[row(`${server.origin}/good.png`), row(`${server.origin}/none.png`), "", "{", row("file:///x.png")].join("\n"),
		);
		const { code, stderr } = await run(file, out);
		expect(code).toBe(3);
		expect(stderr).toContain("3 of 4 rows cannot be used (2 missing image, 1 not json)");
		expect(stderr).toContain(`${file}:2: missing image: messages[0].content[0]: ${server.origin}/none.png: HTTP 404`);
		expect(stderr).toContain(
			`${file}:5: missing image: messages[0].content[0]: file:///x.png: reading images from files is not allowed`,
		);
		expect(readdirSync(own)).toEqual(["rows.jsonl"]);
		const skipped = await run(file, out, { on_bad_row: "skip" }, ["--json"]);
		expect(skipped.code).toBe(0);
		const outcome = JSON.parse(skipped.stdout);
		expect(outcome).toMatchObject({ type: "images", rows: 1, images: 1 });
		expect(outcome.skipped.map(({ location }: { location: string }) => location)).toEqual([
			`${file}:2`,
			`${file}:4`,
			`${file}:5`,
		]);
		expect(readFileSync(out, "utf8").split("\n")).toHaveLength(2);
	});

	it("makes images smaller, reads files under a folder, and puts rows of several lines on one", async () => {
		const { own, out } = place("");
		writeFileSync(join(own, "a.png"), png);
		const file = join(own, "rows.json");
		writeFileSync(file, JSON.stringify([JSON.parse(row(`file://${own}/a.png`))], null, 2));
		const { code } = await run(file, out, { image_root: own, max_pixels: 300 });
		expect(code).toBe(0);
		const [line = "", end] = readFileSync(out, "utf8").split("\n");
		expect(end).toBe("");
		const { url } = JSON.parse(line).messages[0].content[0].image_url;
		const written = Buffer.from(url.split(",")[1], "base64");
		expect([written.readUInt32BE(16), written.readUInt32BE(20)]).toEqual([20, 15]);
	});

	it("refuses this machine unless allowed, and wrong options", async () => {
		const { file, out } = place(row(`${server.origin}/good.png`));
		const strict = await arl(["images", ...flags({ train_file: file, out })]);
		expect(strict.code).toBe(3);
		expect(strict.stderr).toContain("image_allow_private");
		const wrong = await run(file, out, { image_timeout: 0 });
		expect(wrong.code).toBe(2);
		expect(wrong.stderr).toContain("above 0 and at most 3600");
	});

	it("leaves nothing behind when it is stopped", async () => {
		let asked = () => {};
		const url = server.on("/hangs.png", () => asked());
		const { own, file, out } = place(row(url));
		const { code } = await arl(["images", ...flags({ train_file: file, out }), "--image_allow_private"], (kill) => {
			asked = () => kill("SIGINT");
		});
		expect(code).toBe(130);
		expect(existsSync(out)).toBe(false);
		expect(readdirSync(own)).toEqual(["rows.jsonl"]);
	});
});
