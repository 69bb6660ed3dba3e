/**
 * Rank 0: has a connection from every other rank, gives them work, and learns first of what fails. It ends the run with the
 * first failure, and names the rank.
 */
import { randomBytes, timingSafeEqual } from "node:crypto";
import { createServer, type Server, type Socket } from "node:net";
import { hostname } from "node:os";
import { ArlError, type ErrorJson, isErrorCode, toArlError } from "../errors.js";
import type { Native, NativeEngine, NativeRanks } from "../native.js";
import { Channel, type Message } from "./channel.js";
import { checkEqual, type Others, sharedEngine } from "./engine.js";
import { checkShared, gpuOf, idOf, meetGpus, type RankGpu } from "./gpus.js";
import { Links } from "./links.js";
import { type OpenOptions, type Ranks, threadsOf } from "./ranks.js";
import { holdUp, type Sign } from "./watch.js";

/** What all ranks must agree on before they train: values by name. */
export type Facts = Readonly<Record<string, string>>;

/** Where rank 0 listens. */
export interface Address {
	port: number;
	token: string;
}

interface Peer {
	channel: Channel;
	host: string;
	pid: number;
	phase: string;
	waiting: number;
	/** When it was last heard from. */
	heard: number;
	/** It ends, or has ended, because rank 0 or a failure has ended it. */
	leaving: boolean;
}

const ALIVE_MILLISECONDS = 1000;
/** Another rank's failure follows from one of this rank's own where that comes within this time, as a loss that is not finite. */
const OWN_FIRST_MILLISECONDS = 500;
/** How long a failed run has to close its files. */
const CLOSE_MILLISECONDS = 3000;
/** After this time without any answer, the others are left to the launcher. */
const LEAVE_MILLISECONDS = 2000;

/** The centre of the ranks. */
export class Hub implements Ranks {
	private readonly peers = new Map<number, Peer>();
	private readonly answers: ((rank: number, message: Message) => void)[] = [];
	private readonly timers: NodeJS.Timeout[] = [];
	private failure: ArlError | null = null;
	private ending = false;
	/** What ends with the failure of another rank, once it is known to be one. */
	private readonly waits = new Set<(error: ArlError) => void>();
	private known = false;
	private readonly links: Links;
	/** Called when another rank gets a signal to stop. */
	onStop: (signal: NodeJS.Signals) => void = () => {};
	/** Seconds without progress after which a rank that holds the others up ends the run. */
	timeout = 600;

	private constructor(
		readonly world: number,
		readonly localWorld: number,
		mpi: NativeRanks | null,
		private readonly server: Server,
		private readonly token: string,
		readonly cpuRefusal: ArlError | null,
	) {
		this.links = new Links(mpi);
	}

	/** Listens for the other ranks. `mpi`: null: the launcher has none; `cpuRefusal`: why these ranks cannot compute on CPUs. */
	static async listen(
		world: number,
		localWorld: number,
		mpi: NativeRanks | null,
		cpuRefusal: ArlError | null = null,
	): Promise<Hub> {
		const server = createServer();
		await new Promise<void>((resolve, reject) => server.once("error", reject).listen(0, () => resolve()));
		const hub = new Hub(world, localWorld, mpi, server, randomBytes(32).toString("hex"), cpuRefusal);
		server.on("connection", (socket) => hub.welcome(socket));
		return hub;
	}

	get address(): Address {
		const address = this.server.address();
		return { port: typeof address === "object" && address !== null ? address.port : 0, token: this.token };
	}

	/** Whether another rank has failed. */
	get hasFailed(): boolean {
		return this.failure !== null;
	}

	/** `result`, unless another rank fails first: then that failure. */
	unlessFailed<T>(result: Promise<T>): Promise<T> {
		return new Promise((resolve, reject) => {
			if (this.known && this.failure !== null) reject(this.failure);
			this.waits.add(reject);
			result.then(resolve, reject).finally(() => this.waits.delete(reject));
		});
	}

	/** The same values, until another rank fails: then that failure. */
	async *untilFailure<T>(values: AsyncGenerator<T, void>): AsyncGenerator<T, void> {
		try {
			for (;;) {
				const next = await this.unlessFailed(values.next());
				if (next.done === true) return;
				yield next.value;
			}
		} finally {
			// A run that waits for something else than the other ranks is not waited for: nothing that it has saved is at risk.
			const closed = values.return(undefined).catch(() => {});
			if (this.failure !== null) await Promise.race([closed, later(CLOSE_MILLISECONDS)]);
			else await closed;
		}
	}

	/** Resolves when all ranks are connected. */
	async connected(): Promise<void> {
		while (this.peers.size < this.world - 1) {
			if (this.failure !== null) throw this.failure;
			await later(5);
		}
		let last = Date.now();
		const look = () => {
			// Where this rank itself was held up, it has heard from none, whatever they have sent.
			const onTime = Date.now() - last < 3 * ALIVE_MILLISECONDS;
			last = Date.now();
			for (const { channel } of this.peers.values()) channel.send({ type: "alive" });
			const found = onTime ? holdUp(this.signs(), this.timeout) : null;
			if (found === null) return;
			this.fail(
				new ArlError("ARL_DEVICE", found, "Look at that host's processes and network; ddp_timeout is in seconds."),
			);
		};
		this.timers.push(setInterval(look, ALIVE_MILLISECONDS).unref());
	}

	private signs(): Sign[] {
		const waiting = this.links.waiting();
		const own = { name: this.name(0), phase: waiting > 0 ? "waiting for gradients" : "at work", waiting, silent: 0 };
		const others = [...this.peers].map(([rank, { phase, waiting: waits, heard }]) => {
			return { name: this.name(rank), phase, waiting: waits, silent: (Date.now() - heard) / 1000 };
		});
		return [own, ...others];
	}

	/** `rank 1 (host b, pid 7)` */
	name(rank: number): string {
		const { host, pid } = this.peers.get(rank) ?? { host: hostname(), pid: process.pid };
		return `rank ${rank} (host ${host}, pid ${pid})`;
	}

	/** The hosts of all ranks, without repetition. */
	get hosts(): string[] {
		return [...new Set([hostname(), ...[...this.peers.values()].map(({ host }) => host)])];
	}

	private welcome(socket: Socket): void {
		const channel = new Channel(socket);
		channel.onMessage = ({ type, rank, token, host, pid }) => {
			const known = typeof rank === "number" && rank > 0 && rank < this.world && !this.peers.has(rank);
			if (type !== "hello" || !known || !equal(String(token), this.token)) return channel.destroy();
			const peer: Peer = {
				channel,
				host: String(host),
				pid: Number(pid),
				phase: "starting",
				waiting: 0,
				heard: Date.now(),
				leaving: false,
			};
			this.peers.set(rank, peer);
			channel.onMessage = (message) => this.take(rank, peer, message);
			channel.onClose = () => this.lost(rank, peer);
		};
	}

	private take(rank: number, peer: Peer, message: Message): void {
		peer.heard = Date.now();
		switch (message.type) {
			case "alive":
				peer.phase = String(message.phase);
				peer.waiting = Number(message.waiting);
				return;
			case "stop":
				this.onStop(message.signal as NodeJS.Signals);
				return;
			case "failed":
				peer.leaving = true;
				this.fail(errorOf(`${this.name(rank)}: `, message.error as ErrorJson));
				return;
			default:
				for (const answer of this.answers) answer(rank, message);
		}
	}

	private lost(rank: number, peer: Peer): void {
		if (this.ending || peer.leaving) return;
		peer.leaving = true;
		const message = `${this.name(rank)} was killed, or its host is gone; it was ${peer.phase}`;
		this.fail(
			new ArlError(
				"ARL_DEVICE",
				message,
				"Look at that host's system log: the system kills processes when memory runs out. The last checkpoint is whole.",
			),
		);
	}

	/** Ends the run with another rank's failure, unless it fails by itself within a moment. */
	private fail(error: ArlError): void {
		if (this.failure !== null || this.ending) return;
		this.failure = error;
		// Ends what waits for that rank.
		this.links.fail(error.message);
		setTimeout(() => {
			this.known = true;
			for (const reject of this.waits) reject(error);
		}, OWN_FIRST_MILLISECONDS);
	}

	async cause(error: ArlError, known = false): Promise<ArlError> {
		// Where MPI notices first, the connection tells within a moment what has happened.
		if (this.failure === null && (known || error.code === "ARL_DEVICE")) {
			await later(LEAVE_MILLISECONDS);
		}
		const follows = error.code === "ARL_INTERRUPTED" || error.code === "ARL_DEVICE";
		return follows && this.failure !== null ? this.failure : error;
	}

	private ask(message: Message): Promise<string[]> {
		const found: string[] = [];
		const answered = new Promise<string[]>((resolve) => {
			let missing = this.world - 1;
			const answer = (rank: number, { type, value }: Message) => {
				if (type !== message.type || found[rank] !== undefined) return;
				found[rank] = String(value);
				missing -= 1;
				if (missing > 0) return;
				this.answers.splice(this.answers.indexOf(answer), 1);
				resolve(found);
			};
			this.answers.push(answer);
		});
		for (const { channel } of this.peers.values()) channel.send(message);
		return this.unlessFailed(answered);
	}

	/**
	 * Compares `facts` with those of every other rank.
	 *
	 * @throws ArlError `ARL_CONFIG` with the first rank that differs, and all that differs there.
	 */
	async agree(facts: Facts): Promise<void> {
		const answers = await this.ask({ type: "facts" });
		for (let rank = 1; rank < this.world; rank++) {
			const theirs = JSON.parse(answers[rank] as string) as Facts;
			const names = [...new Set([...Object.keys(facts), ...Object.keys(theirs)])].filter(
				(name) => facts[name] !== theirs[name],
			);
			if (names.length === 0) continue;
			const lines = names.map((name) => `${name}: ${facts[name] ?? "none"} on rank 0, ${theirs[name] ?? "none"} there`);
			throw new ArlError(
				"ARL_CONFIG",
				[`${this.name(rank)} was started differently from rank 0:`, ...lines].join("\n"),
				"Start every rank with the same command, configuration file, environment and version of arl.",
			);
		}
	}

	async openEngine(native: Native, options: OpenOptions): Promise<NativeEngine> {
		const others: Others = {
			world: this.world,
			send: (rank, message, parts) => this.peers.get(rank)?.channel.send(message, parts),
			ask: (message) => this.ask(message),
			name: (rank) => this.name(rank),
			cause: (error, follows) => this.cause(error, follows),
		};
		const local = await (String(options.device).startsWith("cuda")
			? this.openOnGpus(native, options)
			: this.openOnCpus(native, options));
		// A state that is read next brings its own weights.
		if (options.restored !== true) await checkEqual(local, others, "after opening the model");
		return sharedEngine(local, others, options);
	}

	private async openOnCpus(native: Native, options: OpenOptions): Promise<NativeEngine> {
		const opened = this.ask({ type: "open", options });
		opened.catch(() => {});
		const local = await this.openLocal(native, options);
		await local.joinRanks(this.links.first);
		await opened;
		return local;
	}

	/** Opens the engine on every rank's GPU, and then connects the GPUs, all at once. */
	private async openOnGpus(native: Native, options: OpenOptions): Promise<NativeEngine> {
		const { meeting, accept } = meetGpus(native, this.world);
		const opened = this.ask({ type: "open", options, gpus: meeting, world: this.world });
		opened.catch(() => {});
		const accepted = this.unlessFailed(accept());
		accepted.catch(() => {});
		const local = await this.openLocal(native, options);
		const ranks = await accepted;
		this.links.add(ranks);
		const others = (await opened).slice(1).map((text) => JSON.parse(text) as RankGpu);
		checkShared([gpuOf(native, options.device), ...others], (rank) => this.name(rank));
		const joined = this.ask({ type: "join" });
		joined.catch(() => {});
		await local.joinRanks(ranks, idOf(meeting)).catch(async (error: unknown) => {
			throw await this.cause(toArlError(error));
		});
		await joined;
		return local;
	}

	private openLocal(native: Native, options: OpenOptions): Promise<NativeEngine> {
		return native.Engine.open({ ...options, threads: options.threads ?? threadsOf(this.localWorld) });
	}

	/** Ends the other ranks, after a run that was taken to its end. */
	async end(code: number): Promise<void> {
		this.ending = true;
		await this.leave({ type: "end", code });
		await Promise.race([this.links.close(), later(CLOSE_MILLISECONDS)]);
	}

	/** Ends the other ranks because the run has failed. */
	async abandon(error: ArlError): Promise<void> {
		this.ending = true;
		this.links.fail(error.message);
		await this.leave({ type: "failed", code: error.exitCode });
	}

	private async leave(message: Message): Promise<void> {
		for (const timer of this.timers) clearInterval(timer);
		this.server.close();
		const closed = [...this.peers.values()].map(({ channel }) => {
			return new Promise<void>((resolve) => {
				channel.onClose = resolve;
				channel.send(message);
				channel.end();
			});
		});
		await Promise.race([Promise.all(closed), later(LEAVE_MILLISECONDS)]);
		for (const { channel } of this.peers.values()) channel.destroy();
	}
}

/** Resolves after so many milliseconds; holds up no process. */
function later(milliseconds: number): Promise<void> {
	return new Promise((resolve) => setTimeout(resolve, milliseconds).unref());
}

function equal(given: string, wanted: string): boolean {
	return given.length === wanted.length && timingSafeEqual(Buffer.from(given), Buffer.from(wanted));
}

function errorOf(where: string, { code, message, hint }: ErrorJson): ArlError {
	return new ArlError(isErrorCode(code) ? code : "ARL_INTERNAL", `${where}${message}`, hint);
}
