import type { Platform } from "./platforms.mjs";
/** Sentences on what is wrong with the addon of a platform in `file`; empty where nothing is. */
export function faultsOf(file: string, platform: Pick<Platform, "id" | "platform" | "arch" | "abi">): string[];
