/** The packages of the platforms: their names, what they promise, and what the packed files ask of a system. `npm run
 * test:packages` installs and uses them. */
import { execFileSync, spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { NapiCli } from "@napi-rs/cli";
import { describe, expect, it } from "vitest";
import { faultsOf } from "../scripts/packages/check.mjs";
import { glibcOf, isNewer, requirementsOf } from "../scripts/packages/elf.mjs";
import { requirementsOf as readMachO } from "../scripts/packages/macho.mjs";
import { noticesFor } from "../scripts/packages/notices.mjs";
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
} from "../scripts/packages/platforms.mjs";
import { temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();

function skipped(test: string, reason: string): void {
	process.stderr.write(`SKIPPED: ${test}: ${reason}\n`);
}

describe("the packages of the platforms", () => {
	it("are those of every platform that is promised", () => {
		expect(PLATFORMS.map(({ id }) => id)).toEqual([
			"linux-x64-gnu",
			"linux-x64-musl",
			"linux-arm64-gnu",
			"darwin-arm64",
			"win32-x64-msvc",
		]);
		expect(PLATFORMS.map(({ zig }) => zig)).toEqual([
			"x86_64-unknown-linux-gnu.2.17",
			"x86_64-unknown-linux-musl",
			"aarch64-unknown-linux-gnu.2.17",
			"aarch64-apple-darwin",
			"x86_64-pc-windows-gnu",
		]);
	});

	it("have the names that the generated loader asks for, at this version", () => {
		const loader = readFileSync(join(root, "binding.cjs"), "utf8");
		for (const platform of PLATFORMS) {
			expect(loader).toContain(`require('./${platform.file}')`);
			expect(loader).toContain(`require('${platform.package}')`);
		}
		expect(loader).toContain(`bindingPackageVersion !== '${manifest.version}'`);
	});

	it("are for one system each, and npm need not download another's", async () => {
		writeFileSync(join(folder, "package.json"), JSON.stringify(manifest));
		await new NapiCli().createNpmDirs({ cwd: folder, npmDir: "npm" });
		const made = PLATFORMS.map(({ id }) => {
			const { os, cpu, libc, files, main } = JSON.parse(readFileSync(join(folder, "npm", id, "package.json"), "utf8"));
			return { os, cpu, libc, isItsFile: files.length === 1 && files[0] === main };
		});
		const linux = { os: ["linux"], isItsFile: true };
		expect(made).toEqual([
			{ ...linux, cpu: ["x64"], libc: ["glibc"] },
			{ ...linux, cpu: ["x64"], libc: ["musl"] },
			{ ...linux, cpu: ["arm64"], libc: ["glibc"] },
			{ os: ["darwin"], cpu: ["arm64"], libc: undefined, isItsFile: true },
			{ os: ["win32"], cpu: ["x64"], libc: undefined, isItsFile: true },
		]);
	});

	it("come with the licences of all that is compiled into them", () => {
		const text = noticesFor("x86_64-unknown-linux-gnu");
		for (const part of ["napi 3.", "tokenizers 0.", "zstd-sys 2.", "K.Kosako", "Meta Platforms, Inc."]) {
			expect(text).toContain(part);
		}
		// Crates of tests, of builds and of other systems are not in the addon.
		expect(text).not.toMatch(/^(proptest|cc|sysinfo|arl-engine) \d/m);
	});

	it("are not published under names that are not settled", () => {
		expect(manifest.private).toBe(true);
		const { status, stderr } = spawnSync(process.execPath, [join(root, "scripts", "publish.mjs")], {
			encoding: "utf8",
		});
		expect([status, stderr]).toEqual([1, expect.stringContaining("names in package.json are placeholders")]);
		const tagged = spawnSync(process.execPath, [join(root, "scripts", "publish.mjs"), "--tag", "v99.0.0"], {
			encoding: "utf8",
		});
		expect([tagged.status, tagged.stderr]).toEqual([1, expect.stringContaining("The tag is v99.0.0")]);
	});
});

describe("what a shared object asks of a system", () => {
	it("is what readelf finds", (context) => {
		const addon = readdirSync(root).find((name) => /^arl\.linux-.*-gnu\.node$/.test(name));
		const readelf = spawnSync("readelf", ["--version"]);
		if (addon === undefined || readelf.error !== undefined) {
			skipped("symbol versions against readelf", addon === undefined ? "no addon of Linux" : "readelf is missing");
			return context.skip();
		}
		const file = join(root, addon);
		const text = execFileSync("readelf", ["--wide", "--version-info", "--dynamic", file], { encoding: "utf8" });
		const needed = [...text.matchAll(/\(NEEDED\).*\[(.*)\]/g)].map(([, name]) => name);
		const names = [...text.matchAll(/Name: (GLIBC_[\d.]+)/g)].map(([, name = ""]) => name);
		const { libraries, versions } = requirementsOf(file);
		expect(libraries).toEqual(needed);
		const found = new Set(Object.values(versions).flat());
		expect([...found].filter((name) => name.startsWith("GLIBC_")).sort()).toEqual([...new Set(names)].sort());
		expect(names).toContain(`GLIBC_${glibcOf(file)}`);
		expect(names.filter((name) => isNewer(name.slice(6), glibcOf(file) ?? "0"))).toEqual([]);
	});

	it("is refused in the package of another platform", (context) => {
		const addon = readdirSync(root).find((name) => /^arl\.linux-x64-gnu\.node$/.test(name));
		if (addon === undefined) {
			skipped("an addon in the packages of other platforms", "no addon of Linux x64");
			return context.skip();
		}
		const faults = PLATFORMS.map((platform) => faultsOf(join(root, addon), platform).join("; "));
		expect(faults).toEqual([
			"",
			expect.stringMatching(
				/^it needs .*libc\.so\.6.*, which users may not have; it asks for glibc, and musl is none$/,
			),
			"it is for x64, not arm64",
			"it is not for darwin-arm64: no 64-bit little-endian Mach-O file",
			"it is not for win32-x64-msvc: no 64-bit PE file",
		]);
	});

	it("is refused where it asks for NVIDIA's libraries, but in the CUDA package, which opens them first", (context) => {
		const file = join(root, CUDA.file);
		if (!existsSync(file)) {
			skipped("the libraries that the CUDA addon asks for", "`npm run build:cuda` builds it");
			return context.skip();
		}
		const [own] = PLATFORMS;
		expect([faultsOf(file, CUDA), own && faultsOf(file, own)]).toEqual([
			[],
			[expect.stringMatching(/^it needs .*libcublas\.so\.\d+.*, which users may not have$/)],
		]);
	});

	it("compares versions by their parts, and refuses what is no such file", () => {
		expect([
			isNewer("2.28", "2.3.4"),
			isNewer("2.3.4", "2.28"),
			isNewer("2.17", "2.17"),
			isNewer("2.2.5", "2.2"),
		]).toEqual([true, false, false, true]);
		const file = join(mkdtempSync(join(folder, "elf-")), "text");
		writeFileSync(file, "no such file".repeat(20));
		expect(() => requirementsOf(file)).toThrow("ELF");
	});
});

describe("the packed package", () => {
	it.for([...PLATFORMS, CUDA])("$package is small, and runs on systems as old as promised", (one, context) => {
		const file = join(FOLDERS.out, tarballName(one.package));
		if (!existsSync(file)) {
			skipped(`the packed package ${one.package}`, `\`npm run pack -- --only ${one.id}\` makes it`);
			return context.skip();
		}
		expect(statSync(file).size).toBeLessThan(one === CUDA ? MOST_CUDA_BYTES : MOST_BYTES);
		const unpacked = mkdtempSync(join(folder, "packed-"));
		execFileSync("tar", ["-xzf", file, "-C", unpacked]);
		const names = readdirSync(join(unpacked, "package")).sort();
		expect(names).toEqual(["LICENSE", "README.md", "THIRD-PARTY-LICENSES.txt", one.file, "package.json"].sort());
		const addon = join(unpacked, "package", one.file);
		expect(faultsOf(addon, one)).toEqual([]);
		if (one.platform === "darwin") {
			// Code that changed after it was signed is not loaded.
			const bytes = readFileSync(addon);
			bytes[bytes.length >> 1] = (bytes[bytes.length >> 1] ?? 0) ^ 1;
			writeFileSync(addon, bytes);
			expect(readMachO(addon).signed).toBe(false);
		}
		const described = JSON.parse(readFileSync(join(unpacked, "package", "package.json"), "utf8")).description;
		const promised = /glibc ([\d.]+) or newer/.exec(described)?.[1];
		expect(promised !== undefined).toBe(one.id.includes("-gnu"));
		if (promised === undefined) return;
		expect(isNewer(glibcOf(addon) ?? "0", promised)).toBe(false);
		// Without zig a package is for this machine's own glibc, and says so; `npm run pack -- --all` refuses it.
		if (promised !== (one === CUDA ? CUDA_GLIBC : GLIBC)) {
			skipped(`the oldest glibc of ${one.package}`, `it was built for glibc ${promised}, without zig`);
		}
	});
});
