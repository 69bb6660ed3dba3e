import type { ChildProcess } from "node:child_process";

export function findServer(): string | null;
export function installServer(): string | null;
export function startServer(options: {
	dir: string;
	port?: number;
	args?: string[];
}): Promise<{ child: ChildProcess; port: number }>;
