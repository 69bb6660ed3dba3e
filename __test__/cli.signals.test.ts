import { afterEach, describe, expect, it, vi } from "vitest";
import { hungUp, onStopSignals } from "../src/cli/signals.js";

afterEach(() => vi.restoreAllMocks());

function listening() {
	const exit = vi.spyOn(process, "exit").mockImplementation((() => {}) as () => never);
	const notes: string[] = [];
	const stop = onStopSignals((text) => notes.push(text));
	return { exit, notes, stop };
}

describe("SIGINT and SIGTERM", () => {
	it.each(["SIGINT", "SIGTERM"] as const)(
		"%s asks for an orderly end first, and ends with 130 at once when it comes again",
		(name) => {
			const { exit, notes, stop } = listening();
			expect(stop.signal.aborted).toBe(false);
			process.emit(name, name);
			expect(stop.signal.aborted).toBe(true);
			expect(exit).not.toHaveBeenCalled();
			expect(notes).toEqual([`${name}: finishing the step and saving; repeat to exit at once without saving`]);
			process.emit(name, name);
			expect(exit).toHaveBeenCalledWith(130);
			stop.release();
			expect(process.listenerCount(name)).toBe(0);
			expect(hungUp()).toBe(false);
		},
	);
});

describe("SIGHUP", () => {
	it("asks for an orderly end, however often it comes, and is remembered as the way to end", () => {
		const { exit, notes, stop } = listening();
		for (let i = 0; i < 3; i++) process.emit("SIGHUP", "SIGHUP");
		expect(stop.signal.aborted).toBe(true);
		expect(notes).toEqual(["SIGHUP: finishing the step and saving"]);
		expect(exit).not.toHaveBeenCalled();
		expect(hungUp()).toBe(true);
		process.emit("SIGINT", "SIGINT");
		expect(exit).toHaveBeenCalledWith(130);
		stop.release();
		expect(process.listenerCount("SIGHUP")).toBe(0);
	});
});
