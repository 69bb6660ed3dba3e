/**
 * A connection between two ranks: messages of JSON, each with bytes behind it. Knows nothing of what they mean.
 */
import type { Socket } from "node:net";

/** What one rank tells another. */
export interface Message {
	type: string;
	[name: string]: unknown;
}

/** Lengths of the JSON and of the bytes behind it. */
const HEADER = 8;
/** Longest JSON that is read: the other end is a rank of the same program, or an intruder. */
const MAX_JSON = 64 << 20;

/** One end of a connection. */
export class Channel {
	private buffered: Buffer[] = [];
	private length = 0;
	/** Bytes without which no message can be read: of the next header, or of the whole message behind it. */
	private needed = HEADER;
	/** Called with each message. */
	onMessage: (message: Message, bytes: Uint8Array) => void = () => {};
	/** Called once, when the other end is gone. */
	onClose: () => void = () => {};

	constructor(private readonly socket: Socket) {
		socket.setNoDelay(true);
		socket.on("data", (chunk: Buffer) => this.read(chunk));
		// `close` follows.
		socket.on("error", () => {});
		socket.once("close", () => this.onClose());
	}

	/** Sends a message; a connection that is gone swallows it. */
	send(message: Message, parts: readonly Uint8Array[] = []): void {
		if (this.socket.destroyed) return;
		const json = Buffer.from(JSON.stringify(message));
		const header = Buffer.alloc(HEADER);
		header.writeUInt32LE(json.length, 0);
		header.writeUInt32LE(
			parts.reduce((sum, part) => sum + part.length, 0),
			4,
		);
		this.socket.cork();
		for (const part of [header, json, ...parts]) this.socket.write(part);
		this.socket.uncork();
	}

	/** Ends the connection once all is sent. */
	end(): void {
		this.socket.end();
	}

	/** Ends the connection at once. */
	destroy(): void {
		this.socket.destroy();
	}

	/** Takes what has arrived, and every message that is whole by now. */
	private read(chunk: Buffer): void {
		this.buffered.push(chunk);
		this.length += chunk.length;
		// The pixels of a step come in thousands of chunks, which are joined once.
		if (this.length < this.needed) return;
		let all: Buffer | null = null;
		for (;;) {
			this.needed = HEADER;
			if (this.length < HEADER) break;
			all ??= Buffer.concat(this.buffered);
			const [json, bytes] = [all.readUInt32LE(0), all.readUInt32LE(4)];
			if (json > MAX_JSON) {
				this.destroy();
				break;
			}
			const end = HEADER + json + bytes;
			if (all.length < end) {
				this.needed = end;
				break;
			}
			const message = parse(all.subarray(HEADER, HEADER + json));
			if (message === null) {
				this.destroy();
				break;
			}
			const payload = all.subarray(HEADER + json, end);
			all = all.subarray(end);
			this.length = all.length;
			this.onMessage(message, payload);
		}
		if (all !== null) this.buffered = [all];
	}
}

function parse(json: Buffer): Message | null {
	try {
		const value: unknown = JSON.parse(json.toString());
		const typed = typeof value === "object" && value !== null && "type" in value && typeof value.type === "string";
		return typed ? (value as Message) : null;
	} catch {
		return null;
	}
}
