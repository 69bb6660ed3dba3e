import { describe, expect, it } from "vitest";
import { fixedOf } from "../src/run/checkpoint/state.js";
import { engineOptions, resolveForDevice, textOptions } from "../src/run/setup/options.js";
import { refused, resolve } from "./support/config.js";

describe("options of images", () => {
	it("are auto unless given, and read where images come from as `arl images` does", () => {
		const { args } = resolve([]);
		expect(args).toMatchObject({ images: "auto", freeze: [], min_pixels: null, max_pixels: null });
		expect(args).toMatchObject({ image_root: null, image_allow_private: false, image_cache_dir: null });
		expect(args).toMatchObject({ image_max_bytes: 20 * 1024 * 1024, image_timeout: 30 });
		expect(resolve(["--freeze", "vision", "merger"]).args.freeze).toEqual(["vision", "merger"]);
		expect(resolve(["--freeze", "none"]).args.freeze).toEqual([]);
		expect(refused(["--freeze", "tower"]).message).toContain("one or several of vision, merger, language");
	});

	it("contradict each other where nothing would be trained, and where images are not", () => {
		const all = ["--freeze", "vision", "merger", "language"];
		expect(refused(all).message).toContain("nothing would be trained");
		expect(resolve([...all, "--use_peft"]).args.freeze).toHaveLength(3);
		expect(refused(["--min_pixels", "200", "--max_pixels", "100"]).message).toContain("it is larger");
		for (const mode of ["drop", "error"]) {
			for (const option of [
				["--min_pixels", "200"],
				["--max_pixels", "200"],
				["--freeze", "vision"],
			]) {
				const { message } = refused(["--images", mode, ...option]);
				expect(message).toContain(`contradicts images "${mode}"`);
			}
		}
	});

	it("without effect are reported", () => {
		const { notices } = resolve(["--images", "drop", "--image_root", "x"]);
		expect(notices.join("\n")).toContain("image_root");
	});

	it("reach encoder and engine as what was decided", () => {
		const { args } = resolve(["--freeze", "merger", "vision"]);
		expect(textOptions(args, 8, null)).toMatchObject({ images: "error" });
		const vision = { info: { fingerprint: "p" } };
		const seeing = { ...args, images: "train" as const };
		expect(textOptions(seeing, 8, vision)).toMatchObject({ images: "train", imageProcessor: "p" });
		const engine = (options: typeof args) =>
			engineOptions(resolveForDevice(options, "cpu").args, "cpu", { maxTokens: 1, maxSequences: 1 });
		expect(engine(seeing)).toMatchObject({ vision: true, freeze: ["merger", "vision"] });
		expect(engine(args)).not.toHaveProperty("vision");
	});

	it("are what a resumed run must share, as far as they change what is trained", () => {
		const run = {
			model: {
				path: "",
				modelType: "",
				vocabSize: 1,
				maxPositionEmbeddings: 1,
				vision: true,
				weightBytes: 0,
				identity: { config: "", weights: "" },
			},
			dataIdentity: "",
			rows: 1,
			entryRows: [1],
			databaseList: null,
			textFingerprint: "",
			warmupSteps: 0,
			totalSteps: 1,
			badImages: null,
			heldOut: null,
			evalInterval: 1,
		};
		const fixed = (words: string[], more = {}) =>
			fixedOf(resolveForDevice(resolve(words).args, "cpu").args, { ...run, ...more });
		expect(fixed(["--images", "train", "--freeze", "vision"])).toMatchObject({
			images: "train",
			freeze: JSON.stringify(["vision"]),
		});
		expect(fixed([])).not.toHaveProperty("images");
		expect(fixed([], { badImages: "1 (ab)" })).toMatchObject({ "rows left out for their images": "1 (ab)" });
	});
});
