// The licences of what an addon contains: every crate that is linked into it, with the licence texts that the crate ships,
// those of C libraries inside it too. Knows cargo's metadata, and nothing of packages.

import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { root } from "../setup.mjs";

/** The standard texts, for crates that name a licence and ship no text of it. */
const STANDARD = { MIT: "MIT.txt", "BSD-3-Clause": "BSD-3-Clause.txt" };
const texts = join(root, "scripts", "packages", "licences");

const LICENCE = /^(licen[cs]e|copying|notice|unlicense)/i;
/** Folders of a crate that hold what its library does not contain. */
const ASIDE = new Set(["tests", "test", "benches", "examples", "fuzz", ".github", "node_modules", "target"]);

/** Names of the licence files in a folder: `LICENSE` is taken where the same folder offers `COPYING`, of another licence, too. */
function licenceFiles(folder) {
	const names = readdirSync(folder, { withFileTypes: true })
		.filter((entry) => entry.isFile() && LICENCE.test(entry.name) && !/\.(rs|c|h|py|toml)$/.test(entry.name))
		.map(({ name }) => name);
	const chosen = names.some((name) => /^licen/i.test(name)) ? names.filter((name) => !/^copying/i.test(name)) : names;
	return chosen.sort();
}

/** Every licence text of a crate; with MIT for choice, that one alone. */
function textsOf({ manifest_path, license, name }) {
	const folder = dirname(manifest_path);
	const offersMit = /\bMIT\b/.test(license ?? "") && /\bOR\b|\//.test(license);
	const own = licenceFiles(folder);
	const mit = own.filter((file) => /mit/i.test(file));
	const paths = (offersMit && mit.length > 0 ? mit : own).map((file) => join(folder, file));
	const nested = (at, depth) => {
		for (const entry of readdirSync(at, { withFileTypes: true })) {
			if (!entry.isDirectory() || ASIDE.has(entry.name)) continue;
			paths.push(...licenceFiles(join(at, entry.name)).map((file) => join(at, entry.name, file)));
			if (depth > 1) nested(join(at, entry.name), depth - 1);
		}
	};
	nested(folder, 2);
	if (paths.length > 0) return paths.map((path) => readFileSync(path, "utf8"));
	const standard = STANDARD[offersMit ? "MIT" : license];
	if (standard === undefined)
		throw new Error(`the crate ${name} has no licence text, and none is known for ${license}`);
	return [readFileSync(join(texts, standard), "utf8")];
}

const standardText = (license) => readFileSync(join(texts, STANDARD[license]), "utf8").trim();

/** The crates that are linked into the addon, on one platform: normal dependencies of normal dependencies, without macros. */
function linkedCrates(triple, features) {
	const args = ["metadata", "--format-version", "1", "--locked", "--filter-platform", triple];
	const select = ["--manifest-path", "crates/arl-node/Cargo.toml", ...(features ? ["--features", features] : [])];
	const options = { cwd: root, encoding: "utf8", maxBuffer: 1 << 28, stdio: ["ignore", "pipe", "inherit"] };
	const { packages, resolve } = JSON.parse(execFileSync("cargo", [...args, ...select], options));
	const byId = new Map(packages.map((found) => [found.id, found]));
	const nodes = new Map(resolve.nodes.map((node) => [node.id, node]));
	const isMacro = (id) => byId.get(id).targets.some(({ kind }) => kind.includes("proc-macro"));
	const found = new Set();
	const visit = (id) => {
		if (found.has(id) || isMacro(id)) return;
		found.add(id);
		for (const { pkg, dep_kinds } of nodes.get(id).deps) {
			if (dep_kinds.some(({ kind }) => kind === null)) visit(pkg);
		}
	};
	visit(packages.find(({ name }) => name === "arl-node").id);
	return [...found].map((id) => byId.get(id)).filter(({ source }) => source !== null);
}

/**
 * The notices of the addon for a platform: a list of crates with their licences, then each text once, with the crates that
 * it is of. Throws where a crate has none. `also`: code that is no crate.
 */
export function noticesFor(triple, { features = "", also = null } = {}) {
	const crates = linkedCrates(triple, features).sort((a, b) => (a.name < b.name ? -1 : 1));
	const users = new Map(also === null ? [] : [[standardText(also.license), new Set([also.name])]]);
	for (const crate of crates) {
		for (const text of textsOf(crate)) {
			const key = text.replace(/\r/g, "").trim();
			users.set(key, new Set([...(users.get(key) ?? []), `${crate.name} ${crate.version}`]));
		}
	}
	const others = also === null ? [] : [`${also.name}: ${also.license}`];
	const list = crates.map(
		({ name, version, license, repository }) => `${name} ${version}: ${license} (${repository ?? "-"})`,
	);
	const parts = [...users].map(([text, names]) => `${"=".repeat(80)}\n${[...names].join(", ")}\n\n${text}\n`);
	return [
		"This package contains compiled code of the Rust crates below and of Rust's standard library (MIT OR Apache-2.0,",
		"https://github.com/rust-lang/rust). The licence texts follow the list.\n",
		`${[...list, ...others].join("\n")}\n`,
		...parts,
	].join("\n");
}
