/** The licences of all that an addon contains on a platform, as text. */
export function noticesFor(
	triple: string,
	options?: { features?: string; also?: { name: string; license: string } | null },
): string;
