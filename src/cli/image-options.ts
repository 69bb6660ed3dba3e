/** Flags of commands that read images: one set, with the names and defaults of `ImageLoader`. */
import type { Command } from "commander";
import { IMAGE_DEFAULTS, type ImageOptions } from "../images/loader.js";
import { numberAbove, wholeNumber } from "./options.js";

/** What `withImageOptions` gives; an `ImageLoader` takes it as it is. */
export type ImageFlags = Pick<
	ImageOptions,
	"image_root" | "image_allow_private" | "image_max_bytes" | "image_timeout" | "image_cache_dir" | "max_pixels"
>;

/** Adds the flags to a command. */
export function withImageOptions(of: Command): Command {
	const { image_max_bytes, image_timeout } = IMAGE_DEFAULTS;
	return of
		.option("--image_root <folder>", "folder under which file: URLs are read (default: they are refused)")
		.option("--image_allow_private", "read images from this machine and from private networks too")
		.option("--image_max_bytes <n>", "largest image in bytes", wholeNumber(1), image_max_bytes)
		.option(
			"--image_timeout <seconds>",
			"for one attempt at an image; there are five where a failure may pass",
			numberAbove(0, 3600),
			image_timeout,
		)
		.option("--image_cache_dir <folder>", "keep fetched images there, up to 10 GiB (default: nowhere)")
		.option("--max_pixels <n>", "make images of more pixels smaller; needs the package sharp", wholeNumber(1));
}
