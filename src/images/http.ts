/**
 * Fetches one image over HTTP: follows redirects itself, limits size and time, retries transient failures with back-off. Errors
 * name the failure; callers add the URL and the row.
 */
import { promisify } from "node:util";
import { brotliDecompress, gunzip, inflate } from "node:zlib";
import type { Agent } from "undici";
import { imageType, isTruncated } from "../data/mime.js";
import { ArlError } from "../errors.js";
import { checkHost, guardedAgent, type Resolve } from "./connect.js";
import { showUrl, tooLarge } from "./show.js";

/** Limits of a request. */
export interface HttpOptions {
	maxBytes: number;
	/** Of one attempt, redirects included. */
	timeoutMs: number;
	allowPrivate: boolean;
	signal: AbortSignal | null;
}

/** Replaced by tests. */
export interface HttpHooks {
	resolve: Resolve;
	/** Waits between attempts. */
	pause: (milliseconds: number, signal: AbortSignal | null) => Promise<void>;
}

/** Attempts in total for one image. */
const ATTEMPTS = 5;
const MAX_REDIRECTS = 5;
const FIRST_PAUSE_MS = 500;
/** If a server asks for a longer pause, the image fails. */
const MAX_PAUSE_MS = 60_000;

const REDIRECTS: ReadonlySet<number> = new Set([301, 302, 303, 307, 308]);
const TRANSIENT_STATUS: ReadonlySet<number> = new Set([
	408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529,
]);
const TRANSIENT_ERRORS: ReadonlySet<string> = new Set([
	...["ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "EHOSTUNREACH"],
	...["UND_ERR_SOCKET", "UND_ERR_CONNECT_TIMEOUT", "UND_ERR_HEADERS_TIMEOUT", "UND_ERR_BODY_TIMEOUT"],
	...["UND_ERR_RES_CONTENT_LENGTH_MISMATCH", "UND_ERR_CLOSED", "HPE_INVALID_EOF_STATE"],
]);

/** A failure that a retry may fix. */
class TransientError extends Error {
	constructor(
		message: string,
		/** How long the server asks clients to wait. */
		readonly waitMs: number | null = null,
		options?: ErrorOptions,
	) {
		super(message, options);
	}
}

const CHECK_URL = "Check the URL.";

/** Fetches images; keeps connections open until it is closed. */
export class HttpImages {
	private agent: Promise<Agent> | null = null;

	constructor(
		private readonly options: HttpOptions,
		private readonly hooks: HttpHooks,
	) {}

	/** The body that a URL returns. Throws `ARL_DATA`. */
	async get(url: URL): Promise<Uint8Array> {
		const { signal } = this.options;
		for (let attempt = 1; ; attempt++) {
			try {
				return await this.attempt(url);
			} catch (error) {
				if (signal?.aborted) throw new ArlError("ARL_INTERRUPTED", "interrupted while images were read");
				if (!(error instanceof TransientError)) throw error;
				if (attempt === ATTEMPTS) {
					const message = `${error.message}, ${ATTEMPTS} times`;
					throw new ArlError("ARL_DATA", message, "Try again later.", { cause: error });
				}
				// Jitter, so that the images of one server are not all retried at once.
				const pause = error.waitMs ?? FIRST_PAUSE_MS * 2 ** (attempt - 1) * (0.5 + Math.random());
				if (pause > MAX_PAUSE_MS) {
					const message = `${error.message}, and the server asks clients to wait ${Math.ceil(pause / 1000)} s`;
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

	/** All requests of one attempt, with one timeout. */
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
			if (error instanceof TransientError) {
				throw new TransientError(`${error.message}${via}`, error.waitMs, { cause: error.cause });
			}
			if (error instanceof ArlError) throw new ArlError(error.code, `${error.message}${via}`, error.hint);
			if (limit.aborted)
				throw new TransientError(`no complete response within ${timeoutMs / 1000} s${via}`, null, { cause: error });
			const { code, message } = error as NodeJS.ErrnoException;
			const what = `${message || code || "no connection"}${via}`;
			if (code !== undefined && TRANSIENT_ERRORS.has(code)) throw new TransientError(what, null, { cause: error });
			throw new ArlError("ARL_DATA", what, CHECK_URL, { cause: error });
		}
	}

	/** One request: returns the body, or the URL that it redirects to. */
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
					throw new ArlError("ARL_DATA", "a redirect to something that is not a URL", CHECK_URL);
				}
				return new URL(location, url);
			}
			if (TRANSIENT_STATUS.has(statusCode)) {
				throw new TransientError(`HTTP ${statusCode}`, waitOf(header("retry-after")));
			}
			throw new ArlError("ARL_DATA", `HTTP ${statusCode}`, CHECK_URL);
		}
		const announced = Number(header("content-length") ?? 0);
		if (announced > maxBytes) {
			// Do not download the rest of the body.
			body.on("error", () => {}).destroy();
			throw tooLarge(announced, maxBytes);
		}
		const chunks: Uint8Array[] = [];
		let length = 0;
		for await (const chunk of body as AsyncIterable<Uint8Array>) {
			length += chunk.length;
			// Throwing out of the loop closes the connection.
			if (length > maxBytes) throw tooLarge(null, maxBytes);
			chunks.push(chunk);
		}
		const bytes = await decoded(Buffer.concat(chunks), header("content-encoding"), maxBytes);
		const type = imageType(bytes);
		if (type !== null && isTruncated(bytes, type)) throw new TransientError(`the ${type} is truncated`);
		return bytes;
	}
}

/** `Retry-After`, given in seconds or as a date, in milliseconds; null: absent or malformed. */
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

/** Decompresses a body: some servers compress unasked. The limit holds for the result, since a small body may expand without end. */
async function decoded(bytes: Uint8Array, encoding: string | undefined, maxBytes: number): Promise<Uint8Array> {
	const name = encoding?.trim().toLowerCase() ?? "";
	if (name === "" || name === "identity") return bytes;
	const decode = DECODERS[name];
	if (!decode) throw new ArlError("ARL_DATA", `the body is compressed as ${JSON.stringify(name)}`, CHECK_URL);
	try {
		return await decode(bytes, { maxOutputLength: maxBytes });
	} catch (error) {
		if ((error as NodeJS.ErrnoException).code === "ERR_BUFFER_TOO_LARGE") throw tooLarge(null, maxBytes);
		throw new TransientError(`the body is compressed as ${name} and cannot be decompressed`, null, { cause: error });
	}
}
