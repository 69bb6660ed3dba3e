/**
 * The one error class of the public interface, its codes and their exit codes, and how an error is shown.
 * Knows nothing of where errors come from.
 */
import pc from "picocolors";

/** Every code with the exit code of the process that it ends; the core's codes reach TypeScript unchanged. */
export const EXIT_CODES = {
	ARL_USAGE: 2,
	ARL_CONFIG: 2,
	ARL_DATA: 3,
	ARL_TEXT: 3,
	ARL_WEIGHTS: 3,
	ARL_STATE: 3,
	ARL_IO: 1,
	ARL_NETWORK: 1,
	ARL_OOM: 4,
	ARL_NONFINITE: 5,
	ARL_DEVICE: 1,
	ARL_INTERRUPTED: 130,
	ARL_USER: 1,
	ARL_INTERNAL: 1,
} as const;

/** A stable code: the part of an error that programs may depend on. */
export type ErrorCode = keyof typeof EXIT_CODES;

/** What each exit code means; shown by `arl --help`. */
export const EXIT_MEANINGS: Readonly<Record<number, string>> = {
	0: "done",
	1: "failed",
	2: "wrong usage or configuration",
	3: "data, text, weights or saved state that cannot be used",
	4: "out of memory",
	5: "a loss or gradient that is not finite",
	130: "interrupted; what was asked to be saved is saved",
};

/** Whether `code` is one of this project's codes. */
export function isErrorCode(code: unknown): code is ErrorCode {
	return typeof code === "string" && Object.hasOwn(EXIT_CODES, code);
}

/** An error as `--json` prints it. */
export interface ErrorJson {
	code: ErrorCode;
	message: string;
	hint: string;
	suppressed?: ErrorJson[];
}

/** What went wrong and where (`message`), and what to do about it (`hint`; empty where nothing useful can be said). */
export class ArlError extends Error {
	override readonly name = "ArlError";
	readonly code: ErrorCode;
	readonly hint: string;
	/** What failed after this error, while the run was being closed; it never takes the place of the error that ended the run. */
	readonly suppressed: ArlError[] = [];

	constructor(code: ErrorCode, message: string, hint = "", options?: ErrorOptions) {
		super(message, options);
		this.code = code;
		this.hint = hint;
	}

	/** The exit code of a process that ends because of this error. */
	get exitCode(): number {
		return EXIT_CODES[this.code];
	}

	/** The error as one JSON value, as `--json` prints it. */
	toJSON(): ErrorJson {
		const { code, message, hint, suppressed } = this;
		return {
			code,
			message,
			hint,
			...(suppressed.length > 0 && { suppressed: suppressed.map((error) => error.toJSON()) }),
		};
	}
}

const SYSTEM_HINTS: Readonly<Record<string, string>> = {
	ENOENT: "Check the path; relative paths start at the working directory.",
	EACCES: "Check the permissions of the file and of the folders above it.",
	EPERM: "Check the permissions of the file and of the folders above it.",
	EISDIR: "A file is expected here, and this is a folder.",
	ENOTDIR: "A part of the path is a file where a folder is expected.",
	ENOSPC: "Free some space, or choose another output_dir.",
	EDQUOT: "Free some space, or choose another output_dir.",
	EROFS: "The file system is read-only; choose another folder.",
	EMFILE: "Too many files are open; raise the limit with `ulimit -n`.",
};

/**
 * Any thrown value as an `ArlError`: the system's refusals become `ARL_IO`, everything unforeseen `ARL_INTERNAL`. `path`: what
 * was being read or written, for refusals that do not name it themselves (those of a file that is open).
 */
export function toArlError(thrown: unknown, path?: string): ArlError {
	if (thrown instanceof ArlError) return thrown;
	if (thrown instanceof Error) {
		const { code } = thrown as NodeJS.ErrnoException;
		if (thrown.name === "AbortError") {
			return new ArlError("ARL_INTERRUPTED", "The run was interrupted.", "", { cause: thrown });
		}
		if (typeof code === "string" && "syscall" in thrown) {
			const named = "path" in thrown || path === undefined ? thrown.message : `${path}: ${thrown.message}`;
			return new ArlError("ARL_IO", named, SYSTEM_HINTS[code] ?? "", { cause: thrown });
		}
		return new ArlError(
			"ARL_INTERNAL",
			messageOf(thrown),
			"This is a defect of arl. Set ARL_DEBUG=1 to see where it happened, and report it.",
			{ cause: thrown },
		);
	}
	return new ArlError("ARL_INTERNAL", String(thrown), "This is a defect of arl; please report it.");
}

/** What a thrown value says. */
export function messageOf(thrown: unknown): string {
	return thrown instanceof Error ? thrown.message || thrown.name : String(thrown);
}

/** What a function of the user's own code threw, as the error that ends the run; an `ArlError` stays as it is. */
export function userError(name: string, thrown: unknown): ArlError {
	if (thrown instanceof ArlError) return thrown;
	const said = messageOf(thrown);
	const hint = "The error is in the code that was given to arl, not in arl; `cause` is what it threw.";
	return new ArlError("ARL_USER", `${name} threw: ${said}`, hint, { cause: thrown });
}

/** Codes whose messages say what to do themselves, where they have no hint: they name the option, and what is expected. */
const SELF_EXPLANATORY: ReadonlySet<ErrorCode> = new Set(["ARL_USAGE", "ARL_CONFIG", "ARL_INTERRUPTED"]);

/** How an error is shown. */
export interface FormatOptions {
	color?: boolean;
	/** With the trace. */
	trace?: boolean;
	/** An error without a hint points to `arl explain`. */
	explain?: boolean;
}

/** An error as a person reads it: code and what is wrong, then what to do; the trace only on request. */
export function formatError(error: ArlError, options: FormatOptions = {}): string {
	const colors = pc.createColors(options.color ?? false);
	const [first = "", ...rest] = error.message.split("\n");
	const lines = [`${colors.red(colors.bold(error.code))} ${colors.bold(first)}`, ...rest.map((line) => `  ${line}`)];
	const explains = options.explain === true && !SELF_EXPLANATORY.has(error.code);
	const hint = error.hint === "" && explains ? `see \`arl explain ${error.code}\`` : error.hint;
	if (hint !== "") {
		const [head = "", ...tail] = hint.split("\n");
		lines.push(`  ${colors.cyan("what to do:")} ${head}`, ...tail.map((line) => `    ${line}`));
	}
	for (const { code, message } of error.suppressed) {
		lines.push(`  ${colors.cyan("failed after it:")} ${code} ${message.replaceAll("\n", "\n    ")}`);
	}
	if (options.trace) {
		const cause = error.cause instanceof Error ? error.cause : error;
		lines.push(colors.dim(cause.stack ?? ""));
	}
	return `${lines.join("\n")}\n`;
}
