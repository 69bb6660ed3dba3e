/** Reads `file:` URLs, only from below one folder; symbolic links that lead out of it are refused. */
import { constants } from "node:fs";
import { open, realpath } from "node:fs/promises";
import { sep } from "node:path";
import { fileURLToPath } from "node:url";
import { ArlError, messageOf, toArlError } from "../errors.js";
import { tooLarge } from "./show.js";

const HOW_TO_ALLOW = "Name the folder that images may be read from with image_root.";

function withFolderEnd(path: string): string {
	return path.endsWith(sep) ? path : path + sep;
}

/** The file's bytes. Throws `ARL_DATA` if it may not or cannot be read. */
export async function fileUrlBytes(url: URL, root: string | null, maxBytes: number): Promise<Uint8Array> {
	if (root === null) throw new ArlError("ARL_DATA", "reading images from files is not allowed", HOW_TO_ALLOW);
	let path: string;
	try {
		path = fileURLToPath(url);
	} catch (error) {
		const reason = messageOf(error);
		throw new ArlError("ARL_DATA", reason, "A file URL looks like file:///folder/image.png.");
	}
	const top = await realpath(root).catch((error: unknown) => {
		const { message, hint } = toArlError(error);
		throw new ArlError("ARL_CONFIG", `image_root ${root}: ${message}`, hint);
	});
	const unreadable = (error: unknown) => {
		const { message } = toArlError(error);
		return new ArlError("ARL_DATA", message, "Check the path, and the permissions of the file.");
	};
	const real = await realpath(path).catch((error: unknown) => {
		throw unreadable(error);
	});
	if (!real.startsWith(withFolderEnd(top))) {
		const where = real === path ? "" : ` (it is ${real})`;
		throw new ArlError("ARL_DATA", `the file is not under ${top}${where}`, HOW_TO_ALLOW);
	}
	// Opened by its real path and without following links, so that a link created in between has no effect. Non-blocking, so
	// that a pipe without a writer does not block the run.
	const handle = await open(real, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK).catch(
		(error: unknown) => {
			throw unreadable(error);
		},
	);
	try {
		const info = await handle.stat();
		if (!info.isFile()) throw new ArlError("ARL_DATA", "not a file", "Name the image itself.");
		if (info.size > maxBytes) throw tooLarge(info.size, maxBytes);
		return await handle.readFile();
	} catch (error) {
		throw error instanceof ArlError ? error : unreadable(error);
	} finally {
		await handle.close();
	}
}
