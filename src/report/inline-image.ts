/** Images in terminals that can show them: kitty's protocol, and iTerm2's. */

/** How a terminal shows images; null: it does not, as far as is known. */
export type InlineProtocol = "kitty" | "iterm2";

/** What the terminal of this environment can do. Multiplexers pass neither protocol on. */
export function inlineProtocol(environment: NodeJS.ProcessEnv): InlineProtocol | null {
	const { TERM = "", TERM_PROGRAM = "", KITTY_WINDOW_ID, TMUX, STY } = environment;
	if (TMUX !== undefined || STY !== undefined || /^(screen|tmux)/.test(TERM)) return null;
	if (TERM_PROGRAM === "iTerm.app") return "iterm2";
	if (KITTY_WINDOW_ID !== undefined || TERM === "xterm-kitty" || TERM === "xterm-ghostty") return "kitty";
	if (TERM_PROGRAM === "ghostty" || TERM_PROGRAM === "WezTerm") return "kitty";
	return null;
}

/** The longest part of an image in one of kitty's commands. */
const PART = 4096;

/** What shows a PNG, on lines of its own. */
export function inlineImage(png: Uint8Array, protocol: InlineProtocol): string {
	const base64 = Buffer.from(png.buffer, png.byteOffset, png.byteLength).toString("base64");
	if (protocol === "iterm2") return `\u001b]1337;File=inline=1;size=${png.length}:${base64}\u0007\n`;
	const parts = base64.match(new RegExp(`.{1,${PART}}`, "g")) ?? [];
	const commands = parts.map((part, i) => {
		const first = i === 0 ? "f=100,a=T," : "";
		return `\u001b_G${first}m=${i < parts.length - 1 ? 1 : 0};${part}\u001b\\`;
	});
	return `${commands.join("")}\n`;
}
