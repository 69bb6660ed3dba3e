// Publishes the packages in out/packages: those of the platforms first, so that the main package never names one that is not there.
// `--tag v1.2.3`: the tag that is released, which must be the version's. `--dry-run` uploads nothing.

import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join, relative } from "node:path";
import { parseArgs } from "node:util";
import { CUDA, FOLDERS, manifest, PLATFORMS, tarballName } from "./packages/platforms.mjs";
import { root } from "./setup.mjs";

const { values } = parseArgs({ options: { tag: { type: "string" }, "dry-run": { type: "boolean", default: false } } });
const dryRun = values["dry-run"];

function end(text) {
	console.error(`arl: ${text}`);
	process.exit(1);
}

const refuse = (text) => end(`nothing was published. ${text}`);

if (values.tag !== undefined && values.tag !== `v${manifest.version}`) {
	refuse(`The tag is ${values.tag}, and package.json has version ${manifest.version}.`);
}
if (manifest.private && !dryRun) {
	refuse("The names in package.json are placeholders: settle them, and remove `private` (docs/releasing.md).");
}
const names = [...PLATFORMS.map((platform) => platform.package), CUDA.package, manifest.name];
const files = names.map((name) => join(FOLDERS.out, tarballName(name)));
const missing = files.filter((file) => !existsSync(file)).map((file) => relative(root, file));
if (missing.length > 0 && !dryRun) refuse(`Missing: ${missing.join(", ")}. \`npm run pack\` says why.`);
for (const file of files.filter((one) => existsSync(one))) {
	const args = [
		"publish",
		file,
		"--access",
		"public",
		...(dryRun ? ["--dry-run", "--tag", "latest"] : ["--provenance"]),
	];
	const { status } = spawnSync("npm", args, { cwd: root, stdio: "inherit", shell: process.platform === "win32" });
	if (status !== 0) end(`\`npm ${args.join(" ")}\` failed; the packages before it are published.`);
}
for (const file of missing) console.error(`skipped: ${file} is missing`);
