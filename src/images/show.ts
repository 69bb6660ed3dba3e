/** How errors show URLs and sizes of images: enough to find the image, without anything that may be a secret. */
import { ArlError } from "../errors.js";

const SHOWN = 200;

/** A URL without user, password, query and fragment, which may contain keys; only the beginning of a `data:` URL. */
export function showUrl(url: string): string {
	if (/^\s*data:/i.test(url)) return `${url.trimStart().slice(0, 40)}${url.length > 40 ? "..." : ""}`;
	let shown = url.replace(/[?#].*$/s, (rest) => (rest.length > 1 ? `${rest[0]}...` : rest));
	// User and password end at the last @ before the path.
	shown = shown.replace(/^(\s*[a-z][a-z0-9+.-]*:[/\\]*)[^/\\]*@/i, "$1");
	return shown.length > SHOWN ? `${shown.slice(0, SHOWN)}...` : shown;
}

/** A number of bytes for people. */
function showBytes(bytes: number): string {
	return bytes < 1024 * 1024 ? `${bytes} bytes` : `${Number((bytes / 1024 / 1024).toFixed(1))} MiB`;
}

/** The error for an image that is too large; `bytes` null: reading stopped at the limit. */
export function tooLarge(bytes: number | null, maxBytes: number): ArlError {
	const most = showBytes(maxBytes);
	return new ArlError(
		"ARL_DATA",
		bytes === null ? `larger than the limit of ${most}` : `${showBytes(bytes)}; the limit is ${most}`,
		"Raise image_max_bytes.",
	);
}
