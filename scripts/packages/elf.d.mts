/** What a shared object asks of the loader: names of libraries, and of each the versions of symbols. */
export function requirementsOf(file: string): { libraries: string[]; versions: Record<string, string[]> };
/** Whether version `a` is newer than `b`. */
export function isNewer(a: string, b: string): boolean;
/** The newest glibc that the file asks for; null: it asks for none. */
export function glibcOf(file: string): string | null;
