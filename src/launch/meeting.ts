/**
 * How ranks learn of a text of rank 0 before they are connected: through the store of torchrun, or at a port of rank 0's host
 * that all know. Knows nothing of what the text means. Through MPI is none of this file's business.
 */
import { connect, createServer, type Server } from "node:net";
import { ArlError } from "../errors.js";
import { addressText, type Store } from "./launch.js";
import { TorchStore } from "./torch-store.js";

/** Where a text waits for other ranks; closed when all have it. */
export interface Published {
	close(): void;
}

/** What rank 0 sends first over each connection to its port. */
const GREETING = "arl ranks 1\n";
/** How often a rank looks for rank 0's port. */
const RETRY_MILLISECONDS = 100;
/** The name of the text in torchrun's store. */
const KEY = "centre";

type Meeting = Extract<Store, { kind: "torchrun" | "tcp" }>;

/**
 * Gives `text` to every rank that asks for it. Of rank 0.
 *
 * @throws ArlError `ARL_DEVICE` where torchrun's store does not answer in so many milliseconds, or the port is taken.
 */
export async function publish(store: Meeting, text: string, milliseconds: number): Promise<Published> {
	if (store.kind === "tcp") return listen(store.port, text);
	const client = await TorchStore.connect(store.host, store.port, milliseconds);
	client.set(store.prefix + KEY, Buffer.from(text));
	return client;
}

/**
 * The text that rank 0 publishes; waits for it. Of the other ranks.
 *
 * @throws ArlError `ARL_DEVICE` where nothing, or something else, answers for so many milliseconds.
 */
export async function obtain(store: Meeting, milliseconds: number): Promise<string> {
	const { host, port } = store;
	if (store.kind === "tcp") return ask(host, port, milliseconds);
	const client = await TorchStore.connect(host, port, milliseconds);
	try {
		await client.wait(store.prefix + KEY);
		return Buffer.from(await client.get(store.prefix + KEY)).toString();
	} finally {
		client.close();
	}
}

async function listen(port: number, text: string): Promise<Published> {
	const server: Server = createServer((socket) => {
		socket.on("error", () => {});
		socket.end(GREETING + text);
	});
	await new Promise<void>((resolve, reject) => {
		server.once("error", (error: NodeJS.ErrnoException) => {
			const why = error.code === "EADDRINUSE" ? "another program listens there" : error.message;
			const hint = "Give all ranks a MASTER_PORT that is free on rank 0's host, or start them with torchrun.";
			reject(new ArlError("ARL_DEVICE", `rank 0 cannot listen at MASTER_PORT ${port}: ${why}`, hint));
		});
		server.listen(port, () => resolve());
	});
	server.unref();
	return server;
}

async function ask(host: string, port: number, milliseconds: number): Promise<string> {
	const end = Date.now() + milliseconds;
	const address = addressText(host, port);
	for (;;) {
		const found = await all(host, port, Math.max(1, end - Date.now())).catch((error: Error) => error);
		if (typeof found === "string" && found.startsWith(GREETING)) return found.slice(GREETING.length);
		if (typeof found === "string" && found.length > 0) {
			throw new ArlError(
				"ARL_DEVICE",
				`at ${address} (MASTER_ADDR, MASTER_PORT) another program answers than rank 0 of arl`,
				"Give all ranks the address of rank 0's host, and a port that is free there.",
			);
		}
		if (Date.now() + RETRY_MILLISECONDS >= end) {
			const why = typeof found === "string" ? "it closes the connection" : found.message;
			throw new ArlError(
				"ARL_DEVICE",
				`rank 0 does not answer at ${address} (MASTER_ADDR, MASTER_PORT): ${why}`,
				"Start all ranks at once; every host must be able to connect to rank 0's host by TCP.",
			);
		}
		await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
	}
}

/** All that a connection gives until it ends. */
function all(host: string, port: number, milliseconds: number): Promise<string> {
	return new Promise((resolve, reject) => {
		const socket = connect({ host, port });
		const late = setTimeout(() => socket.destroy(new Error("no answer")), milliseconds);
		let text = "";
		socket.setEncoding("utf8").on("data", (chunk: string) => {
			text += chunk;
			// Whatever does not begin so need not be read to its end.
			if (!GREETING.startsWith(text.slice(0, GREETING.length))) socket.destroy();
		});
		socket.once("error", reject);
		socket.once("close", () => {
			clearTimeout(late);
			resolve(text);
		});
	});
}
