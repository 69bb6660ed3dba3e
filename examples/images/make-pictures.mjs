// Draws pictures of shapes, and writes questions about them as rows: node make-pictures.mjs [TRAIN] [HELD_OUT].
// Needs nothing but Node: a PNG is a few chunks around what zlib packs.
import { mkdirSync, writeFileSync } from "node:fs";
import { crc32, deflateSync } from "node:zlib";

const [train = 1600, heldOut = 200] = process.argv.slice(2).map(Number);

/** Pixels of a picture's side: 4 x 4 cells, each of which the model sees as one token. */
const SIDE = 64;
const CELL = 16;
const COLOURS = { red: [220, 40, 40], green: [40, 160, 70], blue: [40, 80, 220], black: [30, 30, 30] };
const KINDS = ["circle", "square", "cross"];

/** Numbers from 0 to 1 that are the same in each run (mulberry32). */
function uniform(seed) {
	let state = seed;
	return () => {
		state = (state + 0x6d2b79f5) | 0;
		let mixed = Math.imul(state ^ (state >>> 15), state | 1);
		mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
		return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
	};
}

const random = uniform(1);
const below = (end) => Math.floor(random() * end);
const choose = (values) => values[below(values.length)];

/** Whether a shape covers a pixel at this distance from its centre. */
function covers(kind, x, y, radius) {
	if (kind === "circle") return x * x + y * y <= radius * radius;
	if (kind === "square") return Math.max(Math.abs(x), Math.abs(y)) <= radius - 1;
	return Math.min(Math.abs(x), Math.abs(y)) <= 1 && Math.max(Math.abs(x), Math.abs(y)) <= radius;
}

/** One to four shapes of one colour and kind, each in a cell of its own, on a light ground. */
function picture() {
	const [colour, kind, count] = [choose(Object.keys(COLOURS)), choose(KINDS), 1 + below(4)];
	const ground = 225 + below(30);
	const pixels = new Uint8Array(3 * SIDE * SIDE).fill(ground);
	const cells = new Set();
	while (cells.size < count) cells.add(below((SIDE / CELL) ** 2));
	for (const cell of cells) {
		const radius = 5 + below(2);
		const [column, row] = [cell % (SIDE / CELL), Math.floor(cell / (SIDE / CELL))];
		const [x0, y0] = [column * CELL + 7 + below(2), row * CELL + 7 + below(2)];
		for (let y = y0 - radius; y <= y0 + radius; y++) {
			for (let x = x0 - radius; x <= x0 + radius; x++) {
				if (covers(kind, x - x0, y - y0, radius)) pixels.set(COLOURS[colour], 3 * (y * SIDE + x));
			}
		}
	}
	return { colour, kind, count, pixels };
}

/** A chunk of a PNG: length, name, content and checksum. */
function chunk(name, content) {
	const body = Buffer.concat([Buffer.from(name, "latin1"), content]);
	const [length, sum] = [Buffer.alloc(4), Buffer.alloc(4)];
	length.writeUInt32BE(content.length);
	sum.writeUInt32BE(crc32(body));
	return Buffer.concat([length, body, sum]);
}

/** Pixels as a PNG of red, green and blue. */
function png(pixels) {
	const header = Buffer.alloc(13);
	header.writeUInt32BE(SIDE, 0);
	header.writeUInt32BE(SIDE, 4);
	header.set([8, 2, 0, 0, 0], 8);
	const rows = Buffer.alloc(SIDE * (3 * SIDE + 1));
	for (let y = 0; y < SIDE; y++) rows.set(pixels.subarray(3 * SIDE * y, 3 * SIDE * (y + 1)), y * (3 * SIDE + 1) + 1);
	const signature = Buffer.from("89504e470d0a1a0a", "hex");
	return Buffer.concat([
		signature,
		chunk("IHDR", header),
		chunk("IDAT", deflateSync(rows)),
		chunk("IEND", Buffer.alloc(0)),
	]);
}

/** A question about a picture. What is asked for takes turns. */
function row(name, i, { colour, kind, count }) {
	const [question, answer] = [
		["How many?", String(count)],
		["Which colour?", colour],
		["Which shape?", kind],
	][i % 3];
	const image = { type: "image_url", image_url: { url: `pictures/${name}` } };
	const messages = [
		{ role: "user", content: [image, { type: "text", text: question }] },
		{ role: "assistant", content: answer },
	];
	return `${JSON.stringify({ messages })}\n`;
}

mkdirSync("pictures", { recursive: true });
const seen = new Set();
for (const [file, many] of [
	["train.jsonl", train],
	["heldout.jsonl", heldOut],
]) {
	const rows = [];
	while (rows.length < many) {
		const drawn = picture();
		const bytes = png(drawn.pixels);
		const key = bytes.toString("latin1");
		// No picture is both trained and held out.
		if (seen.has(key)) continue;
		const name = `${seen.size}.png`;
		seen.add(key);
		writeFileSync(`pictures/${name}`, bytes);
		rows.push(row(name, rows.length, drawn));
	}
	writeFileSync(file, rows.join(""));
	console.log(`${file}: ${many} questions about ${many} pictures`);
}
