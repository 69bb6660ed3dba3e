/** What ranks tell each other, without an MPI: rank 0 and another one over a real connection, on a fake core. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it, vi } from "vitest";
import { QwenTrainer } from "../src/api/trainer.js";
import { ranksFindings } from "../src/cli/doctor-ranks.js";
import { onStopSignals } from "../src/cli/signals.js";
import { trainingSchema } from "../src/config/schema.js";
import { ArlError } from "../src/errors.js";
import type { EngineOptions, MemoryPlan, MicroBatch, Native, NativeEngine, NativeRanks } from "../src/native.js";
import { checkShared, deviceOfRank } from "../src/ranks/gpus.js";
import { Hub } from "../src/ranks/hub.js";
import { checkDevice, checkRanks } from "../src/ranks/ranks.js";
import { Worker } from "../src/ranks/worker.js";
import { divideToFit } from "../src/run/setup/memory.js";
import { zeroOf, zeroText } from "../src/run/setup/options.js";
import { errorOf } from "./support/folder.js";
import { root } from "./support/real.js";

const batch = (length: number, weights = false): MicroBatch => {
	const ids = Int32Array.from({ length }, (_, i) => i);
	const all = { inputIds: ids, targets: ids.map((id) => -id), positions: ids, cuSeqlens: Int32Array.of(0, length) };
	return weights ? { ...all, weights: Float32Array.from(ids, (id) => id / 3) } : all;
};

async function two(engines: Partial<NativeEngine>[] = [{}, {}]) {
	const calls: string[][] = [[], []];
	const failed: string[] = [];
	const mpi = (rank: number) =>
		({
			waiting: () => 0,
			spent: () => 0,
			fail: (reason) => failed.push(`${rank}: ${reason}`),
			close: async () => {},
			library: () => "fake",
			broadcast: async (bytes) => bytes,
		}) satisfies NativeRanks;
	const engine = (rank: number) => {
		const answers: Record<string, unknown> = { submitStep: 1, fingerprint: "same", finishStep: { loss: 1 } };
		return new Proxy(engines[rank] as NativeEngine, {
			get: (given, key: string) => {
				if (key === "then") return undefined;
				return (...args: unknown[]) => {
					calls[rank]?.push(key === "submitStep" ? `submitStep ${(args[0] as MicroBatch[]).length}` : key);
					const own: unknown = Reflect.get(given, key);
					return typeof own === "function" ? own(...args) : Promise.resolve(answers[key]);
				};
			},
		});
	};
	const native = (rank: number) =>
		({ Engine: { open: async () => engine(rank) as unknown as NativeEngine } }) as unknown as Native;
	const hub = await Hub.listen(2, 2, mpi(0) as unknown as NativeRanks);
	const centre = { hosts: ["127.0.0.1"], ...hub.address };
	const worker = await Worker.connect(centre, 1, 2, native(1), mpi(1) as unknown as NativeRanks);
	await hub.connected();
	const open = (options: Partial<EngineOptions> = {}) => hub.openEngine(native(0), options as EngineOptions);
	return { hub, worker, centre, calls, failed, open };
}

describe("rank 0 and another rank", () => {
	it("do a step together, each its own micro-batches, and end together", async () => {
		const { hub, worker, calls, open } = await two();
		const verdict = worker.serve(async () => ({ seed: "1" }));
		await hub.agree({ seed: "1" });
		const engine = await open();
		const ticket = await engine.submitStep([batch(1), batch(2), batch(3)], { learningRate: 1, maxGradNorm: 1 });
		await engine.finishStep(ticket);
		await engine.saveState("somewhere");
		await engine.close();
		await hub.end(130);
		expect(await verdict).toEqual({ code: 130, error: null });
		const before = ["joinRanks", "fingerprint"];
		expect(calls[0]).toEqual([...before, "submitStep 2", "finishStep", "fingerprint", "saveState", "close"]);
		expect(calls[1]).toEqual([...before, "submitStep 1", "finishStep", "fingerprint", "close"]);
	});

	it("compute the same micro-batches where they divide a model, and save together", async () => {
		const { hub, worker, calls, open } = await two();
		const verdict = worker.serve(async () => ({}));
		const engine = await open({ dataParallel: 1, tpSize: 2, zero: 2 });
		const ticket = await engine.submitStep([batch(1), batch(2), batch(3)], { learningRate: 1, maxGradNorm: 1 });
		await engine.finishStep(ticket);
		await engine.saveState("somewhere");
		await engine.close();
		await hub.end(0);
		expect(await verdict).toEqual({ code: 0, error: null });
		const both = ["joinRanks", "fingerprint", "submitStep 3", "finishStep", "fingerprint", "saveState", "close"];
		expect(calls).toEqual([both, both]);
	});

	it("save together where they divide moments, each what it has", async () => {
		const { hub, worker, calls, open } = await two();
		const verdict = worker.serve(async () => ({}));
		const engine = await open({ zero: 1 });
		await engine.exportModel("somewhere");
		await engine.saveState("somewhere");
		await engine.exportAdapter("somewhere", "base");
		await engine.close();
		await hub.end(0);
		expect(await verdict).toEqual({ code: 0, error: null });
		const both = ["joinRanks", "fingerprint", "exportModel", "fingerprint", "saveState", "exportAdapter", "close"];
		expect(calls).toEqual([both, both]);
	});

	it("evaluate and generate on rank 0 alone, to which the other sends weights where they divide these", async () => {
		const divided: Partial<EngineOptions>[] = [{ zero: 2 }, { zero: 3 }, { zero: 2, tpSize: 2, dataParallel: 1 }];
		for (const options of divided) {
			const serving = options.zero === 3 || options.tpSize !== undefined;
			const thrown = () => {
				throw new ArlError("ARL_DATA", "no prompt");
			};
			const { hub, worker, calls, open } = await two([{ generate: thrown, evaluateSequences: async () => [] }, {}]);
			const verdict = worker.serve(async () => ({}));
			const engine = await open(options);
			await engine.evaluateSequences(batch(1));
			// What fails before the engine has it leaves no rank behind.
			expect((await errorOf(() => engine.generate([], { maxNewTokens: 1, stopIds: [] }))).message).toBe("no prompt");
			await engine.close();
			await hub.end(0);
			expect(await verdict).toEqual({ code: 0, error: null });
			const ends = serving ? ["endServing"] : [];
			const before = ["joinRanks", "fingerprint"];
			expect(calls[0]).toEqual([...before, "evaluateSequences", ...ends, "generate", ...ends, "close"]);
			const serves = serving ? ["serveWeights", "serveWeights"] : [];
			expect(calls[1]).toEqual([...before, ...serves, "close"]);
		}
	});

	it("fail with the error of the rank that could not save", async () => {
		const follows = () => Promise.reject(new ArlError("ARL_INTERRUPTED", "ended because rank 1 failed"));
		const full = () => Promise.reject(new ArlError("ARL_IO", "no space left", "free some"));
		const { hub, worker, open } = await two([{ saveState: follows }, { saveState: full }]);
		const verdict = worker.serve(async () => ({}));
		const engine = await open({ zero: 2 });
		const error = await errorOf(engine.saveState("somewhere"));
		expect(error).toMatchObject({ code: "ARL_IO", hint: "free some" });
		expect(error.message).toMatch(/^rank 1 \(host \S+, pid \d+\): no space left$/);
		await hub.abandon(error);
		expect((await verdict).error).toBeNull();
	});

	it("disagree with all that differs, by name", async () => {
		const { hub, worker } = await two();
		const verdict = worker.serve(async () => ({ seed: "1", version: "2", only: "here" }));
		const error = await errorOf(hub.agree({ seed: "1", version: "3" }));
		expect(error.code).toBe("ARL_CONFIG");
		expect(error.message).toMatch(/^rank 1 \(host \S+, pid \d+\) was started differently from rank 0:\n/);
		expect(error.message).toContain("version: 3 on rank 0, 2 there\nonly: none on rank 0, here there");
		await hub.abandon(error);
		expect(await verdict).toEqual({ code: 2, error: null });
	});

	it("find that their weights differ, and name the rank and the moment", async () => {
		const { hub, worker, open } = await two([{}, { fingerprint: async () => "other" }]);
		const verdict = worker.serve(async () => ({}));
		const error = await errorOf(open());
		expect(error.code).toBe("ARL_WEIGHTS");
		expect(error.message).toMatch(/^rank 1 \(.*\) has other weights than rank 0 after opening the model$/);
		await hub.abandon(error);
		expect((await verdict).code).toBe(3);
	});

	it("fail with the other rank's error: its code, place, message and hint", async () => {
		const submitStep = () => Promise.reject(new ArlError("ARL_OOM", "no memory", "take less"));
		const { hub, worker, failed, open } = await two([{ submitStep: () => new Promise(() => {}) }, { submitStep }]);
		const verdict = worker.serve(async () => ({}));
		const engine = await open();
		engine.submitStep([batch(1), batch(2)], { learningRate: 1, maxGradNorm: 1 }).catch(() => {});
		const error = await errorOf(hub.unlessFailed(new Promise(() => {})));
		expect(error).toMatchObject({ code: "ARL_OOM", hint: "take less", exitCode: 4 });
		expect(error.message).toMatch(/^rank 1 \(host \S+, pid \d+\): no memory$/);
		expect(failed).toEqual([`0: ${error.message}`]);
		await hub.abandon(error);
		expect(await verdict).toEqual({ code: 4, error: null });
	});

	it("leave a loss that is not finite to rank 0, which finds the same", async () => {
		const finishStep = () => Promise.reject(new ArlError("ARL_NONFINITE", "the loss is NaN"));
		const { hub, worker, open } = await two([{ finishStep }, { finishStep }]);
		const verdict = worker.serve(async () => ({}));
		const engine = await open();
		const ticket = await engine.submitStep([batch(1)], { learningRate: 1, maxGradNorm: 1 });
		const error = await errorOf(engine.finishStep(ticket));
		expect(error).toMatchObject({ code: "ARL_NONFINITE", message: "the loss is NaN" });
		expect(hub.hasFailed).toBe(false);
		await hub.abandon(error);
		expect((await verdict).code).toBe(5);
	});

	it("end where rank 0 is gone: the other one says so", async () => {
		const { hub, worker, failed } = await two();
		const verdict = worker.serve(async () => ({}));
		Reflect.get(hub, "peers").get(1).channel.destroy();
		const { code, error } = await verdict;
		expect(code).toBe(1);
		expect(error?.message).toBe("rank 0 was killed, or its host is gone; rank 1 was starting");
		expect(failed).toContain("1: rank 0 was killed, or its host is gone");
	});

	it("do not let in who does not know the token, or names no rank", async () => {
		const { hub, centre } = await two();
		const mpi = { waiting: () => 0, fail: () => {} } as unknown as NativeRanks;
		for (const [rank, token] of [
			[1, centre.token],
			[7, centre.token],
			[1, "guess"],
		] as const) {
			const stranger = await Worker.connect({ ...centre, token }, rank, 2, {} as Native, mpi);
			expect((await stranger.serve(async () => ({}))).error?.message).toContain("rank 0 was killed");
		}
		expect(hub.hasFailed).toBe(false);
	});
});

/** Two ranks on GPUs, connected without MPI. `uuids`: of their GPUs. */
describe("a signal to any rank", () => {
	it("stops the run once, and not where a rank has failed", async () => {
		vi.useFakeTimers();
		const notes: string[] = [];
		const ranks = { onStop: (_: NodeJS.Signals) => {}, hasFailed: false };
		const stop = onStopSignals((text) => notes.push(text), ranks);
		ranks.onStop("SIGTERM");
		process.emit("SIGTERM", "SIGTERM");
		expect(stop.signal.aborted).toBe(false);
		vi.advanceTimersByTime(1000);
		expect([stop.signal.aborted, notes]).toEqual([true, ["SIGTERM: finishing the step on all ranks and saving"]]);
		stop.release();
		const failed = { ...ranks, hasFailed: true };
		const other = onStopSignals((text) => notes.push(text), failed);
		failed.onStop("SIGTERM");
		vi.advanceTimersByTime(1000);
		expect([other.signal.aborted, notes.length]).toEqual([false, 1]);
		other.release();
		vi.useRealTimers();
	});
});

describe("what a run of several ranks needs", () => {
	const one = { dp_replicate_size: 1, tp_size: 1, cp_size: 1, ep_size: 1, pp_size: 1 };
	const sizes = (dp_size: number) => ({ dp_size, ...one });
	const ranks = (world: number) => ({
		world,
		localWorld: world,
		cpuRefusal: null,
		openEngine: () => Promise.reject(new Error("none")),
	});

	it("is arl train: a program that calls the trainer would train once on each", async () => {
		const place = { model_name_or_path: "m", train_file: "f", output_dir: "o" };
		const names = { RANK: "0", SIZE: "2", LOCAL_RANK: "0", LOCAL_SIZE: "2" };
		for (const [name, value] of Object.entries(names)) vi.stubEnv(`OMPI_COMM_WORLD_${name}`, value);
		const error = await errorOf(new QwenTrainer({ args: place }).train());
		vi.unstubAllEnvs();
		expect(error).toMatchObject({
			code: "ARL_DEVICE",
			message: expect.stringContaining("2 ranks were started by Open MPI"),
		});
	});

	it("is as many as dp_size", async () => {
		const message = async (world: number, dp: number, mesh = {}) =>
			(await errorOf(() => checkRanks(ranks(world), { ...sizes(dp), ...mesh }))).message;
		expect(await message(1, 2)).toBe("dp_size is 2, and this process trains alone");
		expect(await message(4, 2)).toBe("dp_size is 2, and 4 ranks were started");
		expect(await message(1, 1, { tp_size: 2 })).toBe("tp_size 2 makes 2 ranks, and this process trains alone");
		checkRanks(ranks(4), sizes(4));
		checkRanks(ranks(24), { ...sizes(2), tp_size: 2, cp_size: 3, ep_size: 4, pp_size: 2 });
	});

	it("is MPI on CPUs, and NCCL on GPUs, of which each rank has one", async () => {
		const nothing = { tried: [], hint: "install it" };
		const old = {
			tried: [
				{ at: "/old", why: "it is NCCL 2.26.2" },
				{ at: "/none", why: "not there" },
			],
			hint: "install it",
		};
		const on = (wanted: string, device: string, report: object = nothing) => {
			return { wanted, device, native: { ncclReport: () => report as ReturnType<Native["ncclReport"]> } };
		};
		const refusal = new ArlError("ARL_DEVICE", "no MPI");
		expect(await errorOf(() => checkDevice({ ...ranks(2), cpuRefusal: refusal }, on("auto", "cpu")))).toBe(refusal);
		checkDevice(ranks(2), on("cpu", "cpu"));
		checkDevice(ranks(1), on("cuda", "cuda:0"));
		checkDevice(ranks(2), on("cuda", "cuda:0", { ...nothing, found: "NCCL 2.30.7 (libnccl.so.2)" }));
		checkDevice({ ...ranks(2), localWorld: 1 }, on("cuda:3", "cuda:3", { ...nothing, found: "NCCL" }));
		expect(await errorOf(() => checkDevice(ranks(2), on("auto", "cuda:0", old)))).toMatchObject({
			message: "2 ranks on GPUs (device cuda:0) need NCCL (libnccl.so.2), and there is none; /old: it is NCCL 2.26.2",
			hint: "To get it: install it.",
		});
		const one = await errorOf(() => checkDevice(ranks(2), on("cuda:0", "cuda:0", { ...nothing, found: "NCCL" })));
		expect(one.message).toBe("device cuda:0 names one GPU, and 2 ranks run on this host");
	});

	it("is a GPU for each rank on its host", async () => {
		const usable = ["cuda:0", "cuda:2", "cuda:3"];
		const of = (localRank: number, localWorld: number, gpus: string[], env = {}, wanted = "cuda") =>
			deviceOfRank(wanted, gpus, { localRank, localWorld }, env);
		expect([0, 1, 2].map((rank) => of(rank, 3, usable))).toEqual(usable);
		// A launcher that gives each rank a GPU of its own shows it that one alone.
		expect([of(1, 2, ["cuda:0"]), of(0, 1, usable), of(0, 1, usable, {}, "cuda:3")]).toEqual([
			"cuda:0",
			"cuda:0",
			"cuda:3",
		]);
		expect(of(3, 4, usable, { NCCL_MULTI_RANK_GPU_ENABLE: "1" })).toBe("cuda:0");
		expect((await errorOf(() => of(3, 4, usable))).message).toBe(
			"rank 3 of 4 on this host has no GPU: 3 can be used (cuda:0, cuda:2, cuda:3)",
		);
		const gpu = (host: string, uuid: string) => ({ host, device: "cuda:0", name: "H100", uuid });
		const name = (rank: number) => `rank ${rank}`;
		checkShared([gpu("a", "1"), gpu("b", "2"), gpu("c", ""), gpu("d", "")], name, {});
		const two = [gpu("a", "1"), gpu("b", "2"), gpu("a", "1")];
		checkShared(two, name, { NCCL_MULTI_RANK_GPU_ENABLE: "1" });
		expect(await errorOf(() => checkShared(two, name, {}))).toMatchObject({
			code: "ARL_DEVICE",
			message: "rank 0 and rank 2 use one GPU: cuda:0 (H100)",
		});
	});

	it("is divided as zero says, and by itself as far as that is built", () => {
		expect(zeroOf({ ...sizes(1), zero: 2 })).toBe(0);
		expect(zeroOf({ ...sizes(2), zero: "auto" })).toBe(2);
		expect(zeroOf({ ...sizes(2), zero: 1 })).toBe(1);
		expect(zeroText({ ...sizes(1), zero: "auto" }, 0)).toBeNull();
		expect(zeroText({ ...sizes(1), zero: 1 }, 0)).toContain("no effect");
		expect(zeroText({ ...sizes(4), zero: "auto" }, 2)).toBe(
			"zero 2 (auto): 4 ranks divide gradients, moments and master weights among them",
		);
		expect(zeroText({ ...sizes(4), zero: "auto" }, 3)).toContain("zero 3 (auto: 2 does not fit a rank's share of the");
		expect(zeroText({ ...sizes(2), zero: 0 }, 0)).toBe("zero 0: 2 ranks divide nothing among them");
		const cut = { ...sizes(1), tp_size: 2, zero: "auto" as const };
		expect(zeroText(cut, zeroOf(cut))).toMatch(/^zero 2 \(auto\): ranks with the same weights divide gradients, /);
		const parse = (zero: unknown) => trainingSchema.shape.zero.safeParse(zero).success;
		expect(["auto", 0, 1, 2, 3, 4, -1, "2"].map(parse)).toEqual([true, true, true, true, true, false, false, false]);
	});

	it("is weights too where nobody has asked, and only that fits", () => {
		const plan = ({ zero }: EngineOptions) => ({ totalBytes: zero === 3 ? 50 : 100 }) as MemoryPlan;
		const taken = (asked: "auto" | number, room?: number, zero = 2, larger = 0) => {
			const grown = (options: EngineOptions) => ({
				...plan(options),
				totalBytes: plan(options).totalBytes + (options.zero === 3 ? larger : 0),
			});
			return divideToFit({ zero } as EngineOptions, asked, grown, room).zero;
		};
		expect([taken("auto", 100), taken("auto", 99), taken("auto", 10), taken("auto")]).toEqual([2, 3, 3, 2]);
		expect([taken(2, 99), taken("auto", 99, 0), taken("auto", 99, 2, 60)]).toEqual([2, 0, 2]);
		const cut = (mesh: Partial<EngineOptions>) =>
			divideToFit({ zero: 2, ...mesh } as EngineOptions, "auto", plan, 99).zero;
		expect([cut({ tpSize: 2 }), cut({ epSize: 2 }), cut({ ppSize: 2 }), cut({ cpSize: 2 })]).toEqual([2, 2, 2, 3]);
	});

	it("is what arl doctor shows", () => {
		const env = { OMPI_COMM_WORLD_RANK: "1", OMPI_COMM_WORLD_SIZE: "2" };
		const local = { OMPI_COMM_WORLD_LOCAL_RANK: "1", OMPI_COMM_WORLD_LOCAL_SIZE: "2" };
		const core = (report: object) => () => ({ ncclReport: () => report }) as unknown as Native;
		const none = core({ tried: [{ at: "/x", why: "too old" }], hint: "install it" });
		const [launcher, mpirun, torchrun, nccl] = ranksFindings(none, { ...env, ...local, PATH: "/nowhere" });
		expect(torchrun).toMatchObject({ name: "torchrun", ok: true, value: expect.stringMatching(/^none/) });
		expect(nccl).toMatchObject({ name: "NCCL", ok: true, hint: "/x: too old\nTo get it: install it." });
		expect(ranksFindings(core({ found: "NCCL 2.30.7 (f)", tried: [], hint: "" }), {})[3]?.value).toBe(
			"NCCL 2.30.7 (f)",
		);
		const noCore = () => {
			throw new ArlError("ARL_DEVICE", "no core");
		};
		expect(ranksFindings(noCore, {})).toHaveLength(3);
		expect(ranksFindings(noCore, {}, "win32").map(({ name }) => name)).toEqual(["ranks"]);
		expect(launcher?.value).toMatch(/^Open MPI: rank 1 of 2, 1 of 2 on this host; MPI library .*libmpi/);
		expect(mpirun).toMatchObject({ ok: true, hint: expect.stringContaining("apt-get install openmpi-bin") });
		expect(ranksFindings(none, env)[0]).toMatchObject({ ok: false });
		expect(ranksFindings(none, {})[0]?.value).toBe("none: this process would train alone");
	});

	it("is described: docs/distributed.md names every row of the launch table and every option", () => {
		const text = readFileSync(join(root, "docs", "distributed.md"), "utf8");
		for (const name of [
			"torchrun",
			"Open MPI",
			"MPICH",
			"srun",
			"RANK",
			"dp_size",
			"dp_replicate_size",
			"ddp_timeout",
			"nproc_per_node",
			"tp_size",
			"cp_size",
			"ep_size",
			"pp_size",
		]) {
			expect(text).toContain(name);
		}
	});
});
