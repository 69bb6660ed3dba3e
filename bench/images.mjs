// How fast images are read: one JSON line a case. The server is a process of its own on this machine.
//
//   node bench/images.mjs [--images 1000] [--kib 100]
//
// Cases: every image well; every fifth answered with 503 at first; all of them from the cache on disk.

import { fork } from "node:child_process";
import { randomBytes } from "node:crypto";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const { values: a } = parseArgs({
	options: {
		images: { type: "string", default: "1000" },
		kib: { type: "string", default: "100" },
		serve: { type: "boolean", default: false },
	},
});
const images = Number(a.images);
const kib = Number(a.kib);

/** A whole GIF of one pixel with a comment as long as asked for: small to make, and no two alike. */
function gif(number) {
	const head = Buffer.from("47494638396101000100800000ffffff000000", "hex");
	const comment = randomBytes(Math.floor((kib * 1024) / 256) * 256).toString("latin1");
	const blocks = [];
	for (let at = 0; at < comment.length; at += 255) {
		const block = Buffer.from(comment.slice(at, at + 255), "latin1");
		blocks.push(Buffer.of(block.length), block);
	}
	const image = Buffer.from("2c000000000100010000020244010000", "hex").subarray(0, 15);
	const name = Buffer.from(String(number).padStart(8, "0"));
	return Buffer.concat([
		head,
		Buffer.of(0x21, 0xfe, name.length),
		name,
		...blocks,
		Buffer.of(0),
		image,
		Buffer.of(0, 0x3b),
	]);
}

if (a.serve) {
	const body = gif(0);
	const seen = new Set();
	const server = createServer((request, response) => {
		const number = Number(/(\d+)\.gif/.exec(request.url ?? "")?.[1] ?? 0);
		if (request.url?.startsWith("/flaky/") && number % 5 === 0 && !seen.has(request.url)) {
			seen.add(request.url);
			response.writeHead(503).end();
			return;
		}
		const own = Buffer.from(body);
		own.write(String(number).padStart(8, "0"), 22);
		response.writeHead(200, { "content-type": "image/gif", "content-length": own.length }).end(own);
	});
	server.listen(0, "127.0.0.1", () => process.send?.(server.address().port));
	process.on("disconnect", () => process.exit(0));
} else {
	const { ImageLoader } = await import("../dist/images/loader.js");
	const child = fork(fileURLToPath(import.meta.url), ["--serve", "--kib", a.kib]);
	const port = await new Promise((resolve) => child.once("message", resolve));
	const folder = mkdtempSync(join(tmpdir(), "arl-bench-images-"));
	const machine = `${cpus().length} x ${cpus()[0]?.model.trim()}, Node ${process.versions.node}`;
	const round = (x) => Number(x.toPrecision(4));
	const print = (name, fields) => console.log(JSON.stringify({ case: name, ...fields, machine }));

	const read = async (name, path, more = {}) => {
		const loader = new ImageLoader({ image_allow_private: true, ...more });
		const started = performance.now();
		let size = 0;
		await Promise.all(
			Array.from({ length: images }, async (_, i) => {
				const { bytes } = await loader.load(`http://127.0.0.1:${port}/${path}/${i}.gif`);
				size += bytes.length;
			}),
		);
		const seconds = (performance.now() - started) / 1000;
		await loader.close();
		print(name, {
			images,
			kib,
			images_per_s: round(images / seconds),
			mib_per_s: round(size / 1024 / 1024 / seconds),
			seconds: round(seconds),
		});
	};
	try {
		await read("http", "plain");
		await read("http, every fifth 503 at first", "flaky");
		await read("http into the cache", "cached", { image_cache_dir: folder });
		await read("from the cache", "cached", { image_cache_dir: folder });
	} finally {
		child.disconnect();
		rmSync(folder, { recursive: true, force: true });
	}
}
