// Packs `bench/gpu-train.mjs` with all that it needs into one file for a machine with a GPU: Node itself, the package with its
// dependencies and both addons, the small model and its rows. There it takes tar and NVIDIA's libraries, and nothing else:
//
//   npm run build:cuda && node scripts/pack-gpu-train.mjs
//   tar xf gpu-train.tar.xz && gpu-train/run
//
// `--cpu` leaves the CUDA addon out, to rehearse it.

import { execFileSync } from "node:child_process";
import { chmodSync, cpSync, existsSync, mkdirSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import { root, setup } from "./setup.mjs";

/** What is carried to such a machine may be no larger. */
const MOST_BYTES = 64 * 2 ** 20;
const CUDA_ADDON = /-cuda\.node$/;

setup();
const cpuOnly = process.argv.includes("--cpu");
const addons = readdirSync(root).filter((name) => name.endsWith(".node") && !(cpuOnly && CUDA_ADDON.test(name)));
if (!cpuOnly && !addons.some((name) => CUDA_ADDON.test(name))) {
	console.error("the CUDA addon is missing: `npm run build:cuda` builds it");
	process.exit(1);
}
const out = join(root, "out");
const folder = join(out, "gpu-train");
rmSync(folder, { recursive: true, force: true });
const put = (from, to) => {
	mkdirSync(join(folder, to, ".."), { recursive: true });
	cpSync(from, join(folder, to), { recursive: true, dereference: true });
};

put(process.execPath, "node");
for (const path of ["package.json", "binding.cjs", "dist", "assets/model", "assets/train.jsonl", ...addons]) {
	put(join(root, path), path);
}
put(join(root, "bench", "gpu-train.mjs"), "bench/gpu-train.mjs");
const listed = execFileSync("npm", ["ls", "--omit=dev", "--all", "--parseable"], { cwd: root, encoding: "utf8" });
// Without a network nothing is fetched from the Hub.
const ofHub = /node_modules\/@huggingface\//;
for (const path of listed.trim().split("\n").slice(1)) {
	if (existsSync(path) && !ofHub.test(path)) put(path, relative(root, path));
}
const configs = join(root, "..", "shared", "bench", "configs");
if (existsSync(configs)) put(configs, "configs");
writeFileSync(
	join(folder, "run"),
	'#!/bin/sh\nhere=$(cd "$(dirname "$0")" && pwd)\nexec "$here/node" "$here/bench/gpu-train.mjs" --configs "$here/configs" "$@"\n',
);
chmodSync(join(folder, "run"), 0o755);

const file = join(out, "gpu-train.tar.xz");
execFileSync("tar", ["-C", out, "-cJf", file, "gpu-train"], { stdio: "inherit" });
const { size } = statSync(file);
console.log(`${relative(root, file)}: ${(size / 2 ** 20).toFixed(1)} MiB`);
if (size > MOST_BYTES) {
	console.error(`it is larger than the ${MOST_BYTES / 2 ** 20} MiB that can be carried`);
	process.exitCode = 1;
}
