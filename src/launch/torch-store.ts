/**
 * A client of the store that torchrun runs (torch's TCPStore): values by key, and waiting for one. Knows nothing of what they
 * mean. Numbers are little-endian; a text or a value has its length in front, 8 bytes.
 */
import { connect, type Socket } from "node:net";
import { ArlError } from "../errors.js";
import { addressText } from "./launch.js";

/** What a client of this protocol begins with. */
const MAGIC = 0x3c85f7ce;
/** Kinds of requests, and the answer to a wait. */
const [VALIDATE, SET, GET, WAIT, READY] = [0, 1, 3, 6, 0];
/** Longest value that is read. */
const LONGEST = 1 << 20;
/** A store may start after its ranks: how long between two tries. */
const RETRY_MILLISECONDS = 100;

/** A connection to the store. */
export class TorchStore {
	private received = Buffer.alloc(0);
	private wanted: { bytes: number; resolve: (bytes: Buffer) => void; reject: (error: Error) => void } | null = null;
	private gone: Error | null = null;

	private constructor(
		private readonly socket: Socket,
		private readonly address: string,
	) {
		socket.setNoDelay(true);
		socket.on("data", (chunk: Buffer) => {
			this.received = Buffer.concat([this.received, chunk]);
			this.serve();
		});
		socket.on("error", () => {});
		socket.on("close", () => {
			this.gone = this.failed("has closed the connection");
			this.wanted?.reject(this.gone);
		});
		const hello = Buffer.alloc(5);
		hello.writeUInt8(VALIDATE, 0);
		hello.writeUInt32LE(MAGIC, 1);
		socket.write(hello);
	}

	/**
	 * Connects, and tries again for so many milliseconds.
	 *
	 * @throws ArlError `ARL_DEVICE` where nothing answers.
	 */
	static async connect(host: string, port: number, milliseconds: number): Promise<TorchStore> {
		const address = addressText(host, port);
		const end = Date.now() + milliseconds;
		for (;;) {
			try {
				return new TorchStore(await reach(host, port, Math.max(1, end - Date.now())), address);
			} catch (error) {
				if (Date.now() + RETRY_MILLISECONDS < end) {
					await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
					continue;
				}
				const why = (error as Error).message;
				throw new ArlError(
					"ARL_DEVICE",
					`torchrun's store at ${address} does not answer: ${why}`,
					"Start all ranks with one torchrun a host, and leave MASTER_ADDR and MASTER_PORT as it sets them.",
				);
			}
		}
	}

	/** Sets a key's value. */
	set(key: string, value: Uint8Array): void {
		this.socket.write(Buffer.concat([Buffer.of(SET), text(key), length(value.length), value]));
	}

	/** Resolves when a key has a value. */
	async wait(key: string): Promise<void> {
		this.socket.write(Buffer.concat([Buffer.of(WAIT), length(1), text(key)]));
		const [answer] = await this.read(1);
		if (answer !== READY) throw this.failed(`gave up the wait for ${key}`);
	}

	/** A key's value, which it must have. */
	async get(key: string): Promise<Uint8Array> {
		this.socket.write(Buffer.concat([Buffer.of(GET), text(key)]));
		const bytes = Number((await this.read(8)).readBigUInt64LE());
		if (bytes > LONGEST) throw this.failed(`has ${bytes} bytes for ${key}`);
		return this.read(bytes);
	}

	/** Ends the connection once all is sent. */
	close(): void {
		this.socket.end();
	}

	private read(bytes: number): Promise<Buffer> {
		if (this.gone !== null) return Promise.reject(this.gone);
		return new Promise((resolve, reject) => {
			this.wanted = { bytes, resolve, reject };
			this.serve();
		});
	}

	private serve(): void {
		if (this.wanted === null || this.received.length < this.wanted.bytes) return;
		const { bytes, resolve } = this.wanted;
		this.wanted = null;
		resolve(this.received.subarray(0, bytes));
		this.received = this.received.subarray(bytes);
	}

	private failed(what: string): ArlError {
		return new ArlError(
			"ARL_DEVICE",
			`torchrun's store at ${this.address} ${what}`,
			"Look at what torchrun printed, and at its other hosts.",
		);
	}
}

function reach(host: string, port: number, milliseconds: number): Promise<Socket> {
	return new Promise((resolve, reject) => {
		const socket = connect({ host, port });
		const late = setTimeout(() => socket.destroy(new Error("no answer")), milliseconds);
		const settled = (settle: () => void) => {
			clearTimeout(late);
			settle();
		};
		socket.once("error", (error) => settled(() => reject(error)));
		socket.once("connect", () => settled(() => resolve(socket)));
	});
}

function length(bytes: number): Buffer {
	const buffer = Buffer.alloc(8);
	buffer.writeBigUInt64LE(BigInt(bytes));
	return buffer;
}

function text(value: string): Buffer {
	const bytes = Buffer.from(value);
	return Buffer.concat([length(bytes.length), bytes]);
}
