/** `arl cuda install` and `remove`, with wheels of an index on loopback: nothing of NVIDIA's is fetched. */
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, it, vi } from "vitest";
import { run as install } from "../src/cli/cuda-install.js";
import { run as remove } from "../src/cli/cuda-remove.js";
import { run as doctor } from "../src/cli/doctor.js";
import { installLibraries } from "../src/device/cuda-libraries.js";
import { pipIndexes, type Wheel } from "../src/download/python-index.js";
import type { ArlError } from "../src/errors.js";
import type { Native } from "../src/native.js";
import { cudaSystem, DRIVER, fakeCuda, H100, LIBRARIES, onlyIn } from "./support/cuda.js";
import { fakeNative } from "./support/fake-native.js";
import { temporaryFolder } from "./support/folder.js";
import { capturedOutput } from "./support/output.js";
import { arl } from "./support/real.js";
import { FakeIndex } from "./support/wheels.js";

const folder = temporaryFolder();
const output = capturedOutput();
const index = await FakeIndex.start();
const built = cudaSystem ? fakeCuda(folder) : folder;
const content = (soname: string) => (cudaSystem ? readFileSync(join(built, soname)) : Buffer.from(soname));
const pins: Wheel[] = [
	index.add("nvidia-cuda-runtime", "13.0.96", {
		"nvidia/cu13/lib/libcudart.so.13": content("libcudart.so.13"),
		"nvidia/cu13/include/cuda_runtime.h": Buffer.from("not needed"),
		"nvidia_cuda_runtime-13.0.96.dist-info/RECORD": Buffer.from("not needed"),
	}),
	index.add(
		"nvidia-others",
		"13.1",
		Object.fromEntries(LIBRARIES.slice(1).map((soname) => [`nvidia/cu13/lib/${soname}`, content(soname)])),
	),
];

let places = 0;
let place = "";
let native: Native;
const system = { platform: "linux", arch: "x64" };
const calls = { signal: null, progress: () => {} };
beforeEach(() => {
	index.seen.length = 0;
	Object.assign(index, { breaks: [], html: false, user: null, sends: null });
	place = join(folder, `cache-${++places}`, "cuda");
	native = { ...fakeNative(), cudaFolder: () => place, cudaWheels: () => pins };
	vi.stubEnv("PIP_INDEX_URL", index.url);
	vi.stubEnv("PIP_EXTRA_INDEX_URL", "");
	vi.stubEnv("NO_PROXY", "127.0.0.1");
});
afterAll(() => vi.unstubAllEnvs());

const failure = (): Promise<ArlError> =>
	installLibraries(native, calls, system).then(
		() => {
			throw new Error("it was installed");
		},
		(error: ArlError) => error,
	);

describe.runIf(cudaSystem)("arl cuda install", () => {
	it("unpacks the libraries of the pinned wheels into the cache, where `arl doctor` finds them", async () => {
		expect(await install([], () => native)).toBe(0);
		expect(output.stdout).toMatch(/^installed NVIDIA's libraries in \S+\/cuda\/libraries \(.* from http:\/\/127/);
		expect(output.stderr).toContain("fetching nvidia-cuda-runtime\n");
		const lib = join(place, "libraries", "nvidia", "cu13", "lib");
		expect(readdirSync(lib).sort()).toEqual([...LIBRARIES].sort());
		expect(readFileSync(join(lib, "libcudart.so.13")).equals(content("libcudart.so.13"))).toBe(true);
		expect(readdirSync(place)).toEqual(["libraries"]);
		output.stdout = "";
		await doctor(["--json"], () => native);
		expect(JSON.parse(output.stdout)).toContainEqual({
			name: "cuda libraries",
			value: `ready: ${join(place, "libraries")}`,
			ok: true,
		});
		// A machine with a driver takes them from there.
		const driver = fakeCuda(folder, []);
		const env = onlyIn(folder, [driver], { FAKE_CUDA_GPUS: H100, ARL_CACHE: join(place, "..") });
		const { stdout } = await arl(["doctor", "--json"], undefined, undefined, env);
		const found = JSON.parse(stdout) as { name: string; value: string; ok: boolean }[];
		expect(found.find(({ name }) => name === "cuda driver")?.value).toContain(join(driver, DRIVER));
		for (const name of ["cudart", "NVRTC", "cuRAND", "cuBLASLt", "cuBLAS"]) {
			const one = found.find((finding) => finding.name === name);
			expect(one?.ok).toBe(true);
			// The system's own come first where there are some.
			if (!one?.value.startsWith("/usr")) expect(one?.value).toContain(`${lib}/`);
		}
	}, 60_000);

	it("does nothing where all is there, and remove takes it away", async () => {
		await install([], () => native);
		index.seen.length = 0;
		output.stdout = "";
		expect(await install([], () => native)).toBe(0);
		expect(output.stdout).toContain("are in");
		expect(index.seen).toEqual([]);
		output.stdout = "";
		expect(await remove([], () => native)).toBe(0);
		expect(output.stdout).toMatch(/^removed \S+\/libraries\n.* freed\n$/);
		expect(readdirSync(place)).toEqual([]);
		output.stdout = "";
		expect(await remove([], () => native)).toBe(0);
		expect(output.stdout).toBe("there is nothing to remove\n");
	});
});

describe("an installation", () => {
	it("that breaks off resumes, in the same call and in the next one", async () => {
		index.breaks = [200];
		await installLibraries(native, calls, system);
		expect(index.seen.filter((url) => url.includes("bytes=200-"))).toHaveLength(1);
		// The next one is stopped in the middle.
		place = join(folder, `cache-${++places}`, "cuda");
		const controller = new AbortController();
		index.breaks = [250, 250, 250, 250];
		const stopped = installLibraries(
			native,
			{
				signal: controller.signal,
				progress: ({ bytes }) => {
					if (bytes > 0) controller.abort();
				},
			},
			system,
		);
		await expect(stopped).rejects.toMatchObject({ code: "ARL_INTERRUPTED" });
		expect(readdirSync(join(place, "wheels")).some((name) => name.endsWith(".arl.incomplete"))).toBe(true);
		index.seen.length = 0;
		index.breaks = [];
		await installLibraries(native, calls, system);
		expect(index.seen.some((url) => /nvidia_cuda_runtime.* bytes=\d+-/.test(url))).toBe(true);
		expect(existsSync(join(place, "wheels"))).toBe(false);
	}, 60_000);

	it("refuses content with another hash, and keeps the libraries that were there", async () => {
		mkdirSync(join(place, "libraries"), { recursive: true });
		writeFileSync(join(place, "libraries", "old"), "x");
		index.sends = (whole) => Buffer.alloc(whole.length);
		const error = await failure();
		expect(error.code).toBe("ARL_NETWORK");
		expect(error.message).toContain("does not have its published hash");
		expect(existsSync(join(place, "libraries", "old"))).toBe(true);
	});

	it("reads indexes in HTML, and those that want a password, which no message holds", async () => {
		index.html = true;
		index.user = "me:s3cret";
		vi.stubEnv("PIP_INDEX_URL", index.url.replace("http://", "http://me:s3cret@"));
		const { from } = await installLibraries(native, calls, system);
		expect(from).toBe(index.url);
		await remove([], () => native);
		vi.stubEnv("PIP_INDEX_URL", index.url.replace("http://", "http://me:wr0ng@"));
		const error = await failure();
		expect(error.message).toBe(`the Python package index answers 401 to ${index.url}/nvidia-cuda-runtime/`);
		expect(`${error.message} ${error.hint} ${error.stack}`).not.toMatch(/s3cret|wr0ng/);
	});

	it("says what is missing, where, and on which systems there is nothing to install", async () => {
		const unknown = { name: "nvidia-none", version: "1.0", sha256: "a".repeat(64) };
		native = { ...native, cudaWheels: () => [unknown] };
		const error = await failure();
		expect(error).toMatchObject({
			code: "ARL_NETWORK",
			message: `${index.url} has no nvidia-none 1.0 with SHA-256 aaaaaaaaaaaaaaaa...`,
		});
		const gone = await FakeIndex.start();
		gone.stop();
		vi.stubEnv("PIP_INDEX_URL", gone.url);
		expect((await failure()).message).toMatch(
			/^the Python package index cannot be reached at 127\.0\.0\.1:\d+: .*ECONNREFUSED/,
		);
		const mac = installLibraries(native, calls, { platform: "darwin", arch: "arm64" });
		await expect(mac).rejects.toMatchObject({ code: "ARL_DEVICE" });
	});
});

describe("the index", () => {
	it("is that of pip's environment, then of its files, else the public one", async () => {
		const home = join(folder, "pip-home");
		mkdirSync(join(home, "pip"), { recursive: true });
		const file = join(folder, "own.conf");
		writeFileSync(
			file,
			"[global]\ntimeout = 60\nindex-url = https://own.example/simple/\nextra-index-url =\n  https://a.example/simple\n  https://b.example/simple\n",
		);
		expect(await pipIndexes({ PIP_CONFIG_FILE: file, XDG_CONFIG_HOME: home })).toEqual([
			"https://own.example/simple",
			"https://a.example/simple",
			"https://b.example/simple",
		]);
		const both = {
			PIP_CONFIG_FILE: file,
			PIP_INDEX_URL: "https://env.example/simple",
			PIP_EXTRA_INDEX_URL: "https://c.example",
		};
		expect(await pipIndexes(both)).toEqual(["https://env.example/simple", "https://c.example"]);
		expect(await pipIndexes({ PIP_CONFIG_FILE: "/dev/null" })).toEqual(["https://pypi.org/simple"]);
		writeFileSync(
			join(home, "pip", "pip.conf"),
			"[install]\nindex-url: https://user.example/simple\n[list]\nindex-url = https://no.example\n",
		);
		if (process.platform === "linux")
			expect(await pipIndexes({ XDG_CONFIG_HOME: home, VIRTUAL_ENV: "" })).toContain("https://user.example/simple");
	});
});
