// All set-up of a clone, as a function: packages, the addon, the TypeScript. Each step is skipped when what it makes is
// already there for the very same sources. Knows only Node itself, because it runs before anything is installed.

import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
	copyFileSync,
	existsSync,
	mkdirSync,
	readdirSync,
	readFileSync,
	renameSync,
	rmSync,
	statSync,
	symlinkSync,
	writeFileSync,
} from "node:fs";
import { availableParallelism, homedir } from "node:os";
import { delimiter, dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { claimTarget } from "./cargo-target.mjs";

export const root = dirname(dirname(fileURLToPath(import.meta.url)));

/** Where builds are kept between clones: ARL_CACHE, else the user's cache folder. */
export const cache = process.env.ARL_CACHE ?? join(process.env.XDG_CACHE_HOME ?? join(homedir(), ".cache"), "arl");

const targetFolder = process.env.CARGO_TARGET_DIR ?? join(cache, "target");

/** The environment of a cargo call that comes next. */
export function cargoEnv() {
	return { ...process.env, CARGO_TARGET_DIR: claimTarget(targetFolder, root) };
}

const windows = process.platform === "win32";

/** npm is a script on Windows, which only a shell starts; a shell would cut the path of any other program at its spaces. */
const needsShell = (command) => windows && command === "npm";

/** Ends the set-up with what is missing and what to do. */
export class SetupError extends Error {}

export function run(command, args, options = {}) {
	const result = spawnSync(command, args, { cwd: root, stdio: "inherit", shell: needsShell(command), ...options });
	if (result.error) throw new SetupError(`${command}: ${result.error.message}`);
	if (result.status !== 0)
		throw new SetupError(
			`\`${command} ${args.join(" ")}\` failed (exit code ${result.status ?? result.signal}); its output is above.`,
		);
	return result;
}

function output(command, args) {
	const result = spawnSync(command, args, { cwd: root, encoding: "utf8", shell: needsShell(command) });
	return result.status === 0 ? result.stdout.trim() : undefined;
}

function* filesUnder(path) {
	if (statSync(path).isFile()) {
		yield path;
		return;
	}
	for (const name of readdirSync(path).sort()) {
		if (name === "target" || name === "node_modules") continue;
		yield* filesUnder(join(path, name));
	}
}

/** A hash of the contents and names of files and folders, and of some words next to them. */
export function hashOf(paths, words = []) {
	const hash = createHash("sha256");
	for (const word of words) hash.update(`${word}\0`);
	for (const path of paths) {
		for (const file of filesUnder(join(root, path))) {
			hash.update(`${relative(root, file)}\0`);
			hash.update(readFileSync(file));
			hash.update("\0");
		}
	}
	return hash.digest("hex").slice(0, 32);
}

function stampIs(file, value) {
	return existsSync(file) && readFileSync(file, "utf8") === value;
}

function atLeast(version, wanted) {
	const have = version.split(".").map(Number);
	for (const [i, part] of wanted.split(".").map(Number).entries()) {
		if ((have[i] ?? 0) !== part) return (have[i] ?? 0) > part;
	}
	return true;
}

function checkNode() {
	const wanted = "20.19";
	if (!atLeast(process.versions.node, wanted)) {
		throw new SetupError(
			`Node ${wanted} or newer is needed; this is ${process.versions.node}. Install a newer Node (nodejs.org), then run this again.`,
		);
	}
}

/** Rust's version; the addon needs it and a C compiler (the tokenizer's regular expressions are C). */
function checkToolchain() {
	const wanted = /rust-version = "([^"]+)"/.exec(readFileSync(join(root, "Cargo.toml"), "utf8"))[1];
	const rustc = output("rustc", ["--version"]);
	const install =
		"Install stable Rust with rustup: open https://rustup.rs and run the one line shown there, open a new terminal, then run this again.";
	if (!rustc || !output("cargo", ["--version"])) throw new SetupError(`Rust is missing. ${install}`);
	const version = /rustc (\d+\.\d+(\.\d+)?)/.exec(rustc)?.[1] ?? "0";
	if (!atLeast(version, wanted))
		throw new SetupError(
			`Rust ${wanted} or newer is needed; this is ${version}. Run \`rustup update stable\`, then run this again. (${install})`,
		);
	const compiler = process.env.CC ?? "cc";
	if (!windows && !output(compiler, ["--version"])) {
		throw new SetupError(
			`A C compiler is missing (\`${compiler}\` does not run). Install one (Debian, Ubuntu: \`apt-get install build-essential\`; Fedora: \`dnf install gcc\`; macOS: \`xcode-select --install\`), then run this again.`,
		);
	}
	return rustc;
}

function installPackages() {
	const stamp = join(root, "node_modules", ".arl-stamp");
	const wanted = hashOf(["package.json", "package-lock.json"]);
	if (stampIs(stamp, wanted)) return;
	console.error("arl: installing packages");
	// Not `npm ci`: it refuses a lock file that lacks optional packages of other platforms, and registries that mirror only
	// some of them make just such a file. This installs what is locked, and writes nothing.
	run("npm", ["install", "--no-save", "--no-audit", "--no-fund", "--loglevel=error"]);
	writeFileSync(stamp, wanted);
}

/** A process that has the old file loaded keeps it. */
function replaceFile(from, to) {
	rmSync(to, { force: true });
	copyFileSync(from, to);
}

/** What the addons are made of. */
export const ADDON_SOURCES = ["Cargo.toml", "Cargo.lock", "crates"];

/** The addon with CUDA, and what it is made of: other pins of the toolkit make another addon. */
export const CUDA_ADDON = {
	file: "arl.linux-x64-gnu-cuda.node",
	sources: [...ADDON_SOURCES, "scripts/cuda-toolkit.mjs"],
};

/** Builds what `files` lists in the clone, or takes it from the cache where it was built from the same sources by the same compiler. */
function keepBuilt({ stampName, sources: paths, files, build }) {
	const sources = hashOf(paths);
	const stamp = join(root, "node_modules", stampName);
	const complete = () => files().every((name) => existsSync(join(root, name)));
	if (stampIs(stamp, sources) && complete()) return;
	const rustc = checkToolchain();
	const store = join(cache, "addon", hashOf([], [sources, rustc, process.platform, process.arch]));
	if (existsSync(store)) {
		for (const name of readdirSync(store)) replaceFile(join(store, name), join(root, name));
	} else {
		build();
		const partial = `${store}.${process.pid}`;
		mkdirSync(partial, { recursive: true });
		for (const name of files()) copyFileSync(join(root, name), join(partial, name));
		try {
			renameSync(partial, store);
		} catch {
			rmSync(partial, { recursive: true, force: true }); // another clone was quicker
		}
	}
	writeFileSync(stamp, sources);
}

/** The addon that every machine can load, with its loader and its types. */
function buildAddon() {
	const built = () => readdirSync(root).filter((name) => /^arl\..*\.node$/.test(name) && name !== CUDA_ADDON.file);
	keepBuilt({
		stampName: ".arl-addon",
		sources: ADDON_SOURCES,
		// Which name the addon has, only the build tells.
		files: () => [...(built().length > 0 ? built() : ["arl.node"]), "binding.cjs", "binding.d.ts"],
		build: () => {
			console.error("arl: building the addon (minutes the first time; kept in the build cache after that)");
			for (const name of built()) rmSync(join(root, name));
			run(
				process.execPath,
				[
					join(root, "node_modules", "@napi-rs", "cli", "dist", "cli.js"),
					"build",
					"--platform",
					"--release",
					"--js",
					"binding.cjs",
					"--dts",
					"binding.d.ts",
					"--no-const-enum",
					"--manifest-path",
					"crates/arl-node/Cargo.toml",
					"--output-dir",
					".",
				],
				{ env: cargoEnv() },
			);
		},
	});
}

export const CUDA_TRIPLE = "x86_64-unknown-linux-gnu";

/** The environment of the cargo call that comes next and builds with CUDA; `home`: the toolkit. */
export function cudaEnv(home) {
	return {
		...cargoEnv(),
		CUDA_HOME: home,
		PATH: `${join(home, "bin")}${delimiter}${process.env.PATH}`,
		// candle's own kernels: their PTX serves every GPU from 8.0 on.
		CUDA_COMPUTE_CAP: "80",
		CUDAFORGE_THREADS: String(availableParallelism()),
		// Nothing here calls candle's kernels, those for quantized models among them: optimised and without compression they are
		// 30 MB of code and most of the build's time. This project's are compiled without these flags.
		NVCC_APPEND_FLAGS: [process.env.NVCC_APPEND_FLAGS, "--compress-mode=size", "--Ofast-compile=max"]
			.filter(Boolean)
			.join(" "),
	};
}

/** The addon with CUDA, next to the other; `home`: the toolkit; `fatbin`: the kernels, where these are compiled already. */
export function buildCudaAddon(home, fatbin) {
	keepBuilt({
		stampName: ".arl-addon-cuda",
		sources: CUDA_ADDON.sources,
		files: () => [CUDA_ADDON.file],
		build: () => {
			console.error("arl: building the CUDA addon (ten minutes on two cores the first time; kept in the build cache)");
			const env = { ...cudaEnv(home), ...(fatbin && { ARL_KERNELS_FATBIN: fatbin }) };
			const args = ["build", "--release", "--locked", "-p", "arl-node", "--features", "cuda", "--target", CUDA_TRIPLE];
			run("cargo", args, { env });
			replaceFile(join(env.CARGO_TARGET_DIR, CUDA_TRIPLE, "release", "libarl_node.so"), join(root, CUDA_ADDON.file));
		},
	});
	return join(root, CUDA_ADDON.file);
}

/** A CUDA addon of other sources would be loaded next to this one's: it goes. */
function dropStaleCudaAddon() {
	const file = join(root, CUDA_ADDON.file);
	const current = stampIs(join(root, "node_modules", ".arl-addon-cuda"), hashOf(CUDA_ADDON.sources));
	if (!existsSync(file) || current) return;
	console.error(
		"arl: the CUDA addon was built from other sources and is removed; `npm run build:cuda` builds it again",
	);
	rmSync(file);
}

function buildTypeScript() {
	const stamp = join(root, "node_modules", ".arl-typescript");
	const wanted = hashOf(["src", "tsconfig.json", "tsconfig.build.json", "binding.d.ts", "package-lock.json"]);
	if (stampIs(stamp, wanted) && existsSync(join(root, "dist"))) return;
	console.error("arl: compiling the TypeScript");
	rmSync(join(root, "dist"), { recursive: true, force: true });
	run(process.execPath, [join(root, "node_modules", "typescript", "bin", "tsc"), "-p", "tsconfig.build.json"]);
	linkCommand();
	writeFileSync(stamp, wanted);
}

/** Makes `npx arl` inside the clone run the clone's own command. */
function linkCommand() {
	if (windows) return;
	const { bin } = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));
	const link = join(root, "node_modules", ".bin", "arl");
	mkdirSync(dirname(link), { recursive: true });
	rmSync(link, { force: true });
	symlinkSync(relative(dirname(link), join(root, bin.arl)), link);
	run("chmod", ["+x", join(root, bin.arl)]);
}

function explain(error) {
	if (!(error instanceof SetupError)) throw error;
	console.error(`\narl: set-up stopped. ${error.message}`);
	process.exit(1);
}

/** Runs `job`, which may be asynchronous; a failed set-up is reported in a sentence and ends the process with code 1. */
export function orExplain(job) {
	try {
		const result = job();
		return result instanceof Promise ? result.catch(explain) : result;
	} catch (error) {
		return explain(error);
	}
}

/** Everything that `npm start`, `npm test` and the benches need. `addon` false: all but the clone's own addon. */
export function setup({ addon = true } = {}) {
	orExplain(() => {
		checkNode();
		installPackages();
		if (addon) buildAddon();
		dropStaleCudaAddon();
		buildTypeScript();
	});
}

if (process.argv[1] === fileURLToPath(import.meta.url)) setup();
