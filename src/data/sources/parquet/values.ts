/**
 * A Parquet value as JSON text, by its column's type: integers of any size and decimals digit by digit, floats as floats,
 * times as ISO 8601, bytes as text, an image's data URL, or base64.
 */
import { isUtf8 } from "node:buffer";
import type { SchemaElement } from "hyparquet";
import { imageType } from "../../mime.js";
import { writeNested } from "../columns.js";
import type { JsonBytes } from "../json-bytes.js";
import { isValueText } from "../json-scan.js";
import { floatText } from "../json-text.js";

/** Writes one value. What it gets is of the column's physical type. */
export type WriteValue = (out: JsonBytes, value: unknown) => void;

function mismatch(value: unknown): Error {
	return new Error(`a value of another type than the column's: ${value === undefined ? "none" : typeof value}`);
}

function asBytes(value: unknown): Uint8Array {
	if (value instanceof Uint8Array) return value;
	throw mismatch(value);
}

function asNumber(value: unknown): number {
	if (typeof value === "number") return value;
	throw mismatch(value);
}

function asInteger(value: unknown): bigint {
	if (typeof value === "bigint") return value;
	return BigInt(asNumber(value));
}

/** Whether the column's bytes are text by its type. */
export function isText({ converted_type: converted, logical_type: logical }: SchemaElement): boolean {
	return converted === "UTF8" || converted === "ENUM" || logical?.type === "STRING" || logical?.type === "ENUM";
}

/** Whether the column is bytes that its type does not say to be text. */
export function isBinary(element: SchemaElement): boolean {
	return element.type === "BYTE_ARRAY" && !isText(element) && !element.converted_type && !element.logical_type;
}

/** Bytes that are not said to be text: an image as its data URL, text as text, all else as base64 in a data URL. */
function writeBinary(out: JsonBytes, bytes: Uint8Array): void {
	const image = imageType(bytes);
	if (image === null && isUtf8(bytes) && !bytes.includes(0)) out.string(bytes);
	else writeDataUrl(out, image ?? "application/octet-stream", bytes);
}

function writeDataUrl(out: JsonBytes, type: string, bytes: Uint8Array): void {
	out.ascii(`"data:${type};base64,`);
	out.raw(Buffer.from(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("base64"), "latin1"));
	out.ascii('"');
}

/** A float's text. What JSON has none for is written as Python does; such a row is refused where it is parsed. */
function writeFloat(out: JsonBytes, value: number): void {
	if (Number.isFinite(value)) out.ascii(floatText(value));
	else out.ascii(Number.isNaN(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity");
}

function signedBigEndian(bytes: Uint8Array): bigint {
	if (bytes.length === 0) return 0n;
	return BigInt.asIntN(bytes.length * 8, BigInt(`0x${Buffer.from(bytes).toString("hex")}`));
}

/** The digits of `unscaled / 10^scale`, all of them. */
function decimalText(unscaled: bigint, scale: number): string {
	if (scale <= 0) return String(unscaled * 10n ** BigInt(-scale));
	const digits = String(unscaled < 0n ? -unscaled : unscaled).padStart(scale + 1, "0");
	return `${unscaled < 0n ? "-" : ""}${digits.slice(0, -scale)}.${digits.slice(-scale)}`;
}

const UNIT_DIGITS = { MILLIS: 3, MICROS: 6, NANOS: 9 } as const;

type Unit = keyof typeof UNIT_DIGITS;

function floorDivide(value: bigint, by: bigint): bigint {
	const quotient = value / by;
	return value % by < 0n ? quotient - 1n : quotient;
}

function dateText(days: number): string {
	const date = new Date(days * 86_400_000);
	// Years beyond those that JavaScript knows are given as days.
	return Number.isNaN(date.getTime()) ? `${days} days since 1970-01-01` : date.toISOString().replace(/T.*/, "");
}

function timeText(value: bigint, unit: Unit): string {
	const digits = UNIT_DIGITS[unit];
	const perSecond = 10n ** BigInt(digits);
	const seconds = Number(value / perSecond);
	const two = (part: number) => String(part).padStart(2, "0");
	const fraction = String(value % perSecond).padStart(digits, "0");
	return `${two(Math.floor(seconds / 3600))}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}.${fraction}`;
}

function timestampText(value: bigint, unit: Unit, utc: boolean): string {
	const perDay = 86_400n * 10n ** BigInt(UNIT_DIGITS[unit]);
	const days = floorDivide(value, perDay);
	return `${dateText(Number(days))}T${timeText(value - days * perDay, unit)}${utc ? "Z" : ""}`;
}

function quoted(text: (value: unknown) => string): WriteValue {
	return (out, value) => out.ascii(`"${text(value)}"`);
}

const JULIAN_DAY_OF_1970 = 2_440_588n;

function int96Text(value: unknown): string {
	const packed = asInteger(value);
	const days = (packed >> 64n) - JULIAN_DAY_OF_1970;
	return timestampText(days * 86_400_000_000_000n + BigInt.asUintN(64, packed), "NANOS", false);
}

function uuidText(value: unknown): string {
	const hex = Buffer.from(asBytes(value)).toString("hex");
	return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}

/** IEEE 754's 16 bits. */
function halfFloat(bytes: Uint8Array): number {
	const bits = ((bytes[1] ?? 0) << 8) | (bytes[0] ?? 0);
	const sign = bits & 0x8000 ? -1 : 1;
	const exponent = (bits >> 10) & 31;
	const fraction = bits & 1023;
	if (exponent === 31) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
	return exponent === 0 ? sign * 2 ** -24 * fraction : sign * 2 ** (exponent - 25) * (1024 + fraction);
}

function timeUnit(element: SchemaElement): { unit: Unit; utc: boolean; kind: "TIME" | "TIMESTAMP" } | null {
	const { logical_type: logical, converted_type: converted } = element;
	if (logical?.type === "TIME" || logical?.type === "TIMESTAMP") {
		return { unit: logical.unit, utc: logical.isAdjustedToUTC, kind: logical.type };
	}
	switch (converted) {
		case "TIME_MILLIS":
			return { unit: "MILLIS", utc: true, kind: "TIME" };
		case "TIME_MICROS":
			return { unit: "MICROS", utc: true, kind: "TIME" };
		case "TIMESTAMP_MILLIS":
			return { unit: "MILLIS", utc: true, kind: "TIMESTAMP" };
		case "TIMESTAMP_MICROS":
			return { unit: "MICROS", utc: true, kind: "TIMESTAMP" };
		default:
			return null;
	}
}

function unsignedBits(element: SchemaElement): number {
	const { logical_type: logical, converted_type: converted } = element;
	if (logical?.type === "INTEGER") return logical.isSigned ? 0 : logical.bitWidth;
	return converted?.startsWith("UINT_") ? Number(converted.slice(5)) : 0;
}

function integerWriter(element: SchemaElement): WriteValue {
	const bits = unsignedBits(element);
	if (bits === 64) return (out, value) => out.ascii(String(BigInt.asUintN(64, asInteger(value))));
	if (bits > 0 && element.type === "INT32") return (out, value) => out.ascii(String(asNumber(value) >>> 0));
	return (out, value) => {
		if (typeof value !== "bigint" && typeof value !== "number") throw mismatch(value);
		out.ascii(String(value));
	};
}

function decimalWriter(element: SchemaElement): WriteValue {
	const logical = element.logical_type;
	const scale = element.scale ?? (logical?.type === "DECIMAL" ? logical.scale : 0);
	return (out, value) => {
		const unscaled = value instanceof Uint8Array ? signedBigEndian(value) : asInteger(value);
		out.ascii(decimalText(unscaled, scale));
	};
}

/** Text that is JSON by the column's type: as it stands; what is no JSON after all is a string. */
export const writeJson: WriteValue = (out, value) => {
	const text = asBytes(value);
	if (isValueText(text)) out.raw(text);
	else out.string(text);
};

/** Text of a column of lists or objects. */
export const writeNestedText: WriteValue = (out, value) => writeNested(out, asBytes(value));

function bytesWriter(element: SchemaElement): WriteValue {
	const { converted_type: converted, logical_type: logical } = element;
	if (isText(element)) return (out, value) => out.string(asBytes(value));
	if (converted === "JSON" || logical?.type === "JSON") return writeJson;
	if (logical?.type === "UUID") return quoted(uuidText);
	if (logical?.type === "FLOAT16") return (out, value) => writeFloat(out, halfFloat(asBytes(value)));
	if (isBinary(element)) return (out, value) => writeBinary(out, asBytes(value));
	return (out, value) => writeDataUrl(out, "application/octet-stream", asBytes(value));
}

/** The writer of a column's values. */
export function valueWriter(element: SchemaElement): WriteValue {
	const { type, converted_type: converted, logical_type: logical } = element;
	if (converted === "DECIMAL" || logical?.type === "DECIMAL") return decimalWriter(element);
	switch (type) {
		case "BOOLEAN":
			return (out, value) => out.ascii(value === true || value === 1 ? "true" : "false");
		case "INT32":
		case "INT64": {
			if (converted === "DATE" || logical?.type === "DATE") return quoted((value) => dateText(asNumber(value)));
			const time = timeUnit(element);
			if (time === null) return integerWriter(element);
			const { unit, utc, kind } = time;
			if (kind === "TIME") return quoted((value) => timeText(asInteger(value), unit));
			return quoted((value) => timestampText(asInteger(value), unit, utc));
		}
		case "INT96":
			return quoted(int96Text);
		case "FLOAT":
		case "DOUBLE":
			return (out, value) => writeFloat(out, asNumber(value));
		default:
			return bytesWriter(element);
	}
}
