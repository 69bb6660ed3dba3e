// Stages the packages of a release and packs them: the main package with what npm would pack of the clone, and one package
// for each platform, made by napi's own commands. Knows nothing of how the addons were built.

import { execFileSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { NapiCli } from "@napi-rs/cli";
import { root } from "../setup.mjs";
import { glibcOf, isNewer } from "./elf.mjs";
import { noticesFor } from "./notices.mjs";
import {
	CUDA,
	CUDA_GLIBC,
	FOLDERS,
	GLIBC,
	MOST_BYTES,
	MOST_CUDA_BYTES,
	manifest,
	PLATFORMS,
	tarballName,
} from "./platforms.mjs";

/** Headers of NVIDIA's that the CUDA addon is compiled with. */
const CUDNN_FRONTEND = { name: "cudnn-frontend (NVIDIA CORPORATION & AFFILIATES)", license: "MIT" };

const NOTICES = "THIRD-PARTY-LICENSES.txt";

const readJson = (path) => JSON.parse(readFileSync(path, "utf8"));
const writeJson = (path, value) => writeFileSync(path, `${JSON.stringify(value, null, "\t")}\n`);

function npm(args, cwd) {
	const shell = process.platform === "win32";
	return execFileSync("npm", args, { cwd, encoding: "utf8", shell, stdio: ["ignore", "pipe", "inherit"] });
}

/** The files that npm packs of the clone. */
export function packedFiles() {
	const [{ files }] = JSON.parse(npm(["pack", "--dry-run", "--json", "--ignore-scripts", "--offline"], root));
	return files.map(({ path }) => path);
}

/** The main package, as it is published: without what only a clone needs. */
function stageMain(folder) {
	for (const path of packedFiles()) {
		mkdirSync(dirname(join(folder, path)), { recursive: true });
		cpSync(join(root, path), join(folder, path));
	}
	const { scripts: _scripts, devDependencies: _development, private: _held, ...published } = manifest;
	writeJson(join(folder, "package.json"), published);
}

/** Adds licences and a description to a platform's package, which napi has made. */
function finishPlatform(folder, description, licences) {
	const path = join(folder, "package.json");
	const made = readJson(path);
	writeJson(path, { ...made, description, files: [...made.files, NOTICES] });
	cpSync(join(root, "LICENSE"), join(folder, "LICENSE"));
	writeFileSync(join(folder, NOTICES), licences);
}

/** The oldest glibc that an addon runs on: one that was built for this machine's own libraries asks for more than `promised`. */
function glibcFor(addon, promised) {
	const asked = addon !== null && existsSync(addon) ? glibcOf(addon) : null;
	return asked !== null && isNewer(asked, promised) ? asked : promised;
}

function describe({ id, abi, file }) {
	const needs = abi === "gnu" ? ` (glibc ${glibcFor(join(FOLDERS.artifacts, file), GLIBC)} or newer)` : "";
	return `The native part of ${manifest.name} for ${id}${needs}`;
}

/** The CUDA package, for which napi has no platform. */
function stageCuda(folder, addon) {
	const own = PLATFORMS.find(({ id }) => id === "linux-x64-gnu");
	const like = readJson(join(FOLDERS.stage, "npm", own.id, "package.json"));
	mkdirSync(folder, { recursive: true });
	writeJson(join(folder, "package.json"), { ...like, name: CUDA.package, main: CUDA.file, files: [CUDA.file] });
	const glibc = glibcFor(addon, CUDA_GLIBC);
	const text = `The part of ${manifest.name} for NVIDIA GPUs, on Linux x64 (glibc ${glibc} or newer, driver 580 or newer)`;
	writeFileSync(
		join(folder, "README.md"),
		`# \`${CUDA.package}\`\n\n${text}. Install it next to \`${manifest.name}\`.\n`,
	);
	finishPlatform(folder, text, noticesFor(own.triple, { features: "cuda", also: CUDNN_FRONTEND }));
	if (addon !== null) cpSync(addon, join(folder, CUDA.file));
}

/**
 * Stages every package of a release below `FOLDERS.stage`: the main one in `main`, the others in `npm`. `built`: the ids of
 * the platforms whose addons are in `FOLDERS.artifacts`; packages of other platforms come without one, and are not for
 * publishing.
 */
export async function stage(built, cudaAddon) {
	const { stage: folder, artifacts } = FOLDERS;
	rmSync(folder, { recursive: true, force: true });
	mkdirSync(folder, { recursive: true });
	writeJson(join(folder, "package.json"), manifest);
	const napi = new NapiCli();
	const npmDir = "npm";
	await napi.createNpmDirs({ cwd: folder, npmDir });
	for (const platform of PLATFORMS) {
		finishPlatform(join(folder, npmDir, platform.id), describe(platform), noticesFor(platform.triple));
	}
	// From here on napi asks for the addon of every target.
	const targets = PLATFORMS.filter(({ id }) => built.includes(id)).map(({ triple }) => triple);
	writeJson(join(folder, "package.json"), { ...manifest, napi: { ...manifest.napi, targets } });
	await napi.artifacts({ cwd: folder, npmDir, outputDir: artifacts });
	await napi.prePublish({ cwd: folder, npmDir, ghRelease: false, skipOptionalPublish: true });
	stageCuda(join(folder, npmDir, CUDA.id), cudaAddon);
	const main = join(folder, "main");
	stageMain(main);
	const { optionalDependencies } = readJson(join(folder, "package.json"));
	const all = Object.fromEntries(PLATFORMS.map((platform) => [platform.package, manifest.version]));
	const optionalPeer = { [CUDA.package]: manifest.version };
	const published = readJson(join(main, "package.json"));
	writeJson(join(main, "package.json"), {
		...published,
		optionalDependencies: { ...all, ...optionalDependencies },
		peerDependencies: { ...published.peerDependencies, ...optionalPeer },
		peerDependenciesMeta: { ...published.peerDependenciesMeta, [CUDA.package]: { optional: true } },
	});
	return { main, platform: ({ id }) => join(folder, npmDir, id) };
}

/** Packs a staged folder into `destination`; returns the file. Throws where it weighs more than a package may. */
export function packFolder(folder, destination) {
	const { name } = readJson(join(folder, "package.json"));
	mkdirSync(destination, { recursive: true });
	npm(["pack", "--json", "--ignore-scripts", "--offline", "--pack-destination", destination], folder);
	const file = join(destination, tarballName(name));
	if (!existsSync(file)) throw new Error(`npm packed ${name}, and ${file} is missing`);
	const { size } = statSync(file);
	const most = name === CUDA.package ? MOST_CUDA_BYTES : MOST_BYTES;
	if (size > most) throw new Error(`${file} has ${size} bytes, and a package may have ${most}`);
	return file;
}
