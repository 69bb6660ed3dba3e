/** What a run needs of the Hugging Face Hub, fetched before it begins; progress as events. */
import { within } from "../../data/cancellation.js";
import { type DownloadEvent, notice, type TrainEvent } from "../../events.js";
import { type FetchOptions, localArgs } from "../../hub/index.js";

const EVENT_MILLISECONDS = 500;

/** Has `fetch` report, and yields its progress about twice a second. Returns what it returns; a reader who leaves ends it. */
async function* fetching<T>(
	signal: AbortSignal | null,
	fetch: (calls: Pick<FetchOptions, "signal" | "progress">) => Promise<T>,
): AsyncGenerator<TrainEvent, T> {
	const left = new AbortController();
	let latest: DownloadEvent | null = null;
	let done = false;
	const result = fetch({
		signal: signal === null ? left.signal : AbortSignal.any([signal, left.signal]),
		progress: (progress) => {
			latest = { type: "download", ...progress };
		},
	}).finally(() => {
		done = true;
	});
	// Awaited below, where it throws.
	const settled = result.then(
		() => {},
		() => {},
	);
	try {
		while (!done) {
			await within(settled, EVENT_MILLISECONDS);
			if (latest !== null) yield latest;
			latest = null;
		}
		return await result;
	} finally {
		left.abort();
	}
}

/** The options with local paths for what they name on the Hub. */
export async function* fetchNamed<Args extends Parameters<typeof localArgs>[0]>(
	args: Args,
	weights: boolean,
	signal: AbortSignal | null,
): AsyncGenerator<TrainEvent, Args> {
	const found = yield* fetching(signal, (calls) => localArgs(args, { weights, ...calls }));
	for (const message of found.notices) yield notice("info", message);
	return found.args;
}
