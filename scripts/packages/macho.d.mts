/**
 * What a library of macOS asks of the loader: paths of libraries; the symbols that it defines for others; its processor by
 * Node's name; the oldest macOS that it runs on; whether its code signature holds.
 */
export function requirementsOf(file: string): {
	libraries: string[];
	exports: string[];
	arch: string | undefined;
	oldest: string | null;
	signed: boolean;
};
