import { describe, expect, it } from "vitest";
import { ArlError, EXIT_CODES, EXIT_MEANINGS, formatError, isErrorCode, toArlError } from "../src/errors.js";
import { wantsColor } from "../src/report/terminal.js";

describe("an error", () => {
	it("ends the process with its code's exit code, and each of these has a meaning", () => {
		expect(new ArlError("ARL_USAGE", "x").exitCode).toBe(2);
		expect(new ArlError("ARL_DATA", "x").exitCode).toBe(3);
		expect(new ArlError("ARL_OOM", "x").exitCode).toBe(4);
		expect(new ArlError("ARL_NONFINITE", "x").exitCode).toBe(5);
		expect(new ArlError("ARL_INTERRUPTED", "x").exitCode).toBe(130);
		for (const code of Object.values(EXIT_CODES)) expect(EXIT_MEANINGS[code]).toBeTruthy();
	});

	it("is shown with code, what is wrong, and what to do", () => {
		const error = new ArlError("ARL_DATA", "rows.jsonl:3: not JSON\nrows.jsonl:7: no messages", "Mend the rows.");
		expect(formatError(error)).toBe(
			"ARL_DATA rows.jsonl:3: not JSON\n  rows.jsonl:7: no messages\n  what to do: Mend the rows.\n",
		);
		expect(formatError(new ArlError("ARL_IO", "no room"))).toBe("ARL_IO no room\n");
		expect(formatError(error, { color: true })).toContain("\x1b[31m");
		expect(formatError(error, { trace: true })).toContain("errors.test.ts");
	});

	it("has a code from the list only", () => {
		expect(isErrorCode("ARL_OOM")).toBe(true);
		expect(isErrorCode("toString")).toBe(false);
		expect(isErrorCode(3)).toBe(false);
	});
});

describe("a foreign error", () => {
	it("from the system keeps its path and gets advice", () => {
		const refusal = Object.assign(new Error("ENOSPC: no space left on device, write 'out'"), {
			code: "ENOSPC",
			syscall: "write",
		});
		const error = toArlError(refusal);
		expect(error).toMatchObject({ code: "ARL_IO", exitCode: 1 });
		expect(error.message).toContain("'out'");
		expect(error.hint).toContain("space");
	});

	it("from an abort is an interruption, and anything else a defect", () => {
		const controller = new AbortController();
		controller.abort();
		expect(toArlError(controller.signal.reason).code).toBe("ARL_INTERRUPTED");
		expect(toArlError(new TypeError("x is not a function")).code).toBe("ARL_INTERNAL");
		expect(toArlError("odd").message).toBe("odd");
		const own = new ArlError("ARL_TEXT", "x");
		expect(toArlError(own)).toBe(own);
	});
});

describe("colours", () => {
	it("are for terminals only, and NO_COLOR is obeyed", () => {
		expect(wantsColor({ isTTY: true }, {})).toBe(true);
		expect(wantsColor({}, {})).toBe(false);
		expect(wantsColor({ isTTY: true }, { NO_COLOR: "1" })).toBe(false);
		expect(wantsColor({}, { NO_COLOR: "1", FORCE_COLOR: "1" })).toBe(false);
		expect(wantsColor({}, { FORCE_COLOR: "1" })).toBe(true);
		expect(wantsColor({ isTTY: true }, { TERM: "dumb" })).toBe(false);
	});
});
