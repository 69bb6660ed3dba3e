import sharp from "sharp";
import { describe, expect, it } from "vitest";
import { describeBytes, type ImageType, imageType, isTruncated } from "../src/data/mime.js";
import { imageSize } from "../src/images/size.js";
import { picture } from "./support/images.js";

/** A BMP of 24 bits, which sharp does not write. */
function bmp(width: number, height: number): Buffer {
	const line = Math.ceil((width * 3) / 4) * 4;
	const bytes = Buffer.alloc(54 + line * Math.abs(height));
	bytes.write("BM");
	bytes.writeUInt32LE(bytes.length, 2);
	bytes.writeUInt32LE(54, 10);
	bytes.writeUInt32LE(40, 14);
	bytes.writeInt32LE(width, 18);
	bytes.writeInt32LE(height, 22);
	bytes.writeUInt16LE(1, 26);
	bytes.writeUInt16LE(24, 28);
	return bytes;
}

const formats = ["png", "jpeg", "gif", "webp", "tiff", "avif"] as const;

describe("an image's type and size by its bytes", () => {
	it.each(formats)("%s", async (format) => {
		for (const [width, height] of [
			[8, 6],
			[1, 1],
			[300, 17],
			[160, 120],
		] as const) {
			const bytes = await picture(format, width, height);
			const type = imageType(bytes);
			expect(type).toBe(`image/${format}`);
			expect(imageSize(bytes, type as ImageType)).toEqual({ width, height });
			expect(isTruncated(bytes, type as ImageType)).toBe(false);
		}
	});

	it("bmp, from below and from above", () => {
		expect(imageType(bmp(5, 7))).toBe("image/bmp");
		expect(imageSize(bmp(5, 7), "image/bmp")).toEqual({ width: 5, height: 7 });
		expect(imageSize(bmp(5, -7), "image/bmp")).toEqual({ width: 5, height: 7 });
	});

	it("progressive JPEG, lossless and transparent WebP, interlaced PNG", async () => {
		const raw = sharp(await picture("png", 33, 21));
		const alpha = sharp(await picture("png", 33, 21)).ensureAlpha(0.5);
		const made: [ImageType, Buffer][] = [
			["image/jpeg", await raw.clone().jpeg({ progressive: true }).toBuffer()],
			["image/webp", await raw.clone().webp({ lossless: true }).toBuffer()],
			["image/webp", await alpha.webp().toBuffer()],
			["image/png", await raw.clone().png({ progressive: true }).toBuffer()],
		];
		for (const [type, bytes] of made) {
			expect(imageType(bytes)).toBe(type);
			expect(imageSize(bytes, type)).toEqual({ width: 33, height: 21 });
		}
	});

	it("a photograph that is on its side has the sides that it is shown with", async () => {
		for (const orientation of [1, 2, 3, 4, 5, 6, 7, 8]) {
			const turned = orientation >= 5;
			const size = turned ? { width: 20, height: 30 } : { width: 30, height: 20 };
			for (const format of ["jpeg", "tiff"] as const) {
				const bytes = await sharp(await picture("png", 30, 20))
					.withMetadata({ orientation })
					.toFormat(format)
					.toBuffer();
				expect(imageSize(bytes, `image/${format}`), `${format} ${orientation}`).toEqual(size);
			}
		}
	});

	it("a header cut off anywhere gives no size and no exception", async () => {
		for (const format of formats) {
			const bytes = await picture(format, 40, 30);
			for (let length = 0; length < Math.min(bytes.length, 400); length++) {
				const size = imageSize(bytes.subarray(0, length), `image/${format}`);
				if (size !== null) expect(size).toEqual({ width: 40, height: 30 });
			}
		}
	});

	it("an image cut off anywhere counts as not whole, for the formats that say where they end", async () => {
		for (const format of ["png", "jpeg", "webp", "gif"] as const) {
			const bytes = await picture(format, 64, 48);
			for (const part of [0.2, 0.5, 0.9, 0.99]) {
				const cut = bytes.subarray(0, Math.floor(bytes.length * part));
				// GIF's end is one byte, which may stand anywhere in its data.
				if (format === "gif" && cut.includes(0x3b, 13)) continue;
				expect(isTruncated(cut, `image/${format}`), `${format} ${part}`).toBe(true);
			}
		}
	});

	it.each([
		["", "nothing (0 bytes)"],
		["<!DOCTYPE html>", "a page of HTML or XML"],
		["  <svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"],
		["<?xml version='1.0'?><svg/>", "an SVG drawing"],
		['{"error":"gone"}', "JSON"],
		["%PDF-1.7", "a PDF"],
		["Not Found", "text"],
		["\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "a HEIC image"],
		["\x00\x00\x00\x18ftypisom\x00\x00\x00\x00isommp42", "a video"],
		["\x1f\x8b\x08\x00", "gzip"],
		["\x01\x02\x03\x04\x05", "bytes that begin with 0102030405"],
		["BM\x00\x00 is no picture at all, it seems", "bytes that begin with 424d000020697320"],
		["RIFF\x00\x00\x00\x00WAVE", "bytes that begin with 5249464600000000"],
	])("%j is no image but %s", (text, name) => {
		const bytes = Buffer.from(text, "latin1");
		expect(imageType(bytes)).toBe(null);
		expect(describeBytes(bytes)).toBe(name);
	});
});
