/** Defaults of how images are loaded, in training as in `arl/images`. Imports nothing. */

/** The largest image in bytes, and the seconds that one attempt at it may take. */
export const IMAGE_DEFAULTS = { image_max_bytes: 20 * 1024 * 1024, image_timeout: 30 } as const;
