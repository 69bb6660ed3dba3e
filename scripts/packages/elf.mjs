// What a shared object of Linux asks of the system that loads it: libraries, and versions of their symbols. Reads 64-bit
// little-endian ELF files as the System V ABI and the GNU extensions for symbol versions describe them; knows only Node.

import { readFileSync } from "node:fs";

const SHT_DYNAMIC = 6;
const SHT_DYNSYM = 11;
const SHT_GNU_VERNEED = 0x6ffffffe;
const DT_NEEDED = 1n;
/** `e_machine` by Node's names. */
const MACHINES = { 62: "x64", 183: "arm64" };

function sectionsOf(bytes) {
	const magic = bytes.length >= 64 && bytes.readUInt32BE(0) === 0x7f454c46;
	if (!magic || bytes[4] !== 2 || bytes[5] !== 1) throw new Error("no 64-bit little-endian ELF file");
	const start = Number(bytes.readBigUInt64LE(40));
	const [size, count] = [bytes.readUInt16LE(58), bytes.readUInt16LE(60)];
	return Array.from({ length: count }, (_, i) => {
		const at = start + i * size;
		return {
			type: bytes.readUInt32LE(at + 4),
			offset: Number(bytes.readBigUInt64LE(at + 24)),
			size: Number(bytes.readBigUInt64LE(at + 32)),
			link: bytes.readUInt32LE(at + 40),
			info: bytes.readUInt32LE(at + 44),
		};
	});
}

/** A string of a string table. */
function textAt(bytes, table, offset) {
	const start = table.offset + offset;
	return bytes.toString("latin1", start, bytes.indexOf(0, start));
}

/** The names of the dynamic symbols that a file defines (`st_shndx` is not 0), each entry 24 bytes long. */
function definedIn(bytes, section, table) {
	const names = [];
	for (let at = section.offset; at < section.offset + section.size; at += 24) {
		if (bytes.readUInt16LE(at + 6) !== 0) names.push(textAt(bytes, table, bytes.readUInt32LE(at)));
	}
	return names;
}

/**
 * `libraries`: the names that it asks the loader for; `versions`: of each library, the versions of the symbols that it uses;
 * `arch`: the processor, by Node's name; `exports`: the symbols that it defines for others.
 */
export function requirementsOf(file) {
	const bytes = readFileSync(file);
	const sections = sectionsOf(bytes);
	const libraries = [];
	const versions = {};
	const exports = [];
	for (const section of sections) {
		const table = sections[section.link];
		if (section.type === SHT_DYNSYM) exports.push(...definedIn(bytes, section, table));
		if (section.type === SHT_DYNAMIC) {
			for (let at = section.offset; at < section.offset + section.size; at += 16) {
				const value = Number(bytes.readBigUInt64LE(at + 8));
				if (bytes.readBigInt64LE(at) === DT_NEEDED) libraries.push(textAt(bytes, table, value));
			}
		}
		if (section.type !== SHT_GNU_VERNEED) continue;
		let need = section.offset;
		for (let i = 0; i < section.info; i++) {
			const names = [];
			let aux = need + bytes.readUInt32LE(need + 8);
			for (let j = 0; j < bytes.readUInt16LE(need + 2); j++) {
				names.push(textAt(bytes, table, bytes.readUInt32LE(aux + 8)));
				aux += bytes.readUInt32LE(aux + 12);
			}
			versions[textAt(bytes, table, bytes.readUInt32LE(need + 4))] = names.sort();
			need += bytes.readUInt32LE(need + 12);
		}
	}
	return { libraries, versions, exports, arch: MACHINES[bytes.readUInt16LE(18)] };
}

const partsOf = (version) => version.split(".").map(Number);

/** Whether version `a` is newer than `b`, part by part. */
export function isNewer(a, b) {
	const [left, right] = [partsOf(a), partsOf(b)];
	for (let i = 0; i < Math.max(left.length, right.length); i++) {
		if ((left[i] ?? 0) !== (right[i] ?? 0)) return (left[i] ?? 0) > (right[i] ?? 0);
	}
	return false;
}

/** The newest glibc that the file asks for, such as `2.17`; null: it asks for none. */
export function glibcOf(file) {
	const names = Object.values(requirementsOf(file).versions).flat();
	const found = names.flatMap((name) => /^GLIBC_(\d[\d.]*)$/.exec(name)?.[1] ?? []);
	return found.reduce((newest, version) => (newest === null || isNewer(version, newest) ? version : newest), null);
}
