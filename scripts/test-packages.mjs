// `npm run test:packages`: packs the packages of this machine's platform, and uses them as a user would: an empty home, no Rust,
// compiler or Python, and a registry on this machine that serves them. Trains the packaged sample on several runtimes. Ends in one
// line: N passed, N failed(, N skipped). `-- --packed` takes the packages in out/packages as they are.

import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { root, setup } from "./setup.mjs";

setup({ addon: false });
const { CUDA, FOLDERS, manifest, PLATFORMS, tarballName } = await import("./packages/platforms.mjs");
const { packFolder } = await import("./packages/stage.mjs");
const { startRegistry } = await import("./packages/registry.mjs");
const { runtimes } = await import("./packages/runtimes.mjs");
const { elsewhere } = await import("./packages/elsewhere.mjs");
const { Sandbox } = await import("./packages/sandbox.mjs");

const windows = process.platform === "win32";
const totals = { passed: 0, failed: 0, skipped: 0 };
const say = (text) => process.stderr.write(`${text}\n`);

async function check(name, job) {
	try {
		const note = await job();
		totals.passed += 1;
		say(`ok       ${name}${note ? `: ${note}` : ""}`);
	} catch (error) {
		totals.failed += 1;
		say(`FAILED   ${name}: ${error.message}`);
	}
}

function skip(name, reason) {
	totals.skipped += 1;
	say(`SKIPPED: ${name}: ${reason}`);
}

function expect(condition, text) {
	if (!condition) throw new Error(text);
}

const seconds = (value) => `${value.toFixed(2)} s`;

/** The package of this machine's platform. */
const libc = process.report.getReport().header.glibcVersionRuntime === undefined ? "musl" : "gnu";
const own = PLATFORMS.find(
	({ platform, arch, abi }) =>
		platform === process.platform && arch === process.arch && (platform !== "linux" || abi === libc),
);
if (own === undefined) {
	say(`there is no package for ${process.platform}-${process.arch}`);
	process.exit(1);
}

if (!process.argv.includes("--packed")) {
	const pack = [join(root, "scripts", "pack.mjs"), "--only", own.id, "--only", CUDA.id];
	const { status } = spawnSync(process.execPath, pack, { cwd: root, stdio: "inherit" });
	if (status !== 0) process.exit(1);
}

/**
 * What a registry would hold: the packed packages, and those of other platforms without their addons, so that npm has all to
 * choose from.
 */
function served() {
	const folders = ["main", ...[...PLATFORMS, CUDA].map(({ id }) => join("npm", id))];
	return folders.map((name) => {
		const folder = join(FOLDERS.stage, name);
		const described = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
		const packed = join(FOLDERS.out, tarballName(described.name));
		return {
			manifest: described,
			file: existsSync(packed) ? packed : packFolder(folder, join(FOLDERS.stage, "others")),
		};
	});
}

const upstream = spawnSync("npm", ["config", "get", "registry"], { encoding: "utf8", shell: windows }).stdout.trim();
const packages = served();
const registry = await startRegistry(packages, upstream);
const sandbox = new Sandbox(registry.url);
const ours = new Set(packages.map((entry) => entry.manifest.name));
const name = manifest.name;

await check("there is no Rust, compiler or Python", () => {
	const found = ["cargo", "rustc", "cc", "gcc", "clang", "python3", "python"].filter((program) => sandbox.has(program));
	expect(found.length === 0, `found ${found.join(", ")}`);
	expect(sandbox.has("node"), "there is no Node either");
});

const empty = sandbox.makeFolder("empty");
await check(`npx ${name} in an empty folder`, async () => {
	const first = await sandbox.run("npx", ["--yes", name, "--version"], { cwd: empty });
	expect(first.stdout.trim() === manifest.version, `it printed ${first.stdout}`);
	const again = await sandbox.run("npx", ["--yes", name, "--version"], { cwd: empty });
	return `${seconds(first.seconds)} with the download, ${seconds(again.seconds)} after it`;
});

/** Which of our packages a folder has got, in the order of the alphabet. */
const foundIn = (folder) =>
	[...ours]
		.filter((one) => existsSync(join(folder, "node_modules", one)))
		.sort()
		.join(", ");
const wanted = [name, own.package].sort().join(", ");

const project = sandbox.makeFolder("project");
const installed = join(project, "node_modules", name);
await check("npm installs the package of this platform alone", async () => {
	writeFileSync(join(project, "package.json"), '{ "private": true, "type": "module" }\n');
	await sandbox.run("npm", ["install", name], { cwd: project });
	expect(foundIn(project) === wanted, `installed ${foundIn(project)} instead of ${wanted}`);
	const fetched = [...new Set(registry.downloads)].sort().join(", ");
	expect(fetched === wanted, `downloaded ${fetched} instead of ${wanted}`);
	const lock = JSON.parse(readFileSync(join(project, "package-lock.json"), "utf8"));
	const scripts = Object.entries(lock.packages).filter(([, entry]) => entry.hasInstallScript);
	expect(scripts.length === 0, `these run install scripts: ${scripts.map(([path]) => path).join(", ")}`);
	return `${Object.keys(lock.packages).length - 1} packages in the lock file`;
});

await check(`npx ${name} train, in an empty folder, on rows of one's own`, async () => {
	cpSync(join(installed, "assets", "model"), join(empty, "model"), { recursive: true });
	const row = {
		messages: [
			{ role: "user", content: "Hi" },
			{ role: "assistant", content: "Hello" },
		],
	};
	writeFileSync(join(empty, "rows.jsonl"), `${Array.from({ length: 8 }, () => JSON.stringify(row)).join("\n")}\n`);
	const words = "--model_name_or_path model --train_file rows.jsonl --output_dir out --max_steps 2".split(" ");
	await sandbox.run("npx", ["--yes", name, "train", ...words], { cwd: empty });
	expect(existsSync(join(empty, "out", "model.safetensors")), "it left no model");
});

await check("TypeScript compiles a user's ES module and CommonJS against the types", async () => {
	const { typescript, "@types/node": types } = manifest.devDependencies;
	await sandbox.run("npm", ["install", "--save-dev", `typescript@${typescript}`, `@types/node@${types}`], {
		cwd: project,
	});
	for (const file of readdirSync(join(root, "scripts", "packages", "sample"))) {
		cpSync(join(root, "scripts", "packages", "sample", file), join(project, file));
	}
	const options = "--module nodenext --target es2022 --strict --skipLibCheck false --types node".split(" ");
	await sandbox.run("npx", ["tsc", ...options, "train.ts", "answer.cts"], { cwd: project });
	expect(existsSync(join(project, "train.js")) && existsSync(join(project, "answer.cjs")), "it wrote no JavaScript");
});

const assets = join(installed, "assets");
/** The program `arl`, in the package. */
const entry = Object.values(manifest.bin)[0];
const main = join(installed, entry);
const weights = new Map();

const found = runtimes();
const bun = found.find(({ kind }) => kind === "bun");
const others = [["pnpm", "npx", ["--yes", "pnpm@10.34.9", "add", name]]];
if (bun.file !== undefined) others.push(["Bun", bun.file, ["add", name]]);
for (const [manager, program, words] of others) {
	await check(`${manager} installs the package of this platform alone`, async () => {
		const folder = sandbox.makeFolder(manager);
		writeFileSync(join(folder, "package.json"), '{ "private": true }\n');
		const before = registry.downloads.length;
		await sandbox.run(program, words, { cwd: folder });
		const fetched = [...new Set(registry.downloads.slice(before))].sort().join(", ");
		expect(fetched === wanted, `downloaded ${fetched} instead of ${wanted}`);
		const { stdout } = await sandbox.run(process.execPath, [join(folder, "node_modules", name, entry), "doctor"], {
			cwd: folder,
		});
		expect(stdout.includes(manifest.version), `doctor does not name the version:\n${stdout}`);
	});
}

for (const { name: runtime, kind, file, reason } of found) {
	if (reason !== undefined) {
		skip(`the packages on ${runtime}`, reason);
		continue;
	}
	const out = join(project, `out-${runtime.replace(" ", "-")}`);
	const run = (args, options = {}) => sandbox.run(file, args, { cwd: project, ...options });
	await check(`${runtime}: the command starts`, async () => {
		const { seconds: took, stdout } = await run([main, "--version"]);
		expect(stdout.trim() === manifest.version, `it printed ${stdout}`);
		return `${seconds(took)} (aim: 1 s)`;
	});
	await check(`${runtime}: train, on the packaged sample`, async () => {
		const words = ["--model_name_or_path", join(assets, "model"), "--train_file", join(assets, "train.jsonl")];
		const more = ["--output_dir", out, "--max_steps", "5", "--logging_steps", "1", "--json"];
		const { marked } = await run([main, "train", ...words, ...more], { mark: '"type":"step","step":1' });
		expect(marked !== null, "it printed no first step");
		weights.set(
			runtime,
			createHash("sha256")
				.update(readFileSync(join(out, "model.safetensors")))
				.digest("hex"),
		);
		return `first step after ${seconds(marked)} (aim: 2 s)`;
	});
	await check(`${runtime}: doctor`, async () => {
		const { stdout } = await run([main, "doctor"]);
		expect(stdout.includes(manifest.version), `it does not name the version:\n${stdout}`);
	});
	await check(`${runtime}: generate`, async () => {
		const words = ["--model_name_or_path", out, "--prompt", "Hello", "--max_new_tokens", "4", "--json"];
		const reply = JSON.parse((await run([main, "generate", ...words])).stdout);
		expect(JSON.stringify(reply).length > 10, "it printed no reply");
	});
	await check(`${runtime}: an ES module, compiled of TypeScript`, async () => {
		const { stdout } = await run([join(project, "train.js"), assets, join(project, `esm-${kind}`)]);
		rmSync(join(project, `esm-${kind}`), { recursive: true, force: true });
		const printed = JSON.parse(stdout.trim().split("\n").at(-1));
		const right = { steps: [1, 2, 3], code: "ARL_CONFIG", more: ["function", "function"] };
		expect(
			printed.completionTokens >= 1 && printed.completionTokens <= 4,
			`${printed.completionTokens} tokens were generated`,
		);
		for (const [key, value] of Object.entries(right)) {
			expect(
				JSON.stringify(printed[key]) === JSON.stringify(value),
				`${key} is not ${JSON.stringify(value)}: ${stdout}`,
			);
		}
	});
	await check(`${runtime}: CommonJS`, async () => {
		const { stdout, stderr } = await run([join(project, "answer.cjs"), out]);
		expect(JSON.parse(stdout).completionTokens >= 1, `it printed ${stdout}`);
		return stderr.includes("Warning") ? `with a warning: ${stderr.split("\n")[0]}` : "";
	});
}

if (weights.size > 1) {
	await check("every runtime trains the same bits", () => {
		expect(
			new Set(weights.values()).size === 1,
			[...weights].map(([runtime, hash]) => `${runtime} ${hash}`).join(", "),
		);
		return [...weights.keys()].join(", ");
	});
}

if (existsSync(join(FOLDERS.out, tarballName(CUDA.package)))) {
	await check("the CUDA package is found where it is installed", async () => {
		await sandbox.run("npm", ["install", CUDA.package], { cwd: project });
		const { stdout } = await sandbox.run(process.execPath, [main, "doctor"], { cwd: project });
		expect(stdout.includes(CUDA.file), `doctor does not name it:\n${stdout}`);
	});
} else {
	skip("the CUDA package", "its addon was not built (`npm run build:cuda`)");
}

/** What a run on the packaged sample prints of each step: its loss. */
const lossesOf = (stdout) => [...stdout.matchAll(/"type":"step".*?"loss":([\d.e-]+)/g)].map(([, loss]) => Number(loss));

/** How far losses of other processors may be from this one's, whose sums have another order; relative. */
const ROUNDING = 1e-5;

/** The losses of three steps, as a function starts `arl`. */
async function threeSteps(folder, start) {
	const [model, rows] = ["model", "train.jsonl"].map((part) => join(folder, "node_modules", name, "assets", part));
	const words = `--model_name_or_path ${model} --train_file ${rows} --output_dir ${join(folder, "out")}`.split(" ");
	const more = "--max_steps 3 --logging_steps 1 --device cpu --overwrite_output_dir --json".split(" ");
	const [command, args] = start(folder, [join(folder, "node_modules", name, entry), "train", ...words, ...more]);
	const { stdout, seconds: took } = await sandbox.run(command, args, { cwd: folder });
	return { losses: lossesOf(stdout), took };
}

for (const { id, npm, runtime } of elsewhere()) {
	const other = PLATFORMS.find((platform) => platform.id === id);
	if (other === own) continue;
	const reason = existsSync(join(FOLDERS.out, tarballName(other.package)))
		? null
		: "it was not packed (`npm run pack`)";
	const { start, reason: missing } = reason === null ? runtime() : { reason };
	if (missing !== undefined) {
		skip(`${other.package} on this machine`, missing);
		continue;
	}
	await check(`${other.package} is what npm installs there, and it trains as this machine's does`, async () => {
		const folder = sandbox.makeFolder(id);
		writeFileSync(join(folder, "package.json"), '{ "private": true }\n');
		await sandbox.run("npm", ["install", ...npm, name], { cwd: folder });
		const both = [name, other.package].sort().join(", ");
		expect(foundIn(folder) === both, `installed ${foundIn(folder)} instead of ${both}`);
		const there = await threeSteps(folder, start);
		const here = await threeSteps(project, (_folder, args) => [process.execPath, args]);
		expect(here.losses.length === 3 && there.losses.length === 3, `${there.losses.length} steps were logged`);
		const far = here.losses.map((loss, i) => Math.abs(there.losses[i] / loss - 1));
		expect(Math.max(...far) < ROUNDING, `losses ${there.losses.join(", ")} instead of ${here.losses.join(", ")}`);
		return `losses within ${Math.max(...far).toExponential(1)}, ${seconds(there.took)} instead of ${seconds(here.took)}`;
	});
}

registry.close();
sandbox.remove();
console.log(
	`${totals.passed} passed, ${totals.failed} failed${totals.skipped > 0 ? `, ${totals.skipped} skipped` : ""}`,
);
process.exitCode = totals.failed > 0 ? 1 : 0;
