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

/** Escapes control characters, which a terminal would obey, as JSON does; line breaks stay, and the characters of `keep`. */
export function escapeControls(text: string, keep = ""): string {
	// biome-ignore lint/suspicious/noControlCharactersInRegex: the expression looks for them.
	return text.replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/g, (character) => {
		if (keep.includes(character)) return character;
		// JSON leaves those from U+007F on as they are, and U+009B begins a control sequence.
		const code = character.charCodeAt(0);
		return code < 0x7f ? JSON.stringify(character).slice(1, -1) : `\\u${code.toString(16).padStart(4, "0")}`;
	});
}

/** A model's text as `stream` gets it: all of it where a program reads, without control characters on a terminal. */
export function modelText(text: string, stream: Stream): string {
	return stream.isTTY === true ? escapeControls(text, "\t") : text;
}
