/** `arl cuda install`: puts NVIDIA's libraries for the CUDA addon into arl's cache, without Python. */
import { installLibraries } from "../device/cuda-libraries.js";
import { loadNative, type Native } from "../native.js";
import { bytes, jsonLine, percent } from "../report/index.js";
import { liveLine } from "../report/live.js";
import { JSON_FLAG, parseCommand } from "./command.js";
import { stoppable } from "./signals.js";

export const COMMAND = {
	name: "arl cuda install",
	usage: "[--json]",
	about: `Fetches NVIDIA's CUDA 13 libraries and NCCL (1.3 GB), checks each by its pinned SHA-256, and unpacks them into arl's cache
(2.2 GB), where runs find them. Broken off, it resumes. The files are NVIDIA's own wheels, taken from the Python package index that
PIP_INDEX_URL or pip.conf names, else from pypi.org. No Python is needed.

The GPU's driver is not among them: install NVIDIA's driver 580 or newer. \`arl doctor\` shows what a run would use.`,
	flags: { json: JSON_FLAG },
};

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const live = liveLine(process.stderr);
	let told = "";
	return stoppable(async (signal) => {
		const installed = await installLibraries(core(), {
			signal,
			progress: ({ name, phase, bytes: done, totalBytes }) => {
				live?.show([
					{ text: `${phase} ${name}`, keep: 9 },
					{ text: totalBytes === null ? bytes(done) : `${bytes(done)} of ${bytes(totalBytes)}`, keep: 7 },
					{ text: totalBytes === null ? "" : percent(done / totalBytes), keep: 5 },
				]);
				if (live === null && told !== `${phase} ${name}`) process.stderr.write(`${phase} ${name}\n`);
				told = `${phase} ${name}`;
			},
		});
		live?.clear();
		const { folder, changed, bytes: fetched, from } = installed;
		const text = changed
			? `installed NVIDIA's libraries in ${folder} (${bytes(fetched)} from ${from}); \`arl doctor\` shows what a run uses`
			: `NVIDIA's libraries are in ${folder} already`;
		process.stdout.write(given.flags.json ? `${jsonLine(installed)}\n` : `${text}\n`);
		return 0;
	}).finally(() => live?.clear());
}
