/** Ranks on GPUs, up to where they compute: how rank 0 and another find each other, and what is refused. */
import { describe, expect, it } from "vitest";
import type { EngineOptions, Native, NativeRanks } from "../src/native.js";
import { Hub } from "../src/ranks/hub.js";
import { Worker } from "../src/ranks/worker.js";
import { errorOf } from "./support/folder.js";

async function twoOnGpus(uuids: [string, string]) {
	const calls: string[][] = [[], []];
	const links = (rank: number) => {
		const own = { waiting: () => 0, fail: () => {}, close: async () => {} };
		return Object.assign(own, { rank }) as unknown as NativeRanks;
	};
	const native = (rank: number, device: string) => {
		const engine = {
			joinRanks: async (joined: { rank: number }, id: Uint8Array) => {
				calls[rank]?.push(`join ${joined.rank} ${Buffer.from(id)}`);
			},
			fingerprint: async () => "same",
			close: async () => {},
		};
		return {
			ncclId: () => Buffer.from("an id"),
			RankListener: {
				open: (world: number, token: string) => {
					calls[rank]?.push(`listen ${world} ${token.length}`);
					return { port: () => 4711, accept: async () => links(rank) };
				},
			},
			Ranks: {
				connect: async (hosts: string[], port: number, token: string, own: number, world: number) => {
					calls[rank]?.push(`connect ${hosts} ${port} ${token.length} ${own} ${world}`);
					return links(rank);
				},
			},
			cudaReport: () => ({ devices: [{ device, name: "H100", uuid: uuids[rank] }], libraries: [] }),
			Engine: {
				open: async (options: EngineOptions) => {
					calls[rank]?.push(`open ${options.device} ${options.rank ?? 0}`);
					return engine;
				},
			},
		} as unknown as Native;
	};
	const hub = await Hub.listen(2, 2, null);
	const cpu = {} as Native;
	const worker = await Worker.connect({ hosts: ["127.0.0.1"], ...hub.address }, 1, 2, cpu, null);
	await hub.connected();
	const verdict = worker.serve(
		async () => ({}),
		(wanted) => {
			calls[1]?.push(`gpu ${wanted}`);
			return { device: "cuda:1", native: native(1, "cuda:1") };
		},
	);
	const open = () => hub.openEngine(native(0, "cuda:0"), { device: "cuda:0" } as EngineOptions);
	return { hub, worker, verdict, calls, open };
}

describe("ranks on GPUs", () => {
	it("open an engine each on a GPU of its own, connect by TCP, and then join their GPUs under one id", async () => {
		const { hub, verdict, calls, open } = await twoOnGpus(["a", "b"]);
		await (await open()).close();
		await hub.end(0);
		expect(await verdict).toEqual({ code: 0, error: null });
		expect(calls[0]).toEqual(["listen 2 64", "open cuda:0 0", "join 0 an id"]);
		expect(calls[1]).toEqual(["gpu cuda:0", "connect 127.0.0.1 4711 64 1 2", "open cuda:1 1", "join 1 an id"]);
	});

	it("are refused before they join where two have one GPU", async () => {
		const { hub, verdict, calls, open } = await twoOnGpus(["a", "a"]);
		const error = await errorOf(open());
		expect(error.message).toMatch(/^rank 0 \(.*\) and rank 1 \(.*\) use one GPU: cuda:1 \(H100\)$/);
		await hub.abandon(error);
		expect(await verdict).toEqual({ code: 1, error: null });
		expect(calls.flat().filter((call) => call.startsWith("join"))).toEqual([]);
	});
});
