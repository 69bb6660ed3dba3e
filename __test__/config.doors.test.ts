import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { loadConfigFile, parseFlags, resolveConfig } from "../src/config/index.js";
import type { AgentTrainingConfig, AgentTrainingConfigInput } from "../src/config/schema.js";
import { ArlError } from "../src/errors.js";
import { resolveArgs } from "../src/run/setup/options.js";
import { argsOf } from "./support/code.js";
import { fakeNative } from "./support/fake-native.js";
import { temporaryFolder } from "./support/folder.js";
import { workspace } from "./support/run.js";

const folder = temporaryFolder();
beforeEach(() => vi.stubEnv("ARL_DB_CONNECTION_STRING", ""));
afterEach(() => vi.unstubAllEnvs());

type Values = Partial<Record<keyof AgentTrainingConfigInput, unknown>>;

const REQUIRED: Values = { model_name_or_path: "model", output_dir: "out" };
const FILE: Values = { train_file: ["rows.jsonl"] };
const DATABASE: Values = { db_connection_string: "mongodb://localhost/rows" };
const FOLLOW: Values = { ...DATABASE, max_steps: 5, train_sampling_strategy: "sequential", follow: true };

/** Options that are fine, and what contradicts them. */
const PAIRS: [Values, Values][] = [
	[{ max_tokens_per_micro_batch: 64 }, { per_device_train_batch_size: 2 }],
	[{ max_tokens_per_micro_batch: 64 }, { max_length: 100 }],
	[{ overwrite_output_dir: true }, { resume_from_checkpoint: "latest" }],
	[{ fp16: true }, { bf16: true }],
	[{ fp16: true }, { bf16_stochastic_round: true }],
	[{ bf16: false }, { bf16_stochastic_round: true }],
	[FILE, { train_weights: [1, 2, 3] }],
	[FILE, { train_caps: [1, 2, 3] }],
	[FILE, { db_source: "Record" }],
	[FILE, { db_match: { a: 1 } }],
	[FILE, { mongo_write_back: "none" }],
	[FILE, { follow_idle: 5 }],
	[FILE, { follow: true }],
	[FOLLOW, { max_tokens_per_micro_batch: 64 }],
	[FOLLOW, { on_bad_row: "skip" }],
	[FOLLOW, { truncation: "drop", max_length: 10 }],
	[FOLLOW, FILE],
	[FOLLOW, { dataset: "rows.ts" }],
	[FOLLOW, { convert: "convert.ts" }],
	[FOLLOW, { num_train_epochs: 2 }],
	[FOLLOW, { max_trained_count: 2 }],
	[FOLLOW, { retrained_interval: 2 }],
	[FOLLOW, { mongo_write_back: "none" }],
	[FOLLOW, { train_sampling_strategy: "random" }],
	[FOLLOW, { max_steps: -1 }],
];

const flagsOf = (values: Values) =>
	Object.entries(values).flatMap(([name, value]) => {
		if (Array.isArray(value)) return [`--${name}`, ...value.map(String)];
		return [`--${name}`, typeof value === "object" ? JSON.stringify(value) : String(value)];
	});

let files = 0;
async function throughFile(values: Values) {
	const path = join(folder, `${files++}.json`);
	writeFileSync(path, JSON.stringify(values));
	return resolveConfig([await loadConfigFile(path)]);
}
const throughCode = (values: Values) => resolveArgs(values as AgentTrainingConfigInput);
const resolved = (values: Values): AgentTrainingConfig => throughCode({ ...REQUIRED, ...values }).args;

/** The ways in which the options `a` and then `b` can come to the trainer. */
const DOORS: [string, (a: Values, b: Values) => unknown][] = [
	[
		"flags",
		(a, b) => resolveConfig([{ origin: "flag", values: parseFlags(flagsOf({ ...REQUIRED, ...a, ...b })).options }]),
	],
	["a file", (a, b) => throughFile({ ...REQUIRED, ...a, ...b })],
	[
		"a file and flags over it",
		async (a, b) => {
			const path = join(folder, `${files++}.json`);
			writeFileSync(path, JSON.stringify({ ...REQUIRED, ...a }));
			const flags = { origin: "flag", values: parseFlags(flagsOf(b)).options };
			return resolveConfig([await loadConfigFile(path), flags]);
		},
	],
	["code", (a, b) => throughCode({ ...REQUIRED, ...a, ...b })],
	["a resolved configuration that is spread", (a, b) => throughCode({ ...resolved(a), ...b })],
	["a copy of one through JSON", (a, b) => throughCode({ ...JSON.parse(JSON.stringify(resolved(a))), ...b })],
];

async function refusal(make: () => unknown): Promise<string> {
	try {
		await make();
	} catch (error) {
		if (error instanceof ArlError && error.code === "ARL_CONFIG") {
			// Where a value comes from is the one thing in which the doors differ.
			return `${error.message}\n${error.hint}`.replaceAll(/ \((a flag|in code|the default|[^()\s]*\.json)\)/g, "");
		}
		throw error;
	}
	throw new Error("accepted");
}

describe("options that contradict each other", () => {
	it.each(PAIRS.map(([a, b]) => [Object.keys(a).at(-1), Object.keys(b)[0], a, b] as const))(
		"%s and %s: are refused with one message through every door",
		async (_, __, a, b) => {
			const messages = new Map<string, string>();
			for (const [door, open] of DOORS) messages.set(door, await refusal(() => open(a, b)));
			const wanted = messages.get("code");
			// The message begins with one of the two, or says that one needs the other.
			const [one, other] = [Object.keys(a).at(-1), Object.keys(b)[0]];
			expect(wanted).toMatch(new RegExp(`^(${one}|${other})\\b.*(contradicts|concerns|needs|has|: )`));
			for (const [door, message] of messages) expect(message, door).toBe(wanted);
		},
	);
});

describe("a configuration that is fine", () => {
	const fine: Values[] = [{}, FILE, FOLLOW, DATABASE, { max_tokens_per_micro_batch: 64 }, ...PAIRS.map(([a]) => a)];
	it.each(fine)("is fine through every door, and however often it is spread: %j", async (values) => {
		const wanted = resolved(values);
		for (const [door, open] of DOORS) {
			const { args } = (await open(values, {})) as { args: AgentTrainingConfig };
			expect(args, door).toEqual(wanted);
			expect(throughCode({ ...args }).args, door).toEqual(wanted);
		}
	});

	it("and resolved is taken as it is: the very object, which nothing can change", () => {
		const args = resolved(FILE);
		expect(resolveArgs(args)).toEqual({ args, notices: [] });
		expect(resolveArgs(args).args).toBe(args);
		expect(() => {
			args.overwrite_output_dir = true;
		}).toThrow(TypeError);
		expect(() => args.train_file.push("more.jsonl")).toThrow(TypeError);
	});

	it("and spread with a wrong value, an unknown name or a name that is not built is refused as in code", async () => {
		const wrong: [object, string][] = [
			[{ learning_rate: -1 }, "learning_rate"],
			[{ learning_rte: 1e-5 }, "learning_rte"],
			[{ optim: "sgd" }, "optim"],
			[{ output_dir: undefined }, "output_dir is missing"],
		];
		for (const [values, name] of wrong) {
			const spread = await refusal(() => throughCode({ ...resolved(FILE), ...values } as Values));
			expect(spread).toContain(name);
			expect(spread).toBe(await refusal(() => throughCode({ ...REQUIRED, ...FILE, ...values } as Values)));
		}
	});

	it("and spread to overwrite what it resumes from destroys nothing", async () => {
		const place = workspace(folder);
		const { createTrainer } = await import("../src/api/trainer.js");
		const options = argsOf(place, { train_file: place.file, save_strategy: "steps", save_steps: 2 });
		await createTrainer({ args: options }, () => fakeNative()).train();
		const { args } = resolveArgs(options);
		const again = { ...args, overwrite_output_dir: true, resume_from_checkpoint: "latest" };
		expect(() => createTrainer({ args: again }, () => fakeNative())).toThrow(/contradicts/);
	});
});
