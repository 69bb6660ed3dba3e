import { type ChildProcess, fork } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { loadNative } from "../src/native.js";
import { lockFolder } from "../src/run/checkpoint/lock.js";
import { onDataset, rowsOf } from "./support/code.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { arl, contents, flags, root, tinyPlace } from "./support/real.js";
import { trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const LOCK = ".arl-lock";
const ROUNDS = 10;

interface Answer {
	held: boolean;
	code?: string;
	message?: string;
}

/** Processes that all take a folder at the same moment. */
class Workers {
	private readonly all: ChildProcess[] = [];

	static async start(count: number): Promise<Workers> {
		const workers = new Workers();
		for (let i = 0; i < count; i++) await workers.add();
		return workers;
	}

	async add(): Promise<void> {
		const child = fork(join(root, "__test__", "support", "lock-worker.mjs"));
		this.all.push(child);
		await once(child, "message");
	}

	private async ask(message: { folder: string | null; at?: number }): Promise<Answer[]> {
		const answers = this.all.map((child) => once(child, "message"));
		for (const child of this.all) child.send(message);
		return (await Promise.all(answers)).map(([answer]) => answer as Answer);
	}

	take(path: string): Promise<Answer[]> {
		return this.ask({ folder: path, at: Date.now() + 50 });
	}

	async release(): Promise<void> {
		await this.ask({ folder: null });
	}

	/** Ends one process without warning. */
	async kill(index: number): Promise<void> {
		const [child] = this.all.splice(index, 1);
		child?.kill("SIGKILL");
		if (child) await once(child, "exit");
	}

	pid(index: number): number | undefined {
		return this.all[index]?.pid;
	}

	end(): void {
		for (const child of this.all) child.disconnect();
	}
}

describe("processes that start in one folder at the same moment", () => {
	let workers: Workers;
	beforeAll(async () => {
		workers = await Workers.start(4);
	});
	afterAll(() => workers.end());

	const lefts: [string, (out: string) => void][] = [
		["is not there yet", () => {}],
		["is there", (out) => mkdirSync(out)],
		[
			"a killed run has left its lock in",
			(out) => {
				mkdirSync(out);
				writeFileSync(join(out, LOCK), `process ${process.pid} on here\n`);
			},
		],
		[
			"a killed run has left an empty lock in",
			(out) => {
				mkdirSync(out);
				writeFileSync(join(out, LOCK), "");
			},
		],
	];
	it.each(lefts)(`one of them gets a folder that %s, ${ROUNDS} times of ${ROUNDS}`, async (_, prepare) => {
		for (let round = 0; round < ROUNDS; round++) {
			const out = join(mkdtempSync(join(folder, "lock-")), "out");
			prepare(out);
			const answers = await workers.take(out);
			expect(answers.filter(({ held }) => held)).toHaveLength(1);
			const holder = workers.pid(answers.findIndex(({ held }) => held));
			for (const answer of answers.filter(({ held }) => !held)) {
				expect(answer.code).toBe("ARL_STATE");
				// A process that was quicker than the holder's note names nobody, and never anybody else.
				const named = /process (\d+)/.exec(answer.message ?? "")?.[1];
				if (named !== undefined && named !== String(process.pid)) expect(named).toBe(String(holder));
			}
			expect(readFileSync(join(out, LOCK), "utf8")).toMatch(new RegExp(`^process ${holder} on `));
			await workers.release();
			expect(existsSync(join(out, LOCK))).toBe(false);
		}
	});

	it("gets it at once when the holder is killed", async () => {
		const out = join(folder, "killed");
		const answers = await workers.take(out);
		await workers.kill(answers.findIndex(({ held }) => held));
		expect(existsSync(join(out, LOCK))).toBe(true);
		const next = await workers.take(out);
		expect(next.filter(({ held }) => held)).toHaveLength(1);
		await workers.release();
		await workers.add();
	});
});

describe("a folder that is locked", () => {
	it("is refused to the same process too, with who has it", async () => {
		const out = join(folder, "same");
		const held = await lockFolder(loadNative(), out);
		const error = await errorOf(lockFolder(loadNative(), out));
		expect(error).toMatchObject({ code: "ARL_STATE", exitCode: 3 });
		expect(error.message).toMatch(new RegExp(`in use by another run \\(process ${process.pid} on \\S+\\)`));
		held.release();
		(await lockFolder(loadNative(), out)).release();
	});

	it("that cannot be locked is named, and what was made for it is removed", async () => {
		const out = join(folder, "a", "b");
		const refusing = {
			FileLock: {
				take: () => {
					throw Object.assign(new Error("ENOLCK: no locks available, flock"), { code: "ENOLCK", syscall: "flock" });
				},
			},
		};
		const error = await errorOf(lockFolder(refusing, out));
		expect(error).toMatchObject({ code: "ARL_IO" });
		expect(existsSync(join(folder, "a"))).toBe(false);
	});
});

describe("a start that is refused because another run is in the folder", () => {
	it("leaves that run's cache, and what it has noted of its rows", async () => {
		const place = workspace(folder);
		const rows = rowsOf(place);
		let before: Map<string, Buffer> | null = null;
		for await (const event of onDataset(place, rows).run()) {
			if (event.type !== "step" || event.step !== 2) continue;
			before = contents(join(place.out, ".cache"));
			expect([...before.keys()].some((name) => name.endsWith("rows.hashes"))).toBe(true);
			const error = await errorOf(onDataset(place, rows).train());
			expect(error).toMatchObject({ code: "ARL_STATE" });
			const file = await errorOf(trainer(place, { overwrite_output_dir: true }).train());
			expect(file).toMatchObject({ code: "ARL_STATE" });
			expect(contents(join(place.out, ".cache"))).toEqual(before);
			expect(existsSync(join(place.out, LOCK))).toBe(true);
		}
		expect(before).not.toBeNull();
		expect(existsSync(join(place.out, "model.safetensors"))).toBe(true);
	});

	it("for another reason leaves a cache that was there before", async () => {
		const place = workspace(folder);
		await trainer(place).train();
		const before = contents(place.out);
		const error = await errorOf(trainer(place).train());
		expect(error.message).toContain("holds another run");
		expect(contents(place.out)).toEqual(before);
	});

	it("by processes: one of four trains to its end, and the others touch nothing", async () => {
		const place = tinyPlace(folder);
		const options = {
			model_name_or_path: place.model,
			train_file: place.file,
			output_dir: place.out,
			init_from_config: true,
			num_train_epochs: 4,
			threads: 1,
		};
		const ended = await Promise.all([1, 2, 3, 4].map(() => arl(["train", ...flags(options)])));
		const codes = ended.map(({ code }) => code);
		// One that starts after the first has ended meets its model instead.
		expect(codes.filter((code) => code === 0)).toHaveLength(1);
		for (const { code, stderr } of ended)
			if (code !== 0) expect(stderr).toMatch(/in use by another run|holds another run/);
		const names = readdirSync(place.out).filter((name) => name !== ".cache");
		expect(names.sort()).toContain("model.safetensors");
		expect(names).not.toContain(LOCK);
		expect(readdirSync(join(place.out, ".cache")).length).toBeGreaterThan(0);
	});
});
