/**
 * HTTP for what arl fetches: one client, through the proxy that the environment names, whose failures are `ARL_NETWORK`. Neither
 * a token nor a password ever gets into a message. Knows no server.
 */
import type { Dispatcher } from "undici";
import { ArlError } from "../errors.js";

/** A request that `Fetcher` sends. */
export interface Request {
	headers?: Readonly<Record<string, string>>;
	signal?: AbortSignal | null;
}

const CONNECT_MILLISECONDS = 20_000;
/** How long a server may send nothing. */
const SILENT_MILLISECONDS = 60_000;

/** The client of one server. Close it when nothing more is fetched. */
export class Fetcher {
	private agent: Dispatcher | null = null;

	/** `service`: what the server is, in a message; `hint`: what to do where it cannot be reached. */
	constructor(
		private readonly service: string,
		private readonly hint: string,
	) {}

	/**
	 * Sends a GET request, and follows redirects; those to another server go without what `headers` authorizes.
	 *
	 * @throws ArlError `ARL_NETWORK` where the server cannot be reached, `ARL_INTERRUPTED` where the signal ended it.
	 */
	async get(url: string | URL, { headers = {}, signal = null }: Request = {}): Promise<Response> {
		// Loaded only by a call that fetches.
		const { EnvHttpProxyAgent, fetch } = await import("undici");
		this.agent ??= new EnvHttpProxyAgent({
			connect: { timeout: CONNECT_MILLISECONDS },
			headersTimeout: SILENT_MILLISECONDS,
			bodyTimeout: SILENT_MILLISECONDS,
		});
		try {
			// undici's Response is the global one, under its own types.
			return (await fetch(url, { headers, signal, dispatcher: this.agent })) as unknown as Response;
		} catch (thrown) {
			throw mayPass(this.failed(thrown, url, signal));
		}
	}

	/** What a failure to reach the server, or to read on from it, means. */
	failed(thrown: unknown, url: string | URL, signal: AbortSignal | null = null): ArlError {
		if (thrown instanceof ArlError) return thrown;
		if (signal?.aborted) return new ArlError("ARL_INTERRUPTED", `interrupted while fetching ${shownUrl(url)}`);
		const message = `${this.service} cannot be reached at ${new URL(url).host}: ${reasonOf(thrown)}`;
		return new ArlError("ARL_NETWORK", message, this.hint, { cause: thrown });
	}

	/** Ends open connections. */
	async close(): Promise<void> {
		await this.agent?.destroy();
	}
}

const passing = new WeakSet<ArlError>();

/** Marks an error after which the same request may succeed: a broken connection, a busy server. A refusal is final. */
export function mayPass(error: ArlError): ArlError {
	passing.add(error);
	return error;
}

/** Whether the same request may succeed after `error`. */
export function isPassing(error: ArlError): boolean {
	return passing.has(error);
}

/** The headers of a request for content from `offset` on: encoded content could not be continued. */
export function contentHeaders(offset: number): Record<string, string> {
	return { "Accept-Encoding": "identity", ...(offset > 0 && { Range: `bytes=${offset}-` }) };
}

/** The content of an answer that was asked for from `offset` on, and where it really begins. */
export function contentOf(response: Response, offset: number): { content: AsyncIterable<Uint8Array>; offset: number } {
	const begins = response.status === 206 ? offset : 0;
	return { content: (response.body ?? []) as unknown as AsyncIterable<Uint8Array>, offset: begins };
}

/** The innermost reason that a failed request names. */
export function reasonOf(thrown: unknown): string {
	let inner = thrown;
	while (inner instanceof Error && inner.cause instanceof Error) inner = inner.cause;
	if (inner instanceof AggregateError && inner.errors[0] instanceof Error) inner = inner.errors[0];
	if (!(inner instanceof Error)) return String(inner);
	const { code } = inner as NodeJS.ErrnoException;
	return code !== undefined && !inner.message.includes(code)
		? `${inner.message} (${code})`
		: inner.message || inner.name;
}

/** A URL as messages show it: without a user's name, a password, or a query that may hold a signature. */
export function shownUrl(url: string | URL): string {
	const { origin, pathname } = new URL(url);
	return `${origin}${pathname}`;
}
