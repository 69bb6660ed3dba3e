/**
 * The program that `cuda.ts` runs in a process of its own, since a bad native library can end the process that opens it:
 * opens the driver and NVIDIA's libraries, loads the CUDA addon if nothing is missing, and writes each result as a line of
 * JSON to file descriptor 3. Its words: the loader of the CPU addon, the CUDA addon or an empty word, the
 * GPU whose free memory is asked for, and folders to search.
 */
import { writeSync } from "node:fs";
import { createRequire } from "node:module";
import type { CudaReport, Native } from "../native.js";

/** What the probe found; parts that it did not come to are absent. */
export interface ProbeResult {
	report?: CudaReport;
	addon?: { version: string; backends: string[] };
	/** Why the CUDA addon does not load. */
	failure?: string;
}

const RESULTS = 3;
const [core = "", cuda = "", device = "", ...folders] = process.argv.slice(2);
const load = createRequire(import.meta.url) as (path: string) => Native;
const write = (result: ProbeResult) => writeSync(RESULTS, `${JSON.stringify(result)}\n`);

const report = load(core).cudaReport(folders, device);
write({ report });
if (cuda !== "" && !report.problem) {
	try {
		const addon = load(cuda);
		write({ addon: { version: addon.version(), backends: addon.backends() } });
	} catch (error) {
		write({ failure: error instanceof Error ? error.message : String(error) });
	}
}
