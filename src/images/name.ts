/** What people call an image of a row. */
import { basename } from "node:path";
import { showUrl } from "./show.js";

/** The file's name, the end of the URL, or what it is if it has neither. */
export function imageName({ url, path }: { url?: string; path?: string }): string {
	if (path !== undefined) return basename(path);
	if (url === undefined) return "bytes in the row";
	if (/^\s*data:/i.test(url)) return "data URL";
	return basename(showUrl(url).replace(/[?#].*$/, "")) || showUrl(url);
}
