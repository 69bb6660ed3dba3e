/** What commands show while a model or rows are fetched from the Hugging Face Hub. */
import type { FetchProgress } from "../hub/index.js";
import type { LiveLine } from "../report/live.js";
import { downloadParts } from "../report/reporter.js";

/** Shows the progress on the live line; nothing where there is none. */
export function fetchingOn(live: LiveLine | null): (progress: FetchProgress) => void {
	return (progress) => live?.show(downloadParts(progress));
}
