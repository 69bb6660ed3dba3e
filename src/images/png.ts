/** Writes pixels as a PNG, for people who look at what a model gets. */
import { crc32, deflateSync } from "node:zlib";

const SIGNATURE = Buffer.from("89504e470d0a1a0a", "hex");
const RGB = 2;

/** A chunk of a PNG: its length, name, content and checksum. */
function chunk(name: string, content: Uint8Array): Buffer {
	const body = Buffer.concat([Buffer.from(name, "latin1"), content]);
	const length = Buffer.alloc(4);
	length.writeUInt32BE(content.length);
	const sum = Buffer.alloc(4);
	sum.writeUInt32BE(crc32(body));
	return Buffer.concat([length, body, sum]);
}

/** A PNG of `[height, width, 3]` bytes of red, green and blue. */
export function encodePng(pixels: Uint8Array, height: number, width: number): Buffer {
	const header = Buffer.alloc(13);
	header.writeUInt32BE(width, 0);
	header.writeUInt32BE(height, 4);
	header.set([8, RGB, 0, 0, 0], 8);
	// Each row begins with the filter of its bytes: none.
	const stride = 3 * width;
	const rows = Buffer.alloc(height * (stride + 1));
	for (let y = 0; y < height; y++) rows.set(pixels.subarray(y * stride, (y + 1) * stride), y * (stride + 1) + 1);
	const parts = [chunk("IHDR", header), chunk("IDAT", deflateSync(rows)), chunk("IEND", new Uint8Array())];
	return Buffer.concat([SIGNATURE, ...parts]);
}
