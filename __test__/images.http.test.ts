import { gzipSync } from "node:zlib";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type ImageLoader, type ImageOptions, loaderWithHooks } from "../src/images/loader.js";
import { errorOf } from "./support/folder.js";
import { picture, type TestServer, testServer } from "./support/images.js";

let server: TestServer;
let png: Buffer;
/** Pauses that were asked for, in place of waiting. */
let pauses: number[] = [];
const loaders: ImageLoader[] = [];

function loader(options: ImageOptions = {}): ImageLoader {
	pauses = [];
	const made = loaderWithHooks(
		{ image_allow_private: true, ...options },
		{
			pause: async (milliseconds) => {
				pauses.push(milliseconds);
			},
		},
	);
	loaders.push(made);
	return made;
}

const refusedWith = async (url: string, options: ImageOptions = {}) => {
	const error = await errorOf(loader(options).load(url));
	expect(error).toMatchObject({ code: "ARL_DATA", exitCode: 3 });
	expect(error.hint).not.toBe("");
	return error.message;
};

beforeAll(async () => {
	server = await testServer();
	png = await picture("png");
});
afterAll(async () => {
	await Promise.all(loaders.map((made) => made.close()));
});

describe("an image over HTTP", () => {
	it("is what its bytes are, whatever header and name say", async () => {
		const url = server.on("/photo.jpg", (_, response) => {
			response.writeHead(200, { "content-type": "text/html" }).end(png);
		});
		const image = await loader().load(url);
		expect(image).toMatchObject({ content_type: "image/png", width: 8, height: 6 });
		expect(Buffer.from(image.bytes).equals(png)).toBe(true);
	});

	it("is refused where the bytes are a page that calls itself an image", async () => {
		const url = server.on("/page.png", (_, response) => {
			response.writeHead(200, { "content-type": "image/png" }).end("<!DOCTYPE html><title>Log in</title>");
		});
		expect(await refusedWith(url)).toBe(`${url}: not a supported image: this is a page of HTML or XML`);
	});

	it("is fetched once for many that ask at once", async () => {
		const url = server.on("/once.png", (_, response) => response.end(png));
		const one = loader();
		await Promise.all(Array.from({ length: 20 }, () => one.load(url)));
		expect(server.hits.get("/once.png")).toBe(1);
	});

	it("is asked for with user and password of its URL, which no error shows, and neither is the query", async () => {
		const seen: (string | undefined)[] = [];
		server.on("/secret.png", (request, response) => {
			seen.push(request.headers.authorization);
			response.writeHead(403).end();
		});
		const url = `http://us%20er:s3cret@127.0.0.1:${server.port}/secret.png?key=s3cret#s3cret`;
		const error = await errorOf(loader().load(url));
		expect(Buffer.from(seen[0]?.replace("Basic ", "") ?? "", "base64").toString()).toBe("us er:s3cret");
		expect(`${error.message}${error.hint}${error.stack}`).not.toContain("s3cret");
		expect(error.message).toBe(`http://127.0.0.1:${server.port}/secret.png?...: HTTP 403`);
	});

	it("never has more on its way than allowed", async () => {
		let open = 0;
		let most = 0;
		const urls = Array.from({ length: 30 }, (_, i) =>
			server.on(`/many/${i}`, (_request, response) => {
				open += 1;
				most = Math.max(most, open);
				setTimeout(() => {
					open -= 1;
					response.end(png);
				}, 5);
			}),
		);
		const three = loader({ image_concurrency: 3 });
		await Promise.all(urls.map((url) => three.load(url)));
		expect(most).toBe(3);
	});

	it("that waits for its next attempt leaves its place to others", async () => {
		const busy = server.on("/busy.png", (_, response, hit) => {
			if (hit === 1) response.writeHead(503).end();
			else response.end(png);
		});
		const quick = server.on("/quick.png", (_, response) => response.end(png));
		let go = () => {};
		const one = loaderWithHooks(
			{ image_allow_private: true, image_concurrency: 1 },
			{
				pause: () =>
					new Promise((resolve) => {
						go = resolve;
					}),
			},
		);
		loaders.push(one);
		const waiting = one.load(busy);
		expect((await one.load(quick)).width).toBe(8);
		expect(server.hits.get("/busy.png")).toBe(1);
		go();
		expect((await waiting).width).toBe(8);
		expect((await one.load(`${quick}?again`)).width).toBe(8);
	});
});

describe("limits", () => {
	it("an announced length is refused before the body is read", async () => {
		const url = server.on("/announced", (_, response) => {
			response.writeHead(200, { "content-length": 5_000_000 }).write(png);
		});
		expect(await refusedWith(url, { image_max_bytes: 1_000_000 })).toBe(`${url}: 4.8 MiB; the limit is 1000000 bytes`);
	});

	it("a body without end is cut off at the limit", async () => {
		let sent = 0;
		let closed = false;
		const url = server.on("/endless", (_, response) => {
			const chunk = Buffer.alloc(64 * 1024, 1);
			const more = () => {
				while (!closed && response.write(chunk)) sent += chunk.length;
			};
			response.on("drain", more).on("close", () => {
				closed = true;
			});
			response.write(png);
			more();
		});
		expect(await refusedWith(url, { image_max_bytes: 1024 * 1024 })).toBe(`${url}: larger than the limit of 1 MiB`);
		await expect.poll(() => closed).toBe(true);
		expect(sent).toBeLessThan(64 * 1024 * 1024);
		expect(server.hits.get("/endless")).toBe(1);
	});

	it("a small body that unpacks to a large one is refused", async () => {
		const bomb = gzipSync(Buffer.concat([png, Buffer.alloc(50_000_000)]));
		const url = server.on("/bomb", (_, response) => {
			response.writeHead(200, { "content-encoding": "gzip" }).end(bomb);
		});
		expect(bomb.length).toBeLessThan(100_000);
		expect(await refusedWith(url, { image_max_bytes: 1_000_000 })).toContain("larger than the limit of 1000000 bytes");
	});

	it("a compressed image is unpacked", async () => {
		const url = server.on("/packed", (_, response) => {
			response.writeHead(200, { "content-encoding": "gzip" }).end(gzipSync(png));
		});
		expect(Buffer.from((await loader().load(url)).bytes).equals(png)).toBe(true);
	});

	it("a compression that nobody asked for and nobody knows is refused", async () => {
		const url = server.on("/odd", (_, response) => {
			response.writeHead(200, { "content-encoding": "sdch" }).end(png);
		});
		expect(await refusedWith(url)).toContain('compressed as "sdch"');
	});

	it("a body that comes byte by byte runs into the limit of time, each attempt for itself", async () => {
		const url = server.on("/slow", (_, response, hit) => {
			if (hit === 3) {
				response.end(png);
				return;
			}
			let at = 0;
			const timer = setInterval(() => response.write(png.subarray(at, ++at)), 20);
			response.on("close", () => clearInterval(timer));
		});
		await loader({ image_timeout: 0.2 }).load(url);
		expect(server.hits.get("/slow")).toBe(3);
		const never = server.on("/silent", () => {});
		expect(await refusedWith(never, { image_timeout: 0.05 })).toBe(
			`${never}: no complete response within 0.05 s, 5 times`,
		);
	});

	it("stops when it is asked to", async () => {
		const stop = new AbortController();
		const url = server.on("/abort", () => stop.abort());
		const error = await errorOf(loader({ signal: stop.signal }).load(url));
		expect(error.code).toBe("ARL_INTERRUPTED");
		expect((await errorOf(loader({ signal: stop.signal }).load(url))).code).toBe("ARL_INTERRUPTED");
	});
});

describe("what may pass", () => {
	it.each([408, 425, 429, 500, 502, 503, 504])("is asked for again: %i", async (status) => {
		const url = server.on(`/passing/${status}`, (_, response, hit) => {
			if (hit < 3) response.writeHead(status).end("busy");
			else response.end(png);
		});
		expect((await loader().load(url)).width).toBe(8);
		expect(pauses).toHaveLength(2);
		expect(pauses[0]).toBeGreaterThanOrEqual(250);
		expect(pauses[0]).toBeLessThan(750);
		expect(pauses[1]).toBeGreaterThanOrEqual(500);
		expect(pauses[1]).toBeLessThan(1500);
	});

	it.each([400, 401, 403, 404, 410, 501])("is not asked for again: %i", async (status) => {
		const url = server.on(`/final/${status}`, (_, response) => response.writeHead(status).end());
		expect(await refusedWith(url)).toBe(`${url}: HTTP ${status}`);
		expect(server.hits.get(`/final/${status}`)).toBe(1);
	});

	it("is given up after five attempts", async () => {
		const url = server.on("/down", (_, response) => response.writeHead(503).end());
		expect(await refusedWith(url)).toBe(`${url}: HTTP 503, 5 times`);
		expect(server.hits.get("/down")).toBe(5);
	});

	it("waits as long as the server asks, in seconds or until a date, and not for hours", async () => {
		const seconds = server.on("/retry/seconds", (_, response, hit) => {
			if (hit === 1) response.writeHead(429, { "retry-after": "7" }).end();
			else response.end(png);
		});
		await loader().load(seconds);
		expect(pauses).toEqual([7000]);
		const date = server.on("/retry/date", (_, response, hit) => {
			const until = new Date(Date.now() + 30_000).toUTCString();
			if (hit === 1) response.writeHead(503, { "retry-after": until }).end();
			else response.end(png);
		});
		await loader().load(date);
		expect(pauses[0]).toBeGreaterThan(20_000);
		expect(pauses[0]).toBeLessThanOrEqual(30_000);
		const hours = server.on("/retry/hours", (_, response) => {
			response.writeHead(429, { "retry-after": "7200" }).end();
		});
		expect(await refusedWith(hours)).toContain("HTTP 429, and the server asks clients to wait 7200 s");
	});

	it.each([
		["a connection that is reset", (response: { destroy(): void }) => response.destroy()],
		[
			"a body shorter than announced",
			(response: import("node:http").ServerResponse) => {
				response.writeHead(200, { "content-length": png.length });
				response.write(png.subarray(0, 40), () => response.destroy());
			},
		],
		[
			"a chunked body that breaks off",
			(response: import("node:http").ServerResponse) => {
				response.write(png.subarray(0, 40), () => response.destroy());
			},
		],
		[
			"an image that ends before its end, in a whole answer",
			(response: import("node:http").ServerResponse) => response.end(png.subarray(0, png.length - 14)),
		],
		[
			"gzip that ends before its end",
			(response: import("node:http").ServerResponse) => {
				response.writeHead(200, { "content-encoding": "gzip" }).end(gzipSync(png).subarray(0, 60));
			},
		],
	])("%s is asked for again", async (name, fail) => {
		const path = `/broken/${name.replaceAll(" ", "-")}`;
		const url = server.on(path, (_, response, hit) => {
			if (hit < 3) fail(response);
			else response.end(png);
		});
		expect((await loader().load(url)).width).toBe(8);
		expect(server.hits.get(path)).toBe(3);
		const always = server.on(`${path}/always`, (_, response) => fail(response));
		expect(await refusedWith(always)).toMatch(/, 5 times$/);
	});

	it("a server that nobody listens at is reported with its address", async () => {
		const url = "http://127.0.0.1:1/x.png";
		expect(await refusedWith(url)).toMatch(/^http:\/\/127\.0\.0\.1:1\/x\.png: connect ECONNREFUSED.*, 5 times$/);
	});
});

describe("redirects", () => {
	const to = (path: string, location: string, status = 302) =>
		server.on(path, (_, response) => response.writeHead(status, { location }).end());

	it.each([301, 302, 303, 307, 308])("are followed: %i, relative ones too", async (status) => {
		server.on("/target.png", (_, response) => response.end(png));
		const url = to(`/from/${status}`, "../target.png", status);
		expect((await loader().load(url)).width).toBe(8);
	});

	it("end somewhere", async () => {
		const url = to("/circle", "/circle");
		expect(await refusedWith(url)).toContain("more than 5 redirects");
		expect(server.hits.get("/circle")).toBe(6);
	});

	it.each([
		["file:///etc/passwd", "a redirect to file:///etc/passwd, which is neither http nor https"],
		["data:image/png;base64,AAAA", "a redirect to data:"],
		["ftp://127.0.0.1/x", "a redirect to ftp://127.0.0.1/x"],
		["http://", "a redirect to something that is not a URL"],
	])("do not lead to %s", async (location, message) => {
		expect(await refusedWith(to(`/to/${encodeURIComponent(location)}`, location))).toContain(message);
	});

	it("keep no user and password for another server", async () => {
		const seen: (string | undefined)[] = [];
		server.on("/open.png", (request, response) => {
			seen.push(request.headers.authorization);
			response.end(png);
		});
		to("/moved", `http://localhost:${server.port}/open.png`);
		await loader().load(`http://user:pw@127.0.0.1:${server.port}/moved`);
		expect(seen).toEqual([undefined]);
	});

	it("without a location, and 304, are no image", async () => {
		const url = server.on("/nowhere", (_, response) => response.writeHead(302).end());
		expect(await refusedWith(url)).toBe(`${url}: HTTP 302`);
		const unchanged = server.on("/unchanged", (_, response) => response.writeHead(304).end());
		expect(await refusedWith(unchanged)).toBe(`${unchanged}: HTTP 304`);
	});
});
