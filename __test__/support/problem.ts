/** What a document is refused with. */
import { DocumentProblem } from "../../src/mongo/bson-json.js";

/** The problem that `action` throws; fails where it throws none. */
export function problemOf(action: () => unknown): DocumentProblem {
	try {
		action();
	} catch (error) {
		if (error instanceof DocumentProblem) return error;
		throw error;
	}
	throw new Error("nothing was thrown");
}
