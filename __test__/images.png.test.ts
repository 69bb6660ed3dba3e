import sharp from "sharp";
import { describe, expect, it } from "vitest";
import { imageName } from "../src/images/name.js";
import { encodePng } from "../src/images/png.js";
import { inlineImage, inlineProtocol } from "../src/report/inline-image.js";
import { fc, holds } from "./support/properties.js";

describe("a PNG of pixels", () => {
	it("has these pixels when another program decodes it", async () => {
		const size = fc.tuple(fc.integer({ min: 1, max: 9 }), fc.integer({ min: 1, max: 9 }));
		const cases: { height: number; width: number; pixels: Uint8Array }[] = [];
		holds(
			20,
			fc.property(size, fc.uint8Array({ minLength: 243, maxLength: 243 }), ([height, width], bytes) => {
				cases.push({ height, width, pixels: bytes.slice(0, 3 * height * width) });
			}),
		);
		for (const { height, width, pixels } of cases) {
			const { data, info } = await sharp(encodePng(pixels, height, width))
				.raw()
				.toBuffer({ resolveWithObject: true });
			expect([info.height, info.width, info.channels]).toEqual([height, width, 3]);
			expect(new Uint8Array(data)).toEqual(pixels);
		}
	});
});

describe("an image in a terminal", () => {
	it("is shown where the terminal is known to", () => {
		expect(inlineProtocol({ TERM: "xterm-kitty" })).toBe("kitty");
		expect(inlineProtocol({ TERM_PROGRAM: "iTerm.app" })).toBe("iterm2");
		expect(inlineProtocol({ TERM: "xterm-256color" })).toBe(null);
		expect(inlineProtocol({ TERM: "xterm-kitty", TMUX: "x" })).toBe(null);
	});

	it("comes in parts of at most 4096 characters for kitty, the last of which says so", () => {
		const png = new Uint8Array(10_000).fill(1);
		const esc = "\u001b";
		const commands = inlineImage(png, "kitty").trimEnd().split(`${esc}\\`).slice(0, -1);
		const parts = commands.map((command) => command.replace(`${esc}_G`, "").split(";"));
		expect(parts.map(([keys]) => keys)).toEqual(["f=100,a=T,m=1", "m=1", "m=1", "m=0"]);
		expect(parts.every(([, part = ""]) => part.length <= 4096)).toBe(true);
		expect(Buffer.from(parts.map(([, part]) => part).join(""), "base64")).toEqual(Buffer.from(png));
		expect(inlineImage(png, "iterm2")).toContain("inline=1;size=10000:");
	});
});

describe("what people call an image", () => {
	it("is its file's name, and no secret of its URL", () => {
		expect(imageName({ path: "deep/a.png" })).toBe("a.png");
		expect(imageName({ url: "https://user:key@host/x/b.jpg?sig=1" })).toBe("b.jpg");
		expect(imageName({ url: "data:image/png;base64,AAAA" })).toBe("data URL");
		expect(imageName({})).toBe("bytes in the row");
	});
});
