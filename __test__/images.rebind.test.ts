/**
 * From a public server to a private one: two servers on one port of this machine, at 127.0.0.1 and 127.0.0.2, of which the
 * first counts as public here. Systems that have no 127.0.0.2 of their own skip.
 */
import { createServer, type RequestListener, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import type { Reach } from "../src/images/address.js";
import { loaderWithHooks } from "../src/images/loader.js";
import { errorOf } from "./support/folder.js";
import { picture } from "./support/images.js";

vi.mock("../src/images/address.js", async (original) => {
	const { reachOf } = await original<typeof import("../src/images/address.js")>();
	return { reachOf: (address: string): Reach => (address === "127.0.0.1" ? "public" : reachOf(address)) };
});

const servers: Server[] = [];
let port = 0;
let secondHost = true;
const hits = { public: [] as string[], private: [] as string[] };

function listen(listener: RequestListener, host: string, at: number): Promise<number> {
	const server = createServer(listener);
	servers.push(server);
	return new Promise((resolve, reject) => {
		server.once("error", reject).listen(at, host, () => resolve((server.address() as AddressInfo).port));
	});
}

beforeAll(async () => {
	const png = await picture("png");
	port = await listen(
		(request, response) => {
			hits.public.push(request.url ?? "");
			// A closed connection makes the next request resolve its name again.
			response.setHeader("connection", "close");
			if (request.url === "/leave") response.writeHead(302, { location: `http://127.0.0.2:${port}/secret` }).end();
			else if (request.url === "/name") response.writeHead(302, { location: `http://two.example:${port}/x` }).end();
			else response.end(png);
		},
		"127.0.0.1",
		0,
	);
	await listen(
		(request, response) => {
			hits.private.push(request.url ?? "");
			response.end(png);
		},
		"127.0.0.2",
		port,
	).catch(() => {
		secondHost = false;
		process.stderr.write("SKIPPED: redirects to a private server: this system has no 127.0.0.2\n");
	});
});
afterAll(() => {
	for (const server of servers) {
		server.closeAllConnections();
		server.close();
	}
});

/** Answers of the name server, one for each question; the last one for ever. */
function loader(answers: Record<string, string[]>, image_allow_private = false) {
	const asked: string[] = [];
	const made = loaderWithHooks(
		{ image_allow_private },
		{
			pause: async () => {},
			resolve: async (name) => {
				asked.push(name);
				const left = answers[name] ?? [];
				const address = (left.length > 1 ? left.shift() : left[0]) ?? "";
				return [{ address, family: 4 }];
			},
		},
	);
	return { made, asked };
}

describe("from a public server", () => {
	it("no redirect leads to a private address or a name of one", async ({ skip }) => {
		skip(!secondHost);
		const { made } = loader({ "two.example": ["127.0.0.2"] });
		const literal = await errorOf(made.load(`http://127.0.0.1:${port}/leave`));
		expect(literal.message).toContain("127.0.0.2 is an address of this machine or of a private network");
		const named = await errorOf(made.load(`http://127.0.0.1:${port}/name`));
		expect(named.message).toContain("two.example is 127.0.0.2");
		expect(hits.private).toEqual([]);
		expect(hits.public).toEqual(["/leave", "/name"]);
		await made.close();
		// Were the redirects not followed at all, nothing would be proven.
		const open = loader({ "two.example": ["127.0.0.2"] }, true).made;
		await open.load(`http://127.0.0.1:${port}/leave`);
		await open.load(`http://127.0.0.1:${port}/name`);
		expect(hits.private.splice(0)).toEqual(["/secret", "/x"]);
		await open.close();
	});

	it("a name whose second answer is private is connected to at its first, which was checked", async ({ skip }) => {
		skip(!secondHost);
		const { made, asked } = loader({ "turn.example": ["127.0.0.1", "127.0.0.2"] });
		expect((await made.load(`http://turn.example:${port}/a`)).width).toBe(8);
		expect(asked).toEqual(["turn.example"]);
		expect((await errorOf(made.load(`http://turn.example:${port}/b`))).message).toContain("turn.example is 127.0.0.2");
		expect(hits.private).toEqual([]);
		await made.close();
	});
});
