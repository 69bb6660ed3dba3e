import { afterEach, describe, expect, it, vi } from "vitest";
import { onStopSignals } from "../src/cli/signals.js";

afterEach(() => vi.restoreAllMocks());

describe("SIGINT and SIGTERM", () => {
	it.each(["SIGINT", "SIGTERM", "SIGHUP"] as const)(
		"%s asks for an orderly end first, and ends with 130 at once when it comes again",
		(name) => {
			const exit = vi.spyOn(process, "exit").mockImplementation((() => {}) as () => never);
			const notes: string[] = [];
			const stop = onStopSignals((text) => notes.push(text));
			expect(stop.signal.aborted).toBe(false);
			process.emit(name, name);
			expect(stop.signal.aborted).toBe(true);
			expect(exit).not.toHaveBeenCalled();
			expect(notes).toEqual([`${name}: finishing the step and saving; once more to leave at once, without saving`]);
			process.emit(name, name);
			expect(exit).toHaveBeenCalledWith(130);
			stop.release();
			expect(process.listenerCount(name)).toBe(0);
		},
	);
});
