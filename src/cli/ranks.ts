/** `arl train` on one of several ranks: opens them, has them agree, and ends them together. */
import { createHash } from "node:crypto";
import { type AgentTrainingConfig, OPTION_NAMES, type Resolved, soundsSecret } from "../config/index.js";
import { findCuda, openCuda } from "../device/cuda.js";
import { ArlError } from "../errors.js";
import { writeErrorFile } from "../launch/error-file.js";
import type { Launch } from "../launch/launch.js";
import { loadNative, type Native } from "../native.js";
import { deviceOfRank } from "../ranks/gpus.js";
import { type Facts, Hub } from "../ranks/hub.js";
import { openRanks } from "../ranks/open.js";
import type { Worker } from "../ranks/worker.js";
import { version } from "./command.js";

/** Ranks other than 0 report what happens before they are connected this much later: by then the launcher has ended them. */
const AFTER_RANK_0 = 1500;
/** How long a failed run has to end by itself. */
const EXIT_MILLISECONDS = 2000;

/** This process's part in a run of several ranks. */
export class RankedRun {
	/** Rank 0's view; null: this is another rank. */
	readonly hub: Hub | null;
	/** How the run ends, if it does not fail. */
	code = 0;
	private ended = false;

	private constructor(
		private readonly ranks: Hub | Worker,
		private readonly found: string,
		private readonly native: Native,
		private readonly launch: Launch,
	) {
		this.hub = ranks instanceof Hub ? ranks : null;
	}

	/**
	 * Opens the ranks. `cpu`: they are known to compute on CPUs.
	 *
	 * @throws ArlError where that fails; on other ranks than 0 only after rank 0 has had the time to say so.
	 */
	static async open(launch: Launch, core: () => Native = loadNative, cpu = false): Promise<RankedRun> {
		try {
			const native = core();
			const { ranks, found } = await openRanks(launch, native, cpu);
			return new RankedRun(ranks, found, native, launch);
		} catch (thrown) {
			if (launch.rank > 0) await new Promise((resolve) => setTimeout(resolve, AFTER_RANK_0));
			throw thrown;
		}
	}

	/** Works for rank 0 until the run ends; gives the exit code. */
	async serve(resolve: () => Promise<{ resolved: Resolved } | null>): Promise<number> {
		const worker = this.ranks as Worker;
		worker.onFailure = writeErrorFile;
		const facts = async () => {
			const found = await resolve();
			if (found === null) return {};
			worker.timeout = found.resolved.args.ddp_timeout;
			return this.facts(found.resolved.args);
		};
		const { code, error } = await worker.serve(facts, (wanted) => this.openGpu(wanted));
		this.ended = true;
		// What rank 0 cannot report any more, one rank does.
		if (error !== null && worker.rank === 1) throw error;
		// MPI may hold threads of a run that has failed.
		process.exit(code);
	}

	/**
	 * Has all ranks agree on what they were started with. Returns what was found, in words.
	 *
	 * @throws ArlError `ARL_CONFIG` naming the rank that differs, and what.
	 */
	async agree({ localWorld }: Launch, args: AgentTrainingConfig): Promise<string> {
		if (args.nproc_per_node > 1 && args.nproc_per_node !== localWorld) {
			throw new ArlError(
				"ARL_CONFIG",
				`nproc_per_node is ${args.nproc_per_node}, and the launcher has started ${localWorld} ranks on this host`,
				"Leave nproc_per_node out: the launcher decides.",
			);
		}
		const hub = this.ranks as Hub;
		hub.timeout = args.ddp_timeout;
		await hub.agree(this.facts(args));
		return this.found;
	}

	/** Ends all ranks because the run has failed here. */
	async abandon(error: ArlError): Promise<void> {
		this.ended = true;
		await this.hub?.abandon(error);
		// Where something still holds this process, for example a call of MPI.
		setTimeout(() => process.exit(error.exitCode), EXIT_MILLISECONDS).unref();
	}

	/** Ends all ranks, unless they have ended. */
	async end(): Promise<void> {
		if (this.ended) return;
		this.ended = true;
		await this.hub?.end(this.code);
	}

	/** This rank's GPU. `wanted`: what rank 0 resolved the option `device` to. */
	private openGpu(wanted: string): { device: string; native: Native } {
		const option = this.launch.localWorld === 1 ? wanted : "cuda";
		const finding = findCuda(this.native, option);
		if (finding.problem !== null) {
			const { message, hint } = finding.problem;
			throw new ArlError("ARL_DEVICE", `device cuda: ${message}`, hint);
		}
		const usable = finding.report.devices.filter(({ problem }) => problem === undefined).map(({ device }) => device);
		const device = deviceOfRank(option, usable, this.launch);
		return { device, native: openCuda(this.native, String(finding.addon)) };
	}

	/** What all ranks must have in common. */
	private facts(args: AgentTrainingConfig): Facts {
		const options = OPTION_NAMES.map((name) => {
			const value = JSON.stringify(args[name]);
			return [name, soundsSecret(name) ? createHash("sha256").update(value).digest("hex").slice(0, 12) : value];
		});
		return {
			...Object.fromEntries(options),
			"version of arl": `${version()} (${this.native.version()})`,
			"vector instructions": this.native.devices()[0]?.features.join(", ") ?? "unknown",
		};
	}
}
