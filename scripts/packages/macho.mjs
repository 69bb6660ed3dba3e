// What a library of macOS asks of the system that loads it, and whether its signature holds. Reads 64-bit little-endian
// Mach-O files and embedded code signatures as Apple's <mach-o/loader.h> and <kern/cs_blobs.h> describe them; knows only Node.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";

const MAGIC = 0xfeedfacf;
const CPU_ARM64 = 0x0100000c;
const CPU_X86_64 = 0x01000007;
const LC_SYMTAB = 0x2;
/** Libraries that must be there, that may be there, and whose symbols become this one's. */
const LC_LOAD_DYLIBS = new Set([0xc, 0x80000018, 0x8000001f]);
const LC_CODE_SIGNATURE = 0x1d;
const LC_BUILD_VERSION = 0x32;
/** `n_type`: an external symbol that a section defines, and that is not private to the library. */
const N_EXT = 0x01;
const N_PEXT = 0x10;
const N_TYPE = 0x0e;
const N_SECT = 0x0e;

const SUPER_BLOB = 0xfade0cc0;
const CODE_DIRECTORY = 0xfade0c02;
const HASH_SHA256 = 2;

const textAt = (bytes, start) => bytes.toString("latin1", start, bytes.indexOf(0, start));

function symbolsOf(bytes, at) {
	const [offset, count, strings] = [8, 12, 16].map((field) => bytes.readUInt32LE(at + field));
	const names = [];
	for (let entry = offset; entry < offset + count * 16; entry += 16) {
		const type = bytes[entry + 4];
		if ((type & (N_EXT | N_PEXT)) === N_EXT && (type & N_TYPE) === N_SECT) {
			names.push(textAt(bytes, strings + bytes.readUInt32LE(entry)));
		}
	}
	return names;
}

/** The code directory of an embedded signature whose blobs start at `start`; -1: there is none. */
function codeDirectoryAt(bytes, start) {
	if (bytes.readUInt32BE(start) !== SUPER_BLOB) return -1;
	for (let i = 0; i < bytes.readUInt32BE(start + 8); i++) {
		const blob = start + bytes.readUInt32BE(start + 12 + i * 8 + 4);
		if (bytes.readUInt32BE(blob) === CODE_DIRECTORY) return blob;
	}
	return -1;
}

/**
 * Whether the signature's hashes are those of the file's pages: Macs with Apple silicon load nothing else. An ad-hoc
 * signature, which names nobody, is enough for them.
 */
function isSigned(bytes, at) {
	const start = bytes.readUInt32LE(at + 8);
	const directory = codeDirectoryAt(bytes, start);
	if (directory < 0) return false;
	const hashes = directory + bytes.readUInt32BE(directory + 16);
	const slots = bytes.readUInt32BE(directory + 28);
	const limit = bytes.readUInt32BE(directory + 32);
	const [size, type, page] = [bytes[directory + 36], bytes[directory + 37], 1 << bytes[directory + 39]];
	if (type !== HASH_SHA256 || limit > start || slots !== Math.ceil(limit / page)) return false;
	for (let slot = 0; slot < slots; slot++) {
		const found = createHash("sha256")
			.update(bytes.subarray(slot * page, Math.min((slot + 1) * page, limit)))
			.digest();
		const wanted = hashes + slot * size;
		if (!found.subarray(0, size).equals(bytes.subarray(wanted, wanted + size))) return false;
	}
	return true;
}

/**
 * `libraries`: the paths that it asks the loader for; `exports`: the symbols that it defines for others, with the underscore
 * that C's names have there; `oldest`: the oldest macOS that it runs on; `signed`: whether its code signature holds.
 */
export function requirementsOf(file) {
	const bytes = readFileSync(file);
	if (bytes.length < 32 || bytes.readUInt32LE(0) !== MAGIC) throw new Error("no 64-bit little-endian Mach-O file");
	const arch = { [CPU_ARM64]: "arm64", [CPU_X86_64]: "x64" }[bytes.readUInt32LE(4)];
	const found = { arch, libraries: [], exports: [], oldest: null, signed: false };
	let at = 32;
	for (let i = 0; i < bytes.readUInt32LE(16); i++) {
		const command = bytes.readUInt32LE(at);
		if (LC_LOAD_DYLIBS.has(command)) found.libraries.push(textAt(bytes, at + bytes.readUInt32LE(at + 8)));
		if (command === LC_SYMTAB) found.exports = symbolsOf(bytes, at);
		if (command === LC_CODE_SIGNATURE) found.signed = isSigned(bytes, at);
		if (command === LC_BUILD_VERSION) {
			const version = bytes.readUInt32LE(at + 12);
			found.oldest = `${version >>> 16}.${(version >>> 8) & 0xff}`;
		}
		at += bytes.readUInt32LE(at + 4);
	}
	return found;
}
