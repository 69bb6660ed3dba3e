/**
 * Loads the image behind an `image_url` of any scheme: limits concurrency, size and time, checks the bytes, caches, and scales
 * down if asked.
 */
import { resolve } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { IMAGE_DEFAULTS } from "../config/image-defaults.js";
import { describeBytes, type ImageType, imageType, isTruncated } from "../data/mime.js";
import { ArlError } from "../errors.js";
import { ImageCache } from "./cache.js";
import { systemResolve } from "./connect.js";
import { dataUrlBytes, maxDataUrlLength } from "./data-url.js";
import { fileUrlBytes } from "./file-url.js";
import { type HttpHooks, HttpImages } from "./http.js";
import { scaleImage, sizeWithin } from "./scale.js";
import { showUrl, tooLarge } from "./show.js";
import { type ImageSize, imageSize } from "./size.js";

/** How images are loaded; the names are those of the configuration. */
export interface ImageOptions {
	/** Largest image in bytes; absent: 20 MiB. */
	image_max_bytes?: number;
	/** Seconds for one attempt at an image, redirects included; absent: 30. */
	image_timeout?: number;
	/** Whether images may come from this machine and from private networks; absent: no. */
	image_allow_private?: boolean;
	/** Folder below which `file:` URLs are read; absent or null: they are refused. */
	image_root?: string | null;
	/** Cache folder for fetched images; absent or null: none. */
	image_cache_dir?: string | null;
	/** Limit on that folder's size; absent: 10 GiB. */
	image_cache_max_bytes?: number;
	/** Images with more pixels are scaled down, which needs the package `sharp`; absent or null: they stay as they are. */
	max_pixels?: number | null;
	/** Images loaded concurrently; absent: 16. */
	image_concurrency?: number;
	/** Aborts all loading. */
	signal?: AbortSignal;
}

/** An image as it was found, or scaled down. */
export interface LoadedImage extends ImageSize {
	bytes: Uint8Array;
	/** Determined by the bytes, not by a header or a name. */
	content_type: ImageType;
}

const CACHE_MAX_BYTES = 10 * 1024 ** 3;
const CONCURRENCY = 16;

const HOOKS: HttpHooks = {
	resolve: systemResolve,
	pause: async (milliseconds, signal) => {
		// The next attempt reports an abort.
		await pause(milliseconds, undefined, signal ? { signal } : {}).catch(() => {});
	},
};

/** Loads images. Keeps connections open until it is closed: `await using loader = new ImageLoader()` closes it. */
export class ImageLoader {
	private readonly maxBytes: number;
	private readonly root: string | null;
	private readonly maxPixels: number | null;
	private readonly http: HttpImages;
	private readonly cache: ImageCache | null;
	/** Images being loaded, by URL: an image that several rows need at once is fetched once. */
	private readonly loading = new Map<string, Promise<LoadedImage>>();
	private free: number;
	private readonly waiting: (() => void)[] = [];

	constructor(options?: ImageOptions);
	constructor(options: ImageOptions = {}, hooks: Partial<HttpHooks> = {}) {
		this.maxBytes = options.image_max_bytes ?? IMAGE_DEFAULTS.image_max_bytes;
		this.root = options.image_root ?? null;
		this.maxPixels = options.max_pixels ?? null;
		this.free = options.image_concurrency ?? CONCURRENCY;
		this.http = new HttpImages(
			{
				maxBytes: this.maxBytes,
				timeoutMs: Math.ceil((options.image_timeout ?? IMAGE_DEFAULTS.image_timeout) * 1000),
				allowPrivate: options.image_allow_private ?? false,
				signal: options.signal ?? null,
			},
			{
				resolve: hooks.resolve ?? HOOKS.resolve,
				// An image that waits for its next attempt frees its slot.
				pause: async (milliseconds, signal) => {
					this.leave();
					try {
						await (hooks.pause ?? HOOKS.pause)(milliseconds, signal);
					} finally {
						await this.enter();
					}
				},
			},
		);
		const folder = options.image_cache_dir ?? null;
		this.cache = folder === null ? null : new ImageCache(folder, options.image_cache_max_bytes ?? CACHE_MAX_BYTES);
	}

	/** Loads the image of a URL. @throws ArlError `ARL_DATA`, with the URL, if it cannot be loaded. */
	async load(url: string): Promise<LoadedImage> {
		const known = this.loading.get(url);
		if (known) return known;
		const image = this.read(url).finally(() => this.loading.delete(url));
		this.loading.set(url, image);
		return image;
	}

	/** Loads the image of a file; a relative path starts at `image_root`. @throws as `load`. */
	async loadFile(path: string): Promise<LoadedImage> {
		return this.load(pathToFileURL(resolve(this.root ?? ".", path)).href);
	}

	/** Checks an image that is already in memory, as `load` does. @throws ArlError `ARL_DATA` if it is none. */
	loadBytes(bytes: Uint8Array): LoadedImage {
		return this.check(bytes);
	}

	/** Closes the connections; images still loading fail. */
	async close(): Promise<void> {
		await this.http.close();
	}

	/** The same as `close`. */
	[Symbol.asyncDispose](): Promise<void> {
		return this.close();
	}

	/** Waits for one of the `image_concurrency` slots. */
	private async enter(): Promise<void> {
		if (this.free > 0) this.free -= 1;
		else await new Promise<void>((resolve) => this.waiting.push(resolve));
	}

	private leave(): void {
		const next = this.waiting.shift();
		if (next) next();
		else this.free += 1;
	}

	private async read(url: string): Promise<LoadedImage> {
		await this.enter();
		try {
			const image = await this.checked(url);
			const size = this.maxPixels === null ? image : sizeWithin(image, this.maxPixels);
			if (size.width === image.width && size.height === image.height) return image;
			const scaled = await scaleImage(image.bytes, image.content_type, size);
			return { ...scaled, width: size.width, height: size.height };
		} catch (error) {
			if (!(error instanceof ArlError) || error.code !== "ARL_DATA") throw error;
			throw new ArlError(error.code, `${showUrl(url)}: ${error.message}`, error.hint, { cause: error });
		} finally {
			this.leave();
		}
	}

	/** The image as its URL returns it, checked and cached. */
	private async checked(url: string): Promise<LoadedImage> {
		if (/^\s*data:/i.test(url)) {
			if (url.length > maxDataUrlLength(this.maxBytes)) throw tooLarge(null, this.maxBytes);
			return this.check(dataUrlBytes(url));
		}
		const parsed = parse(url);
		if (parsed.protocol === "file:") return this.check(await fileUrlBytes(parsed, this.root, this.maxBytes));
		// The fragment is not sent to the server: the resource is the same without it.
		parsed.hash = "";
		const kept = (await this.cache?.get(parsed.href)) ?? null;
		if (kept !== null) return this.check(kept);
		const image = this.check(await this.http.get(parsed));
		await this.cache?.put(parsed.href, image.bytes);
		return image;
	}

	private check(bytes: Uint8Array): LoadedImage {
		if (bytes.length > this.maxBytes) throw tooLarge(bytes.length, this.maxBytes);
		const type = imageType(bytes);
		if (type === null) {
			throw new ArlError(
				"ARL_DATA",
				`not a supported image: this is ${describeBytes(bytes)}`,
				"PNG, JPEG, GIF, WebP, BMP, TIFF and AVIF are supported.",
			);
		}
		const size = isTruncated(bytes, type) ? null : imageSize(bytes, type);
		if (size === null) {
			throw new ArlError("ARL_DATA", `the ${type} is damaged or truncated`, "Replace it.");
		}
		return { bytes, content_type: type, ...size };
	}
}

/** A loader that reaches the network through `hooks`: for tests, not part of the public API. */
export function loaderWithHooks(options: ImageOptions, hooks: Partial<HttpHooks>): ImageLoader {
	return Reflect.construct(ImageLoader, [options, hooks]);
}

function parse(url: string): URL {
	const schemes = "An image_url is an http:, https:, file: or data: URL.";
	if (!URL.canParse(url)) throw new ArlError("ARL_DATA", "not a URL", schemes);
	const parsed = new URL(url);
	if (["http:", "https:", "file:"].includes(parsed.protocol)) return parsed;
	throw new ArlError("ARL_DATA", `images are not read from ${parsed.protocol} URLs`, schemes);
}
