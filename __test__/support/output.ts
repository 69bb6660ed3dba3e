/** What a command writes, when a test calls it in this process. */
import { afterEach, beforeEach, vi } from "vitest";

/** Collects stdout and stderr of each test, without colours, and keeps them from the terminal. */
export function capturedOutput(): { stdout: string; stderr: string } {
	const output = { stdout: "", stderr: "" };
	beforeEach(() => {
		vi.stubEnv("NO_COLOR", "1");
		for (const name of ["stdout", "stderr"] as const) {
			output[name] = "";
			vi.spyOn(process[name], "write").mockImplementation((text) => {
				output[name] += String(text);
				return true;
			});
		}
	});
	afterEach(() => {
		vi.restoreAllMocks();
		vi.unstubAllEnvs();
	});
	return output;
}
