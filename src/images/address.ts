/**
 * Which network addresses images may come from. Works on addresses only: `connect.ts` resolves names and checks every address
 * that it connects to.
 */
import { BlockList, isIP } from "node:net";

/**
 * `public`: always allowed. `private`: this machine and private networks, refused unless allowed. `never`: addresses that serve
 * no images and may leak secrets or reach many hosts: link-local with the clouds' metadata services, multicast, reserved.
 */
export type Reach = "public" | "private" | "never";

/** Where ranges overlap, `never` overrides `private`, and `private` overrides `public`. */
const V4: readonly [prefix: string, bits: number, reach: Reach][] = [
	// Metadata services outside the link-local range: Alibaba Cloud, Azure.
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
	["0.0.0.0", 0, "public"],
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
	// Everything routed on the internet; an address in no range is `never`.
	["2000::", 3, "public"],
];

/** IPv6 ranges that embed an IPv4 address in the two groups after these bits: the IPv4 address decides. */
const CARRIES_V4: readonly [bits: number, carrying: (groups: string) => string][] = [
	[96, (groups) => `::ffff:${groups}`],
	[96, (groups) => `::ffff:0:${groups}`],
	[96, (groups) => `64:ff9b::${groups}`],
	[16, (groups) => `2002:${groups}::`],
];

/** An IPv4 address as two groups of an IPv6 address. */
function groupsOf(address: string): string {
	const [a = 0, b = 0, c = 0, d = 0] = address.split(".").map(Number);
	return `${(a * 256 + b).toString(16)}:${(c * 256 + d).toString(16)}`;
}

const RANGES: Readonly<Record<Reach, BlockList>> = {
	never: new BlockList(),
	private: new BlockList(),
	public: new BlockList(),
};
for (const [prefix, bits, reach] of V4) {
	RANGES[reach].addSubnet(prefix, bits, "ipv4");
	for (const [before, carrying] of CARRIES_V4) {
		RANGES[reach].addSubnet(carrying(groupsOf(prefix)), before + bits, "ipv6");
	}
}
for (const [prefix, bits, reach] of V6) RANGES[reach].addSubnet(prefix, bits, "ipv6");

/** Classifies an address; text that is not an address is `never`. */
export function reachOf(address: string): Reach {
	const version = isIP(address);
	if (version === 0) return "never";
	// A zone (`%eth0`) names the interface, not the destination.
	const place = address.replace(/%.*$/, "");
	const within = (reach: Reach) => RANGES[reach].check(place, version === 4 ? "ipv4" : "ipv6");
	if (within("never")) return "never";
	if (within("private")) return "private";
	return within("public") ? "public" : "never";
}
