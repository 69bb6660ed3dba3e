/** A small Python package index on loopback, and wheels for it, for tests. */
import { createHash } from "node:crypto";
import { createServer, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { crc32, deflateRawSync } from "node:zlib";
import { afterAll } from "vitest";
import type { Wheel } from "../../src/download/python-index.js";
import { sendContent } from "./hub.js";

/** A zip file of these files, each deflated (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3). */
export function zip(files: Record<string, Buffer>): Buffer {
	const parts: Buffer[] = [];
	const central: Buffer[] = [];
	let at = 0;
	for (const [name, content] of Object.entries(files)) {
		const data = deflateRawSync(content);
		const common = Buffer.alloc(26);
		common.writeUInt16LE(20, 0);
		common.writeUInt16LE(8, 4);
		common.writeUInt32LE(crc32(content), 10);
		common.writeUInt32LE(data.length, 14);
		common.writeUInt32LE(content.length, 18);
		common.writeUInt16LE(name.length, 22);
		const local = Buffer.concat([Buffer.from("PK\x03\x04"), common, Buffer.from(name), data]);
		const rest = Buffer.alloc(14);
		rest.writeUInt32LE(at, 10);
		central.push(Buffer.concat([Buffer.from("PK\x01\x02\x14\x00"), common, rest, Buffer.from(name)]));
		parts.push(local);
		at += local.length;
	}
	const directory = Buffer.concat(central);
	const end = Buffer.alloc(22);
	end.write("PK\x05\x06", "latin1");
	end.writeUInt16LE(central.length, 8);
	end.writeUInt16LE(central.length, 10);
	end.writeUInt32LE(directory.length, 12);
	end.writeUInt32LE(at, 16);
	return Buffer.concat([...parts, directory, end]);
}

export class FakeIndex {
	private readonly wheels = new Map<string, { wheel: Wheel; content: Buffer; file: string }>();
	/** Requests, as `METHOD URL`, with the range behind those that have one. */
	readonly seen: string[] = [];
	/** Breaks the next wheels off after so many bytes each. */
	breaks: number[] = [];
	html = false;
	/** `NAME:PASSWORD` that the index wants. */
	user: string | null = null;
	/** Replaces the content that is sent. */
	sends: ((content: Buffer) => Buffer) | null = null;

	private constructor(
		readonly url: string,
		private readonly server: Server,
	) {}

	static async start(): Promise<FakeIndex> {
		const server = createServer((request, response) => {
			const { url = "", headers } = request;
			index.seen.push([url, headers.range].filter(Boolean).join(" "));
			const wanted = index.user === null ? undefined : `Basic ${Buffer.from(index.user).toString("base64")}`;
			const project = /^\/simple\/([^/]+)\/$/.exec(url)?.[1];
			const one = [...index.wheels.values()].find(({ wheel, file }) => wheel.name === project || url.endsWith(file));
			if (wanted !== undefined && headers.authorization !== wanted) response.writeHead(401).end();
			else if (one === undefined) response.writeHead(404).end();
			else if (project === undefined) {
				sendContent(index.sends?.(one.content) ?? one.content, headers.range, response, index.breaks.shift());
			} else index.list(one, response);
		});
		await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
		const index = new FakeIndex(`http://127.0.0.1:${(server.address() as AddressInfo).port}/simple`, server);
		afterAll(() => index.stop());
		return index;
	}

	stop(): void {
		this.server.close();
		this.server.closeAllConnections();
	}

	/** Adds a wheel; gives its pin. */
	add(name: string, version: string, files: Record<string, Buffer>): Wheel {
		const content = zip(files);
		const wheel = { name, version, sha256: createHash("sha256").update(content).digest("hex") };
		const file = `${name.replaceAll("-", "_")}-${version}-py3-none-manylinux_2_27_x86_64.whl`;
		this.wheels.set(name, { wheel, content, file });
		return wheel;
	}

	private list({ wheel, content, file }: { wheel: Wheel; content: Buffer; file: string }, response: ServerResponse) {
		const other = file.replace("x86_64", "aarch64");
		if (this.html) {
			response.setHeader("Content-Type", "text/html");
			response.end(`<a href="../../files/${other}#sha256=${"0".repeat(64)}">${other}</a>
				<a data-requires-python="&gt;=3" href="../../files/${file}#sha256=${wheel.sha256}">${file}</a>`);
			return;
		}
		response.setHeader("Content-Type", "application/vnd.pypi.simple.v1+json");
		const files = [
			{ filename: other, url: `/files/${other}`, hashes: { sha256: "0".repeat(64) } },
			{ filename: file, url: `/files/${file}`, hashes: { sha256: wheel.sha256 }, size: content.length },
		];
		response.end(JSON.stringify({ files }));
	}
}
