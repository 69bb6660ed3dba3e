// Builds the addon of each platform package: zig cross-compiles those of Linux, so that they run on old systems, and on Linux
// those of macOS and Windows. What was built of the same sources is taken from the build cache.

import { spawnSync } from "node:child_process";
import {
	chmodSync,
	copyFileSync,
	existsSync,
	mkdirSync,
	mkdtempSync,
	readdirSync,
	renameSync,
	rmSync,
	writeFileSync,
} from "node:fs";
import { delimiter, dirname, join } from "node:path";
import { ADDON_SOURCES, cache, cargoEnv, hashOf, root, run } from "../setup.mjs";
import { unpackWheel } from "../wheels.mjs";
import { ENTRY } from "./check.mjs";
import { requirementsOf } from "./elf.mjs";
import { GLIBC, MACOS } from "./platforms.mjs";

/** Zig, whose compiler and linker know every glibc, and the cargo command that uses it. */
const WHEELS = { ziglang: "0.17.1", "cargo-zigbuild": "0.24.0" };

/** Microsoft's runtime for C inside the addon: Windows alone has none, and Node shares its own with nobody. */
const OWN_RUNTIME = "-C target-feature=+crt-static";

/** The names of the frameworks of macOS that the addon is linked with, as a linker needs them: zig knows none. */
const APPLE_STUBS = join(root, "scripts", "packages", "macos");

const homeOf = (name) => join(cache, "zig", `${name}-${WHEELS[name]}`);
const ZIG = join(homeOf("ziglang"), "zig");

/** Why zig cannot be had, or null. */
function installZig() {
	const executable = (path) => {
		chmodSync(path, 0o755);
		return dirname(path);
	};
	return (
		unpackWheel("ziglang", WHEELS.ziglang, homeOf("ziglang"), (folder) => executable(join(folder, "ziglang", "zig"))) ??
		unpackWheel("cargo-zigbuild", WHEELS["cargo-zigbuild"], homeOf("cargo-zigbuild"), (folder) =>
			executable(join(folder, `cargo_zigbuild-${WHEELS["cargo-zigbuild"]}.data`, "scripts", "cargo-zigbuild")),
		)
	);
}

const outputOf = (command, args) => spawnSync(command, args, { cwd: root, encoding: "utf8" }).stdout ?? "";

const hostTriple = () => /^host: (.*)$/m.exec(outputOf("rustc", ["-vV"]))?.[1];

/** Whether rustc has the standard library of a target. */
function hasTarget(triple) {
	const folder = outputOf("rustc", ["--print", "target-libdir", "--target", triple]).trim();
	return folder !== "" && existsSync(folder);
}

/** The target that rustc compiles for where zig builds: zig's, without the version of a C library. */
const zigTriple = ({ zig }) => zig.replace(`.${GLIBC}`, "");

/**
 * How the addon of a platform can be built here: `{ how: "zig" }`, `{ how: "here" }` for this machine's own platform where
 * there is no zig, with what that costs in `reason`, or `{ how: null, reason }`.
 */
export function planFor(platform) {
	const own = platform.triple === hostTriple();
	const here = (reason) => (own ? { how: "here", reason } : { how: null, reason });
	if (platform.platform !== "linux" && own) return { how: "here" };
	if (process.platform !== "linux") return { how: null, reason: "only a Linux machine builds it" };
	const triple = zigTriple(platform);
	if (!hasTarget(triple)) return { how: null, reason: `\`rustup target add ${triple}\` is needed` };
	const missing = installZig();
	if (missing === null) return { how: "zig" };
	return here(
		own ? `${missing}; it is built for this machine's own libraries, and older systems cannot load it` : missing,
	);
}

/** Builds the addon with napi's command, which names it as the package has it, into `folder`. */
function buildByNapi(platform, target, folder, env) {
	const cli = join(root, "node_modules", "@napi-rs", "cli", "dist", "cli.js");
	const words = ["build", "--platform", "--release", "--strip", "--no-js", ...target];
	const crate = ["--manifest-path", "crates/arl-node/Cargo.toml", "--output-dir", folder, "--", "--locked"];
	run(process.execPath, [cli, ...words, ...crate], { env });
	for (const name of readdirSync(folder)) if (name !== platform.file) rmSync(join(folder, name));
}

/** Builds the addon of Windows by zig into `folder`: napi's command knows no linker but Microsoft's there. */
function buildWindowsByZig(platform, folder, env) {
	// What Windows calls a library to link with: the functions that Node offers, as this machine's does, by name.
	const library = mkdtempSync(`${folder}-node.`);
	const offered = requirementsOf(process.execPath).exports.filter((name) => /^(napi|node_api)_/.test(name));
	writeFileSync(join(library, "node.def"), `LIBRARY node.exe\nEXPORTS\n${offered.join("\n")}\n`);
	run(ZIG, ["dlltool", "-m", "i386:x86-64", "-d", join(library, "node.def"), "-l", join(library, "libnode.a")]);
	// napi's build script asks for it, and nothing opens it.
	writeFileSync(join(library, "libnode.dll"), "");
	// Without a list all is exported, which is more than a file of Windows can hold.
	const exported = join(library, "addon.def");
	writeFileSync(exported, `EXPORTS\n${ENTRY}\n`);
	const args = ["rustc", "--release", "--locked", "-p", "arl-node", "--lib", "--target", platform.zig];
	run(join(homeOf("cargo-zigbuild"), "cargo-zigbuild"), [...args, "--", "-C", `link-arg=${exported}`], {
		env: { ...env, LIBNODE_PATH: library, CARGO_PROFILE_RELEASE_STRIP: "symbols" },
	});
	rmSync(library, { recursive: true });
	putInto(folder, join(env.CARGO_TARGET_DIR, platform.zig, "release", "arl_node.dll"), platform.file);
}

/** Builds the addon of a platform as `plan` says, or takes it from the build cache; returns its file. */
export function buildPlatform(platform, plan) {
	const zig = plan.how === "zig";
	const runtime = platform.abi === "msvc" && !zig ? [OWN_RUNTIME] : [];
	const words = [platform.triple, plan.how, outputOf("rustc", ["--version"]), ...Object.values(WHEELS), ...runtime];
	const store = join(cache, "addon-packages", hashOf(ADDON_SOURCES, words));
	const file = join(store, platform.file);
	if (existsSync(file)) return file;
	console.error(`arl: building ${platform.file} (minutes; kept in the build cache)`);
	mkdirSync(dirname(store), { recursive: true });
	const partial = mkdtempSync(`${store}.`);
	const flags = [process.env.RUSTFLAGS, ...runtime].filter(Boolean).join(" ");
	const path = zig ? `${homeOf("cargo-zigbuild")}${delimiter}${process.env.PATH}` : process.env.PATH;
	const env = {
		...cargoEnv(),
		...(flags === "" ? {} : { RUSTFLAGS: flags }),
		// zig would take the macOS that is newest to it.
		...(platform.platform === "darwin" ? { MACOSX_DEPLOYMENT_TARGET: MACOS } : {}),
		...(zig && platform.platform === "darwin" ? { SDKROOT: APPLE_STUBS } : {}),
		PATH: path,
		CARGO_ZIGBUILD_ZIG_PATH: ZIG,
	};
	const target = zig ? ["--cross-compile", "--target", platform.zig] : ["--target", platform.triple];
	if (zig && platform.platform === "win32") buildWindowsByZig(platform, partial, env);
	else buildByNapi(platform, target, partial, env);
	rmSync(store, { recursive: true, force: true });
	renameSync(partial, store);
	return file;
}

/** Puts a file that was built into `folder`, in place of an earlier one. */
export function putInto(folder, file, name) {
	mkdirSync(folder, { recursive: true });
	rmSync(join(folder, name), { force: true });
	copyFileSync(file, join(folder, name));
}
