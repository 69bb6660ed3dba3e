// `npm run pack`: makes the packages of a release that this machine can make, in out/packages. What it cannot make is named
// and counted. Options: `--only ID` (may be repeated) makes some platforms; `--artifacts DIR` takes addons that other machines
// have built, and builds none; `--build` only builds the addons, for another machine to pack; `--all` fails where one is missing.

import { existsSync, mkdirSync, readdirSync, rmSync, statSync } from "node:fs";
import { join, relative, resolve } from "node:path";
import { parseArgs } from "node:util";
import { CUDA_ADDON, orExplain, root, SetupError, setup } from "./setup.mjs";

const { values } = parseArgs({
	options: {
		only: { type: "string", multiple: true },
		artifacts: { type: "string" },
		build: { type: "boolean", default: false },
		all: { type: "boolean", default: false },
	},
});

setup({ addon: false });
// These know packages that the set-up installs.
const { buildPlatform, planFor, putInto } = await import("./packages/build.mjs");
const { faultsOf } = await import("./packages/check.mjs");
const { glibcOf, isNewer } = await import("./packages/elf.mjs");
const { CUDA, CUDA_GLIBC, FOLDERS, GLIBC, PLATFORMS } = await import("./packages/platforms.mjs");
const { packFolder, stage } = await import("./packages/stage.mjs");

const ids = [...PLATFORMS.map(({ id }) => id), CUDA.id];
for (const id of values.only ?? []) {
	if (!ids.includes(id)) {
		console.error(`arl: no package is called ${id}; there are ${ids.join(", ")}`);
		process.exit(1);
	}
}
const wanted = (id) => values.only === undefined || values.only.includes(id);
const notices = [];

/** Refuses an addon that asks for a newer glibc than its package promises. */
function checkGlibc(file, most, excused) {
	const asked = glibcOf(file);
	if (asked === null || !isNewer(asked, most)) return;
	const text = `${relative(root, file)} asks for glibc ${asked}, and its package promises ${most}`;
	if (!excused) throw new SetupError(text);
	notices.push(`${text}: not for publishing`);
}

/** Refuses an addon that users of the platform could not load. */
function checkAddon(file, platform) {
	const faults = faultsOf(file, platform);
	if (faults.length > 0) throw new SetupError(`${relative(root, file)} cannot be packed: ${faults.join("; ")}`);
}

/** Gathers the addons in `FOLDERS.artifacts`; returns the ids of the platforms that have one. */
function gather() {
	const { artifacts } = FOLDERS;
	rmSync(artifacts, { recursive: true, force: true });
	mkdirSync(artifacts, { recursive: true });
	const given = values.artifacts === undefined ? null : filesBelow(resolve(values.artifacts));
	const built = [];
	for (const platform of PLATFORMS.filter(({ id }) => wanted(id))) {
		const plan = given === null ? planFor(platform) : { how: null };
		const file = given === null ? plan.how !== null && buildPlatform(platform, plan) : given.get(platform.file);
		if (!file) {
			notices.push(`${platform.package}: ${plan.reason ?? `there is no ${platform.file} in ${values.artifacts}`}`);
			continue;
		}
		checkAddon(file, platform);
		if (platform.abi === "gnu") checkGlibc(file, GLIBC, plan.how === "here");
		if (platform.platform === "win32" && plan.how === "zig")
			notices.push(
				`${platform.package} has zig's libraries of C in the place of Microsoft's: to try, not for publishing`,
			);
		putInto(artifacts, file, platform.file);
		built.push(platform.id);
	}
	return built;
}

/** The files below a folder, by name. */
function filesBelow(folder) {
	const entries = readdirSync(folder, { withFileTypes: true, recursive: true });
	return new Map(
		entries.filter((entry) => entry.isFile()).map(({ name, parentPath }) => [name, join(parentPath, name)]),
	);
}

/** The CUDA addon: the clone's own, as `npm run build:cuda` builds it, or one that another machine has built. */
function cudaAddon() {
	if (!wanted(CUDA.id)) return null;
	const file =
		values.artifacts === undefined ? join(root, CUDA_ADDON.file) : filesBelow(resolve(values.artifacts)).get(CUDA.file);
	if (file !== undefined && existsSync(file)) {
		checkAddon(file, CUDA);
		checkGlibc(file, CUDA_GLIBC, values.artifacts === undefined);
		return file;
	}
	notices.push(`${CUDA.package}: \`npm run build:cuda\` builds its addon first`);
	return null;
}

await orExplain(async () => {
	const built = gather();
	if (values.build) return;
	const addon = cudaAddon();
	if (built.length === 0 && addon === null) throw new SetupError("no platform's addon was built; see above");
	const staged = await stage(built, addon);
	for (const name of readdirSync(FOLDERS.out)) if (name.endsWith(".tgz")) rmSync(join(FOLDERS.out, name));
	const folders = [staged.main, ...PLATFORMS.filter(({ id }) => built.includes(id)).map(staged.platform)];
	if (addon !== null) folders.push(staged.platform(CUDA));
	for (const folder of folders) {
		const file = packFolder(folder, FOLDERS.out);
		console.log(`${relative(root, file)}: ${(statSync(file).size / 1e6).toFixed(2)} MB`);
	}
});
for (const notice of notices) console.error(`skipped: ${notice}`);
if (notices.length > 0) console.error(`${notices.length} of ${ids.length} packages or promises are not kept here`);
if (values.all && notices.length > 0) process.exitCode = 1;
