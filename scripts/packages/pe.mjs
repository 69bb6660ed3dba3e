// What a library of Windows asks of the system that loads it. Reads 64-bit PE files as Microsoft's "PE Format" describes
// them; knows only Node.

import { readFileSync } from "node:fs";

const MACHINES = { 34404: "x64", 43620: "arm64" };
const PE32_PLUS = 0x20b;
/** Numbers of data directories. */
const EXPORTS = 0;
const IMPORTS = 1;
const DELAYED_IMPORTS = 13;

const textAt = (bytes, start) => bytes.toString("latin1", start, bytes.indexOf(0, start));

/** The names in a table of imports, whose entries have `size` bytes, a name's address at `name`, and end with one of zeros. */
function importsAt(bytes, start, size, name, toOffset) {
	const names = [];
	for (let at = start; bytes.readUInt32LE(at + name) !== 0; at += size) {
		names.push(textAt(bytes, toOffset(bytes.readUInt32LE(at + name))));
	}
	return names;
}

/** `libraries`: the names that it asks the loader for, those too that are loaded when they are first called; `exports`: what it offers. */
export function requirementsOf(file) {
	const bytes = readFileSync(file);
	const header = bytes.length < 64 || bytes.toString("latin1", 0, 2) !== "MZ" ? -1 : bytes.readUInt32LE(60);
	const isPe = header >= 0 && header + 26 <= bytes.length && bytes.toString("latin1", header, header + 4) === "PE\0\0";
	if (!isPe || bytes.readUInt16LE(header + 24) !== PE32_PLUS) throw new Error("no 64-bit PE file");
	const optional = header + 24;
	const sections = optional + bytes.readUInt16LE(header + 20);
	const toOffset = (address) => {
		for (let i = 0; i < bytes.readUInt16LE(header + 6); i++) {
			const [virtualSize, start, size, offset] = [8, 12, 16, 20].map((field) =>
				bytes.readUInt32LE(sections + i * 40 + field),
			);
			if (address >= start && address < start + Math.max(virtualSize, size)) return address - start + offset;
		}
		throw new Error(`no section has the address ${address}`);
	};
	const directoryAt = (number) => {
		const address = bytes.readUInt32LE(optional + 112 + number * 8);
		return address === 0 ? null : toOffset(address);
	};
	const [exported, imported, delayed] = [EXPORTS, IMPORTS, DELAYED_IMPORTS].map(directoryAt);
	const exports = [];
	if (exported !== null) {
		const names = toOffset(bytes.readUInt32LE(exported + 32));
		for (let i = 0; i < bytes.readUInt32LE(exported + 24); i++) {
			exports.push(textAt(bytes, toOffset(bytes.readUInt32LE(names + i * 4))));
		}
	}
	return {
		arch: MACHINES[bytes.readUInt16LE(header + 4)],
		libraries: [
			...(imported === null ? [] : importsAt(bytes, imported, 20, 12, toOffset)),
			...(delayed === null ? [] : importsAt(bytes, delayed, 32, 4, toOffset)),
		],
		exports,
	};
}
