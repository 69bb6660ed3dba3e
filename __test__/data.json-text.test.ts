import { describe, expect, it } from "vitest";
import { floatText } from "../src/data/sources/json-text.js";
import { fc, holds } from "./support/properties.js";

describe("a float as JSON text", () => {
	it("reads back as the same number and is no integer", () => {
		const readsBack = (value: number) => {
			const text = floatText(value);
			expect(Object.is(JSON.parse(text), value), text).toBe(true);
			expect(text).toMatch(/[.e]/);
		};
		for (const value of [0, -0, 1, -3, 0.1, 1e-7, 1e21, 1e300, 5e-324, 2 ** 53, -(2 ** 63), 123456789.125])
			readsBack(value);
		const whole = fc.maxSafeInteger();
		holds(2000, fc.property(fc.oneof(whole, fc.double({ noNaN: true, noDefaultInfinity: true })), readsBack));
	});

	it("refuses what JSON cannot say", () => {
		for (const value of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
			expect(() => floatText(value)).toThrow(RangeError);
		}
	});
});
