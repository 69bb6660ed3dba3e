import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { reachOf } from "../src/images/address.js";
import { ImageLoader, type ImageOptions, loaderWithHooks } from "../src/images/loader.js";
import { errorOf } from "./support/folder.js";
import { picture, type TestServer, testServer } from "./support/images.js";
import { fc, holdsAsync } from "./support/properties.js";

let server: TestServer;
const loaders: ImageLoader[] = [];
beforeAll(async () => {
	server = await testServer();
	const png = await picture("png");
	server.on("/x.png", (_, response) => response.end(png));
});
afterAll(async () => {
	await Promise.all(loaders.map((made) => made.close()));
});

/** A loader for which names have the addresses of the table; every answer is used once, the last one for ever. */
function loader(names: Record<string, string[][]> = {}, options: ImageOptions = {}) {
	const asked: string[] = [];
	const made = loaderWithHooks(options, {
		pause: async () => {},
		resolve: async (hostname) => {
			asked.push(hostname);
			const answers = names[hostname] ?? [];
			const found = answers.length > 1 ? answers.shift() : answers[0];
			if (!found) throw Object.assign(new Error(`getaddrinfo ENOTFOUND ${hostname}`), { code: "ENOTFOUND" });
			return found.map((address) => ({ address, family: address.includes(":") ? 6 : 4 }));
		},
	});
	loaders.push(made);
	return { made, asked };
}
const hits = () => server.hits.get("/x.png") ?? 0;

describe("how far an address reaches", () => {
	it.each([
		["8.8.8.8", "public"],
		["1.1.1.1", "public"],
		["172.15.255.255", "public"],
		["172.32.0.0", "public"],
		["100.63.255.255", "public"],
		["100.128.0.0", "public"],
		["169.253.255.255", "public"],
		["223.255.255.255", "public"],
		["192.169.0.0", "public"],
		["11.0.0.0", "public"],
		["9.255.255.255", "public"],
		["198.20.0.0", "public"],
		["2606:4700:4700::1111", "public"],
		["2a00:1450:4001:80b::200e", "public"],
		["::ffff:8.8.8.8", "public"],
		["64:ff9b::808:808", "public"],
		["2002:808:808::1", "public"],
		["10.0.0.0", "private"],
		["10.255.255.255", "private"],
		["127.0.0.1", "private"],
		["127.255.255.254", "private"],
		["172.16.0.1", "private"],
		["172.31.255.255", "private"],
		["192.168.1.1", "private"],
		["100.64.0.1", "private"],
		["100.127.255.255", "private"],
		["198.19.0.1", "private"],
		["::1", "private"],
		["0:0:0:0:0:0:0:1", "private"],
		["fc00::1", "private"],
		["fdff:ffff::1", "private"],
		["::ffff:127.0.0.1", "private"],
		["::ffff:7f00:1", "private"],
		["::ffff:0:10.0.0.1", "private"],
		["64:ff9b::10.1.2.3", "private"],
		["64:ff9b::c0a8:1", "private"],
		["2002:7f00:1::", "private"],
		["2002:c0a8:101:1::1", "private"],
		["0.0.0.0", "never"],
		["0.1.2.3", "never"],
		["169.254.169.254", "never"],
		["100.100.100.200", "never"],
		["168.63.129.16", "never"],
		["192.0.0.192", "never"],
		["192.0.2.1", "never"],
		["198.51.100.1", "never"],
		["203.0.113.1", "never"],
		["192.88.99.1", "never"],
		["224.0.0.1", "never"],
		["239.255.255.255", "never"],
		["240.0.0.1", "never"],
		["255.255.255.255", "never"],
		["::", "never"],
		["::127.0.0.1", "never"],
		["::8.8.8.8", "never"],
		["fe80::1", "never"],
		["fe80::1%eth0", "never"],
		["febf::1", "never"],
		["fec0::1", "never"],
		["ff02::1", "never"],
		["ff0e::1", "never"],
		["fd00:ec2::254", "never"],
		["fd20:ce::254", "never"],
		["::ffff:169.254.169.254", "never"],
		["64:ff9b::a9fe:a9fe", "never"],
		["64:ff9b:1::a9fe:a9fe", "never"],
		["2002:a9fe:a9fe::1", "never"],
		["2001::1", "never"],
		["2001:0:4136:e378:8000:63bf:3fff:fdd2", "never"],
		["2001:db8::1", "never"],
		["3fff::1", "never"],
		["100::1", "never"],
		["5f00::1", "never"],
		["4000::1", "never"],
		["", "never"],
		["localhost", "never"],
		["1.2.3", "never"],
		["1.2.3.4.5", "never"],
	])("%s: %s", (address, reach) => {
		expect(reachOf(address)).toBe(reach);
	});
});

describe("private addresses", () => {
	it("are refused however they are written, before any connection", async () => {
		const before = hits();
		const hosts = [
			...["127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"],
			...["0x7F.0x0.0x0.0x1", "127.0.0.1.", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"],
			...["[64:ff9b::7f00:1]", "[2002:7f00:1::]", "①②⑦.⓪.⓪.①", "127。0。0。1", "%31%32%37.0.0.1", "１２７.0.0.1"],
			...["user@127.0.0.1", "example.com@127.0.0.1", "10.0.0.1", "192.168.0.1", "0xa000001", "0300.0250.0.1"],
		];
		for (const host of hosts) {
			const url = `http://${host}:${server.port}/x.png`;
			const error = await errorOf(loader().made.load(url));
			expect(error.message, host).toMatch(/an address of this machine or of a private network/);
			expect(error.hint, host).toContain("image_allow_private");
		}
		expect(hits()).toBe(before);
	});

	it("are refused in every number form of every address there is", async () => {
		const blocks: [number, number][] = [
			[0x7f000000, 24],
			[0x0a000000, 24],
			[0xac100000, 20],
			[0xc0a80000, 16],
			[0x64400000, 22],
			[0xa9fe0000, 16],
			[0xe0000000, 28],
			[0x00000000, 24],
		];
		const spellings = [
			(value: number) => String(value),
			(value: number) => `0x${value.toString(16)}`,
			(value: number) => `0X${value.toString(16)}`,
			(value: number) => `0${value.toString(8)}`,
		] as const;
		const spelling = fc.constantFrom(...spellings);
		const hex = (group: number) => group.toString(16);
		/** The forms of an address; each of its parts has a spelling of its own. */
		const forms = (value: number, [one, two, three, four]: ((value: number) => string)[], last: number) => {
			const [a, b, c, d] = [value >>> 24, (value >>> 16) & 255, (value >>> 8) & 255, value & 255];
			return [
				one?.(value),
				`${one?.(a)}.${two?.(value & 0xffffff)}`,
				`${one?.(a)}.${two?.(b)}.${three?.(value & 0xffff)}`,
				`${one?.(a)}.${two?.(b)}.${three?.(c)}.${four?.(d)}`,
				`[::ffff:${a}.${b}.${c}.${d}]`,
				`[::ffff:${hex(value >>> 16)}:${hex(value & 0xffff)}]`,
				`[64:ff9b::${hex(value >>> 16)}:${hex(value & 0xffff)}]`,
				`[2002:${hex(value >>> 16)}:${hex(value & 0xffff)}::${hex(last)}]`,
			];
		};
		const address = fc.constantFrom(...blocks).chain(([base, bits]) => fc.nat(2 ** bits - 1).map((at) => base + at));
		const host = fc
			.tuple(address, fc.array(spelling, { minLength: 4, maxLength: 4 }), fc.nat(0xffff), fc.nat(7))
			.map(([value, spelt, last, form]) => forms(value, spelt, last)[form] ?? "");
		const { made, asked } = loader();
		const refused = async (name: string) => {
			const error = await errorOf(made.load(`http://${name}:${server.port}/x.png`));
			expect(error.message).toMatch(/an address (of this machine|that images are never fetched from)/);
		};
		await holdsAsync(600, fc.asyncProperty(host, refused));
		// An address is never resolved: nobody may answer for it.
		expect(asked).toEqual([]);
	});

	it("are refused after a name was resolved, among good ones too, and connected to by none", async () => {
		const before = hits();
		for (const address of ["127.0.0.1", "10.0.0.8", "::1", "::ffff:127.0.0.1", "fd00::5"]) {
			const { made } = loader({ "img.example.com": [["93.184.215.14", address]] });
			const error = await errorOf(made.load(`http://img.example.com:${server.port}/x.png`));
			expect(error.message).toBe(
				`http://img.example.com:${server.port}/x.png: img.example.com is ${address}, which is an address of this machine or of a private network`,
			);
		}
		expect(hits()).toBe(before);
	});

	it("`localhost`, by the system's own resolving, is one of them", async () => {
		const made = new ImageLoader();
		loaders.push(made);
		const error = await errorOf(made.load(`http://localhost:${server.port}/x.png`));
		expect(error.message).toMatch(/localhost is (127\.0\.0\.1|::1), which is an address of this machine/);
	});

	it("are reached where that is allowed", async () => {
		const { made } = loader({ "img.example.com": [["127.0.0.1"]] }, { image_allow_private: true });
		expect((await made.load(`http://img.example.com:${server.port}/x.png`)).width).toBe(8);
		expect((await made.load(`http://0x7f.1:${server.port}/x.png?again`)).width).toBe(8);
		expect((await made.load(`http://[::ffff:127.0.0.1]:${server.port}/x.png`)).width).toBe(8);
	});

	it("metadata, link-local and multicast addresses are refused even then", async () => {
		const names = { "metadata.google.internal": [["169.254.169.254"]], "mapped.example": [["::ffff:a9fe:a9fe"]] };
		const { made } = loader(names, { image_allow_private: true });
		for (const host of [
			...[
				"169.254.169.254",
				"0xa9fea9fe",
				"[fe80::1]",
				"[fd00:ec2::254]",
				"100.100.100.200",
				"224.0.0.1",
				"0.0.0.0",
				"0",
			],
			...["metadata.google.internal", "mapped.example", "[64:ff9b::a9fe:a9fe]"],
		]) {
			const error = await errorOf(made.load(`http://${host}/latest/meta-data/`));
			expect(error.message, host).toContain("an address that images are never fetched from");
			expect(error.hint, host).not.toContain("image_allow_private");
		}
	});

	it("a second answer of the name server changes nothing: what was checked is connected to", async () => {
		// The first answer is good and nobody listens there; were the name asked again for the connection, it would be this machine.
		const before = hits();
		const { made, asked } = loader({ "rebind.example": [["240.0.0.1"], ["127.0.0.1"]] });
		const error = await errorOf(made.load(`http://rebind.example:${server.port}/x.png`));
		expect(error.message).toContain("rebind.example is 240.0.0.1");
		expect(asked).toEqual(["rebind.example"]);
		// Each new connection is a new answer, and each answer is checked.
		const again = await errorOf(made.load(`http://rebind.example:${server.port}/x.png`));
		expect(again.message).toContain("rebind.example is 127.0.0.1");
		expect(hits()).toBe(before);
	});

	it("are refused at every redirect, by number and by name, at the end of a chain too", async () => {
		const chain = (path: string, location: string) =>
			server.on(path, (_, response) => response.writeHead(302, { location }).end());
		chain("/r3", "http://169.254.169.254/latest/meta-data/");
		chain("/r2", "/r3");
		const metadata = chain("/r1", "/r2");
		const { made } = loader({ "inner.example": [["fe80::9"]] }, { image_allow_private: true });
		const error = await errorOf(made.load(metadata));
		expect(error.message).toBe(
			`${metadata}: 169.254.169.254 is an address that images are never fetched from (link-local, metadata, multicast or reserved) (redirected to http://169.254.169.254/latest/meta-data/)`,
		);
		const named = chain("/named", "http://inner.example/x.png");
		expect((await errorOf(made.load(named))).message).toContain("inner.example is fe80::9");
	});
});

describe("a name", () => {
	it("that does not exist is reported, once", async () => {
		const { made, asked } = loader();
		const error = await errorOf(made.load("https://missing.example/x.png"));
		expect(error.message).toBe("https://missing.example/x.png: getaddrinfo ENOTFOUND missing.example");
		expect(asked).toEqual(["missing.example"]);
	});
});
