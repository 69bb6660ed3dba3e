import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { createTrainer, type TrainerControl } from "../src/api/trainer.js";
import { fakeNative } from "./support/fake-native.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { events, numbers, type Options, ofType, trainer, workspace } from "./support/run.js";

const folder = temporaryFolder();
const SAVING: Options = { save_strategy: "steps", save_steps: 2 };
const notices = (all: Awaited<ReturnType<typeof events>>) => ofType(all, "notice").map(({ message }) => message);

/** A run that is stopped after four steps, with `options` from the start. */
async function stopped(place: ReturnType<typeof workspace>, options: Options): Promise<void> {
	const native = fakeNative({
		onStep: (step) => {
			if (step === 5) throw new Error("killed");
			return undefined;
		},
	});
	await trainer(place, { ...SAVING, ...options }, native)
		.train()
		.catch(() => {});
	expect(existsSync(join(place.out, "checkpoint-4"))).toBe(true);
}

describe("the model's folder", () => {
	it.each([
		["removed", (model: string) => rmSync(model, { recursive: true })],
		["moved", (model: string) => renameSync(model, `${model}-elsewhere`)],
		[
			"emptied",
			(model: string) => {
				rmSync(model, { recursive: true });
				mkdirSync(model);
			},
		],
		["without its weights", (model: string) => rmSync(join(model, "model.safetensors"))],
	])("may be %s when the run is resumed: the numbers and the model are the same", async (_, harm) => {
		const place = workspace(folder);
		const whole = { ...place, out: `${place.out}-whole` };
		const all = await events(trainer(whole, SAVING));
		await stopped(place, {});
		const config = readFileSync(join(place.model, "config.json"));
		harm(place.model);
		const opened: unknown[] = [];
		const native = fakeNative({ onOpen: ({ modelDir, restored }) => opened.push([modelDir, restored]) });
		const rest = await events(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }, native));
		expect(opened).toEqual([[join(place.out, "checkpoint-4"), true]]);
		expect(numbers(rest)).toEqual(numbers(all).slice(4));
		expect(readFileSync(join(place.out, "model.safetensors"))).toEqual(
			readFileSync(join(whole.out, "model.safetensors")),
		);
		expect(readFileSync(join(place.out, "config.json"))).toEqual(config);
		const isGone = !existsSync(join(place.model, "tokenizer.json"));
		expect(notices(rest).some((message) => message.includes(`${place.model} does not exist any more`))).toBe(isGone);
	});

	it("may be gone when a resumed run is resumed, and when a run started from random weights is", async () => {
		const place = workspace(folder);
		const whole = { ...place, out: `${place.out}-whole` };
		await events(trainer(whole, { ...SAVING, init_from_config: true }));
		await stopped(place, { init_from_config: true });
		rmSync(place.model, { recursive: true });
		const options: Options = { ...SAVING, init_from_config: true, resume_from_checkpoint: "latest" };
		const { args } = trainer(place, options);
		const onStep = ({ step }: { step: number }, control: TrainerControl) => void (step === 6 && control.stop());
		await createTrainer({ args, callbacks: [{ onStep }] }, () => fakeNative()).train();
		await trainer(place, options).train();
		expect(readFileSync(join(place.out, "model.safetensors"))).toEqual(
			readFileSync(join(whole.out, "model.safetensors")),
		);
	});

	it("is compared where it is still there, whatever is in the checkpoint", async () => {
		const place = workspace(folder);
		await stopped(place, {});
		writeFileSync(join(place.model, "model.safetensors"), "other");
		const resume: Options = { ...SAVING, resume_from_checkpoint: "latest" };
		expect((await errorOf(trainer(place, resume).train())).message).toContain("weights of the model");
		writeFileSync(join(place.model, "model.safetensors"), "fake");
		writeFileSync(join(place.model, "config.json"), `${readFileSync(join(place.model, "config.json"), "utf8")} `);
		expect((await errorOf(trainer(place, resume).train())).message).toContain("config.json of the model");
	});

	it("must be there when a run begins", async () => {
		const place = workspace(folder);
		rmSync(place.model, { recursive: true });
		const error = await errorOf(trainer(place, { ...SAVING, resume_from_checkpoint: "latest" }).train());
		expect(error.message).toContain("does not exist");
	});
});

describe("a template that replaces the model's", () => {
	const TEMPLATE = "{{ messages }}\r\n{# é #}";

	function templated() {
		const place = workspace(folder);
		const template = join(place.model, "..", "template.jinja");
		writeFileSync(template, TEMPLATE);
		return { place, template };
	}

	it("goes to the engine byte for byte, with the ids that end a reply, and what changes is reported once", async () => {
		const { place, template } = templated();
		const opened: unknown[] = [];
		const native = fakeNative({
			onOpen: ({ exportChatTemplate, exportStopIds }) => opened.push([exportChatTemplate, exportStopIds]),
			exportChanges: ["saved models have another template"],
		});
		const all = await events(trainer(place, { ...SAVING, chat_template: template }, native));
		expect(opened).toEqual([[TEMPLATE, [0]]]);
		expect(notices(all).filter((message) => message === "saved models have another template")).toHaveLength(1);
		for (const path of ["", "checkpoint-4"]) {
			expect(readFileSync(join(place.out, path, "chat_template.jinja"), "utf8")).toBe(TEMPLATE);
		}
	});

	it("may be gone with the model when the run is resumed", async () => {
		const { place, template } = templated();
		await stopped(place, { chat_template: template });
		rmSync(place.model, { recursive: true });
		rmSync(template);
		const options: Options = { ...SAVING, chat_template: template, resume_from_checkpoint: "latest" };
		const rest = await events(trainer(place, options));
		expect(rest.at(-1)).toMatchObject({ outcome: "completed" });
		expect(notices(rest).join("\n")).toContain(`chat_template: ${template} does not exist any more`);
		expect(readFileSync(join(place.out, "chat_template.jinja"), "utf8")).toBe(TEMPLATE);
	});

	it("that was changed in between is another run", async () => {
		const { place, template } = templated();
		await stopped(place, { chat_template: template });
		writeFileSync(template, `${TEMPLATE} `);
		const options: Options = { ...SAVING, chat_template: template, resume_from_checkpoint: "latest" };
		expect((await errorOf(trainer(place, options).train())).message).toContain("template, tokenizer");
	});
});

describe("the published model", () => {
	it("can be edited in place without damage to the checkpoint, and takes no room for its weights", async () => {
		const place = workspace(folder);
		const native = fakeNative({
			onExport: (dir) => {
				writeFileSync(join(dir, "generation_config.json"), "{}");
				mkdirSync(join(dir, "additional_chat_templates"));
				writeFileSync(join(dir, "additional_chat_templates", "tool_use.jinja"), "tools");
			},
		});
		const [published, checkpoint] = [place.out, join(place.out, "checkpoint-8")];
		for (const options of [SAVING, { ...SAVING, overwrite_output_dir: true }]) {
			await trainer(place, options, native).train();
			const small = ["config.json", "generation_config.json", "additional_chat_templates/tool_use.jinja"];
			for (const name of small) writeFileSync(join(published, name), "edited", { flag: "a" });
			const resumed = await events(trainer(place, { ...SAVING, resume_from_checkpoint: checkpoint }, native));
			expect(resumed.at(-1)).toMatchObject({ outcome: "completed", steps: 8 });
			for (const name of small) {
				expect(readFileSync(join(published, name))).toEqual(readFileSync(join(checkpoint, name)));
			}
			const inode = (path: string) => statSync(path).ino;
			expect(inode(join(published, "model.safetensors"))).toBe(inode(join(checkpoint, "model.safetensors")));
		}
		expect(readdirSync(published).filter((name) => name.endsWith(".partial"))).toEqual([]);
		expect(existsSync(join(published, "arl"))).toBe(false);
	});

	it("has the folders of a model that was saved for it alone", async () => {
		const place = workspace(folder);
		const native = fakeNative({
			onExport: (dir) => {
				mkdirSync(join(dir, "additional_chat_templates"));
				writeFileSync(join(dir, "additional_chat_templates", "tool_use.jinja"), "tools");
			},
		});
		await trainer(place, { save_strategy: "no" }, native).train();
		expect(readFileSync(join(place.out, "additional_chat_templates", "tool_use.jinja"), "utf8")).toBe("tools");
	});
});
