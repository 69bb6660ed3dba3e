import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import type { z } from "zod";
import type { QwenTrainerOptions } from "../src/api/trainer.js";
import { metaOf } from "../src/config/fields.js";
import {
	type AgentTrainingConfig,
	configJsonSchema,
	defineConfig,
	formatOptions,
	formatResolved,
	OPTION_NAMES,
	optionsMarkdown,
	optionsTypescript,
	resolvedAsJson,
	type TrainingOptions,
	trainingSchema,
} from "../src/config/index.js";
import { resolve } from "./support/config.js";

describe("what is shown", () => {
	it("is every value with its origin", () => {
		const resolved = resolve(["--seed", "7"], { learning_rate: 1e-3 });
		const text = formatResolved(resolved);
		expect(text).toMatch(/^seed +7 +flag$/m);
		expect(text).toMatch(/^learning_rate +0\.001 +run\.yaml$/m);
		expect(text.trimEnd().split("\n")).toHaveLength(OPTION_NAMES.length);
		expect(resolvedAsJson(resolved).seed).toEqual({ value: 7, origin: "flag" });
	});

	it("is help for every option, within the width", () => {
		const help = formatOptions(80);
		for (const name of OPTION_NAMES) expect(help).toContain(`--${name} `);
		for (const line of help.split("\n")) expect(line.length).toBeLessThanOrEqual(80);
	});

	it("is docs/options.md and the type of options, up to date (`npm run docs:options` writes both)", () => {
		const file = (path: string) => readFileSync(new URL(`../${path}`, import.meta.url), "utf8");
		expect(file("docs/options.md")).toBe(optionsMarkdown());
		expect(file("src/config/training-options.ts")).toBe(optionsTypescript());
	});

	it("is a JSON Schema that knows every option and refuses others", () => {
		const schema = configJsonSchema() as {
			properties: Record<string, { description?: string }>;
			additionalProperties: boolean;
		};
		for (const name of OPTION_NAMES) expect(schema.properties[name]?.description, name).toBeTruthy();
		expect(schema.additionalProperties).toBe(false);
		expect(schema.properties.enable_sampling).toMatchObject({ const: false, default: false });
		expect(schema.properties.optim).toMatchObject({ enum: ["adamw_torch", "adamw_torch_fused"] });
	});
});

describe("the type of options", () => {
	/** `true` where each of two types can be given for the other. */
	type Same<A, B> = [A, B] extends [B, A] ? true : false;
	type Input = z.input<typeof trainingSchema>;

	it("is what the schema takes, name by name, and what code is checked against (tsc checks)", () => {
		const same: [
			Same<keyof TrainingOptions, keyof Input>,
			Same<TrainingOptions, Input>,
			{ [Name in keyof Input]-?: Same<TrainingOptions[Name], Input[Name]> }[keyof Input],
			Same<Required<TrainingOptions>, Required<Input>>,
			Same<AgentTrainingConfig, z.output<typeof trainingSchema>>,
		] = [true, true, true, true, true];
		expect(same).not.toContain(false);
		const options: TrainingOptions = { model_name_or_path: "m", output_dir: "o" };
		// An editor shows an option's text only where the type that it looks up is the interface itself.
		const own: [Parameters<typeof defineConfig>, QwenTrainerOptions["args"]] = [[options], options];
		expect(own).toHaveLength(2);
		// @ts-expect-error what is not built is refused by the compiler already
		defineConfig({ ...options, enable_sampling: true });
		// @ts-expect-error so is an unknown name
		defineConfig({ ...options, learning_rat: 1 });
	});

	it("documents every option in the type that is written from the schema", () => {
		const text = optionsTypescript();
		for (const name of OPTION_NAMES) {
			expect(text).toMatch(new RegExp(` \\*/\n\t${name}\\??:`));
		}
		expect(text).toContain(
			"Files and flags may call it `warmup_ratio`.\n\t * @default 0\n\t */\n\twarmup_steps?: number;",
		);
	});
});

describe("every option", () => {
	it("that has more than one value is read by the trainer, the rows or a command", () => {
		const folders = ["run", "report", "data", "cli", "mongo"].map(
			(name) => new URL(`../src/${name}/`, import.meta.url),
		);
		const sources = folders.flatMap((url) =>
			readdirSync(url, { recursive: true, encoding: "utf8" })
				.filter((name) => name.endsWith(".ts"))
				.map((name) => readFileSync(new URL(name, url), "utf8")),
		);
		const code = sources.join("\n");
		// Both names of optim are one optimizer.
		const without = new Set(["optim"]);
		for (const name of OPTION_NAMES) {
			if (metaOf(trainingSchema.shape[name]).fixed || without.has(name)) continue;
			// As a property of the options, or as a name taken out of them.
			const read = `\\b(args|options)\\.${name}\\b|[{,]\\s*${name}\\s*[,}:]`;
			expect(new RegExp(read).test(code), name).toBe(true);
		}
	});
});
