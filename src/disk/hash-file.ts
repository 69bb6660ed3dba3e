/** Hashes of files. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import type { FileHandle } from "node:fs/promises";

const READ_BYTES = 4 * 1024 * 1024;

/** The SHA-256 of a file's content, in hex. A handle stays open. */
export async function hashFile(file: string | FileHandle): Promise<string> {
	const options = { start: 0, highWaterMark: READ_BYTES };
	const stream =
		typeof file === "string"
			? createReadStream(file, options)
			: file.createReadStream({ ...options, autoClose: false });
	const hash = createHash("sha256");
	for await (const chunk of stream) hash.update(chunk as Buffer);
	return hash.digest("hex");
}
