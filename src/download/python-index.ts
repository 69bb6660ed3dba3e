/**
 * Wheels of the Python package index that the user has set up for pip, without Python: which index that is, and where it has a
 * file with a given hash (https://packaging.python.org/en/latest/specifications/simple-repository-api/). A user's name and
 * password in the index's URL go to that index alone, and into no message.
 */
import { readFile } from "node:fs/promises";
import { homedir, platform } from "node:os";
import { join } from "node:path";
import { ArlError } from "../errors.js";
import { contentHeaders, contentOf, Fetcher, shownUrl } from "./fetch.js";

/** A wheel, pinned. */
export interface Wheel {
	/** The project in the index. */
	name: string;
	version: string;
	/** Of the file, in hex. */
	sha256: string;
}

/** Where an index has a wheel. */
export interface FoundWheel extends Wheel {
	file: string;
	url: string;
	/** Bytes; null: the index does not say. */
	size: number | null;
}

type Environment = Readonly<Record<string, string | undefined>>;

const PUBLIC_INDEX = "https://pypi.org/simple";

/** The files in which pip keeps its configuration; a later one counts more (https://pip.pypa.io/en/stable/topics/configuration/). */
function configFiles(env: Environment): string[] {
	const named = env.PIP_CONFIG_FILE;
	const windows = platform() === "win32";
	const name = windows ? "pip.ini" : "pip.conf";
	const home = homedir();
	const user = windows
		? [join(home, "pip", name), join(env.APPDATA ?? join(home, "AppData", "Roaming"), "pip", name)]
		: [join(home, ".pip", name), join(env.XDG_CONFIG_HOME || join(home, ".config"), "pip", name)];
	const mac = platform() === "darwin" ? [join(home, "Library", "Application Support", "pip", name)] : [];
	const environment = env.VIRTUAL_ENV ? [join(env.VIRTUAL_ENV, name)] : [];
	if (named === "/dev/null" || named === "NUL") return [];
	return ["/etc/pip.conf", "/etc/xdg/pip/pip.conf", ...mac, ...user, ...environment, ...(named ? [named] : [])];
}

/** The values of `index-url` and `extra-index-url` in the text of a configuration file. */
function readConfig(text: string): { index?: string; extra?: string[] } {
	const found: { index?: string; extra?: string[] } = {};
	let section = "";
	let key = "";
	for (const line of text.split(/\r?\n/)) {
		if (/^\s*([#;]|$)/.test(line)) continue;
		const heading = /^\[(.+)\]\s*$/.exec(line)?.[1];
		if (heading !== undefined) section = heading;
		const [, name, value = ""] = /^([\w-]+)\s*[=:]\s*(.*)$/.exec(line) ?? [];
		// A line that is indented continues the value before it.
		const more = name === undefined && /^\s/.test(line) ? line.trim() : value.trim();
		if (name !== undefined) key = name.replaceAll("_", "-");
		if (section !== "global" && section !== "install" && section !== "download") continue;
		if (key === "index-url" && more !== "") found.index = more;
		if (key === "extra-index-url" && more !== "") found.extra = [...(found.extra ?? []), ...more.split(/\s+/)];
	}
	return found;
}

/** The indexes that pip would ask, in its order. */
export async function pipIndexes(env: Environment = process.env): Promise<string[]> {
	let index = PUBLIC_INDEX;
	let extra: string[] = [];
	for (const path of configFiles(env)) {
		const found = readConfig(await readFile(path, "utf8").catch(() => ""));
		index = found.index ?? index;
		extra = found.extra ?? extra;
	}
	if (env.PIP_INDEX_URL) index = env.PIP_INDEX_URL;
	if (env.PIP_EXTRA_INDEX_URL) extra = env.PIP_EXTRA_INDEX_URL.split(/\s+/).filter((url) => url !== "");
	return [index, ...extra].map((url) => url.replace(/\/+$/, ""));
}

const UNREACHABLE = "Check the network; PIP_INDEX_URL or pip.conf names another index, HTTPS_PROXY a proxy.";

/** The indexes of this user. Close it when nothing more is fetched. */
export class PythonIndex {
	private readonly fetcher = new Fetcher("the Python package index", UNREACHABLE);

	constructor(
		private readonly indexes: readonly string[],
		private readonly signal: AbortSignal | null,
	) {}

	/** The addresses, for messages. */
	get shown(): string {
		return this.indexes.map(shownUrl).join(", ");
	}

	/** Finds the wheel by its hash. Throws `ARL_NETWORK` where no index has it. */
	async find(wheel: Wheel): Promise<FoundWheel> {
		for (const index of this.indexes) {
			const page = `${index}/${wheel.name.toLowerCase().replaceAll(/[-_.]+/g, "-")}/`;
			const response = await this.fetcher.get(withoutUser(page), {
				headers: { ...authorization(page), Accept: ACCEPT },
				signal: this.signal,
			});
			if (response.status === 404) {
				await response.body?.cancel();
				continue;
			}
			if (!response.ok) throw await this.refusal(response, page);
			const text = await response.text().catch((thrown: unknown) => {
				throw this.fetcher.failed(thrown, page, this.signal);
			});
			const base = response.url || withoutUser(page);
			const files = response.headers.get("content-type")?.includes("json") ? fromJson(text) : fromHtml(text);
			const found = files.find((file) => file.sha256 === wheel.sha256) ?? files.find((file) => unhashed(file, wheel));
			if (found === undefined) continue;
			const url = new URL(found.url, base);
			return { ...wheel, file: found.file, size: found.size, url: url.href.replace(/#.*/, "") };
		}
		throw new ArlError(
			"ARL_NETWORK",
			`${this.shown} has no ${wheel.name} ${wheel.version} with SHA-256 ${wheel.sha256.slice(0, 16)}...`,
			"arl takes these files alone. PIP_INDEX_URL or pip.conf names another index.",
		);
	}

	/** Opens a wheel's content at `offset`, or at 0 where the server cannot do so. */
	async open({ url }: FoundWheel, offset: number) {
		const index = this.indexes.find((one) => new URL(one).origin === new URL(url).origin);
		const headers = { ...(index !== undefined && authorization(index)), ...contentHeaders(offset) };
		const response = await this.fetcher.get(withoutUser(url), { headers, signal: this.signal });
		if (!response.ok) throw await this.refusal(response, url);
		return contentOf(response, offset);
	}

	/** What broke a wheel's content off. */
	broken({ url }: FoundWheel, thrown: unknown): ArlError {
		return this.fetcher.failed(thrown, url, this.signal);
	}

	/** Ends open connections. */
	close(): Promise<void> {
		return this.fetcher.close();
	}

	private async refusal(response: Response, url: string): Promise<ArlError> {
		await response.body?.cancel().catch(() => {});
		const { status } = response;
		const hint =
			status === 401 || status === 403
				? "The index wants another name or password than PIP_INDEX_URL or pip.conf has."
				: "The server is busy or broken; run the command again later, or set PIP_INDEX_URL.";
		return new ArlError("ARL_NETWORK", `the Python package index answers ${status} to ${shownUrl(url)}`, hint);
	}
}

/** A file as an index lists it. */
interface ListedFile {
	file: string;
	url: string;
	sha256: string | null;
	size: number | null;
}

const ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.2";

function fromJson(text: string): ListedFile[] {
	try {
		const { files } = JSON.parse(text) as {
			files: { filename: string; url: string; hashes?: { sha256?: string }; size?: number }[];
		};
		return files.map(({ filename, url, hashes, size }) => {
			return { file: filename, url, sha256: hashes?.sha256 ?? null, size: size ?? null };
		});
	} catch {
		return [];
	}
}

function fromHtml(text: string): ListedFile[] {
	return [...text.matchAll(/<a\s[^>]*href\s*=\s*["']([^"']+)["'][^>]*>([^<]+)<\/a>/gi)].map(
		([, href = "", file = ""]) => {
			const url = href.replaceAll("&amp;", "&");
			return { file: file.trim(), url, sha256: /#sha256=([0-9a-f]{64})/.exec(url)?.[1] ?? null, size: null };
		},
	);
}

/** Whether a file that the index lists without a hash is the wheel by its name; its content is checked when it is fetched. */
function unhashed({ file, sha256 }: ListedFile, { name, version }: Wheel): boolean {
	const begins = `${name.replaceAll(/[-.]/g, "_")}-${version}-`.toLowerCase();
	return sha256 === null && file.toLowerCase().startsWith(begins) && /x86_64\.whl$/.test(file);
}

function withoutUser(url: string): string {
	const plain = new URL(url);
	plain.username = "";
	plain.password = "";
	return plain.href;
}

function authorization(url: string): Record<string, string> {
	const { username, password } = new URL(url);
	if (username === "" && password === "") return {};
	const pair = `${decodeURIComponent(username)}:${decodeURIComponent(password)}`;
	return { Authorization: `Basic ${Buffer.from(pair).toString("base64")}` };
}
