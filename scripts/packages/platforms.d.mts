/** A package of a platform. */
export interface Platform {
	/** The last part of its name: `linux-x64-gnu`. */
	id: string;
	triple: string;
	platform: NodeJS.Platform;
	arch: string;
	abi: string | null;
	/** The target as zig names it. */
	zig: string;
	package: string;
	file: string;
}

export const manifest: {
	name: string;
	version: string;
	private?: boolean;
	scripts: Record<string, string>;
	napi: { binaryName: string; targets: string[] };
};
export const GLIBC: string;
export const CUDA_GLIBC: string;
export const MACOS: string;
export const MOST_BYTES: number;
export const MOST_CUDA_BYTES: number;
export const PLATFORMS: Platform[];
export const CUDA: Pick<Platform, "id" | "platform" | "arch" | "abi" | "package" | "file">;
export const FOLDERS: { out: string; artifacts: string; stage: string };
export function tarballName(name: string, version?: string): string;
