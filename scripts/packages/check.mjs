// What is wrong with the addon of a platform before anybody loads it: another system's file, no entry for Node, libraries that
// a user may not have. Reads the file alone, so every machine can check every platform's.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "../setup.mjs";
import { glibcOf, isNewer, requirementsOf as readElf } from "./elf.mjs";
import { requirementsOf as readMachO } from "./macho.mjs";
import { requirementsOf as readPe } from "./pe.mjs";
import { CUDA, MACOS } from "./platforms.mjs";

/** What Node calls when it loads an addon. */
export const ENTRY = "napi_register_module_v1";

const GLIBC_PARTS = /^(lib(c|m|pthread|dl|rt|util|gcc_s)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+)$/;

/** NVIDIA's libraries that are opened before the CUDA addon, so that it finds them by these names. */
function openedBefore() {
	const source = readFileSync(join(root, "crates", "arl-cuda-libraries", "src", "lib.rs"), "utf8");
	const listed = /const NVRTC: .*|const LIBRARIES: [^;]*; \d+\] = \[[^\]]*\]/g;
	return source.match(listed).flatMap((text) => [...text.matchAll(/soname: "(.*?)"/g)].map(([, name]) => name));
}

/** Libraries that every machine has which runs Node on the platform, and those that `arl` opens itself. */
function isThere(name, { id, platform, abi }) {
	if (id === CUDA.id) return GLIBC_PARTS.test(name) || name === "libstdc++.so.6" || openedBefore().includes(name);
	if (abi === "gnu") return GLIBC_PARTS.test(name);
	if (abi === "musl") return name === "libc.so";
	if (platform === "darwin") return /^(\/usr\/lib|\/System\/Library)\//.test(name);
	// Microsoft's runtime for C++ comes with other programs, or not at all.
	return !/^(vcruntime|msvcp|msvcr\d|concrt|libgcc|libstdc|libwinpthread)/i.test(name);
}

/** Sentences on what is wrong with the addon in `file`, for one of `PLATFORMS` or `CUDA`; empty where nothing is. */
export function faultsOf(file, platform) {
	const read = { darwin: readMachO, win32: readPe }[platform.platform] ?? readElf;
	let found;
	try {
		found = read(file);
	} catch (error) {
		return [`it is not for ${platform.id}: ${error.message}`];
	}
	const faults = [];
	if (found.arch !== platform.arch)
		faults.push(`it is for ${found.arch ?? "an unknown processor"}, not ${platform.arch}`);
	const entry = platform.platform === "darwin" ? `_${ENTRY}` : ENTRY;
	if (!found.exports.includes(entry)) faults.push(`it has no ${entry}, which Node calls`);
	const strange = found.libraries.filter((name) => !isThere(name, platform));
	if (strange.length > 0) faults.push(`it needs ${strange.join(", ")}, which users may not have`);
	if (platform.abi === "musl" && glibcOf(file) !== null) faults.push("it asks for glibc, and musl is none");
	if (platform.platform !== "darwin") return faults;
	if (!found.signed) faults.push("its code signature is missing or does not hold, and macOS would not load it");
	if (found.oldest === null || isNewer(found.oldest, MACOS)) {
		faults.push(`it is for macOS ${found.oldest ?? "of no version"}, and its package promises ${MACOS}`);
	}
	return faults;
}
