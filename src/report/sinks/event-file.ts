/**
 * TensorBoard's event files: records (tensorflow/core/lib/io/record_writer.h) of messages `Event` (tensorflow/core/util/event.proto),
 * encoded as protocol buffers. Each record is the length (u64), the masked CRC-32C of these 8 bytes, the message, and the
 * masked CRC-32C of the message; all little-endian.
 */

/** CRC-32C (Castagnoli), reflected: the polynomial 0x82f63b78. */
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
	let crc = byte;
	for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
	return crc;
});

export function crc32c(bytes: Uint8Array): number {
	let crc = 0xffffffff;
	for (const byte of bytes) crc = ((CRC_TABLE[(crc ^ byte) & 0xff] as number) ^ (crc >>> 8)) >>> 0;
	return (crc ^ 0xffffffff) >>> 0;
}

function masked(crc: number): number {
	return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
}

/** A message as one record of a file. */
export function record(message: Uint8Array): Buffer {
	const out = Buffer.alloc(message.length + 16);
	out.writeBigUInt64LE(BigInt(message.length), 0);
	out.writeUInt32LE(masked(crc32c(out.subarray(0, 8))), 8);
	out.set(message, 12);
	out.writeUInt32LE(masked(crc32c(message)), 12 + message.length);
	return out;
}

// Wire types of protocol buffers.
const VARINT = 0;
const FIXED64 = 1;
const BYTES = 2;
const FIXED32 = 5;

function varint(value: number): Buffer {
	const bytes: number[] = [];
	let rest = BigInt(value);
	for (; rest > 127n; rest >>= 7n) bytes.push(Number(rest & 127n) | 128);
	return Buffer.from([...bytes, Number(rest)]);
}

const tag = (field: number, wire: number) => varint(field * 8 + wire);
const integerField = (field: number, value: number) => Buffer.concat([tag(field, VARINT), varint(value)]);

function bytesField(field: number, value: Uint8Array | string): Buffer {
	const bytes = typeof value === "string" ? Buffer.from(value) : value;
	return Buffer.concat([tag(field, BYTES), varint(bytes.length), bytes]);
}

function doubleField(field: number, value: number): Buffer {
	const bytes = Buffer.alloc(8);
	bytes.writeDoubleLE(value);
	return Buffer.concat([tag(field, FIXED64), bytes]);
}

function floatField(field: number, value: number): Buffer {
	const bytes = Buffer.alloc(4);
	bytes.writeFloatLE(value);
	return Buffer.concat([tag(field, FIXED32), bytes]);
}

/** The first record of a file: its version. */
export function versionEvent(seconds: number): Buffer {
	return record(Buffer.concat([doubleField(1, seconds), bytesField(3, "brain.Event:2")]));
}

/** A start of a session: readers drop what earlier files have from `step` on. */
export function startEvent(seconds: number, step: number): Buffer {
	const start = integerField(1, 1);
	return record(Buffer.concat([doubleField(1, seconds), integerField(2, step), bytesField(7, start)]));
}

/** Scalars of a step, by their tags. */
export function scalarsEvent(seconds: number, step: number, scalars: readonly (readonly [string, number])[]): Buffer {
	const values = scalars.map(([name, value]) =>
		bytesField(1, Buffer.concat([bytesField(1, name), floatField(2, value)])),
	);
	const summary = bytesField(5, Buffer.concat(values));
	return record(Buffer.concat([doubleField(1, seconds), integerField(2, step), summary]));
}

/** A text, in Markdown, that TensorBoard shows under `name`: a tensor of one string, for its plugin `text`. */
export function textEvent(seconds: number, name: string, text: string): Buffer {
	const plugin = bytesField(1, bytesField(1, "text"));
	// TensorProto: dtype DT_STRING, a shape of one dimension of size 1, the string.
	const shape = bytesField(2, bytesField(2, integerField(1, 1)));
	const tensor = Buffer.concat([integerField(1, 7), shape, bytesField(8, text)]);
	const value = Buffer.concat([bytesField(1, name), bytesField(9, plugin), bytesField(8, tensor)]);
	return record(Buffer.concat([doubleField(1, seconds), integerField(2, 0), bytesField(5, bytesField(1, value))]));
}
