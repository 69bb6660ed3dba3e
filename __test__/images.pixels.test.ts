import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { imageGrid, smart_resize, VISION_GRIDS } from "../src/images/pixels.js";
import { sizeWithin } from "../src/images/scale.js";
import { errorOf } from "./support/folder.js";
import { root } from "./support/real.js";

interface Table {
	transformers: string;
	defaults: [number, number, number, number][];
	/** Patch, merge, bounds, height, width; then height, width, grid and tokens, or nothing where Python refuses. */
	cases: number[][];
}
const table: Table = JSON.parse(readFileSync(join(root, "__test__", "fixtures", "smart_resize.json"), "utf8"));

describe("smart_resize", () => {
	it(`gives what transformers ${table.transformers} gives, size, grid and tokens, in ${table.cases.length} cases`, () => {
		let refused = 0;
		for (const [patch = 0, merge = 0, min = 0, max = 0, height = 0, width = 0, ...wanted] of table.cases) {
			const given = () =>
				imageGrid({ height, width }, { patch_size: patch, merge_size: merge }, { min_pixels: min, max_pixels: max });
			if (wanted.length === 0) {
				expect(given, `${height} x ${width}`).toThrow("one side is more than 200 times the other");
				refused += 1;
				continue;
			}
			const { height: h, width: w, image_grid_thw, tokens } = given();
			expect([h, w, ...image_grid_thw, tokens], `${height} x ${width}`).toEqual(wanted);
			expect(smart_resize(height, width, patch * merge, min, max)).toEqual({ height: h, width: w });
		}
		expect(refused).toBeGreaterThan(10);
		expect(refused).toBeLessThan(table.cases.length / 4);
	});

	it("has the defaults of transformers", () => {
		for (const [height, width, h, w] of table.defaults) {
			expect(smart_resize(height, width)).toEqual({ height: h, width: w });
		}
	});

	it("refuses a side of 0", async () => {
		expect(await errorOf(() => smart_resize(0, 10))).toMatchObject({ code: "ARL_DATA" });
		expect(await errorOf(() => smart_resize(0, 0))).toMatchObject({ code: "ARL_DATA" });
	});

	it("knows the patches of the families: one 448 x 448 image is 256 tokens of Qwen2-VL and 196 of Qwen3-VL", () => {
		const size = { height: 448, width: 448 };
		expect(imageGrid(size, VISION_GRIDS.qwen2_vl)).toMatchObject({ tokens: 256, image_grid_thw: [1, 32, 32] });
		expect(imageGrid(size, VISION_GRIDS.qwen2_5_vl).tokens).toBe(256);
		expect(imageGrid(size, VISION_GRIDS.qwen3_vl)).toMatchObject({ tokens: 196, image_grid_thw: [1, 28, 28] });
	});
});

describe("the size that an image is made smaller to", () => {
	it("never has more pixels than asked for, keeps the shape, and stays where there are few enough", () => {
		expect(sizeWithin({ width: 100, height: 50 }, 5000)).toEqual({ width: 100, height: 50 });
		expect(sizeWithin({ width: 100, height: 50 }, 4999)).toEqual({ width: 99, height: 49 });
		expect(sizeWithin({ width: 4000, height: 3000 }, 1_000_000)).toEqual({ width: 1154, height: 866 });
		for (let width = 1; width < 3000; width += 37) {
			for (const height of [1, 2, 10, 999]) {
				for (const most of [1, 7, 100, 5000]) {
					const size = sizeWithin({ width, height }, most);
					expect(size.width * size.height).toBeLessThanOrEqual(most);
					expect(Math.min(size.width, size.height)).toBeGreaterThanOrEqual(1);
				}
			}
		}
	});
});
