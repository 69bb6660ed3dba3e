/**
 * One image over HTTP: redirects followed by hand, limits on size and time, retries with back-off for what may pass. Errors
 * say what failed; the URL and the row that asked for it are known elsewhere.
 */
import { promisify } from "node:util";
import { brotliDecompress, gunzip, inflate } from "node:zlib";
import type { Agent } from "undici";
import { imageType, isTruncated } from "../data/mime.js";
import { ArlError } from "../errors.js";
import { checkHost, guardedAgent, type Resolve } from "./connect.js";
import { showUrl, tooLarge } from "./show.js";

/** What a request may do. */
export interface HttpOptions {
	maxBytes: number;
	/** For one attempt, redirects included. */
	timeoutMs: number;
	allowPrivate: boolean;
	signal: AbortSignal | null;
}

/** What tests replace. */
export interface HttpHooks {
	resolve: Resolve;
	/** Waits between attempts. */
	pause: (milliseconds: number, signal: AbortSignal | null) => Promise<void>;
}

/** Attempts for one image in all. */
const ATTEMPTS = 5;
const MAX_REDIRECTS = 5;
const FIRST_PAUSE_MS = 500;
/** A server that asks for a longer pause is not waited for. */
const MAX_PAUSE_MS = 60_000;

const REDIRECTS: ReadonlySet<number> = new Set([301, 302, 303, 307, 308]);
const PASSING_STATUS: ReadonlySet<number> = new Set([408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529]);
const PASSING_ERRORS: ReadonlySet<string> = new Set([
	...["ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "EHOSTUNREACH"],
	...["UND_ERR_SOCKET", "UND_ERR_CONNECT_TIMEOUT", "UND_ERR_HEADERS_TIMEOUT", "UND_ERR_BODY_TIMEOUT"],
	...["UND_ERR_RES_CONTENT_LENGTH_MISMATCH", "UND_ERR_CLOSED", "HPE_INVALID_EOF_STATE"],
]);

/** A failure that may pass. */
class Passing extends Error {
	constructor(
		message: string,
		/** How long the server asks to wait. */
		readonly waitMs: number | null = null,
		options?: ErrorOptions,
	) {
		super(message, options);
	}
}

const CHECK_URL = "Check the URL.";

/** Gets images; holds connections until it is closed. */
export class HttpImages {
	private agent: Promise<Agent> | null = null;

	constructor(
		private readonly options: HttpOptions,
		private readonly hooks: HttpHooks,
	) {}

	/** The body that a URL leads to. Throws `ARL_DATA`. */
	async get(url: URL): Promise<Uint8Array> {
		const { signal } = this.options;
		for (let attempt = 1; ; attempt++) {
			try {
				return await this.attempt(url);
			} catch (error) {
				if (signal?.aborted) throw new ArlError("ARL_INTERRUPTED", "interrupted while images were read");
				if (!(error instanceof Passing)) throw error;
				if (attempt === ATTEMPTS) {
					const message = `${error.message}, ${ATTEMPTS} times`;
					throw new ArlError("ARL_DATA", message, "Try again later.", { cause: error });
				}
				// Jitter: many images of one server must not come back all at once.
				const pause = error.waitMs ?? FIRST_PAUSE_MS * 2 ** (attempt - 1) * (0.5 + Math.random());
				if (pause > MAX_PAUSE_MS) {
					const message = `${error.message}, and the server asks to wait for ${Math.ceil(pause / 1000)} s`;
					throw new ArlError("ARL_DATA", message, "Try again later.", { cause: error });
				}
				await this.hooks.pause(pause, signal);
			}
		}
	}

	async close(): Promise<void> {
		const agent = await this.agent;
		this.agent = null;
		await agent?.destroy();
	}

	/** All requests of one attempt, under one limit of time. */
	private async attempt(url: URL): Promise<Uint8Array> {
		const { timeoutMs, signal } = this.options;
		const limit = AbortSignal.timeout(timeoutMs);
		const stop = signal ? AbortSignal.any([limit, signal]) : limit;
		let at = url;
		try {
			for (let hop = 0; hop <= MAX_REDIRECTS; hop++) {
				const answer = await this.request(at, stop);
				if (!(answer instanceof URL)) return answer;
				at = answer;
			}
			throw new ArlError("ARL_DATA", `more than ${MAX_REDIRECTS} redirects`, CHECK_URL);
		} catch (error) {
			const via = at === url ? "" : ` (redirected to ${showUrl(at.href)})`;
			if (error instanceof Passing) throw new Passing(`${error.message}${via}`, error.waitMs, { cause: error.cause });
			if (error instanceof ArlError) throw new ArlError(error.code, `${error.message}${via}`, error.hint);
			if (limit.aborted)
				throw new Passing(`no whole answer within ${timeoutMs / 1000} s${via}`, null, { cause: error });
			const { code, message } = error as NodeJS.ErrnoException;
			const what = `${message || code || "no connection"}${via}`;
			if (code !== undefined && PASSING_ERRORS.has(code)) throw new Passing(what, null, { cause: error });
			throw new ArlError("ARL_DATA", what, CHECK_URL, { cause: error });
		}
	}

	/** One request: the body, or where it is redirected to. */
	private async request(url: URL, signal: AbortSignal): Promise<Uint8Array | URL> {
		if (url.protocol !== "http:" && url.protocol !== "https:") {
			throw new ArlError("ARL_DATA", `a redirect to ${showUrl(url.href)}, which is neither http nor https`, CHECK_URL);
		}
		const { maxBytes, timeoutMs, allowPrivate } = this.options;
		checkHost(url.hostname, allowPrivate);
		this.agent ??= guardedAgent({ allowPrivate, resolve: this.hooks.resolve, timeoutMs });
		const agent = await this.agent;
		const user = decodeURIComponent(url.username);
		const authorization = `Basic ${Buffer.from(`${user}:${decodeURIComponent(url.password)}`).toString("base64")}`;
		const { statusCode, headers, body } = await agent.request({
			origin: url.origin,
			path: `${url.pathname}${url.search}`,
			method: "GET",
			headers: {
				"user-agent": "arl",
				accept: "*/*",
				"accept-encoding": "identity",
				...(url.username !== "" && { authorization }),
			},
			signal,
		});
		const header = (name: string) => {
			const value = headers[name];
			return Array.isArray(value) ? value[0] : value;
		};
		if (statusCode !== 200) {
			await body.dump({ limit: 64 * 1024, signal });
			const location = header("location");
			if (REDIRECTS.has(statusCode) && location !== undefined) {
				if (!URL.canParse(location, url.href)) {
					throw new ArlError("ARL_DATA", "a redirect to what is no URL", CHECK_URL);
				}
				return new URL(location, url);
			}
			if (PASSING_STATUS.has(statusCode)) {
				throw new Passing(`HTTP ${statusCode}`, waitOf(header("retry-after")));
			}
			throw new ArlError("ARL_DATA", `HTTP ${statusCode}`, CHECK_URL);
		}
		const announced = Number(header("content-length") ?? 0);
		if (announced > maxBytes) {
			// The rest of the body would be read for nothing.
			body.on("error", () => {}).destroy();
			throw tooLarge(announced, maxBytes);
		}
		const chunks: Uint8Array[] = [];
		let length = 0;
		for await (const chunk of body as AsyncIterable<Uint8Array>) {
			length += chunk.length;
			// Leaving the loop closes the connection.
			if (length > maxBytes) throw tooLarge(null, maxBytes);
			chunks.push(chunk);
		}
		const bytes = await decoded(Buffer.concat(chunks), header("content-encoding"), maxBytes);
		const type = imageType(bytes);
		if (type !== null && isTruncated(bytes, type)) throw new Passing(`the ${type} ends before its end`);
		return bytes;
	}
}

/** Milliseconds that `Retry-After` asks for, in seconds or as a date; null: nothing that can be read. */
function waitOf(value: string | undefined): number | null {
	if (value === undefined) return null;
	if (/^\s*\d+\s*$/.test(value)) return Number(value) * 1000;
	const date = Date.parse(value);
	return Number.isNaN(date) ? null : Math.max(0, date - Date.now());
}

const DECODERS: Readonly<Record<string, (bytes: Uint8Array, options: { maxOutputLength: number }) => Promise<Buffer>>> =
	{
		gzip: promisify<Uint8Array, { maxOutputLength: number }, Buffer>(gunzip),
		"x-gzip": promisify<Uint8Array, { maxOutputLength: number }, Buffer>(gunzip),
		deflate: promisify<Uint8Array, { maxOutputLength: number }, Buffer>(inflate),
		br: promisify<Uint8Array, { maxOutputLength: number }, Buffer>(brotliDecompress),
	};

/** A body without its compression, which some servers apply unasked. A small body may unpack to one without end. */
async function decoded(bytes: Uint8Array, encoding: string | undefined, maxBytes: number): Promise<Uint8Array> {
	const name = encoding?.trim().toLowerCase() ?? "";
	if (name === "" || name === "identity") return bytes;
	const decode = DECODERS[name];
	if (!decode) throw new ArlError("ARL_DATA", `the body is compressed as ${JSON.stringify(name)}`, CHECK_URL);
	try {
		return await decode(bytes, { maxOutputLength: maxBytes });
	} catch (error) {
		if ((error as NodeJS.ErrnoException).code === "ERR_BUFFER_TOO_LARGE") throw tooLarge(null, maxBytes);
		throw new Passing(`the body is compressed as ${name} and cannot be unpacked`, null, { cause: error });
	}
}
