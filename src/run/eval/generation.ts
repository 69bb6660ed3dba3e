/** Replies of held-out rows, generated at each evaluation: which are right, their texts, and a user's own metric of them. */
import type { ChatMessage } from "../../data/sources/record.js";
import { ArlError, userError } from "../../errors.js";
import type { Sample } from "../../events.js";
import type { Native, NativeEngine } from "../../native.js";
import type { BatchSize } from "../setup/options.js";
import type { HeldOut } from "./evaluate.js";
import { parseReply } from "./parse-reply.js";
import { type Prompt, RowPrompts } from "./prompts.js";
import { generateReplies, newTokens, promptBatches, promptImages } from "./replies.js";
import { isSameReply } from "./same-reply.js";

/** A generated reply, as a user's metric sees it. */
export interface EvalReply {
	/** As the model wrote it, without the token that ends it. */
	text: string;
	/** What it says: its reasoning and tool calls apart from its content. */
	message: ChatMessage;
	/** The row's own reply, as it would be written. */
	expected: string;
	/** Index of the reply among the row's messages. */
	index: number;
	/** Whether the model ended it by itself. */
	ended: boolean;
	/** Whether it did, and the reply is the expected one. */
	right: boolean;
}

/** Figures of a reply by their names; one without a name is `metric`. */
export type EvalFigures = number | Record<string, number>;

/** A user's metric: figures of one reply to a row. The evaluation reports their means as `eval_<name>`. */
export type EvalMetric<Row = unknown> = (row: Row, reply: EvalReply) => EvalFigures | Promise<EvalFigures>;

/** The figure of an evaluation that generates: the share of replies that are right. */
export const EXACT_MATCH = "exact_match";

export interface GenerationInput {
	native: Pick<Native, "TextEncoder">;
	heldOut: HeldOut;
	/** Rows whose replies are generated, spread evenly over all. */
	rows: number;
	batchSize: number;
	metric: EvalMetric<never> | null;
}

type Place = Pick<Sample, "step" | "epoch">;

/** What is generated at each evaluation: the same prompts every time. */
export class Generation {
	private constructor(
		private readonly prompts: readonly (Prompt & { content: unknown })[],
		private readonly rows: RowPrompts,
		private readonly input: GenerationInput,
	) {}

	/** Renders the prompts. Throws `ARL_DATA` where no row has a reply. */
	static async open(input: GenerationInput): Promise<Generation> {
		const { native, heldOut } = input;
		const { textOptions, vision } = heldOut;
		const { source } = heldOut.data;
		// A reply is compared whole, however long samples may be.
		const { maxLength: _, ...whole } = textOptions;
		const encoder = native.TextEncoder.open({ ...whole, truncation: "error" });
		const indexes = spread(heldOut.data.order.all, input.rows);
		const contents = await source.read(indexes);
		const read = contents.filter((content): content is Uint8Array => content instanceof Uint8Array);
		encoder.detect(read.slice(0, 64));
		const rows = new RowPrompts(encoder, source, vision?.loaderOf(encoder) ?? null);
		const prompts: (Prompt & { content: unknown })[] = [];
		for (const [i, index] of indexes.entries()) {
			const content = contents[i];
			if (!(content instanceof Uint8Array)) continue;
			const value = parsed(content);
			for (const prompt of await rows.of(index, content)) prompts.push({ ...prompt, content: value });
		}
		if (prompts.length === 0)
			throw new ArlError("ARL_DATA", `eval_generate: no row of ${source.name} has a trained reply`);
		return new Generation(prompts, rows, input);
	}

	/** What the engine must have room for. */
	get size(): Omit<BatchSize, "maxTokens" | "maxSequences"> {
		const { prompts, input } = this;
		const lengths = (batch: number[]) => batch.map((i) => prompts[i]?.inputIds.length ?? 0);
		const batches = promptBatches(prompts, input.batchSize);
		return {
			evalPrompts: batches.map(lengths),
			evalMaxNewTokens: newTokens(prompts),
			...promptImages(this.rows, prompts, batches),
		};
	}

	/** Generates with the weights as they are. Null: `signal` ended it. */
	async run(
		engine: Pick<NativeEngine, "generate" | "interrupt" | "discardStep">,
		place: Place,
		signal: AbortSignal,
	): Promise<{ figures: Record<`eval_${string}`, number>; samples: Sample[] } | null> {
		const { prompts, rows, input } = this;
		const greedy = { temperature: 0, topK: 0, topP: 1, seed: 0 };
		const options = { ...greedy, batchSize: input.batchSize, maxNewTokens: newTokens(prompts) };
		let completions: Awaited<ReturnType<typeof generateReplies>>;
		try {
			completions = await generateReplies(engine, rows, prompts, options, () => {}, signal);
		} catch (error) {
			if (signal.aborted) return null;
			throw error;
		}
		const { parts } = input.heldOut;
		const means = new Means();
		const samples: Sample[] = [];
		for (const [i, prompt] of prompts.entries()) {
			const { text, ended } = completions[i] ?? { text: "", ended: false };
			const expected = rows.expectedText(prompt);
			const right = ended && isSameReply(text, expected);
			const part =
				parts.length > 1 ? parts.find(({ first, end }) => prompt.row >= first && prompt.row < end) : undefined;
			const sources = part === undefined ? [""] : ["", `${part.name}_`];
			const { message: index, location, lastMessage } = prompt;
			const figures = await this.figuresOf(prompt.content, {
				text,
				message: parseReply(text),
				expected,
				index,
				ended,
				right,
			});
			for (const source of sources) {
				means.add(`eval_${source}${EXACT_MATCH}`, Number(right));
				for (const [name, value] of figures) means.add(`eval_${source}${name}`, value);
			}
			const source = part === undefined ? {} : { source: part.name };
			samples.push({
				...place,
				...source,
				location,
				message: index,
				prompt: lastMessage,
				expected,
				reply: text,
				right,
			});
		}
		return { figures: means.all(), samples };
	}

	/** What the user's metric says of a reply. */
	private async figuresOf(row: unknown, reply: EvalReply): Promise<[string, number][]> {
		const { metric } = this.input;
		if (metric === null) return [];
		let found: unknown;
		try {
			found = await metric(row as never, reply);
		} catch (error) {
			throw userError("eval_metric", error);
		}
		const named: unknown = typeof found === "number" ? { metric: found } : found;
		const entries = typeof named === "object" && named !== null ? Object.entries(named) : [];
		if (entries.length > 0 && entries.every((entry): entry is [string, number] => typeof entry[1] === "number"))
			return entries;
		throw new ArlError(
			"ARL_USER",
			`eval_metric returned ${JSON.stringify(found) ?? String(found)}`,
			"It returns a number, or an object of numbers by name.",
		);
	}
}

/** Means of values by name, in the order in which the names come. */
class Means {
	private readonly sums = new Map<`eval_${string}`, { sum: number; count: number }>();

	add(name: `eval_${string}`, value: number): void {
		const found = this.sums.get(name) ?? { sum: 0, count: 0 };
		this.sums.set(name, { sum: found.sum + value, count: found.count + 1 });
	}

	all(): Record<`eval_${string}`, number> {
		return Object.fromEntries([...this.sums].map(([name, { sum, count }]) => [name, sum / count]));
	}
}

/** `wanted` of the rows, spread evenly. */
function spread(rows: Uint32Array, wanted: number): number[] {
	const many = Math.min(rows.length, wanted);
	return Array.from({ length: many }, (_, i) => rows[Math.floor(((i + 0.5) * rows.length) / many)] as number);
}

/** A row as the user's metric sees it; null where JavaScript's parser refuses it. */
function parsed(content: Uint8Array): unknown {
	try {
		return JSON.parse(new TextDecoder().decode(content));
	} catch {
		return null;
	}
}
