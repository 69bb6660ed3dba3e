/**
 * Which network addresses an image may come from. Knows numbers only: names are resolved elsewhere, and every address that a
 * connection is made to passes here.
 */
import { isIPv4, isIPv6 } from "node:net";

/**
 * `public`: may always be asked. `private`: this machine and its own networks, refused unless allowed. `never`: addresses that
 * no image lives at and that hand out secrets or reach many: link-local with the clouds' metadata services, multicast, reserved.
 */
export type Reach = "public" | "private" | "never";

const V4: readonly [prefix: string, bits: number, reach: Reach][] = [
	// Metadata services that lie outside of link-local addresses: Alibaba Cloud, Azure.
	["100.100.100.200", 32, "never"],
	["168.63.129.16", 32, "never"],
	["0.0.0.0", 8, "never"],
	["10.0.0.0", 8, "private"],
	["100.64.0.0", 10, "private"],
	["127.0.0.0", 8, "private"],
	["169.254.0.0", 16, "never"],
	["172.16.0.0", 12, "private"],
	["192.0.0.0", 24, "never"],
	["192.0.2.0", 24, "never"],
	["192.88.99.0", 24, "never"],
	["192.168.0.0", 16, "private"],
	["198.18.0.0", 15, "private"],
	["198.51.100.0", 24, "never"],
	["203.0.113.0", 24, "never"],
	["224.0.0.0", 3, "never"],
];

const V6: readonly [prefix: string, bits: number, reach: Reach][] = [
	// Metadata services of Amazon and Google.
	["fd00:ec2::254", 128, "never"],
	["fd20:ce::254", 128, "never"],
	["::1", 128, "private"],
	["fc00::", 7, "private"],
	["2001::", 23, "never"],
	["2001:db8::", 32, "never"],
	["3fff::", 20, "never"],
	// All that is routed on the internet; whatever is left has no such place.
	["2000::", 3, "public"],
	["::", 0, "never"],
];

/** IPv6 prefixes that carry an IPv4 address, and at which byte: that address decides. */
const CARRIES_V4: readonly [prefix: string, bits: number, at: number][] = [
	["::ffff:0:0", 96, 12],
	["::ffff:0:0:0", 96, 12],
	["64:ff9b::", 96, 12],
	["2002::", 16, 2],
];

function v4Bytes(address: string): number[] {
	return address.split(".").map(Number);
}

function v6Bytes(address: string): number[] {
	// A zone (`%eth0`) says by which interface, not where to.
	let text = address.replace(/%.*$/, "");
	const dotted = /[^:]*\.[^:]*$/.exec(text)?.[0];
	if (dotted !== undefined) {
		const [a = 0, b = 0, c = 0, d = 0] = v4Bytes(dotted);
		text = `${text.slice(0, -dotted.length)}${(a * 256 + b).toString(16)}:${(c * 256 + d).toString(16)}`;
	}
	const [left = "", right] = text.split("::");
	const groups = (part: string) => (part === "" ? [] : part.split(":").map((group) => Number.parseInt(group, 16)));
	const head = groups(left);
	const tail = groups(right ?? "");
	const all = [...head, ...new Array<number>(8 - head.length - tail.length).fill(0), ...tail];
	return all.flatMap((group) => [group >> 8, group & 0xff]);
}

function within(bytes: readonly number[], prefix: readonly number[], bits: number): boolean {
	for (let at = 0; at * 8 < bits; at++) {
		const mask = 0xff & (0xff << Math.max(0, 8 - (bits - at * 8)));
		if (((bytes[at] ?? 0) & mask) !== ((prefix[at] ?? 0) & mask)) return false;
	}
	return true;
}

const V4_RULES = V4.map(([prefix, bits, reach]) => ({ prefix: v4Bytes(prefix), bits, reach }));
const V6_RULES = V6.map(([prefix, bits, reach]) => ({ prefix: v6Bytes(prefix), bits, reach }));
const CARRIERS = CARRIES_V4.map(([prefix, bits, at]) => ({ prefix: v6Bytes(prefix), bits, at }));

function v4Reach(bytes: readonly number[]): Reach {
	return V4_RULES.find(({ prefix, bits }) => within(bytes, prefix, bits))?.reach ?? "public";
}

/** How far an address reaches. What is no address at all is `never`. */
export function reachOf(address: string): Reach {
	if (isIPv4(address)) return v4Reach(v4Bytes(address));
	if (!isIPv6(address)) return "never";
	const bytes = v6Bytes(address);
	const carrier = CARRIERS.find(({ prefix, bits }) => within(bytes, prefix, bits));
	if (carrier) return v4Reach(bytes.slice(carrier.at, carrier.at + 4));
	return V6_RULES.find(({ prefix, bits }) => within(bytes, prefix, bits))?.reach ?? "never";
}
