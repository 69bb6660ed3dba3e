/** `arl completion`: prints the script by which a shell completes `arl`. */
import { nearest } from "../config/index.js";
import { ArlError } from "../errors.js";
import { parseCommand } from "./command.js";
import { SCRIPTS } from "./completion-scripts.js";

const SHELLS = Object.keys(SCRIPTS);

export const COMMAND = {
	name: "arl completion",
	usage: SHELLS.join("|"),
	about: `Prints the script by which a shell completes commands, options and values of \`arl\`, which must be on the PATH. For
this session:

  source <(arl completion bash)
  source <(arl completion zsh)
  arl completion fish | source
  arl completion powershell | Out-String | Invoke-Expression

For all sessions put that line into the shell's own file: ~/.bashrc, ~/.zshrc behind compinit, ~/.config/fish/config.fish, $PROFILE.`,
	words: { noun: `a shell (${SHELLS.join(", ")})`, least: 1, most: 1, choices: SHELLS },
	flags: {},
};

/** Runs the command; gives the exit code. */
export async function run(words: readonly string[]): Promise<number> {
	const given = parseCommand(COMMAND, words);
	if (given === null) return 0;
	const [shell = ""] = given.words;
	const script = Object.hasOwn(SCRIPTS, shell) ? SCRIPTS[shell] : undefined;
	if (script === undefined) {
		const near = nearest(shell, SHELLS);
		const hint = near === undefined ? `There are scripts for ${SHELLS.join(", ")}.` : `Did you mean ${near}?`;
		throw new ArlError("ARL_USAGE", `there is no completion script for ${JSON.stringify(shell)}`, hint);
	}
	process.stdout.write(script);
	return 0;
}
