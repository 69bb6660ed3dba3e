/**
 * The engine of rank 0 that the others compute with: calls that concern all ranks are sent to them in the order in which
 * this rank's engine gets them. Everything else is done by this rank alone, with all weights: where ranks divide these or the model,
 * the others send them meanwhile. Where ranks divide moments, all of them save at once, each what it has.
 */
import { ArlError, toArlError } from "../errors.js";
import type { EngineOptions, MicroBatch, NativeEngine } from "../native.js";
import { dataPlace, dealt, packBatches } from "./batches.js";
import type { Message } from "./channel.js";

/** How the engine reaches the other ranks. */
export interface Others {
	world: number;
	/** Sends a message to rank `rank`. */
	send(rank: number, message: Message, parts?: readonly Uint8Array[]): void;
	/** Sends a message to all and resolves with their answers, by rank; rank 0's place is empty. */
	ask(message: Message): Promise<string[]>;
	name(rank: number): string;
	/** The failure that ends the run, if there is one, within a moment; else `error`. `follows`: another rank has failed. */
	cause(error: ArlError, follows?: boolean): Promise<ArlError>;
}

/** The engine of all ranks. `local`: rank 0's own; `options`: those that each rank has opened its engine with. */
export function sharedEngine(local: NativeEngine, others: Others, options: EngineOptions): NativeEngine {
	const { world } = others;
	const { zero = 0, tpSize = 1, epSize = 1, ppSize = 1 } = options;
	/** No rank has all of the model. */
	const cut = tpSize * epSize * ppSize > 1;
	/** Each rank then has something that no other can save. */
	const divided = zero > 0 || cut;
	const peers = Array.from({ length: world - 1 }, (_, i) => i + 1);
	const tell = (message: Message) => {
		for (const rank of peers) others.send(rank, message);
	};
	const dealtTo = (rank: number, batches: readonly MicroBatch[]) => {
		const { place, size } = dataPlace(rank, world, options);
		return dealt(batches, place, size);
	};
	const settled = async <T>(result: Promise<T>): Promise<T> => {
		try {
			return await result;
		} catch (error) {
			throw await others.cause(toArlError(error));
		}
	};
	/** What all ranks do at once. */
	const together = async <T>(message: Message, own: () => Promise<T>): Promise<T> => {
		const asked = others.ask(message);
		asked.catch(() => {});
		const result = await own().catch(async (error: unknown) => {
			// Where another rank cannot save, this one learns it from that rank's answer.
			const { code } = toArlError(error);
			throw await others.cause(toArlError(error), code === "ARL_INTERRUPTED");
		});
		await asked;
		return result;
	};
	const saving = {
		exportModel: (dir, dtype) => together({ type: "exportModel", dir, dtype }, () => local.exportModel(dir, dtype)),
		exportAdapter: (dir, base) => together({ type: "exportAdapter", dir, base }, () => local.exportAdapter(dir, base)),
	} satisfies Partial<NativeEngine>;
	/** What rank 0 computes alone, with weights that the others send it. */
	const served = <Arguments extends unknown[], T>(compute: (...args: Arguments) => Promise<T>) => {
		return (...args: Arguments): Promise<T> => {
			tell({ type: "serve" });
			try {
				return settled(compute(...args));
			} finally {
				// The engine comes to it behind the computation, whatever that has come to. A failure of the others ends both.
				local.endServing().catch(() => {});
			}
		};
	};
	const alone = {
		evaluate: served((batches) => local.evaluate(batches)),
		evaluateSequences: served((batch) => local.evaluateSequences(batch)),
		generate: served((...args: Parameters<NativeEngine["generate"]>) => local.generate(...args)),
	} satisfies Partial<NativeEngine>;
	const own = {
		...(divided && saving),
		...((zero === 3 || cut) && alone),
		submitStep: (batches, hyper) => {
			for (const rank of peers) {
				const { lengths, parts } = packBatches(dealtTo(rank, batches));
				others.send(rank, { type: "submit", lengths, hyper }, parts);
			}
			return settled(local.submitStep(dealtTo(0, batches), hyper));
		},
		finishStep: (ticket) => {
			tell({ type: "finish" });
			return settled(local.finishStep(ticket));
		},
		discardStep: () => {
			tell({ type: "discard" });
			return settled(local.discardStep());
		},
		restoreState: async (dir) => {
			const restored = others.ask({ type: "restore", dir });
			const differs = await settled(local.restoreState(dir));
			await restored;
			await checkEqual(local, others, `after reading ${dir}`);
			return differs;
		},
		saveState: async (dir) => {
			// What ranks compute stays equal in bits; a checkpoint of weights that do not agree would hide that they drifted.
			await checkEqual(local, others, "before saving");
			const save = () => local.saveState(dir);
			await (divided ? together({ type: "saveState", dir }, save) : settled(save()));
		},
		close: async () => {
			tell({ type: "close" });
			await local.close();
		},
	} satisfies Partial<NativeEngine>;
	return new Proxy(local, {
		get: (engine, key) => Reflect.get(key in own ? own : engine, key),
	});
}

/** Checks that all ranks hold the same weights and moments. */
export async function checkEqual(local: NativeEngine, others: Others, when: string): Promise<void> {
	const asked = others.ask({ type: "fingerprint" });
	const own = await local.fingerprint();
	const different = (await asked).findIndex((found, rank) => rank > 0 && found !== own);
	if (different < 0) return;
	throw new ArlError(
		"ARL_WEIGHTS",
		`${others.name(different)} has other weights than rank 0 ${when}`,
		"Give every host the same model folder and checkpoints, the same version of arl, and processors with the same vector instructions.",
	);
}
