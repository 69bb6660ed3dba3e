/**
 * The only module that imports the addon: loads it, names what it offers, and turns its errors into `ArlError`.
 * Nothing else may know that there is a native part; public types never show one of these.
 */
import { createRequire } from "node:module";
import type * as Addon from "../index.js";
import { ArlError, isErrorCode } from "./errors.js";

export type {
	DeviceInfo,
	EncodedRow,
	EngineInfo,
	EngineOptions,
	FillReport,
	GenerateOptions,
	MemoryPlan,
	MicroBatch,
	MicroBatchStats,
	RowProblem,
	StepStats,
	TextInfo,
	TextOptions,
} from "../index.js";
export type NativeEngine = Addon.Engine;
export type NativeTextEncoder = Addon.TextEncoder;
export type NativeTokenCache = Addon.TokenCache;

/** What the addon offers; every error that comes out of it is an `ArlError`. */
export interface Native {
	version: typeof Addon.version;
	errorCodes: typeof Addon.errorCodes;
	devices: typeof Addon.devices;
	planMemory: typeof Addon.planMemory;
	decompress: typeof Addon.decompress;
	unpackZstd: typeof Addon.unpackZstd;
	jsonArrayRows: typeof Addon.jsonArrayRows;
	matmulRate: typeof Addon.matmulRate;
	TextEncoder: Pick<typeof Addon.TextEncoder, "open">;
	TokenCache: Pick<typeof Addon.TokenCache, "open">;
	Engine: Pick<typeof Addon.Engine, "open">;
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

function isNativeClass(value: object): boolean {
	const name = value.constructor?.name;
	return name === "Engine" || name === "TextEncoder" || name === "TokenCache";
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

let native: Native | undefined;

/**
 * The addon, loaded at the first call.
 *
 * @throws ArlError `ARL_DEVICE` where there is none for this machine.
 */
export function loadNative(): Native {
	if (native !== undefined) return native;
	let addon: typeof Addon;
	try {
		addon = createRequire(import.meta.url)("../index.cjs") as typeof Addon;
	} catch (cause) {
		throw new ArlError(
			"ARL_DEVICE",
			`The native part for ${process.platform}-${process.arch} cannot be loaded: ${(cause as Error).message}`,
			"In a clone of the repository, run `npm run build`. Installed as a package: install it again, for this very platform.",
			{ cause },
		);
	}
	native = {
		version: guarded(addon.version),
		errorCodes: guarded(addon.errorCodes),
		devices: guarded(addon.devices),
		planMemory: guarded(addon.planMemory),
		decompress: guarded(addon.decompress),
		unpackZstd: guarded(addon.unpackZstd),
		jsonArrayRows: guarded(addon.jsonArrayRows),
		matmulRate: guarded(addon.matmulRate),
		TextEncoder: { open: guarded(addon.TextEncoder.open.bind(addon.TextEncoder)) },
		TokenCache: { open: guarded(addon.TokenCache.open.bind(addon.TokenCache)) },
		Engine: { open: guarded(addon.Engine.open.bind(addon.Engine)) },
	};
	return native;
}
