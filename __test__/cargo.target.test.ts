/** One target folder for all clones: packages stay, and no clone is given what another has built of its own crates. */
import { spawnSync } from "node:child_process";
import {
	cpSync,
	existsSync,
	mkdirSync,
	mkdtempSync,
	readdirSync,
	readFileSync,
	rmSync,
	utimesSync,
	writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();

function claim(target: string, clone: string): void {
	const script = `
		import { claimTarget } from ${JSON.stringify(join(root, "scripts", "cargo-target.mjs"))};
		claimTarget(${JSON.stringify(target)}, ${JSON.stringify(clone)});`;
	const { status, stderr } = spawnSync(process.execPath, ["--input-type=module", "-e", script], { encoding: "utf8" });
	expect(`${stderr}${status}`).toBe("0");
}

function write(path: string, text: string): void {
	mkdirSync(dirname(path), { recursive: true });
	writeFileSync(path, text);
}

/** A workspace of one crate, whose program prints a word. */
function workspace(word: string): string {
	const clone = mkdtempSync(join(folder, "clone-"));
	write(join(clone, "Cargo.toml"), '[workspace]\nmembers = ["crates/word"]\nresolver = "3"\n');
	write(join(clone, "crates/word/Cargo.toml"), '[package]\nname = "word"\nversion = "0.1.0"\nedition = "2024"\n');
	write(join(clone, "crates/word/src/main.rs"), `fn main() { println!("${word}"); }\n`);
	return clone;
}

describe("the target folder that all clones build in", () => {
	it("gives each clone the program of its own sources, also where another's was built later", () => {
		const target = join(folder, "shared-target");
		const [one, other] = [workspace("one"), workspace("other")];
		// Both are older than whatever is built now.
		for (const clone of [one, other]) utimesSync(join(clone, "crates/word/src/main.rs"), 1e9, 1e9);
		for (const [clone, word] of [
			[one, "one"],
			[other, "other"],
			[one, "one"],
		] as const) {
			claim(target, clone);
			const built = spawnSync("cargo", ["run", "--quiet", "--offline"], {
				cwd: clone,
				env: { ...process.env, CARGO_TARGET_DIR: target },
				encoding: "utf8",
			});
			expect(`${built.stderr}${built.stdout}`).toBe(`${word}\n`);
		}
	}, 60_000);

	it("forgets crates of the workspace alone, of every profile and platform, and nothing while one clone builds", () => {
		const target = join(folder, "target");
		const [one, other] = [workspace("one"), workspace("other")];
		const at = (place: string, name: string) => join(target, place, ".fingerprint", name);
		const places = ["debug", "release", "x86_64-unknown-linux-gnu/release"];
		const fill = () => {
			for (const place of places) {
				for (const name of ["word-0123456789abcdef", "words-0123456789abcdef", "serde-0123456789abcdef"]) {
					write(join(at(place, name), "invoked.timestamp"), "");
				}
			}
		};
		const left = () => places.map((place) => existsSync(at(place, "word-0123456789abcdef")));
		fill();
		// Nobody knows who built these.
		claim(target, one);
		expect(left()).toEqual([false, false, false]);
		fill();
		claim(target, one);
		expect(left()).toEqual([true, true, true]);
		claim(target, other);
		expect(left()).toEqual([false, false, false]);
		for (const place of places) {
			for (const name of ["words", "serde"]) expect(existsSync(at(place, `${name}-0123456789abcdef`))).toBe(true);
		}
		// The same path, cloned again.
		fill();
		const crates = join(other, "crates");
		cpSync(crates, join(other, "again"), { recursive: true, preserveTimestamps: true });
		rmSync(crates, { recursive: true });
		cpSync(join(other, "again"), crates, { recursive: true, preserveTimestamps: true });
		claim(target, other);
		expect(left()).toEqual([false, false, false]);
	});

	it("gives each build the library of its own features, though with all of them it has one name", () => {
		const target = join(folder, "features");
		const clone = workspace("one");
		const library = join(clone, "crates/library");
		write(join(clone, "Cargo.toml"), '[workspace]\nmembers = ["crates/*"]\nresolver = "3"\n');
		const lines = ['[package]\nname = "library"\nversion = "0.1.0"\nedition = "2024"', "[features]\nmore = []"];
		write(join(library, "Cargo.toml"), `${lines.join("\n")}\n[lib]\ncrate-type = ["cdylib"]\n`);
		const word = (when: string, text: string) => `#[cfg(${when})]\nstatic WORD: [u8; 8] = *b"${text}";\n`;
		const words = word('feature = "more"', "with-it!") + word('not(feature = "more")', "without!");
		const reader = '#[unsafe(no_mangle)]\npub extern "C" fn word(i: usize) -> u8 {\n\tWORD[i]\n}\n';
		write(join(library, "src/lib.rs"), words + reader);
		utimesSync(join(library, "src/lib.rs"), 1e9, 1e9);
		const build = (features: string[]) => {
			claim(target, clone);
			const args = ["build", "--offline", "-p", "library", ...features.flatMap((name) => ["--features", name])];
			const built = spawnSync("cargo", args, {
				cwd: clone,
				env: { ...process.env, CARGO_TARGET_DIR: target },
				encoding: "utf8",
			});
			expect(built.status, built.stderr).toBe(0);
			const file = readdirSync(join(target, "debug")).find((name) =>
				/^(lib)?library\.(so|dylib|dll)$/.test(name),
			) as string;
			const bytes = readFileSync(join(target, "debug", file)).toString("latin1");
			return [bytes.includes("with-it!"), bytes.includes("without!"), built.stderr.includes("Compiling library")];
		};
		expect(build([])).toEqual([false, true, true]);
		expect(build(["more"])).toEqual([true, false, true]);
		expect(build([])).toEqual([false, true, true]);
		expect(build([])).toEqual([false, true, false]);
	}, 60_000);
});
