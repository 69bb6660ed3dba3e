/** The sinks of a run (`report_to`): opens them, wakes them where there is something to send, and lets them end. */
import { rmSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import type { AgentTrainingConfig } from "../../config/schema.js";
import { ArlError, messageOf } from "../../errors.js";
import { type EventOf, type NoticeEvent, notice, type TrainEvent } from "../../events.js";
import { duration, measure } from "../format.js";
import type { ShownOption } from "../runs/record.js";
import { shellWord } from "../runs/sentences.js";
import { Outbox, SINKS_FOLDER, type Sink } from "./outbox.js";
import type { PrometheusPage } from "./prometheus.js";
import type { Message, SpikeDetector } from "./webhook.js";

/** After the end of the run, for what is not sent yet. */
const PATIENCE_MILLISECONDS = 10_000;
/** Events after which there are new lines in `metrics.jsonl`. */
const LOGGED: ReadonlySet<string> = new Set(["log", "evaluate", "sample"]);

/** The options of a run that sinks read, and its configuration as they pass it on. */
export interface SinksOptions {
	args: Pick<AgentTrainingConfig, "output_dir" | "run_name" | "report_to" | "webhook_url" | "prometheus_address">;
	/** Without secrets. */
	shown: readonly ShownOption[];
	patienceMilliseconds?: number;
}

/** A sink that is made at the start of the run, when the steps before it are known. */
type MakeSink = (firstStep: number) => Sink;

export class Sinks {
	readonly #options: SinksOptions;
	readonly #make: readonly MakeSink[];
	readonly #page: PrometheusPage | null;
	readonly #spikes: SpikeDetector | null;
	readonly #queue: ((message: Message) => void) | null;
	readonly #name: string;
	#outboxes: Outbox[] = [];
	#resumed = false;
	#step = 0;

	private constructor(options: SinksOptions, parts: Parts) {
		this.#options = options;
		this.#make = parts.make;
		this.#page = parts.page;
		this.#spikes = parts.spikes;
		this.#queue = parts.queue;
		this.#name = nameOf(options);
	}

	/**
	 * Loads the sinks that `report_to` names. Nothing is sent or written before the run starts.
	 *
	 * @throws ArlError `ARL_CONFIG` if a sink has no address, or the page for Prometheus cannot have its own.
	 */
	static async open(options: SinksOptions): Promise<Sinks> {
		return new Sinks(options, await loadParts(options));
	}

	/**
	 * Sends what a run that has ended left over. `firstStep`: of its last part. Returns a warning for each sink that did not take
	 * all.
	 */
	static async sendRest(options: SinksOptions, outcome: string, firstStep: number): Promise<NoticeEvent[]> {
		const sinks = await Sinks.open(options);
		sinks.#resumed = true;
		sinks.#start(firstStep);
		return await sinks.finish(outcome);
	}

	/** Takes an event, after `metrics.jsonl` has it. Returns warnings. */
	event(event: TrainEvent): NoticeEvent[] {
		if (this.#make.length === 0) return [];
		try {
			if (event.type === "resumed") this.#resumed = true;
			if (event.type === "start") this.#start(event.firstStep);
			if (event.type === "step") this.#step = event.step;
			if (event.type === "log") this.#noticeSpike(event);
			if (event.type === "end")
				this.#say({ event: "end", text: endText(event), step: event.steps, detail: event.outcome });
			if (LOGGED.has(event.type)) for (const outbox of this.#outboxes) outbox.wake();
			return [];
		} catch (error) {
			return [notice("warning", `${SINKS_FOLDER}: ${messageOf(error)}`)];
		}
	}

	/** The run has ended: sends what is not sent yet, for a bounded time. Returns a warning for each sink that did not take all. */
	async finish(outcome: string): Promise<NoticeEvent[]> {
		const patience = this.#options.patienceMilliseconds ?? PATIENCE_MILLISECONDS;
		const sent = await Promise.all(this.#outboxes.map((outbox) => outbox.finish(outcome, patience)));
		const late = this.#outboxes.filter((_, i) => !sent[i]);
		this.#outboxes = [];
		return late.map(({ sink, problem }) =>
			notice("warning", `report_to ${sink.name}: not all is sent (${problem ?? "it is too slow"}); ${this.#catchUp}`),
		);
	}

	/** The run has ended with this error. */
	async failed(error: ArlError): Promise<void> {
		try {
			this.#say({ event: "failure", text: `failed: ${error.message}`, step: this.#step, detail: error.code });
		} catch {
			// What ended the run may keep a message from being written too.
		}
		await this.finish("failed");
	}

	close(): void {
		for (const outbox of this.#outboxes) outbox.close();
		this.#page?.close();
	}

	get #catchUp(): string {
		return `\`npx arl runs send ${shellWord(this.#options.args.output_dir)}\` sends the rest`;
	}

	#start(firstStep: number): void {
		const { output_dir: outputDir } = this.#options.args;
		if (!this.#resumed) rmSync(join(outputDir, SINKS_FOLDER), { recursive: true, force: true });
		for (const make of this.#make) {
			const outbox = new Outbox(make(firstStep), outputDir);
			outbox.begin(!this.#resumed);
			outbox.cut(sizeOf(join(outputDir, outbox.sink.source)));
			this.#outboxes.push(outbox);
			outbox.wake();
		}
	}

	#noticeSpike(event: EventOf<"log">): void {
		const mean = this.#spikes?.take(event) ?? null;
		if (mean === null) return;
		const { step, loss } = event.metrics;
		const text = `the loss spiked to ${measure(loss)} at step ${step}, from a mean of ${measure(mean)} before`;
		this.#say({ event: "spike", text, step });
		for (const outbox of this.#outboxes) outbox.wake();
	}

	#say(message: Omit<Message, "run" | "time">): void {
		this.#queue?.({ ...message, run: this.#name, time: new Date().toISOString() });
	}
}

interface Parts {
	make: MakeSink[];
	page: PrometheusPage | null;
	spikes: SpikeDetector | null;
	queue: ((message: Message) => void) | null;
}

function nameOf({ args: { run_name: name, output_dir: outputDir } }: SinksOptions): string {
	return name ?? basename(resolve(outputDir));
}

async function loadParts(options: SinksOptions): Promise<Parts> {
	const { args, shown } = options;
	const { output_dir: outputDir, webhook_url: webhook, prometheus_address: address } = args;
	const name = nameOf(options);
	const parts: Parts = { make: [], page: null, spikes: null, queue: null };
	for (const kind of new Set(args.report_to)) {
		switch (kind) {
			case "tensorboard": {
				const { tensorboardSink } = await import("./tensorboard.js");
				parts.make.push((firstStep) => tensorboardSink(outputDir, shown, firstStep));
				break;
			}
			case "prometheus": {
				const { openPrometheusPage, parseAddress } = await import("./prometheus.js");
				const page = openPrometheusPage(name, parseAddress(address));
				await page.listening.catch((error: unknown) => {
					throw new ArlError(
						"ARL_CONFIG",
						`prometheus_address ${address}: ${messageOf(error)}`,
						"Give another --prometheus_address HOST:PORT.",
					);
				});
				parts.page = page;
				parts.make.push(() => page.sink);
				break;
			}
			case "webhook": {
				const { queueMessage, SpikeDetector: Detector, webhookSink } = await import("./webhook.js");
				const url = webhook ?? "";
				parts.spikes = new Detector();
				parts.queue = (message) => queueMessage(outputDir, message);
				parts.make.push(() => webhookSink(url));
				break;
			}
			case "mlflow": {
				const { mlflowSink } = await import("./mlflow.js");
				const sink = mlflowSink(name, shown);
				parts.make.push(() => sink);
				break;
			}
			case "trackio": {
				const { trackioSink } = await import("./trackio.js");
				const sink = trackioSink(name, shown);
				parts.make.push(() => sink);
				break;
			}
		}
	}
	return parts;
}

function endText({ outcome, steps, totalSteps, seconds, trainLoss }: EventOf<"end">): string {
	const loss = trainLoss === null ? "" : `, mean loss ${measure(trainLoss)}`;
	return `${outcome.replace("_", " ")}: step ${steps} of ${totalSteps} in ${duration(seconds)}${loss}`;
}

function sizeOf(path: string): number {
	return statSync(path, { throwIfNoEntry: false })?.size ?? 0;
}
