/** Small true images, and a web server of a test that answers as badly as it is asked to. */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import sharp from "sharp";
import { afterAll } from "vitest";

/** An image of noise, which no format makes much smaller. */
export async function picture(
	format: "png" | "jpeg" | "webp" | "gif" | "tiff" | "avif",
	width = 8,
	height = 6,
): Promise<Buffer> {
	const raw = Buffer.from(Array.from({ length: width * height * 3 }, (_, i) => (i * 7919 + ((i * i) % 251)) % 256));
	return sharp(raw, { raw: { width, height, channels: 3 } })
		.toFormat(format)
		.toBuffer();
}

export type Handler = (request: IncomingMessage, response: ServerResponse, hit: number) => void;

export interface TestServer {
	/** `http://127.0.0.1:PORT` */
	origin: string;
	port: number;
	/** Requests by path. */
	hits: Map<string, number>;
	on(path: string, handler: Handler): string;
}

/** A server on this machine that ends with the tests of the file. */
export async function testServer(): Promise<TestServer> {
	const handlers = new Map<string, Handler>();
	const hits = new Map<string, number>();
	const server = createServer((request, response) => {
		const path = new URL(request.url ?? "/", "http://localhost").pathname;
		const hit = (hits.get(path) ?? 0) + 1;
		hits.set(path, hit);
		const handler = handlers.get(path);
		if (handler) handler(request, response, hit);
		else response.writeHead(404).end("nothing here");
	});
	await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
	afterAll(() => {
		server.closeAllConnections();
		server.close();
	});
	const { port } = server.address() as AddressInfo;
	const origin = `http://127.0.0.1:${port}`;
	return {
		origin,
		port,
		hits,
		on: (path, handler) => {
			handlers.set(path, handler);
			return `${origin}${path}`;
		},
	};
}
