/** The file in which torchrun wants to read why a rank has failed, so that it reports that one as the root cause. */
import { writeFileSync } from "node:fs";
import type { ArlError } from "../errors.js";

type Environment = Readonly<Record<string, string | undefined>>;

/** What torch's own ranks write there. torchrun shows the text of `py_callstack`. */
export function errorFileText({ code, message, hint }: ArlError, seconds: number): string {
	const text = [`${code} ${message}`, hint].filter(Boolean).join("\n");
	return JSON.stringify({
		message: { message: text, extraInfo: { py_callstack: text, timestamp: String(Math.floor(seconds)) } },
	});
}

/** Writes why this rank has failed, where torchrun has started it. */
export function writeErrorFile(error: ArlError, env: Environment = process.env): void {
	const file = env.TORCHELASTIC_ERROR_FILE;
	if (!file) return;
	try {
		writeFileSync(file, errorFileText(error, Date.now() / 1000));
	} catch {
		// The error itself is reported all the same.
	}
}
