/** Temporary folders of tests. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll } from "vitest";
import { ArlError } from "../../src/errors.js";

/** A new folder that goes when the tests of the file are through. */
export function temporaryFolder(): string {
	const folder = mkdtempSync(join(tmpdir(), "arl-test-"));
	afterAll(() => rmSync(folder, { recursive: true, force: true }));
	return folder;
}

/** The error that something ends with; fails where it does not end with one of this project. */
export async function errorOf(action: Promise<unknown> | (() => unknown)): Promise<ArlError> {
	try {
		await (typeof action === "function" ? action() : action);
	} catch (error) {
		if (error instanceof ArlError) return error;
		throw error;
	}
	throw new Error("expected an ArlError, and nothing was thrown");
}
