/**
 * Messages to a webhook when a run ends, fails, or its loss spikes. They wait in `.sinks/webhook.jsonl` until the address has
 * taken them. The address is a secret of its own, and is never written.
 */
import { appendFileSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import type { TrainEvent } from "../../events.js";
import { request } from "./http.js";
import { SINKS_FOLDER, type Sink } from "./outbox.js";

const SOURCE = join(SINKS_FOLDER, "webhook.jsonl");

/** A message as it waits. */
export interface Message {
	event: "end" | "failure" | "spike";
	run: string;
	/** For people. */
	text: string;
	step: number;
	/** ISO 8601. */
	time: string;
	/** Of a run that ended: its outcome; of one that failed: the code of its error. */
	detail?: string;
}

/** Sends each message as JSON: in the shape of Slack or Discord to their addresses, as it is to any other. */
export function webhookSink(url: string): Sink {
	return {
		name: "webhook",
		source: SOURCE,
		async send(lines, memory, signal) {
			// Messages are sent one by one, and those that were taken before a failure are not sent again.
			for (const line of lines) {
				const message = JSON.parse(line) as Message;
				const key = `${message.time} ${message.event}`;
				if (typeof memory.last === "string" && key <= memory.last) continue;
				await request({ method: "POST", url, body: bodyFor(url, message), signal, isSecret: true });
				memory.last = key;
			}
		},
	};
}

function bodyFor(url: string, message: Message): unknown {
	const { hostname } = new URL(url);
	const text = `${message.run}: ${message.text}`;
	if (hostname === "hooks.slack.com") return { text };
	if (hostname === "discord.com" || hostname === "discordapp.com") return { content: text.slice(0, 2000) };
	return message;
}

/** Appends a message to those that wait. */
export function queueMessage(folder: string, message: Message): void {
	mkdirSync(join(folder, SINKS_FOLDER), { recursive: true });
	appendFileSync(join(folder, SOURCE), `${JSON.stringify(message)}\n`);
}

/** Logged losses that a mean is taken over, and those after a spike in which none is reported. */
const WINDOW = 50;
const QUIET = 100;
/** Standard deviations above the mean, and parts of the mean, from which a loss is a spike. */
const DEVIATIONS = 6;
const PART = 0.2;

/** Notices a loss far above those before it. */
export class SpikeDetector {
	readonly #window: number[] = [];
	#quiet = 0;

	/** The mean of the losses before, if the event's loss is a spike; null otherwise. */
	take(event: TrainEvent): number | null {
		if (event.type !== "log") return null;
		const { loss } = event.metrics;
		const before = this.#window;
		const mean = before.reduce((sum, value) => sum + value, 0) / before.length;
		const variance = before.reduce((sum, value) => sum + (value - mean) ** 2, 0) / before.length;
		const bound = mean + Math.max(DEVIATIONS * Math.sqrt(variance), PART * Math.abs(mean));
		const isSpike = before.length === WINDOW && loss > bound && this.#quiet === 0;
		this.#quiet = isSpike ? QUIET : Math.max(0, this.#quiet - 1);
		if (Number.isFinite(loss)) before.push(loss);
		if (before.length > WINDOW) before.shift();
		return isSpike ? mean : null;
	}
}
