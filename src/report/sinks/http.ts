/** Requests of sinks, each bounded in time; errors that name the service and never a secret. */
const REQUEST_MILLISECONDS = 60_000;

export interface Request {
	method: "GET" | "POST";
	url: string;
	headers?: Record<string, string>;
	body?: unknown;
	signal: AbortSignal;
	/** The path of the address is a secret. */
	isSecret?: boolean;
}

/** An answer other than 2xx. */
export class HttpError extends Error {
	constructor(
		readonly status: number,
		message: string,
	) {
		super(message);
	}
}

/**
 * Sends `body` as JSON and returns the answer's text. The address in errors is without user name, password, path and query,
 * which may be secret.
 *
 * @throws HttpError for an answer other than 2xx.
 */
export async function request({
	method,
	url: address,
	headers = {},
	body,
	signal,
	isSecret,
}: Request): Promise<string> {
	const { url, headers: login } = withoutLogin(address);
	const { host } = new URL(url);
	const bounded = AbortSignal.any([signal, AbortSignal.timeout(REQUEST_MILLISECONDS)]);
	const sent = body === undefined ? {} : { body: JSON.stringify(body) };
	let status: number;
	let answer: string;
	try {
		const response = await fetch(url, {
			method,
			headers: { "content-type": "application/json", ...login, ...headers },
			...sent,
			signal: bounded,
		});
		status = response.status;
		answer = await response.text();
	} catch (error) {
		// The text of an error without a cause may have the whole address.
		const { name, cause } = error as Error;
		throw new Error(`${host} does not answer: ${cause instanceof Error ? cause.message : name}`);
	}
	if (status >= 200 && status < 300) return answer;
	// A server may repeat the path that it does not know.
	const said = isSecret ? "" : `: ${answer.slice(0, 200).replaceAll(/\s+/g, " ")}`;
	throw new HttpError(status, `${host} answers ${status}${said}`);
}

/** An address without its user name and password, and the header that has them. */
export function withoutLogin(address: string): { url: string; headers: Record<string, string> } {
	const url = new URL(address);
	const { username, password } = url;
	url.username = "";
	url.password = "";
	const login = `${decodeURIComponent(username)}:${decodeURIComponent(password)}`;
	const headers: Record<string, string> =
		username === "" ? {} : { authorization: `Basic ${Buffer.from(login).toString("base64")}` };
	return { url: url.href.replace(/\/$/, ""), headers };
}
