/** How ranks find each other without MPI: torchrun's store, a port that all know, and the file for torchrun's report. */
import { spawn } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { delimiter, dirname, join } from "node:path";
import { describe, expect, it } from "vitest";
import { ArlError } from "../src/errors.js";
import { errorFileText, writeErrorFile } from "../src/launch/error-file.js";
import { obtain, publish } from "../src/launch/meeting.js";
import { starter } from "../src/launch/start.js";
import { TorchStore } from "../src/launch/torch-store.js";
import { findTorchrun, torchrunArguments } from "../src/launch/torchrun.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";

const folder = temporaryFolder();

/** A store as torch's, which answers waits, and reads requests however they are cut. */
async function tinyStore(): Promise<{ port: number; keys: Map<string, Buffer>; close: () => void }> {
	const keys = new Map<string, Buffer>();
	const waiting: { socket: Socket; key: string }[] = [];
	const server: Server = createServer((socket) => {
		let bytes = Buffer.alloc(0);
		socket.on("error", () => {});
		const request = (at: number): number => {
			const text = (from: number) => {
				const length = Number(bytes.readBigUInt64LE(from));
				if (bytes.length < from + 8 + length) throw new RangeError();
				return { value: bytes.subarray(from + 8, from + 8 + length), end: from + 8 + length };
			};
			switch (bytes.readUInt8(at)) {
				case 0:
					if (bytes.readUInt32LE(at + 1) !== 0x3c85f7ce) socket.destroy();
					return at + 5;
				case 1: {
					const key = text(at + 1);
					const value = text(key.end);
					keys.set(key.value.toString(), Buffer.from(value.value));
					for (const one of waiting) if (keys.has(one.key)) one.socket.write(Buffer.of(0));
					return value.end;
				}
				case 3: {
					const key = text(at + 1);
					const value = keys.get(key.value.toString()) ?? Buffer.alloc(0);
					const length = Buffer.alloc(8);
					length.writeBigUInt64LE(BigInt(value.length));
					// In two pieces, as a network may cut it.
					socket.write(length.subarray(0, 3));
					setTimeout(() => socket.write(Buffer.concat([length.subarray(3), value])), 5);
					return key.end;
				}
				case 6: {
					if (bytes.readBigUInt64LE(at + 1) !== 1n) socket.destroy();
					const key = text(at + 9);
					if (keys.has(key.value.toString())) socket.write(Buffer.of(0));
					else waiting.push({ socket, key: key.value.toString() });
					return key.end;
				}
				default:
					socket.destroy();
					return bytes.length;
			}
		};
		socket.on("data", (chunk) => {
			bytes = Buffer.concat([bytes, chunk]);
			try {
				for (let at = 0; at < bytes.length; bytes = bytes.subarray(at), at = 0) at = request(0);
			} catch {
				// The rest of it is still on its way.
			}
		});
	});
	return { port: await listening(server), keys, close: () => server.close() };
}

function listening(server: Server): Promise<number> {
	return new Promise((resolve) => {
		server.listen(0, "127.0.0.1", () => resolve((server.address() as { port: number }).port));
	});
}

/** A port at which nothing listens. */
async function freePort(): Promise<number> {
	const server = createServer();
	const port = await listening(server);
	await new Promise((resolve) => server.close(resolve));
	return port;
}

describe("a text of rank 0", () => {
	it("comes to the other ranks through torchrun's store, under the keys of this restart, also before it is there", async () => {
		const store = await tinyStore();
		const at = { kind: "torchrun", host: "127.0.0.1", port: store.port } as const;
		const before = obtain({ ...at, prefix: "arl/x/1/" }, 5000);
		const older = await publish({ ...at, prefix: "arl/x/0/" }, "of the first start", 5000);
		const text = JSON.stringify({ hosts: ["fd00::7"], port: 1, token: "é".repeat(3000) });
		const published = await publish({ ...at, prefix: "arl/x/1/" }, text, 5000);
		expect([await before, await obtain({ ...at, prefix: "arl/x/1/" }, 5000)]).toEqual([text, text]);
		expect([...store.keys.keys()]).toEqual(["arl/x/0/centre", "arl/x/1/centre"]);
		older.close();
		published.close();
		store.close();
	});

	it("comes to ranks that look for it before rank 0 listens at its port", async () => {
		const store = { kind: "tcp", host: "127.0.0.1", port: await freePort() } as const;
		const before = [obtain(store, 5000), obtain(store, 5000)];
		const published = await publish(store, "é text", 5000);
		expect(await Promise.all([...before, obtain(store, 5000)])).toEqual(["é text", "é text", "é text"]);
		const second = await errorOf(publish(store, "another", 5000));
		expect(second).toMatchObject({
			code: "ARL_DEVICE",
			message: expect.stringContaining("another program listens there"),
		});
		published.close();
	});

	it("is missed with the address where nothing, or something else, answers", async () => {
		const port = await freePort();
		const nobody = await errorOf(obtain({ kind: "tcp", host: "127.0.0.1", port }, 300));
		expect(nobody.message).toContain(`rank 0 does not answer at 127.0.0.1:${port} (MASTER_ADDR, MASTER_PORT)`);
		const none = await errorOf(TorchStore.connect("127.0.0.1", port, 300));
		expect(none).toMatchObject({
			code: "ARL_DEVICE",
			message: expect.stringContaining(`torchrun's store at 127.0.0.1:${port} does not answer: `),
		});
		const other = createServer((socket) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"));
		const taken = { kind: "tcp", host: "127.0.0.1", port: await listening(other) } as const;
		expect((await errorOf(obtain(taken, 5000))).message).toContain("another program answers than rank 0 of arl");
		const gone = createServer((socket) => socket.destroy());
		const store = await TorchStore.connect("127.0.0.1", await listening(gone), 1000);
		expect((await errorOf(store.wait("key"))).message).toContain("has closed the connection");
		other.close();
		gone.close();
	});
});

describe("what starts ranks on this machine", () => {
	it("is torchrun on GPUs where it is there, else mpirun; without both both are named", async () => {
		const bin = join(folder, "bin");
		mkdirSync(bin);
		writeFileSync(join(bin, "torchrun"), "#!/bin/sh\n", { mode: 0o755 });
		const path = ["/nowhere", bin].join(delimiter);
		expect(starter(2, true, path)).toEqual({
			file: join(bin, "torchrun"),
			args: ["--standalone", "--no-python", "--nproc_per_node=2"],
			stopSignal: "SIGTERM",
		});
		expect([findTorchrun("/nowhere"), findTorchrun(undefined)]).toEqual([null, null]);
		expect((await errorOf(() => starter(2, true, "/nowhere"))).message).toContain("torchrun or mpirun, and neither");
		expect((await errorOf(() => starter(2, false, path))).message).toContain("mpirun, and there is none in PATH");
	});
});

describe("torchrun's error file", () => {
	const error = new ArlError("ARL_OOM", "no memory on rank 1", "take less");

	it("has torch's form, with code, message and hint", () => {
		const text = "ARL_OOM no memory on rank 1\ntake less";
		expect(JSON.parse(errorFileText(error, 12.9))).toEqual({
			message: { message: text, extraInfo: { py_callstack: text, timestamp: "12" } },
		});
	});

	it("is written where torchrun names one, and where that fails nothing else does", () => {
		const file = join(folder, "error.json");
		writeErrorFile(error, {});
		writeErrorFile(error, { TORCHELASTIC_ERROR_FILE: join(folder, "none", "error.json") });
		writeErrorFile(error, { TORCHELASTIC_ERROR_FILE: file });
		expect(readFileSync(file, "utf8")).toContain("no memory on rank 1");
	});
});

/** torchrun of the Python that `ARL_PYTHON` names. */
const torchrun = process.env.ARL_PYTHON ? findTorchrun(dirname(process.env.ARL_PYTHON)) : null;
if (torchrun === null) process.stderr.write("SKIPPED: ranks under torchrun: ARL_PYTHON names no Python with torch\n");

describe.skipIf(torchrun === null)("under torchrun itself", () => {
	/** `arl train` on two ranks, and what it wrote. */
	const ranks = (args: string[], env: NodeJS.ProcessEnv = {}) => {
		const command = [process.execPath, join(root, "dist", "cli", "main.js"), "train", ...args];
		const child = spawn(String(torchrun), [...torchrunArguments(2), ...command], {
			cwd: root,
			env: { ...process.env, NO_COLOR: "1", ARL_CACHE: folder, ...env },
		});
		let text = "";
		for (const stream of [child.stdout, child.stderr]) {
			stream.setEncoding("utf8").on("data", (chunk) => {
				text += chunk;
			});
		}
		return new Promise<{ code: number | null; text: string }>((resolve) => {
			child.on("close", (code) => resolve({ code, text }));
		});
	};
	const place = ["--model_name_or_path", "assets/model", "--train_file", "assets/train.jsonl", "--output_dir"];

	it("ranks find each other through its store, and a failure is its root cause", { timeout: 300_000 }, async () => {
		// Without a GPU rank 0 is the one that fails, after both are connected and agree.
		const run = await ranks([...place, join(folder, "out"), "--device", "cuda"]);
		expect(run.code).toBe(1);
		expect(run.text).toContain("torchrun: rank 0 of 2, 0 of 2 on this host, store at ");
		expect(run.text.match(/^ARL_DEVICE .*device cuda: no NVIDIA driver/gm)?.length ?? 0, run.text).toBeLessThanOrEqual(
			1,
		);
		expect(run.text).toMatch(/Root Cause[\s\S]*ARL_DEVICE device cuda: no NVIDIA driver/);
	});

	it("ranks on CPUs are refused with the line for mpirun", { timeout: 300_000 }, async () => {
		const run = await ranks([...place, join(folder, "cpu"), "--device", "cpu"]);
		expect(run.code).toBe(1);
		expect(run.text).toContain("mpirun -n 2 npx arl train ... --device cpu");
	});
});
