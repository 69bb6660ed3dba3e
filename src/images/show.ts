/** How URLs and sizes of images are shown in errors: enough to be found, without what may be a secret. */
import { ArlError } from "../errors.js";

const SHOWN = 200;

/** A URL without user, password, query and fragment, which may hold keys; a `data:` URL by its beginning only. */
export function showUrl(url: string): string {
	if (/^\s*data:/i.test(url)) return `${url.trimStart().slice(0, 40)}${url.length > 40 ? "..." : ""}`;
	let shown = url.replace(/[?#].*$/s, (rest) => (rest.length > 1 ? `${rest[0]}...` : rest));
	// The last @ before the path ends what stands for user and password.
	shown = shown.replace(/^(\s*[a-z][a-z0-9+.-]*:[/\\]*)[^/\\]*@/i, "$1");
	return shown.length > SHOWN ? `${shown.slice(0, SHOWN)}...` : shown;
}

/** Bytes as a person reads them. */
function showBytes(bytes: number): string {
	return bytes < 1024 * 1024 ? `${bytes} bytes` : `${Number((bytes / 1024 / 1024).toFixed(1))} MiB`;
}

/** The error for an image of too many bytes; `bytes`: null where nobody counted them to the end. */
export function tooLarge(bytes: number | null, maxBytes: number): ArlError {
	const most = showBytes(maxBytes);
	return new ArlError(
		"ARL_DATA",
		bytes === null ? `more than ${most}, which is the limit` : `${showBytes(bytes)}; at most ${most} are read`,
		"Raise image_max_bytes.",
	);
}
