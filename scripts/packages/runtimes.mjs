// The runtimes that the packages are tried on: this Node, and others from the npm registry, kept in the build cache. Knows npm
// and tar, and nothing of the packages.

import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { cache } from "../setup.mjs";

const windows = process.platform === "win32";
const system = { win32: "win", darwin: "darwin", linux: "linux" }[process.platform];
const bunSystem = { win32: "windows", darwin: "darwin", linux: "linux" }[process.platform];
const bunArch = { x64: "x64", arm64: "aarch64" }[process.arch];

/** Programs inside npm packages. Two lines of Node that are supported, and Bun. */
const OTHERS = [
	{ name: "Node 22", kind: "node", spec: `node-${system}-${process.arch}@22.23.5` },
	{ name: "Node 24", kind: "node", spec: `node-${system}-${process.arch}@24.22.3` },
	{ name: "Bun", kind: "bun", spec: `@oven/bun-${bunSystem}-${bunArch}@1.4.4` },
];

function output(command, args, options) {
	const result = spawnSync(command, args, { encoding: "utf8", shell: windows, ...options });
	if (result.status === 0) return null;
	const said = (result.stderr ?? "").trim().split("\n").at(-1);
	return `\`${command} ${args.join(" ")}\` failed: ${result.error?.message ?? said}`;
}

/** Fetches the `program` of the npm package `spec`; returns `{ file }`, or `{ reason }` why it cannot be had. */
export function fetchProgram({ kind, spec, program = windows ? `${kind}.exe` : kind }) {
	const home = join(cache, "runtimes", spec.replace(/[@/]/g, "-").replace(/^-/, ""));
	const file = join(home, "package", "bin", program);
	if (existsSync(file)) return { file };
	mkdirSync(join(cache, "runtimes"), { recursive: true });
	const partial = mkdtempSync(`${home}.`);
	try {
		const failed = output("npm", ["pack", spec, "--silent", "--pack-destination", partial], { cwd: partial });
		if (failed !== null) return { reason: failed };
		const tarball = readdirSync(partial).find((name) => name.endsWith(".tgz"));
		const unpacked = output("tar", ["-xzf", tarball, `package/bin/${program}`], { cwd: partial });
		if (unpacked !== null) return { reason: unpacked };
		rmSync(join(partial, tarball));
		chmodSync(join(partial, "package", "bin", program), 0o755);
		if (!existsSync(home)) renameSync(partial, home);
		return { file };
	} finally {
		rmSync(partial, { recursive: true, force: true });
	}
}

/** This Node first. Each has a `file`, or a `reason` why it cannot be had. */
export function runtimes() {
	const own = { name: `Node ${process.versions.node.split(".")[0]}`, kind: "node", file: process.execPath };
	const others = OTHERS.filter(({ name }) => name !== own.name);
	return [own, ...others.map((other) => ({ ...other, ...fetchProgram(other) }))];
}
