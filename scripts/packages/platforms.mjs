// The packages of a release, in one place: their names follow from `name` (or `napi.packageName`) in package.json, their
// platforms from `napi.targets`. Knows package.json, and nothing of how anything is built.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { parseTriple } from "@napi-rs/cli";
import { root } from "../setup.mjs";

export const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));

const base = manifest.napi.packageName ?? manifest.name;

/** The oldest glibc that the Linux packages run on. */
export const GLIBC = "2.17";

/** The oldest glibc that the CUDA package runs on: that of Node's own builds. NVIDIA's libraries need 2.27. */
export const CUDA_GLIBC = "2.28";

/** The oldest macOS that its package runs on: the first for Apple silicon. */
export const MACOS = "11.0";

/** What a package may weigh when packed, in bytes. */
export const MOST_BYTES = 15_000_000;
export const MOST_CUDA_BYTES = 60_000_000;

/**
 * One package for each platform. `id`: the last part of its name and its file's; `zig`: the target by which zig builds it
 * on any Linux machine. Microsoft's libraries are not zig's to give: for Windows it has MinGW's in their place.
 */
export const PLATFORMS = manifest.napi.targets.map((triple) => {
	const { platformArchABI: id, platform, arch, abi } = parseTriple(triple);
	const zig = platform === "win32" ? triple.replace(/msvc$/, "gnu") : abi === "gnu" ? `${triple}.${GLIBC}` : triple;
	return {
		id,
		triple,
		platform,
		arch,
		abi,
		zig,
		package: `${base}-${id}`,
		file: `${manifest.napi.binaryName}.${id}.node`,
	};
});

/** The package that only machines with an NVIDIA GPU want: nothing depends on it. */
export const CUDA = {
	id: "linux-x64-gnu-cuda",
	platform: "linux",
	arch: "x64",
	abi: "gnu",
	package: `${base}-linux-x64-gnu-cuda`,
	file: `${manifest.napi.binaryName}.linux-x64-gnu-cuda.node`,
};

/** The file name that npm gives a packed package. */
export function tarballName(name, version = manifest.version) {
	return `${name.replace(/^@/, "").replace("/", "-")}-${version}.tgz`;
}

/** Where packages are put: what was built, what is staged, and the packed files. */
const out = join(root, "out", "packages");
export const FOLDERS = { out, artifacts: join(out, "artifacts"), stage: join(out, "stage") };
