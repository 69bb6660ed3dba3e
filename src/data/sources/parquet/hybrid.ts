/**
 * Parquet's hybrid of runs and packed bits, in which levels, dictionary indexes and booleans are written.
 * Checks every bound: a damaged file must end in an error, and not in a run of two thousand million values.
 */

/** Bits that a value takes. */
export function bitWidth(highest: number): number {
	return 32 - Math.clz32(highest);
}

/** The widest index that is read: a dictionary of 16 million entries. */
const MAX_WIDTH = 24;

/** `count` values of `width` bits from [from, end). Throws where they are not there. */
export function readHybrid(bytes: Uint8Array, from: number, end: number, width: number, count: number): Int32Array {
	const out = new Int32Array(count);
	if (width === 0) return out;
	if (width > MAX_WIDTH) throw new Error(`values of ${width} bits; at most ${MAX_WIDTH} are read`);
	let at = from;
	let done = 0;
	while (done < count) {
		let header = 0;
		for (let shift = 0; ; shift += 7) {
			if (at >= end || shift > 28) throw new Error("levels or indexes end early");
			const byte = bytes[at++] as number;
			header |= (byte & 0x7f) << shift;
			if (byte < 0x80) break;
		}
		const runs = header >>> 1;
		if (header & 1) {
			const wanted = Math.min(runs * 8, count - done);
			if (at + Math.ceil((wanted * width) / 8) > end) throw new Error("packed levels or indexes end early");
			unpack(bytes, at, width, out, done, wanted);
			at += runs * width;
			done += wanted;
		} else {
			const size = (width + 7) >> 3;
			if (at + size > end) throw new Error("a run of levels or indexes ends early");
			let value = 0;
			for (let i = 0; i < size; i++) value |= (bytes[at++] as number) << (8 * i);
			const wanted = Math.min(runs, count - done);
			out.fill(value, done, done + wanted);
			done += wanted;
		}
	}
	return out;
}

function unpack(bytes: Uint8Array, from: number, width: number, out: Int32Array, place: number, count: number): void {
	const mask = (1 << width) - 1;
	let at = from;
	let bits = 0;
	let held = 0;
	for (let i = place; i < place + count; i++) {
		while (held < width) {
			bits |= (bytes[at++] as number) << held;
			held += 8;
		}
		out[i] = bits & mask;
		bits >>>= width;
		held -= width;
	}
}
