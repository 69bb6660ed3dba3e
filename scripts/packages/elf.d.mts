/**
 * What a shared object asks of the loader: names of libraries, and of each the versions of symbols; the symbols that it
 * defines for others, and its processor by Node's name.
 */
export function requirementsOf(file: string): {
	libraries: string[];
	versions: Record<string, string[]>;
	exports: string[];
	arch: string | undefined;
};
/** Whether version `a` is newer than `b`. */
export function isNewer(a: string, b: string): boolean;
/** The newest glibc that the file asks for; null: it asks for none. */
export function glibcOf(file: string): string | null;
