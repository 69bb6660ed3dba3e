import { describe, expect, it } from "vitest";
import { sizeWithin } from "../src/images/scale.js";

describe("the size that an image is scaled down to", () => {
	it("never has more pixels than asked for, keeps the shape, and stays as it is where there are few enough", () => {
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
