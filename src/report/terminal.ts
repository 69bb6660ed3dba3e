/** What a stream can show. */

/** A stream as far as this is asked of it. */
interface Stream {
	isTTY?: boolean;
}

/** Whether `stream` is a terminal on which lines can be drawn over and coloured. */
export function isTerminal(stream: Stream, env: NodeJS.ProcessEnv = process.env): boolean {
	return stream.isTTY === true && env.TERM !== "dumb";
}

/** Whether colours suit `stream`: only on a terminal, and never where `NO_COLOR` is set; `FORCE_COLOR` counts as a terminal. */
export function wantsColor(stream: Stream, env: NodeJS.ProcessEnv = process.env): boolean {
	if (env.NO_COLOR !== undefined && env.NO_COLOR !== "") return false;
	if (env.FORCE_COLOR !== undefined && env.FORCE_COLOR !== "" && env.FORCE_COLOR !== "0") return true;
	return isTerminal(stream, env);
}
