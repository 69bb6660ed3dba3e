/**
 * Connections to allowed addresses only. A name is resolved once, and the connection uses the very addresses that were checked,
 * so that a second DNS answer (rebinding) changes nothing.
 */
import { type LookupAddress, lookup as systemLookup } from "node:dns";
import { isIP, type LookupFunction } from "node:net";
import type { Agent } from "undici";
import { ArlError } from "../errors.js";
import { reachOf } from "./address.js";

/** Resolves a name to all its addresses; tests pass their own. */
export type Resolve = (hostname: string) => Promise<LookupAddress[]>;

/** The system's resolver, `/etc/hosts` included. */
export const systemResolve: Resolve = (hostname) =>
	new Promise((resolve, reject) => {
		systemLookup(hostname, { all: true }, (error, addresses) => (error ? reject(error) : resolve(addresses)));
	});

/** A host without IPv6 brackets. */
function bare(hostname: string): string {
	return hostname.replace(/^\[(.*)\]$/, "$1");
}

/** Why an address is refused; null: it is allowed. */
export function refusal(hostname: string, address: string, allowPrivate: boolean): ArlError | null {
	const reach = reachOf(address);
	if (reach === "public" || (reach === "private" && allowPrivate)) return null;
	const shown = bare(hostname) === address ? address : `${hostname} is ${address}, which`;
	if (reach === "private") {
		return new ArlError(
			"ARL_DATA",
			`${shown} is an address of this machine or of a private network`,
			"If images really come from there, allow it with image_allow_private.",
		);
	}
	return new ArlError(
		"ARL_DATA",
		`${shown} is an address that images are never fetched from (link-local, metadata, multicast or reserved)`,
		"Correct the row's URL.",
	);
}

/** Throws if the host is a literal address and is refused. */
export function checkHost(hostname: string, allowPrivate: boolean): void {
	const address = bare(hostname);
	if (isIP(address) === 0) return;
	const refused = refusal(hostname, address, allowPrivate);
	if (refused) throw refused;
}

function guardedLookup(resolve: Resolve, allowPrivate: boolean): LookupFunction {
	return (hostname, options, callback) => {
		resolve(hostname).then(
			(found) => {
				const wanted = options.family === 4 || options.family === 6 ? options.family : null;
				const addresses = found.filter(({ family }) => wanted === null || family === wanted);
				// One refused address among allowed ones is enough: which one is used would be chance.
				const refused = addresses.map(({ address }) => refusal(hostname, address, allowPrivate)).find((error) => error);
				const [first] = addresses;
				if (refused) callback(refused, "", 0);
				else if (!first) {
					callback(Object.assign(new Error(`${hostname} has no address`), { code: "ENOTFOUND" }), "", 0);
				} else if (options.all) callback(null, addresses);
				else callback(null, first.address, first.family);
			},
			(error: NodeJS.ErrnoException) => callback(error, "", 0),
		);
	};
}

/** An agent that checks every connection: literal addresses beforehand, names as they resolve, and the connected peer again. */
export async function guardedAgent(options: {
	allowPrivate: boolean;
	resolve: Resolve;
	timeoutMs: number;
}): Promise<Agent> {
	const { Agent, buildConnector } = await import("undici");
	const { allowPrivate, resolve, timeoutMs } = options;
	const connect = buildConnector({ timeout: timeoutMs, lookup: guardedLookup(resolve, allowPrivate) });
	return new Agent({
		connect: (target, callback) => {
			try {
				checkHost(target.hostname, allowPrivate);
			} catch (error) {
				callback(error instanceof Error ? error : new Error(String(error)), null);
				return;
			}
			connect(target, (...answer) => {
				const [, socket] = answer;
				if (socket) {
					const refused = refusal(target.hostname, socket.remoteAddress ?? "", allowPrivate);
					if (refused) {
						socket.destroy();
						callback(refused, null);
						return;
					}
				}
				callback(...answer);
			});
		},
		headersTimeout: timeoutMs,
		bodyTimeout: timeoutMs,
		keepAliveTimeout: 4000,
	});
}
