/** Sample pictures of a project with images: shapes of one colour on white. */
import { encodePng } from "../images/png.js";

const SIDE = 256;
const RADIUS = 32;
const COLOURS = { red: [220, 40, 40], green: [40, 160, 70], blue: [40, 80, 220] } as const;
/** Where shapes are. */
const PLACES = [
	[70, 90],
	[180, 70],
	[130, 190],
] as const;

/** A PNG with so many shapes. */
export function shapesPicture(many: number, colour: keyof typeof COLOURS, kind: "circle" | "square"): Uint8Array {
	const pixels = new Uint8Array(3 * SIDE * SIDE).fill(255);
	for (const [x0, y0] of PLACES.slice(0, many)) {
		for (let y = y0 - RADIUS; y <= y0 + RADIUS; y++) {
			for (let x = x0 - RADIUS; x <= x0 + RADIUS; x++) {
				if (kind === "circle" && (x - x0) ** 2 + (y - y0) ** 2 > RADIUS ** 2) continue;
				pixels.set(COLOURS[colour], 3 * (y * SIDE + x));
			}
		}
	}
	return encodePng(pixels, SIDE, SIDE);
}
