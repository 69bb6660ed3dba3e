/** Images in what `arl inspect` and `arl data check` print, on the fake core. */
import { mkdirSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import sharp from "sharp";
import { beforeAll, describe, expect, it } from "vitest";
import { run as check } from "../src/cli/data-check.js";
import { run as inspect } from "../src/cli/inspect.js";
import { fakeNative, writeFakeModel } from "./support/fake-native.js";
import { temporaryFolder } from "./support/folder.js";
import { picture } from "./support/images.js";
import { capturedOutput } from "./support/output.js";

const folder = temporaryFolder();
const output = capturedOutput();

const place = mkdtempSync(join(folder, "shown-"));
const model = join(place, "model");
const file = join(place, "rows.jsonl");
const words = ["--model_name_or_path", model, "--train_file", file, "--image_root", place];

beforeAll(async () => {
	mkdirSync(model);
	writeFakeModel(model, { vision_config: {} });
	writeFileSync(join(place, "small.png"), await picture("png", 8, 6));
	writeFileSync(join(place, "tiny.png"), await picture("png", 1, 1));
	const row = (names: string[], text: string) =>
		JSON.stringify({
			messages: [
				{ role: "user", content: names.map((url) => ({ type: "image_url", image_url: { url } })) },
				{ role: "assistant", content: text },
			],
		});
	const rows = [row(["small.png"], "yes"), row(["small.png", "tiny.png"], "no"), row(["gone.png"], "no")];
	writeFileSync(file, `${rows.join("\n")}\n`);
});

describe("arl inspect", () => {
	it("shows an image by the grid and number of its tokens, its size and its name", async () => {
		expect(await inspect([...words, "--row", "2"], () => fakeNative())).toBe(0);
		expect(output.stdout).toContain("[image 4 x 3 = 12 tokens, small.png][image 1 x 1 = 1 token, tiny.png]");
		expect(output.stdout).toContain("small.png: tokens 0 to 11 (4 x 3 = 12), 8 x 6 pixels, 8 x 6 for the model");
		expect(output.stdout).toContain("tiny.png: tokens 12 to 12 (1 x 1 = 1), 1 x 1 pixels, 2 x 2 for the model");
		output.stdout = "";
		await inspect([...words, "--tokens"], () => fakeNative());
		expect(output.stdout).toMatch(/^ +0 +1 x 12 +- {2}"\[image 4 x 3/m);
	});

	it("writes a page with the pixels that the model gets", async () => {
		const page = join(place, "row.html");
		expect(await inspect([...words, "--html", page], () => fakeNative())).toBe(0);
		const text = readFileSync(page, "utf8");
		const [, base64 = ""] = /src="data:image\/png;base64,([^"]+)"/.exec(text) ?? [];
		const { data, info } = await sharp(Buffer.from(base64, "base64")).raw().toBuffer({ resolveWithObject: true });
		const last = readFileSync(join(place, "small.png")).at(-1);
		expect([info.height, info.width, data[0]]).toEqual([6, 8, last]);
		expect(text).toContain("[image 4 x 3 = 12 tokens, small.png]");
	});
});

describe("arl data check", () => {
	it("counts images, their tokens, which are resized, and names broken ones by their place", async () => {
		const decoded: Uint8Array[] = [];
		const native = fakeNative({ onPrepare: (bytes) => void decoded.push(bytes) });
		expect(await check(words, () => native)).toBe(3);
		expect(output.stdout).toContain("images: 3 in 2 rows; 0 scaled down, 2 scaled up".replace("2 scaled", "1 scaled"));
		expect(output.stdout).toContain("tokens of an image: min 1, median 12, max 12, 25 in total");
		expect(output.stdout).toMatch(new RegExp(`${file}:3: image: messages\\[0\\]: .*gone\\.png`));
		// Each of them was decoded: a fault may be anywhere.
		expect(decoded).toHaveLength(3);
	});
});
