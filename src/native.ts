/**
 * The only module that imports the addon: loads it, names what it offers, and turns its errors into `ArlError`.
 * Public types never show one of these.
 */
import { createRequire } from "node:module";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import type * as Addon from "../binding.js";
import { ArlError, isErrorCode } from "./errors.js";

export type {
	BatchImage,
	ColumnCount,
	CudaDevice,
	CudaLibrary,
	CudaReport,
	DeviceInfo,
	EncodedImage,
	EncodedPrompt,
	EncodedRow,
	EngineInfo,
	EngineOptions,
	FillReport,
	GenerateOptions,
	ImageProcessorInfo,
	ImageRef,
	MeasuredImage,
	MemoryPlan,
	MicroBatch,
	MicroBatchStats,
	PreparedImage,
	RowNote,
	RowProblem,
	StepStats,
	TextInfo,
	TextOptions,
	TokenBatch,
	Traffic,
} from "../binding.js";
/** An image of a row as its tokens need it: resized. */
export type RowImage = Pick<Addon.MeasuredRowImage, "hash" | "height" | "width">;
/** An image as the engine takes it. */
export type ImagePixels = NonNullable<Addon.MicroBatch["images"]>[number];
export type NativeEngine = Addon.Engine;
export type NativeImageProcessor = Addon.ImageProcessor;
export type NativeRanks = Addon.Ranks;
export type NativeTextEncoder = Addon.TextEncoder;
export type NativeTokenCache = Addon.TokenCache;

/** The generated loader of the CPU addon, and the folder that it is in: the package's. */
export const ADDON_LOADER = fileURLToPath(new URL("../binding.cjs", import.meta.url));
export const PACKAGE_FOLDER = dirname(ADDON_LOADER);

/** What the addon offers; every error that comes out of it is an `ArlError`. */
export interface Native {
	version: typeof Addon.version;
	errorCodes: typeof Addon.errorCodes;
	devices: typeof Addon.devices;
	planMemory: typeof Addon.planMemory;
	planTraffic: typeof Addon.planTraffic;
	modelConfig: typeof Addon.modelConfig;
	checkWeights: typeof Addon.checkWeights;
	mergeAdapter: typeof Addon.mergeAdapter;
	decompress: typeof Addon.decompress;
	jsonArrayRows: typeof Addon.jsonArrayRows;
	sniff: typeof Addon.sniff;
	MAX_ROW_BYTES: typeof Addon.MAX_ROW_BYTES;
	ParquetReader: Pick<typeof Addon.ParquetReader, "create">;
	ParquetWriter: Pick<typeof Addon.ParquetWriter, "create">;
	ScratchFolder: Pick<typeof Addon.ScratchFolder, "create">;
	matmulRate: typeof Addon.matmulRate;
	backends: typeof Addon.backends;
	cudaDriver: typeof Addon.cudaDriver;
	cudaFolder: typeof Addon.cudaFolder;
	cudaWheels: typeof Addon.cudaWheels;
	cudaReport: typeof Addon.cudaReport;
	cudaRuntime: typeof Addon.cudaRuntime;
	TextEncoder: Pick<typeof Addon.TextEncoder, "open">;
	TokenCache: Pick<typeof Addon.TokenCache, "open">;
	FileLock: Pick<typeof Addon.FileLock, "take">;
	Ranks: Pick<typeof Addon.Ranks, "open" | "connect">;
	RankListener: Pick<typeof Addon.RankListener, "open">;
	ncclReport: typeof Addon.ncclReport;
	ncclId: typeof Addon.ncclId;
	Engine: Pick<typeof Addon.Engine, "open">;
	ImageProcessor: Pick<typeof Addon.ImageProcessor, "open">;
}

/** The addon puts `{ code, message, hint }` as JSON into its errors' messages. */
function translated(thrown: unknown): unknown {
	if (!(thrown instanceof Error) || !thrown.message.startsWith("{")) return thrown;
	try {
		const { code, message, hint } = JSON.parse(thrown.message) as Record<string, unknown>;
		if (isErrorCode(code)) return new ArlError(code, String(message), String(hint ?? ""));
	} catch {
		// Not one of ours after all.
	}
	return thrown;
}

/** The native object behind each handle, for calls that take one. */
const behind = new WeakMap<object, object>();

/** A native object whose methods throw, and reject with, `ArlError`s. */
function handle<T>(native: T): T {
	if (typeof native !== "object" || native === null || !isNativeClass(native)) return native;
	const proxy = new Proxy(native, {
		get(target, key) {
			const member: unknown = Reflect.get(target, key, target);
			return typeof member === "function" ? guarded(member.bind(target)) : member;
		},
	});
	behind.set(proxy, native);
	return proxy;
}

const NATIVE_CLASSES = new Set([
	"Engine",
	"ImageProcessor",
	"TextEncoder",
	"TokenCache",
	"FileLock",
	"Ranks",
	"RankListener",
	"ParquetReader",
	"ParquetWriter",
	"ScratchFolder",
]);

function isNativeClass(value: object): boolean {
	return NATIVE_CLASSES.has(value.constructor?.name);
}

/** The same function with its errors translated, handles going in and coming out. */
function guarded<F extends (...values: never[]) => unknown>(call: F): F {
	const guardedCall = (...values: never[]): unknown => {
		const args = values.map((value) => (behind.get(value as object) ?? value) as never);
		try {
			const result = call(...args);
			if (!(result instanceof Promise)) return handle(result);
			return result.then(handle, (thrown: unknown) => {
				throw translated(thrown);
			});
		} catch (thrown) {
			throw translated(thrown);
		}
	};
	return guardedCall as F;
}

function nativeOf(addon: typeof Addon): Native {
	const openProcessor: Native["ImageProcessor"]["open"] = (...given) => addon.ImageProcessor.open(...given);
	return {
		version: guarded(addon.version),
		errorCodes: guarded(addon.errorCodes),
		devices: guarded(addon.devices),
		planMemory: guarded(addon.planMemory),
		planTraffic: guarded(addon.planTraffic),
		modelConfig: guarded(addon.modelConfig),
		checkWeights: guarded(addon.checkWeights),
		mergeAdapter: guarded(addon.mergeAdapter),
		decompress: guarded(addon.decompress),
		jsonArrayRows: guarded(addon.jsonArrayRows),
		sniff: guarded(addon.sniff),
		MAX_ROW_BYTES: addon.MAX_ROW_BYTES,
		ParquetReader: { create: guarded(addon.ParquetReader.create.bind(addon.ParquetReader)) },
		ParquetWriter: { create: guarded(addon.ParquetWriter.create.bind(addon.ParquetWriter)) },
		ScratchFolder: { create: guarded(addon.ScratchFolder.create.bind(addon.ScratchFolder)) },
		matmulRate: guarded(addon.matmulRate),
		backends: guarded(addon.backends),
		cudaDriver: guarded(addon.cudaDriver),
		cudaFolder: guarded(addon.cudaFolder),
		cudaWheels: guarded(addon.cudaWheels),
		cudaReport: guarded(addon.cudaReport),
		cudaRuntime: guarded(addon.cudaRuntime),
		TextEncoder: { open: guarded(addon.TextEncoder.open.bind(addon.TextEncoder)) },
		TokenCache: { open: guarded(addon.TokenCache.open.bind(addon.TokenCache)) },
		FileLock: { take: guarded(addon.FileLock.take.bind(addon.FileLock)) },
		Ranks: {
			open: guarded(addon.Ranks.open.bind(addon.Ranks)),
			connect: guarded(addon.Ranks.connect.bind(addon.Ranks)),
		},
		RankListener: { open: guarded(addon.RankListener.open.bind(addon.RankListener)) },
		ncclReport: guarded(addon.ncclReport),
		ncclId: guarded(addon.ncclId),
		Engine: { open: guarded(addon.Engine.open.bind(addon.Engine)) },
		ImageProcessor: { open: guarded(openProcessor) },
	};
}

const loaded = new Map<string, Native>();

function load(file: string, what: string, hint: string): Native {
	const before = loaded.get(file);
	if (before !== undefined) return before;
	let addon: typeof Addon;
	try {
		addon = createRequire(import.meta.url)(file) as typeof Addon;
	} catch (cause) {
		throw new ArlError("ARL_DEVICE", `${what} cannot be loaded: ${(cause as Error).message}`, hint, { cause });
	}
	const native = nativeOf(addon);
	loaded.set(file, native);
	return native;
}

/**
 * The addon that every machine can load, loaded at the first call. Its engine runs on the CPU.
 *
 * @throws ArlError `ARL_DEVICE` where there is none for this machine.
 */
export function loadNative(): Native {
	return load(
		ADDON_LOADER,
		`The native part for ${process.platform}-${process.arch}`,
		"Installed as a package: it comes with native parts for Linux x64 (glibc 2.17 or newer, or musl), Linux arm64, macOS arm64 and Windows x64; on one of these, delete node_modules and the lock file, and install again with optional dependencies. In a clone: `npm run build`.",
	);
}

/**
 * The addon with CUDA. Its libraries must be open (`cudaReport`), and another process must have shown that it loads: a bad
 * native library can end the process. Only its engine is for use; handles of the two addons do not mix.
 *
 * @throws ArlError `ARL_DEVICE` where it cannot be loaded.
 */
export function loadCudaNative(file: string): Native {
	return load(file, "The CUDA addon", "Use the CPU (`--device cpu`), and look at `arl doctor`.");
}
