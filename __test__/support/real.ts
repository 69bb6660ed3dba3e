/** Runs on the real core: a model so small that a step takes a few milliseconds, and the command line as a process. */
import { spawn } from "node:child_process";
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

/** Where cases are that are no part of the project: `ARL_SHARED`, else next to it. */
export const shared = process.env.ARL_SHARED ?? join(root, "..", "shared");

/** Whether a path of the shared folder is there; tells on stderr that a test is skipped where it is not. */
export function sharedPath(path: string, test: string): string | null {
	const full = join(shared, path);
	if (existsSync(full)) return full;
	process.stderr.write(`SKIPPED: ${test}: ${full} is missing\n`);
	return null;
}

export interface Place {
	model: string;
	file: string;
	out: string;
}

/** A Qwen3 of two layers with random weights and the tokenizer of `assets/model`, and `rows` short chat rows. */
export function tinyPlace(parent: string, rows = 60): Place {
	const folder = mkdtempSync(join(parent, "tiny-"));
	const model = join(folder, "model");
	mkdirSync(model);
	const assets = join(root, "assets", "model");
	for (const name of ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]) {
		copyFileSync(join(assets, name), join(model, name));
	}
	const config = JSON.parse(readFileSync(join(assets, "config.json"), "utf8"));
	const tiny = {
		hidden_size: 16,
		intermediate_size: 32,
		num_hidden_layers: 2,
		num_attention_heads: 2,
		num_key_value_heads: 1,
		head_dim: 8,
		max_window_layers: 2,
		layer_types: ["full_attention", "full_attention"],
	};
	writeFileSync(join(model, "config.json"), JSON.stringify({ ...config, ...tiny }));
	const file = join(folder, "rows.jsonl");
	const lines = readFileSync(join(root, "assets", "train.jsonl"), "utf8")
		.split("\n")
		.slice(0, rows);
	writeFileSync(file, `${lines.join("\n")}\n`);
	return { model, file, out: join(folder, "out") };
}

/** Options of a short run on such a place, as flags. */
export function flags(options: Record<string, string | number | boolean>): string[] {
	return Object.entries(options).flatMap(([name, value]) => [`--${name}`, String(value)]);
}

export interface Ended {
	code: number | null;
	signal: NodeJS.Signals | null;
	stdout: string;
	stderr: string;
}

/**
 * The command line in a process of its own; `during` may look at the process while it runs. `fileKiB`: the system refuses
 * to write files beyond this size. `env`: variables in addition to this process's own; undefined takes one away.
 */
export function arl(
	args: string[],
	during?: (kill: (signal: NodeJS.Signals) => void) => void,
	fileKiB?: number,
	env: NodeJS.ProcessEnv = {},
): Promise<Ended> {
	const words = [process.execPath, join(root, "dist", "cli", "main.js"), ...args];
	const bounded = ["bash", "-c", `ulimit -f ${fileKiB}; exec "$@"`, "bash", ...words];
	const [program = "", ...rest] = fileKiB === undefined ? words : bounded;
	const child = spawn(program, rest, {
		cwd: root,
		stdio: ["ignore", "pipe", "pipe"],
		env: { ...process.env, NO_COLOR: "1", ...env },
	});
	let stdout = "";
	let stderr = "";
	child.stdout.setEncoding("utf8").on("data", (chunk) => {
		stdout += chunk;
	});
	child.stderr.setEncoding("utf8").on("data", (chunk) => {
		stderr += chunk;
	});
	during?.((signal) => child.kill(signal));
	return new Promise((resolve) => {
		child.on("close", (code, signal) => resolve({ code, signal, stdout, stderr }));
	});
}

/** Every file below a folder with its bytes, by relative path. */
export function contents(folder: string): Map<string, Buffer> {
	const entries = readdirSync(folder, { withFileTypes: true, recursive: true }).filter((entry) => entry.isFile());
	return new Map(
		entries
			.map((entry) => join(entry.parentPath, entry.name))
			.sort()
			.map((path) => [relative(folder, path), readFileSync(path)]),
	);
}

/** All lines of a run's metrics. */
export function linesOf(out: string): Record<string, unknown>[] {
	const lines = readFileSync(join(out, "metrics.jsonl"), "utf8").trim().split("\n");
	return lines.map((line) => JSON.parse(line));
}

/** The lines of a run's metrics, but for those that list trained rows. */
export function metricsOf(out: string): Record<string, number>[] {
	return linesOf(out).filter((line) => line.event !== "trained_rows") as Record<string, number>[];
}

/** Names of the files that differ between two folders; what the trainer notes about time and paths is left out. */
export function differingFiles(a: string, b: string): string[] {
	const [left, right] = [contents(a), contents(b)];
	const timed = ["arl/trainer_state.json", "arl/manifest.json"];
	const names = [...new Set([...left.keys(), ...right.keys()])].filter((name) => !timed.includes(name));
	return names.filter((name) => {
		const [x, y] = [left.get(name), right.get(name)];
		return x === undefined || y === undefined || !x.equals(y);
	});
}
