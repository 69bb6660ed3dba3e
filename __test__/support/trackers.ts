/** Servers of metrics in Python, for tests: MLflow and trackio, and TensorBoard's reader. */
import { type ChildProcess, spawn, spawnSync } from "node:child_process";

/** A Python that has `module`: `ARL_PYTHON`; null, with a counted notice: there is none. */
export function pythonWith(module: string, test: string): string | null {
	const program = process.env.ARL_PYTHON;
	const found = program !== undefined && spawnSync(program, ["-c", `import ${module}`]).status === 0;
	if (found) return program;
	const why =
		program === undefined ? `ARL_PYTHON does not name a Python with ${module}` : `${program} has no ${module}`;
	process.stderr.write(`SKIPPED: ${test}: ${why}\n`);
	return null;
}

/** A server that answers at `url`. */
export interface Tracker {
	url: string;
	/** Kills it at once, with all its processes. */
	kill(): Promise<void>;
}

/** Starts a server and waits until `path` answers. */
export async function startTracker(
	program: string,
	words: string[],
	{ port, path, env }: { port: number; path: string; env: NodeJS.ProcessEnv },
): Promise<Tracker> {
	// In a group of its own: MLflow's workers are processes of their own.
	const child = spawn(program, words, {
		detached: true,
		stdio: ["ignore", "ignore", "pipe"],
		env: { ...process.env, ...env },
	});
	let said = "";
	child.stderr?.on("data", (chunk) => {
		said += chunk;
	});
	const url = `http://127.0.0.1:${port}`;
	const deadline = performance.now() + 180_000;
	for (;;) {
		if (
			await fetch(`${url}${path}`, { signal: AbortSignal.timeout(10_000) }).then(
				({ ok }) => ok,
				() => false,
			)
		)
			break;
		if (child.exitCode !== null || performance.now() > deadline) {
			await killGroup(child);
			throw new Error(`${words.join(" ")} does not answer: ${said}`);
		}
		await new Promise((done) => setTimeout(done, 200));
	}
	return { url, kill: () => killGroup(child) };
}

async function killGroup(child: ChildProcess): Promise<void> {
	const isOver = child.exitCode !== null || child.signalCode !== null;
	const ended = isOver ? Promise.resolve() : new Promise((done) => child.once("close", done));
	try {
		process.kill(-(child.pid ?? 0), "SIGKILL");
	} catch {
		// It has ended already.
	}
	await ended;
}
