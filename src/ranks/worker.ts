/**
 * A rank other than rank 0: computes what rank 0 gives it, with an engine of its own, and prints nothing. It ends as rank 0
 * says, or, where rank 0 is gone, by itself.
 */
import { connect } from "node:net";
import { hostname } from "node:os";
import { ArlError, toArlError } from "../errors.js";
import { STOP_SIGNAL } from "../launch/start.js";
import type { EngineOptions, Native, NativeEngine, NativeRanks, StepStats } from "../native.js";
import { type Lengths, unpackBatches } from "./batches.js";
import { Channel, type Message } from "./channel.js";
import { connectGpus, type GpuMeeting, gpuOf, idOf } from "./gpus.js";
import type { Facts } from "./hub.js";
import { Links } from "./links.js";
import { threadsOf } from "./ranks.js";

const ALIVE_MILLISECONDS = 1000;
const CONNECT_MILLISECONDS = 10_000;
/** How long rank 0 has to say how the run ends, after this rank has reported a failure. */
const VERDICT_MILLISECONDS = 10_000;

/** How a rank ends. */
export interface Verdict {
	code: number;
	/** What rank 0 cannot report, because it is gone; null: it has reported everything. */
	error: ArlError | null;
}

/** Where rank 0 may be reached. */
export interface Centre {
	hosts: readonly string[];
	port: number;
	token: string;
}

/** Finds this rank's GPU and the addon whose engine runs on it. `wanted`: the option `device` on rank 0. */
export type OpenGpu = (wanted: string) => { device: string; native: Native };

/** A rank that works for rank 0. */
export class Worker {
	private engine: NativeEngine | null = null;
	private readonly links: Links;
	/** What the GPUs are connected by, once the engine is open. */
	private gpus: { ranks: NativeRanks; id: Uint8Array } | null = null;
	private ticket: Promise<number> | null = null;
	private phase = "starting";
	private heard = Date.now();
	private done = false;
	private end: (verdict: Verdict) => void = () => {};
	private readonly verdict = new Promise<Verdict>((resolve) => {
		this.end = resolve;
	});
	/** Jobs one after the other, in the order of rank 0's calls. */
	private jobs: Promise<void> = Promise.resolve();
	private openGpu: OpenGpu = noGpu;
	/** Called with a failure of this rank. */
	onFailure: (error: ArlError) => void = () => {};
	/** Seconds without a word from rank 0 after which this rank gives up. */
	timeout = 600;

	constructor(
		private readonly channel: Channel,
		readonly rank: number,
		private readonly localWorld: number,
		private readonly native: Native,
		mpi: NativeRanks | null,
		private readonly hosts: readonly string[],
	) {
		this.links = new Links(mpi);
	}

	/** Connects to rank 0. */
	static async connect(
		centre: Centre,
		rank: number,
		localWorld: number,
		native: Native,
		mpi: NativeRanks | null,
	): Promise<Worker> {
		const reasons: string[] = [];
		for (const host of centre.hosts) {
			try {
				const channel = await reach(host, centre.port);
				channel.send({ type: "hello", rank, token: centre.token, host: hostname(), pid: process.pid });
				// The GPUs' connections are made to the host that this one was made to.
				return new Worker(channel, rank, localWorld, native, mpi, [host]);
			} catch (error) {
				reasons.push(`${host}: ${toArlError(error).message}`);
			}
		}
		throw new ArlError(
			"ARL_DEVICE",
			`rank ${rank} on ${hostname()} cannot reach rank 0: ${reasons.join("; ")}`,
			"Every host must be able to connect to rank 0's host by TCP, on any port.",
		);
	}

	/**
	 * Works until the run ends. `facts`: what this rank was started with, which may fail. `openGpu`: for ranks on GPUs.
	 */
	async serve(facts: () => Promise<Facts>, openGpu: OpenGpu = noGpu): Promise<Verdict> {
		this.openGpu = openGpu;
		const known = facts().catch((error: unknown) => this.fail(error));
		this.channel.onMessage = (message, bytes) => {
			this.heard = Date.now();
			if (message.type === "alive") return;
			if (message.type === "end" || message.type === "failed") return this.leave(message);
			this.jobs = this.jobs.then(() => this.work(message, bytes, known)).catch((error: unknown) => this.fail(error));
		};
		const gone = (what: string) => {
			if (this.done) return;
			this.links.fail(`rank 0 ${what}`);
			const hint = "Look at that host's system log. The last checkpoint is whole.";
			this.end({
				code: 1,
				error: new ArlError("ARL_DEVICE", `rank 0 ${what}; rank ${this.rank} was ${this.phase}`, hint),
			});
		};
		this.channel.onClose = () => gone("was killed, or its host is gone");
		const alive = setInterval(() => {
			const waiting = this.links.waiting();
			const phase = waiting > 0 ? "waiting for other ranks' gradients" : this.phase;
			this.channel.send({ type: "alive", phase, waiting });
			const silent = (Date.now() - this.heard) / 1000;
			if (silent > this.timeout)
				gone(`has sent no sign of life for ${Math.floor(silent)} s (ddp_timeout ${this.timeout})`);
		}, ALIVE_MILLISECONDS);
		const names = ["SIGINT", "SIGTERM", "SIGHUP", STOP_SIGNAL] as const;
		// Rank 0 decides when all stop: behind one and the same step.
		const stop = (signal: NodeJS.Signals) => this.channel.send({ type: "stop", signal });
		for (const name of names) process.on(name, stop);
		try {
			return await this.verdict;
		} finally {
			clearInterval(alive);
			for (const name of names) process.off(name, stop);
			this.channel.destroy();
		}
	}

	private leave({ type, code }: Message): void {
		this.done = true;
		const verdict = { code: Number(code), error: null };
		if (type === "failed") {
			this.links.fail("rank 0 has ended the run");
			this.end(verdict);
			return;
		}
		// Rank 0 ends MPI when it has seen this connection close.
		this.channel.end();
		this.links.close().then(
			() => this.end(verdict),
			(error: unknown) => this.end({ code: 1, error: toArlError(error) }),
		);
	}

	/** Reports a failure of this rank; rank 0 says how it ends. */
	private fail(thrown: unknown): Promise<never> {
		const error = toArlError(thrown);
		// A call that ended because of another rank is no failure.
		if (!this.done && error.code !== "ARL_INTERRUPTED") {
			this.onFailure(error);
			this.channel.send({ type: "failed", error: error.toJSON() });
			setTimeout(() => this.end({ code: error.exitCode, error }), VERDICT_MILLISECONDS).unref();
		}
		return new Promise<never>(() => {});
	}

	private async work(message: Message, bytes: Uint8Array, facts: Promise<Facts>): Promise<void> {
		const answer = (value: string) => this.channel.send({ type: message.type, value });
		switch (message.type) {
			case "facts":
				return answer(JSON.stringify(await facts));
			case "open": {
				this.phase = "reading the model";
				const found = await this.open(message);
				this.phase = "waiting for rank 0";
				return answer(found);
			}
			case "join":
				if (this.gpus === null) throw new ArlError("ARL_INTERNAL", "rank 0 connects GPUs that are not open");
				this.phase = "waiting for the other ranks' GPUs";
				await this.opened.joinRanks(this.gpus.ranks, this.gpus.id);
				this.phase = "waiting for rank 0";
				return answer("");
			case "restore":
				this.phase = "reading a checkpoint";
				await this.opened.restoreState(String(message.dir));
				this.phase = "waiting for rank 0";
				return answer("");
			case "saveState":
			case "exportModel":
			case "exportAdapter":
				this.phase = "writing a checkpoint";
				await this.save(message);
				this.phase = "waiting for rank 0";
				return answer("");
			case "serve":
				this.phase = "sending weights";
				await this.opened.serveWeights();
				this.phase = "waiting for rank 0";
				return;
			case "fingerprint":
				return answer(await this.opened.fingerprint());
			case "submit": {
				const batches = unpackBatches(message.lengths as Lengths[], bytes);
				this.phase = `computing ${batches.length} micro-batches`;
				this.ticket = this.opened.submitStep(batches, message.hyper as Parameters<NativeEngine["submitStep"]>[1]);
				await this.ticket;
				this.phase = "waiting for rank 0";
				return;
			}
			case "finish":
				// A loss that is not finite is the same on all ranks, and rank 0 reports it. It may have submitted a step behind this one.
				await this.finish().catch((error: unknown) => {
					if (toArlError(error).code !== "ARL_NONFINITE") throw error;
				});
				return;
			case "discard":
				return this.opened.discardStep();
			case "close":
				return this.opened.close();
			default:
				throw new ArlError("ARL_INTERNAL", `rank 0 asked rank ${this.rank} for ${message.type}`);
		}
	}

	/** Opens the engine; gives the GPU that it is on, as JSON, or nothing. */
	private async open(message: Message): Promise<string> {
		const options = message.options as EngineOptions;
		const threads = options.threads ?? threadsOf(this.localWorld);
		const own = { ...options, threads, rank: this.rank };
		if (message.gpus === undefined) {
			this.engine = await this.native.Engine.open(own);
			await this.engine.joinRanks(this.links.first);
			return "";
		}
		const meeting = message.gpus as GpuMeeting;
		const { device, native } = this.openGpu(options.device);
		const ranks = await connectGpus(native, this.hosts, meeting, this.rank, Number(message.world));
		this.links.add(ranks);
		this.gpus = { ranks, id: idOf(meeting) };
		this.engine = await native.Engine.open({ ...own, device });
		return JSON.stringify(gpuOf(native, device));
	}

	/** Writes what this rank has of a state, a model or an adapter. */
	private save({ type, dir, dtype, base }: Message): Promise<void> {
		if (type === "saveState") return this.opened.saveState(String(dir));
		if (type === "exportAdapter") return this.opened.exportAdapter(String(dir), String(base));
		return this.opened.exportModel(String(dir), dtype as Parameters<NativeEngine["exportModel"]>[1]);
	}

	private get opened(): NativeEngine {
		if (this.engine === null) throw new ArlError("ARL_INTERNAL", "rank 0 uses an engine that it has not opened");
		return this.engine;
	}

	private async finish(): Promise<StepStats> {
		if (this.ticket === null) throw new ArlError("ARL_INTERNAL", "rank 0 finishes a step that it has not submitted");
		return this.opened.finishStep(await this.ticket);
	}
}

function noGpu(): never {
	throw new ArlError("ARL_INTERNAL", "this rank was not told how to find its GPU");
}

function reach(host: string, port: number): Promise<Channel> {
	return new Promise((resolve, reject) => {
		const socket = connect({ host, port, timeout: CONNECT_MILLISECONDS });
		socket.once("error", reject);
		socket.once("timeout", () => socket.destroy(new Error("no answer")));
		socket.once("connect", () => {
			socket.setTimeout(0);
			resolve(new Channel(socket));
		});
	});
}
