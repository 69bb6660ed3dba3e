import { describe, expect, it } from "vitest";
import { createTrainer, type QwenTrainer, type TrainerCallback } from "../src/api/trainer.js";
import { ArlError, formatError, toArlError } from "../src/errors.js";
import { Resources } from "../src/run/setup/resources.js";
import { argsOf, onConverted, onDataset, type Place, rowsOf } from "./support/code.js";
import { type Faults, fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();

const full = (call: string) =>
	Object.assign(new Error(`ENOSPC: no space left on device, ${call}`), { code: "ENOSPC", syscall: call });
const throwing = (error: Error) => () => {
	throw error;
};

function withCallback(place: Place, callback: TrainerCallback, faults: Faults = {}): QwenTrainer {
	const args = argsOf(place, { train_file: place.file });
	return createTrainer({ args, callbacks: [callback] }, () => fakeNative(faults));
}

/** Each thing of the core that a run closes, failing. */
const CLOSING: [string, (faults: Faults, error: Error) => void][] = [
	["the engine", (faults, error) => Object.assign(faults, { onCloseEngine: throwing(error) })],
	["the token cache", (faults, error) => Object.assign(faults, { onCloseCache: throwing(error) })],
	["a step that is given up", (faults, error) => Object.assign(faults, { onDiscard: throwing(error) })],
];

describe("a failure while closing", () => {
	it.each(CLOSING)("of %s does not hide the error that ended the run", async (_, fail) => {
		const faults: Faults = {
			onStep: (step) => {
				if (step === 2) throw new ArlError("ARL_WEIGHTS", "the first error", "Do this.");
				return undefined;
			},
		};
		fail(faults, full("close"));
		const error = await errorOf(trainer(workspace(folder), {}, fakeNative(faults)).train());
		expect(error).toMatchObject({ code: "ARL_WEIGHTS", message: "the first error", hint: "Do this." });
		expect(error.suppressed.map(({ code, message }) => `${code} ${message}`)).toEqual([
			"ARL_IO ENOSPC: no space left on device, close",
		]);
		expect(error.toJSON().suppressed).toHaveLength(1);
		expect(formatError(error)).toContain("  failed after it: ARL_IO ENOSPC: no space left on device, close\n");
	});

	it.each(CLOSING.slice(0, 2))("of %s is the error where nothing else failed, and an ArlError", async (_, fail) => {
		const faults: Faults = {};
		fail(faults, full("close"));
		const error = await errorOf(trainer(workspace(folder), {}, fakeNative(faults)).train());
		expect(error).toMatchObject({ code: "ARL_IO", exitCode: 1, suppressed: [] });
		expect(error.hint).toContain("space");
	});

	it("reaches a reader who has left the loop", async () => {
		const faults: Faults = { onCloseEngine: throwing(full("close")) };
		const leave = async () => {
			for await (const event of trainer(workspace(folder), {}, fakeNative(faults)).run()) {
				if (event.type === "step") break;
			}
		};
		expect(await errorOf(leave())).toMatchObject({ code: "ARL_IO" });
	});

	it("does not hide why a start was refused, and what the start has made is removed", async () => {
		const faults: Faults = { onCloseCache: throwing(full("close")), availableBytes: 1000 };
		const error = await errorOf(trainer(workspace(folder), {}, fakeNative(faults)).train());
		expect(error.code).toBe("ARL_OOM");
		expect(error.suppressed).toHaveLength(1);
	});

	it("of several things keeps all of them, in order, and closes what is left", async () => {
		const resources = new Resources();
		const closed: string[] = [];
		for (const name of ["a", "b", "c"]) {
			resources.add(() => {
				closed.push(name);
				if (name !== "b") throw new Error(`${name} fails`);
			});
		}
		const first = new ArlError("ARL_DATA", "the first error");
		expect(await errorOf(resources.close(first))).toBe(first);
		expect(closed).toEqual(["c", "b", "a"]);
		expect(first.suppressed.map(({ message }) => message)).toEqual(["c fails", "a fails"]);
		await resources.close();
	});
});

describe("an error of the user's own code", () => {
	const own = new TypeError("x is not a function");
	const callbacks = ["onEvent", "onStart", "onStep", "onLog", "onEpoch", "onEnd"] as const;
	it.each(callbacks)("in the callback %s reaches the caller with its cause, and is no defect of arl", async (name) => {
		for (const callback of [throwing(own), () => Promise.reject(own)]) {
			const error = await errorOf(withCallback(workspace(folder), { [name]: callback }).train());
			expect(error).toMatchObject({ code: "ARL_USER", exitCode: 1 });
			expect(error.message).toBe(`the callback ${name} threw: x is not a function`);
			expect(error.cause).toBe(own);
			expect(error.hint).not.toContain("defect");
		}
	});

	it("in a callback is kept where closing fails after it", async () => {
		const faults: Faults = { onCloseEngine: throwing(full("close")) };
		const error = await errorOf(withCallback(workspace(folder), { onStep: throwing(own) }, faults).train());
		expect(error).toMatchObject({ code: "ARL_USER", cause: own });
		expect(error.suppressed).toHaveLength(1);
	});

	it("in a callback stays what it is where it is an ArlError, and may be no Error at all", async () => {
		const mine = new ArlError("ARL_DATA", "my own check");
		expect(await errorOf(withCallback(workspace(folder), { onStep: throwing(mine) }).train())).toBe(mine);
		const text = () => {
			throw "a text";
		};
		const error = await errorOf(withCallback(workspace(folder), { onStep: text }).train());
		expect(error).toMatchObject({ code: "ARL_USER", cause: "a text" });
		const aborted = new DOMException("The operation was aborted", "AbortError");
		const aborting = await errorOf(withCallback(workspace(folder), { onStep: () => Promise.reject(aborted) }).train());
		expect(aborting.code).toBe("ARL_USER");
	});

	const datasets: [string, (place: Place) => Promise<unknown>][] = [
		["get(i)", (place) => onDataset(place, { length: 4, get: throwing(own) } as never).train()],
		[
			"get(i), which rejects",
			(place) => onDataset(place, { length: 4, get: () => Promise.reject(own) } as never).train(),
		],
		["an iterator", (place) => onDataset(place, { [Symbol.iterator]: throwing(own) } as never).train()],
		[
			"an iterator, at its second row",
			(place) => {
				const rows = rowsOf(place);
				function* some() {
					yield rows[0];
					throw own;
				}
				return onDataset(place, { [Symbol.iterator]: some } as never).train();
			},
		],
		[
			"the end of an iterator that is left early",
			(place) => {
				const rows = rowsOf(place);
				function* some() {
					try {
						yield* rows;
					} finally {
						// biome-ignore lint/correctness/noUnsafeFinally: what a user may write
						throw own;
					}
				}
				const options = { train_sampling_strategy: "sequential" as const, max_steps: 1 };
				return onDataset(place, { [Symbol.iterator]: some } as never, options).train();
			},
		],
		[
			"the length",
			(place) => {
				const dataset = Object.defineProperty({ get: () => rowsOf(place)[0] }, "length", { get: throwing(own) });
				return onDataset(place, dataset as never).train();
			},
		],
		[
			"the identity",
			(place) => {
				const dataset = { length: 4, get: () => rowsOf(place)[0] };
				return onDataset(place, Object.defineProperty(dataset, "identity", { get: throwing(own) }) as never).train();
			},
		],
		["a converting function", (place) => onConverted(place, throwing(own)).train()],
		["a converting function, which rejects", (place) => onConverted(place, () => Promise.reject(own)).train()],
	];
	it.each(datasets)("in a data set's %s is never called a defect of arl", async (_, run) => {
		const error = toArlError(
			await run(workspace(folder)).then(
				() => new ArlError("ARL_DATA", "x is not a function: nothing was thrown, and all rows were trained"),
				(thrown) => thrown,
			),
		);
		expect(["ARL_DATA", "ARL_USER"]).toContain(error.code);
		expect(`${error.message} ${error.hint}`).not.toContain("defect");
		expect(error.message).toContain("x is not a function");
	});
});
