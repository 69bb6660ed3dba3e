/** Options of the images of rows: whether they are trained, how large they are for the model, and where they may come from. */
import { boolean, choice, choices, integer, integerOrNone, number, stringOrNone } from "../fields.js";
import { IMAGE_DEFAULTS } from "../image-defaults.js";

/** The parts of a model with a vision tower. */
export const MODEL_PARTS = ["vision", "merger", "language"] as const;

/** The most pixels of an image that is decoded, as in Pillow. */
const MOST_PIXELS = 178_956_970;

export const images = {
	images: choice(["auto", "train", "error", "drop"], {
		default: "auto",
		description:
			"What happens to the images of rows. train: the model sees them, which needs a model with a vision tower. error: a row with an image cannot be used. drop: images are left out of the text, counted and reported. auto: train if the model has a tower and one of the first rows has an image, else error.",
	}),
	freeze: choices(MODEL_PARTS, {
		description:
			"Parts of a model with a vision tower that are not trained, while images are: the tower (vision), what makes tokens of its output (merger), the rest (language). A frozen part needs neither gradients nor moments, and comes out as it went in.",
	}),
	min_pixels: integerOrNone({
		min: 1,
		max: MOST_PIXELS,
		description:
			"Images with fewer pixels are scaled up to about this many before the model sees them; none: as the model's preprocessor_config.json says.",
	}),
	max_pixels: integerOrNone({
		min: 1,
		max: MOST_PIXELS,
		description:
			"Images with more pixels are scaled down to about this many, so that each takes fewer tokens; none: as the model's preprocessor_config.json says.",
	}),
	image_root: stringOrNone({
		expects: "a folder",
		description:
			"Folder below which images are read from files. Paths in rows that are not absolute start there. None: images in files are refused.",
	}),
	image_allow_private: boolean({
		default: false,
		description: "Fetch images from this machine and from private networks too.",
	}),
	image_max_bytes: integer({
		min: 1,
		default: IMAGE_DEFAULTS.image_max_bytes,
		description: "Largest file of an image in bytes.",
	}),
	image_timeout: number({
		above: 0,
		max: 3600,
		default: IMAGE_DEFAULTS.image_timeout,
		description: "Seconds for one attempt at an image; a failure that may pass is tried five times.",
	}),
	image_cache_dir: stringOrNone({
		expects: "a folder",
		description:
			"Folder that keeps fetched images, up to 10 GiB, so that later epochs and runs do not fetch them again; none: `images` in `cache_dir`.",
	}),
};
