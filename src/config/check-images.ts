/** Options of images that contradict each other or others, and those without effect. Reads valid values only. */
import type { Checks } from "./check-evaluation.js";
import { MODEL_PARTS } from "./options/images.js";

/** Options that say how images are trained. */
const TRAINED = ["freeze", "min_pixels", "max_pixels"] as const;
/** Options that say where images come from. */
const LOADED = ["image_root", "image_allow_private", "image_max_bytes", "image_timeout", "image_cache_dir"] as const;

/** Reports each contradiction, and options without effect. */
export function checkImages({ args, given, shown, add, notices }: Checks): void {
	const { images, min_pixels: least, max_pixels: most } = args;
	if (least !== null && most !== null && least > most)
		add(
			`${shown("min_pixels")} contradicts ${shown("max_pixels")}: it is larger`,
			"Lower min_pixels or raise max_pixels.",
		);
	const frozen = MODEL_PARTS.every((part) => args.freeze.includes(part));
	if (frozen && !args.use_peft && args.adapter_name_or_path === null)
		add(`${shown("freeze")}: nothing would be trained`, "Leave one part out, or add --use_peft.");
	if (images === "auto" || images === "train") return;
	const why = images === "drop" ? "images are left out" : "rows with images cannot be used";
	for (const name of TRAINED) {
		const value = args[name];
		if (!given(name) || value === null || (Array.isArray(value) && value.length === 0)) continue;
		add(`${shown(name)} contradicts ${shown("images")}: ${why}`, "Leave it out, or set images to train.");
	}
	for (const name of LOADED) if (given(name)) notices.push(`${shown(name)} has no effect with ${shown("images")}`);
}
