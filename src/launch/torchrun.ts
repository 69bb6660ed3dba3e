/** Where torchrun is, and the command that starts ranks with it. */
import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";

/** The first `torchrun` of `PATH`; null: there is none. */
export function findTorchrun(path: string | undefined): string | null {
	for (const folder of (path ?? "").split(delimiter)) {
		if (folder === "") continue;
		const file = join(folder, "torchrun");
		try {
			accessSync(file, constants.X_OK);
			return file;
		} catch {
			// Not in this folder.
		}
	}
	return null;
}

/** The arguments before the command that each of `ranks` ranks on this machine runs. */
export function torchrunArguments(ranks: number): string[] {
	// Alone: on a port of its own choice, so that two runs do not meet.
	return ["--standalone", "--no-python", `--nproc_per_node=${ranks}`];
}
