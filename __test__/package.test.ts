/** The package as npm packs it: its entries, types and files, and what importing an entry loads. Needs no network. */
import { execFileSync, spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { checkPackage, createPackageFromTarballData } from "@arethetypeswrong/core";
import { publint } from "publint";
import { formatMessage } from "publint/utils";
import { describe, expect, it } from "vitest";
import { MOST_BYTES } from "../scripts/packages/platforms.mjs";
import { temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();
const ENTRIES = ["arl", "arl/images", "arl/mongo"];
/** Packages that only some users need, each loaded by the first call that needs it. */
const ON_DEMAND = [
	"@clack/prompts",
	"@hono/node-server",
	"@huggingface/hub",
	"csv-parse",
	"hono",
	"jiti",
	"mongodb",
	"sharp",
	"undici",
	"yaml",
	"yauzl",
];

describe("the packed package", () => {
	const packed = execFileSync(
		"npm",
		["pack", "--ignore-scripts", "--offline", "--json", "--pack-destination", folder],
		{
			cwd: root,
			encoding: "utf8",
		},
	);
	const [{ filename, files, size }] = JSON.parse(packed) as [
		{ filename: string; files: { path: string }[]; size: number },
	];
	const tarball = new Uint8Array(readFileSync(join(folder, filename)));

	it("passes publint", async () => {
		const { messages, pkg } = await publint({ pack: { tarball: tarball.buffer }, strict: true });
		expect(messages.map((message) => formatMessage(message, pkg, { color: false }))).toEqual([]);
	});

	it("has types that fit its entries, for importers of ES modules", async () => {
		const analysis = await checkPackage(createPackageFromTarballData(tarball));
		if (analysis.types === false) throw new Error("the package has no types");
		expect(Object.keys(analysis.entrypoints).sort()).toEqual([".", "./images", "./mongo", "./package.json"]);
		// `require` of ES modules, and resolution without `exports`, are not offered.
		const problems = analysis.problems.filter((problem) => {
			const kind = "resolutionKind" in problem ? problem.resolutionKind : "";
			return kind !== "node10" && kind !== "node16-cjs";
		});
		expect(problems).toEqual([]);
	});

	it("has types that compile where a user checks those of packages too", () => {
		const samples = ["train.ts", "answer.cts"].map((name) => join(root, "scripts", "packages", "sample", name));
		const options =
			"--ignoreConfig --noEmit --module nodenext --target es2022 --strict --skipLibCheck false --types node";
		const compiler = join(root, "node_modules", "typescript", "bin", "tsc");
		const compiled = spawnSync(process.execPath, [compiler, ...options.split(" "), ...samples], {
			cwd: root,
			encoding: "utf8",
		});
		expect(compiled.stdout).toBe("");
	}, 60_000);

	it("contains what its entries need and a sample, and neither addons nor source maps nor sources", () => {
		const paths = files.map(({ path }) => path);
		for (const path of [
			"dist/index.js",
			"index.d.ts",
			"dist/index.d.ts",
			"binding.cjs",
			"dist/cli/main.js",
			"page/report.html",
			"assets/train.jsonl",
			"assets/model/model.safetensors",
			"LICENSE",
		]) {
			expect(paths).toContain(path);
		}
		expect(paths.filter((path) => /\.(map|node)$|^(src|crates|__test__|assets\/make)\//.test(path))).toEqual([]);
		expect(size).toBeLessThan(MOST_BYTES);
	});
});

/** The packages that a module's imports load, by the resolution of every import in its process. */
function loadedBy(module: string): string[] {
	const hooks = `import { writeSync } from "node:fs";
		export async function resolve(specifier, context, next) {
			const found = await next(specifier, context);
			writeSync(1, found.url + "\\n");
			return found;
		}`;
	const setup = join(folder, "hooks.mjs");
	writeFileSync(
		setup,
		`import { register } from "node:module"; register("data:text/javascript,${encodeURIComponent(hooks)}");`,
	);
	const urls = execFileSync(process.execPath, ["--import", setup, "--input-type=module", "--eval", module], {
		cwd: root,
		encoding: "utf8",
	});
	const names = [...urls.matchAll(/node_modules\/((?:@[^/\n]+\/)?[^/\n]+)/g)].map(([, name = ""]) => name);
	return [...new Set(names)];
}

describe("an entry of the package", () => {
	it.each(ENTRIES)("%s loads none of the packages that only some users need", (entry) => {
		const loaded = loadedBy(`import ${JSON.stringify(entry)}; import "zod";`);
		expect(loaded).toContain("zod");
		expect(loaded.filter((name) => ON_DEMAND.includes(name))).toEqual([]);
	});

	it("arl/mongo loads the driver, and arl/images undici and sharp, when they are used", () => {
		const mongo = `const { databaseStatus } = await import("arl/mongo");
			await databaseStatus({ db_connection_string: "mongodb://127.0.0.1:1/x?serverSelectionTimeoutMS=50" }).catch(() => {});`;
		expect(loadedBy(mongo)).toContain("mongodb");
		const images = `const { loadImage } = await import("arl/images");
			await loadImage("http://127.0.0.1:1/", { image_allow_private: true, image_timeout: 1, signal: AbortSignal.timeout(500) }).catch(() => {});
			await loadImage("data:image/gif;base64,R0lGODlhAgACAIAAAP///wAAACH5BAAAAAAALAAAAAACAAIAAAIChFEAOw==", { max_pixels: 1 }).catch(() => {});`;
		expect(loadedBy(images)).toEqual(expect.arrayContaining(["undici", "sharp"]));
	});
});
