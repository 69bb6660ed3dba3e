/** Models of the Hugging Face Hub by their names, fetched from a small Hub on loopback into a cache of the usual layout. */
import { spawnSync } from "node:child_process";
import {
	existsSync,
	lstatSync,
	mkdirSync,
	readdirSync,
	readFileSync,
	readlinkSync,
	symlinkSync,
	writeFileSync,
} from "node:fs";
import { createServer } from "node:http";
import { type AddressInfo, connect } from "node:net";
import { hostname } from "node:os";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, it, vi } from "vitest";
import type { ArlError } from "../src/errors.js";
import { type FetchProgress, modelFolder } from "../src/hub/index.js";
import { temporaryFolder } from "./support/folder.js";
import { FakeHub, gitId, MODEL, sendContent, sha256, weights } from "./support/hub.js";
import { SmallDisk } from "./support/small-disk.js";

const folder = temporaryFolder();
const hub = await FakeHub.start();
const TOKEN = "hf_secretOfATest";
const NEEDED = Object.keys(MODEL).filter((path) => !/README|bin$|onnx/.test(path));
const repo = hub.add("models/Qwen/Tiny", MODEL);

let caches = 0;
let cache = "";
beforeEach(() => {
	hub.calm();
	cache = join(folder, `cache-${++caches}`);
	vi.stubEnv("HF_HOME", join(folder, "home"));
	vi.stubEnv("HF_HUB_CACHE", cache);
	vi.stubEnv("HF_ENDPOINT", hub.url);
	vi.stubEnv("HF_TOKEN", "");
	vi.stubEnv("HUGGING_FACE_HUB_TOKEN", "");
	vi.stubEnv("HF_HUB_OFFLINE", "");
	vi.stubEnv("NO_PROXY", "127.0.0.1");
});
afterAll(() => vi.unstubAllEnvs());

const fetchModel = (name: string, more: Partial<Parameters<typeof modelFolder>[1]> = {}) =>
	modelFolder(name, { weights: true, pause: 1, ...more });
const failure = (name: string, more = {}): Promise<ArlError> =>
	fetchModel(name, more).then(
		() => {
			throw new Error("it was fetched");
		},
		(error: ArlError) => error,
	);
const repoFolder = (name = "Qwen--Tiny") => join(cache, `models--${name}`);
const blobs = (name?: string) => readdirSync(join(repoFolder(name), "blobs"));

describe("a model by its name", () => {
	it("is fetched into the cache of the usual layout: only the files that arl needs, each under its hash", async () => {
		const progress: FetchProgress[] = [];
		const { path, notice } = await fetchModel("Qwen/Tiny", { progress: (one) => progress.push(one) });
		expect(path).toBe(join(repoFolder(), "snapshots", repo.commit));
		expect(notice).toMatch(/^Qwen\/Tiny \(main, commit \w{12}\): fetched 0\.3 MB from http:\/\/127\.0\.0\.1:\d+ into /);
		expect(readFileSync(join(repoFolder(), "refs", "main"), "utf8")).toBe(repo.commit);
		const files = readdirSync(path, { recursive: true, withFileTypes: true }).filter((entry) => !entry.isDirectory());
		expect(files.map((entry) => join(entry.parentPath, entry.name).slice(path.length + 1)).sort()).toEqual(
			NEEDED.sort(),
		);
		for (const name of NEEDED) {
			const content = Buffer.from(MODEL[name as keyof typeof MODEL]);
			const hash = name.endsWith(".safetensors") ? sha256(content) : gitId(content);
			expect(lstatSync(join(path, name)).isSymbolicLink()).toBe(true);
			expect(readlinkSync(join(path, name))).toMatch(new RegExp(`^(\\.\\./)+blobs/${hash}$`));
			expect(readFileSync(join(path, name)).equals(content)).toBe(true);
		}
		expect(progress.at(-1)?.bytes).toBe(progress.at(-1)?.totalBytes);
		expect(progress.every(({ bytes }, i) => i === 0 || bytes >= (progress[i - 1]?.bytes ?? 0))).toBe(true);
	});

	it("is taken from the cache without a request, online or not", async () => {
		const first = await fetchModel("Qwen/Tiny");
		hub.calm();
		const second = await fetchModel("Qwen/Tiny");
		vi.stubEnv("HF_HUB_OFFLINE", "1");
		const third = await fetchModel("Qwen/Tiny");
		expect([second.path, third.path]).toEqual([first.path, first.path]);
		expect(second.notice).toContain("is taken from the cache");
		expect(hub.seen).toEqual([]);
	});

	it("is completed where the cache has only a part: without weights first, then with them", async () => {
		const small = await fetchModel("Qwen/Tiny", { weights: false });
		expect(existsSync(join(small.path, "model.safetensors"))).toBe(false);
		hub.calm();
		await fetchModel("Qwen/Tiny");
		expect(hub.contents.map(({ url }) => url.split("/").at(-1))).toEqual(["model.safetensors"]);
	});

	it("is taken from a cache that another program has made", async () => {
		const commit = "c".repeat(40);
		const snapshot = join(repoFolder("Other--Model"), "snapshots", commit);
		for (const sub of [snapshot, join(repoFolder("Other--Model"), "refs"), join(repoFolder("Other--Model"), "blobs")]) {
			mkdirSync(sub, { recursive: true });
		}
		writeFileSync(join(repoFolder("Other--Model"), "refs", "main"), commit);
		for (const name of ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]) {
			writeFileSync(join(repoFolder("Other--Model"), "blobs", name), "x");
			symlinkSync(`../../blobs/${name}`, join(snapshot, name));
		}
		expect((await fetchModel("Other/Model")).path).toBe(snapshot);
		expect(hub.seen).toEqual([]);
	});

	it("may have a revision, and weights in parts that the index lists", async () => {
		const map = { weight_map: { a: "model-00001-of-00002.safetensors", b: "model-00002-of-00002.safetensors" } };
		const files = {
			"config.json": "{}",
			"tokenizer.json": "{}",
			"tokenizer_config.json": "{}",
			"model.safetensors.index.json": JSON.stringify(map),
			"model-00001-of-00002.safetensors": "one",
			"model-00002-of-00002.safetensors": "two",
			"consolidated.safetensors": "not listed",
		};
		hub.add("models/Qwen/Parts", files, { revisions: ["main", "v1.0"] });
		const { path } = await fetchModel("Qwen/Parts@v1.0");
		expect(readdirSync(path).sort()).toEqual(
			Object.keys(files)
				.filter((name) => !name.startsWith("cons"))
				.sort(),
		);
		expect(readdirSync(join(repoFolder("Qwen--Parts"), "refs"))).toEqual(["v1.0"]);
		const error = await failure("Qwen/Parts@v2");
		expect(error.code).toBe("ARL_NETWORK");
		expect(error.message).toBe('Qwen/Parts has no revision "v2"');
	});

	it("yields to a local folder, which is said; hf:// means the Hub", async () => {
		const here = join(folder, "here");
		mkdirSync(join(here, "Qwen", "Tiny"), { recursive: true });
		const before = process.cwd();
		process.chdir(here);
		try {
			expect(await fetchModel("Qwen/Tiny")).toEqual({
				path: "Qwen/Tiny",
				notice: "Qwen/Tiny is a local folder, and is used; hf://Qwen/Tiny names the model of the Hub",
			});
			// Next to a local folder of the owner's name a name is a mistyped path.
			expect(await fetchModel("Qwen/Tyni")).toEqual({ path: "Qwen/Tyni", notice: null });
			expect(hub.seen).toEqual([]);
			expect((await fetchModel("hf://Qwen/Tiny")).path).toContain("snapshots");
		} finally {
			process.chdir(before);
		}
	});

	it("is refused by what is wrong with it", async () => {
		hub.add("models/Qwen/Bin", { "config.json": "{}", "pytorch_model.bin": "x" });
		expect(await failure("Qwen/Bin")).toMatchObject({
			code: "ARL_WEIGHTS",
			message: "Qwen/Bin has no safetensors weights at revision main, only pytorch_model.bin",
		});
		hub.add("models/Qwen/Empty", { "model.safetensors": "x" });
		expect(await failure("Qwen/Empty")).toMatchObject({ code: "ARL_CONFIG" });
		expect(await failure("hf://Qwen")).toMatchObject({ code: "ARL_CONFIG" });
		for (const revision of ["../../x", "%zz", "a/../b", ""]) {
			expect(await failure(`hf://Qwen/Tiny@${revision}`)).toMatchObject({ code: "ARL_CONFIG" });
		}
		hub.add("models/Evil/Model", { "config.json": "{}", "../../outside.json": "x", "model.safetensors": "x" });
		expect((await failure("Evil/Model")).message).toContain('has a file with the path ".."');
		expect(existsSync(cache) && readdirSync(cache).includes("outside.json")).toBe(false);
	});
});

describe("a connection that breaks", () => {
	it("is opened again where it broke", async () => {
		hub.breaks = [...NEEDED.slice(1).map(() => 1e9), 100_000, 50_000];
		const { path } = await fetchModel("Qwen/Tiny");
		expect(readFileSync(join(path, "model.safetensors")).equals(weights)).toBe(true);
		const asked = hub.contents.filter(({ url }) => url.endsWith("model.safetensors"));
		const from = asked.map(({ range }) => Number(/^bytes=(\d+)-$/.exec(range ?? "bytes=0-")?.[1]));
		expect(from).toHaveLength(3);
		expect(from[1]).toBeGreaterThan(0);
		expect(from[1]).toBeLessThanOrEqual(100_000);
		expect(from[2]).toBeGreaterThanOrEqual(from[1] ?? 0);
		expect(from[2]).toBeLessThanOrEqual(150_000);
	});

	it("leaves what was fetched, and the next call resumes", async () => {
		const controller = new AbortController();
		const stop = ({ bytes }: FetchProgress) => {
			if (bytes > 100_000) controller.abort();
		};
		hub.breaks = [...NEEDED.slice(1).map(() => 1e9), 150_000];
		const error = await failure("Qwen/Tiny", { signal: controller.signal, progress: stop });
		expect(error).toMatchObject({
			code: "ARL_INTERRUPTED",
			message: "interrupted while fetching Qwen/Tiny/model.safetensors",
		});
		expect(blobs()).toContain(`${sha256(weights)}.arl.incomplete`);
		hub.calm();
		const { path } = await fetchModel("Qwen/Tiny");
		expect(readFileSync(join(path, "model.safetensors")).equals(weights)).toBe(true);
		expect(hub.contents).toHaveLength(1);
		expect(hub.contents[0]?.range).toMatch(/^bytes=[1-9]\d+-$/);
		expect(blobs().filter((name) => name.includes("incomplete"))).toEqual([]);
	});

	it("ends the call after five attempts that bring nothing", async () => {
		hub.breaks = [...NEEDED.slice(1).map(() => 1e9), 0, 0, 0, 0, 0, 0];
		const error = await failure("Qwen/Tiny");
		expect(error.code).toBe("ARL_NETWORK");
		expect(error.message).toMatch(/^the Hugging Face Hub cannot be reached at 127\.0\.0\.1:\d+: /);
		expect(hub.contents.filter(({ url }) => url.endsWith("model.safetensors"))).toHaveLength(5);
	});

	it("does not matter where the server cannot resume: the file is fetched whole", async () => {
		hub.breaks = [...NEEDED.slice(1).map(() => 1e9), 100_000];
		hub.ignoresRange = true;
		const { path } = await fetchModel("Qwen/Tiny");
		expect(readFileSync(join(path, "model.safetensors")).equals(weights)).toBe(true);
	});
});

describe("the partial file of a process", () => {
	/** Puts the first bytes of the weights under the name of a process's partial file. */
	function leave(pid: number): string {
		mkdirSync(join(repoFolder(), "blobs"), { recursive: true });
		const name = `${sha256(weights)}.arl-${hostname()}-${pid}.incomplete`;
		writeFileSync(join(repoFolder(), "blobs", name), weights.subarray(0, 123_456));
		return name;
	}
	const asked = () => hub.contents.filter(({ url }) => url.endsWith("model.safetensors")).map(({ range }) => range);

	it("that was killed is continued", async () => {
		const { pid } = spawnSync(process.execPath, ["--version"]);
		leave(pid);
		const { path } = await fetchModel("Qwen/Tiny");
		expect(asked()).toEqual(["bytes=123456-"]);
		expect(readFileSync(join(path, "model.safetensors")).equals(weights)).toBe(true);
	});

	it("that works on it is left to that process", async () => {
		const name = leave(process.ppid);
		const { path } = await fetchModel("Qwen/Tiny");
		expect(asked()).toEqual([undefined]);
		expect(readFileSync(join(path, "model.safetensors")).equals(weights)).toBe(true);
		expect(blobs()).toContain(name);
	});
});

describe("content", () => {
	it("without its published hash is refused, and not kept", async () => {
		hub.sends = (path, content) => (path === "model.safetensors" ? Buffer.alloc(content.length) : content);
		const error = await failure("Qwen/Tiny");
		expect(error.code).toBe("ARL_NETWORK");
		expect(error.message).toContain(
			`Qwen/Tiny/model.safetensors does not have its published hash: expected sha256 ${sha256(weights)}`,
		);
		expect(blobs().filter((name) => name.startsWith(sha256(weights)))).toEqual([]);
		expect(existsSync(join(repoFolder(), "snapshots", repo.commit, "model.safetensors"))).toBe(false);
		hub.calm();
		hub.sends = (path, content) => (path === "config.json" ? Buffer.concat([content, content]) : content);
		cache = join(folder, `cache-${++caches}`);
		vi.stubEnv("HF_HUB_CACHE", cache);
		expect((await failure("Qwen/Tiny")).message).toMatch(
			/config\.json is longer than the \d+ bytes that were published/,
		);
	});

	it("of an earlier attempt that has become wrong is fetched again from its beginning", async () => {
		mkdirSync(join(repoFolder(), "blobs"), { recursive: true });
		writeFileSync(join(repoFolder(), "blobs", `${sha256(weights)}.arl.incomplete`), Buffer.alloc(200_000));
		const { path } = await fetchModel("Qwen/Tiny");
		expect(readFileSync(join(path, "model.safetensors")).equals(weights)).toBe(true);
	});

	it("that does not fit the disk is an error that says what to do", async () => {
		const disk = SmallDisk.make("a cache on a full disk");
		if (disk === null) return;
		disk.resize(200);
		vi.stubEnv("HF_HUB_CACHE", join(disk.path, "hub"));
		const before = await failure("Qwen/Tiny");
		expect(before.code).toBe("ARL_IO");
		expect(before.message).toMatch(/^Qwen\/Tiny: 0\.00 GB are to be fetched, and 0\.00 GB are free on the disk of /);
		expect(before.hint).toContain("HF_HOME");
		// It becomes full while the file is fetched.
		disk.resize(2000);
		const shrink = ({ bytes }: FetchProgress) => {
			if (bytes > 1000) disk.resize(150);
		};
		const error = await failure("Qwen/Tiny", { progress: shrink });
		expect(error).toMatchObject({ code: "ARL_IO" });
		expect(error.message).toContain("Qwen/Tiny/model.safetensors: the disk is full");
		expect(error.hint).toContain("What was fetched is kept");
		disk.resize(4000);
		expect(readFileSync(join((await fetchModel("Qwen/Tiny")).path, "model.safetensors")).equals(weights)).toBe(true);
	});
});

describe("access", () => {
	hub.add("models/Qwen/Private", MODEL, { token: TOKEN });
	hub.add("models/Qwen/Gated", MODEL, { token: TOKEN, gated: true });

	it("is asked for by name where it is missing", async () => {
		const unknown = await failure("Qwen/Nothing");
		expect(unknown.code).toBe("ARL_NETWORK");
		expect(unknown.message).toBe(`${hub.url} has no model Qwen/Nothing that can be read without a token`);
		expect(unknown.hint).toBe(
			"Check the name, or give a local folder. If it is private: set HF_TOKEN, or run `hf auth login`.",
		);
		expect((await failure("Qwen/Private")).message).toContain("has no model Qwen/Private");
		const gated = await failure("Qwen/Gated");
		expect(gated.message).toBe("Qwen/Gated: access to this model is restricted");
		expect(gated.hint).toBe(`Accept its terms at ${hub.url}/Qwen/Gated; then set HF_TOKEN, or run \`hf auth login\`.`);
		vi.stubEnv("HF_TOKEN", "hf_ofSomebodyElse");
		expect((await failure("Qwen/Gated")).hint).toContain("HF_TOKEN has a token that may not read it");
		vi.stubEnv("HF_TOKEN", "hf_expired");
		expect((await failure("Qwen/Tiny")).message).toBe(`${hub.url} does not accept the token of HF_TOKEN`);
	});

	it("is that of the token of HF_TOKEN or of its file, which no other server, message or file ever gets", async () => {
		const others: (string | undefined)[] = [];
		const cdn = createServer((request, response) => {
			others.push(request.headers.authorization);
			sendContent(weights, request.headers.range, response);
		});
		await new Promise<void>((resolve) => cdn.listen(0, "127.0.0.1", resolve));
		hub.redirectTo = `http://127.0.0.1:${(cdn.address() as AddressInfo).port}`;
		mkdirSync(join(folder, "home"), { recursive: true });
		writeFileSync(join(folder, "home", "token"), `${TOKEN}\n`);
		const found = await fetchModel("Qwen/Private");
		cdn.close();
		expect(new Set(hub.seen.map(({ authorization }) => authorization))).toEqual(new Set([`Bearer ${TOKEN}`]));
		expect(others).toEqual([undefined]);
		const kept = readdirSync(cache, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
		for (const { parentPath, name } of kept) expect(readFileSync(join(parentPath, name), "utf8")).not.toContain(TOKEN);
		expect(JSON.stringify(found)).not.toContain(TOKEN);
		vi.stubEnv("HF_TOKEN", TOKEN);
		hub.status = 500;
		const broken = await failure("Qwen/Other");
		expect(broken.message).toBe(`Qwen/Other: ${hub.url} answers 500`);
		expect(`${broken.message} ${broken.hint} ${broken.stack}`).not.toContain(TOKEN);
		vi.stubEnv("HF_ENDPOINT", hub.url.replace("http://", `http://user:${TOKEN}@`));
		const named = await failure("Qwen/Other");
		expect(`${named.message} ${named.hint} ${named.stack}`).not.toContain(TOKEN);
	});
});

describe("without the Hub", () => {
	it("a model that the cache lacks is an error that says so", async () => {
		vi.stubEnv("HF_HUB_OFFLINE", "1");
		expect(await failure("Qwen/Tiny")).toMatchObject({
			code: "ARL_NETWORK",
			message: `Qwen/Tiny is not in the cache (${cache}), and HF_HUB_OFFLINE forbids to fetch it`,
		});
		vi.stubEnv("HF_HUB_OFFLINE", "");
		await fetchModel("Qwen/Tiny", { weights: false });
		vi.stubEnv("HF_HUB_OFFLINE", "1");
		expect((await failure("Qwen/Tiny")).message).toContain("is in the cache only in part");
		expect((await fetchModel("Qwen/Tiny", { weights: false })).path).toContain(repo.commit);
	});

	it("a proxy that the environment names is used", async () => {
		const through: string[] = [];
		const proxy = createServer();
		proxy.on("connect", (request, socket) => {
			through.push(String(request.url));
			const { port } = new URL(hub.url);
			const onward = connect(Number(port), "127.0.0.1", () => {
				socket.write("HTTP/1.1 200 Connection established\r\n\r\n");
				onward.pipe(socket).pipe(onward);
			});
			for (const one of [socket, onward]) one.on("error", () => {});
		});
		await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
		vi.stubEnv("NO_PROXY", "");
		vi.stubEnv("no_proxy", "");
		for (const name of ["http_proxy", "HTTP_PROXY"]) {
			vi.stubEnv(name, `http://127.0.0.1:${(proxy.address() as AddressInfo).port}`);
		}
		vi.stubEnv("HF_ENDPOINT", "http://hub.invalid");
		await fetchModel("Qwen/Tiny");
		for (const name of ["http_proxy", "HTTP_PROXY"]) vi.stubEnv(name, "");
		proxy.close();
		expect(new Set(through)).toEqual(new Set(["hub.invalid:80"]));
	});

	it("a Hub that does not answer is named with the reason", async () => {
		const gone = await FakeHub.start();
		gone.stop();
		vi.stubEnv("HF_ENDPOINT", gone.url);
		const error = await failure("Qwen/Tiny");
		expect(error.code).toBe("ARL_NETWORK");
		expect(error.message).toMatch(/^the Hugging Face Hub cannot be reached at 127\.0\.0\.1:\d+: .*ECONNREFUSED/);
		expect(error.hint).toContain("HTTPS_PROXY");
	});
});
