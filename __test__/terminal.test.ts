import { spawnSync } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { temporaryFolder } from "./support/folder.js";
import { arl, flags, metricsOf, root, tinyPlace } from "./support/real.js";

const folder = temporaryFolder();
const PYTHON = process.env.ARL_PYTHON ?? "python3";
const hasTerminals = spawnSync(PYTHON, ["-c", "import pty; pty.openpty()"]).status === 0;
if (!hasTerminals) process.stderr.write(`SKIPPED: closing a terminal: ${PYTHON} cannot open one\n`);

function words(place: ReturnType<typeof tinyPlace>, more: Record<string, string | number | boolean> = {}): string[] {
	const options = {
		model_name_or_path: place.model,
		train_file: place.file,
		output_dir: place.out,
		init_from_config: true,
		per_device_train_batch_size: 2,
		max_steps: 100_000,
		lr_scheduler_type: "constant",
		logging_steps: 1,
		save_strategy: "no",
		threads: 1,
		...more,
	};
	return ["train", ...flags(options)];
}

/** Runs the command line in a terminal that is closed once `text` has appeared there. */
function inClosedTerminal(args: string[], text: string, hangups: number) {
	const command = [process.execPath, join(root, "dist", "cli", "main.js"), ...args];
	const script = join(root, "__test__", "support", "terminal.py");
	const env = { ...process.env, NO_COLOR: "1", TERM: "xterm" };
	const done = spawnSync(PYTHON, [script, text, String(hangups), ...command], { encoding: "utf8", env, cwd: root });
	expect(done.status, done.stderr).toBe(0);
	return JSON.parse(done.stdout) as { appeared: boolean; signal: string | null; code: number | null; shown: string };
}

describe.skipIf(!hasTerminals)("a terminal that is closed while a run writes to it", () => {
	it.each([
		["live lines", "step 3/", 0, {}],
		["plain lines", "step 3 ", 0, { disable_tqdm: true }],
		["a shell that passes the hang-up on", "step 3/", 2, {}],
	] as const)("%s: the run saves, frees its folder, and ends by SIGHUP", async (_, text, hangups, more) => {
		const place = tinyPlace(folder);
		const ended = inClosedTerminal(words(place, more), text, hangups);
		expect(ended, ended.shown).toMatchObject({ appeared: true, signal: "SIGHUP", code: null });
		const checkpoints = readdirSync(place.out).filter((name) => name.startsWith("checkpoint-"));
		expect(checkpoints).toHaveLength(1);
		expect(existsSync(join(place.out, ".arl-lock"))).toBe(false);
		const step = Number(checkpoints[0]?.slice("checkpoint-".length));
		expect(step).toBeGreaterThanOrEqual(3);
		const resumed = await arl(words(place, { resume_from_checkpoint: "latest", max_steps: step + 2 }));
		expect(resumed.code, resumed.stderr).toBe(0);
		expect(metricsOf(place.out).map((line) => line.step)).toEqual(Array.from({ length: step + 2 }, (_, i) => i + 1));
	});

	it("before the first step ends it with nothing left behind", () => {
		const place = tinyPlace(folder);
		const slow = { preprocess_seconds: 600 };
		const ended = inClosedTerminal(words(place, slow), "ok model", 0);
		expect(ended, ended.shown).toMatchObject({ appeared: true, signal: "SIGHUP" });
		expect(existsSync(place.out) ? readdirSync(place.out) : []).not.toContain(".arl-lock");
	});
});
