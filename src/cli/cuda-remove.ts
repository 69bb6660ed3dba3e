/** `arl cuda remove`: removes NVIDIA's libraries from arl's cache. */
import { removeLibraries } from "../device/cuda-libraries.js";
import { loadNative, type Native } from "../native.js";
import { bytes, jsonLine } from "../report/index.js";
import { JSON_FLAG, parseCommand } from "./command.js";

export const COMMAND = {
	name: "arl cuda remove",
	usage: "[--json]",
	about: `Removes NVIDIA's libraries from arl's cache, and what \`arl cuda install\` has left there. Libraries of the system, of Python
environments and of CUDA toolkits stay.`,
	flags: { json: JSON_FLAG },
};

/** Runs the command; gives the exit code. `core`: the native part; only tests give another one. */
export async function run(words: readonly string[], core: () => Native = loadNative): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const removed = await removeLibraries(core());
	const text = removed.folders.map((folder) => `removed ${folder}\n`).join("");
	const line = removed.folders.length === 0 ? "there is nothing to remove\n" : `${text}${bytes(removed.bytes)} freed\n`;
	process.stdout.write(given.flags.json ? `${jsonLine(removed)}\n` : line);
	return 0;
}
