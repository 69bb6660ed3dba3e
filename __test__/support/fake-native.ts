/**
 * A core in TypeScript with the interface of the real one: tokens are bytes, and a model is a few numbers. Tests of the trainer
 * run on it without the addon, and can make anything in it fail.
 */
import { createHash } from "node:crypto";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout } from "node:timers/promises";
import { imageType } from "../../src/data/mime.js";
import { ArlError } from "../../src/errors.js";
import { imageSize } from "../../src/images/size.js";
import type {
	EngineOptions,
	FillReport,
	ImageRef,
	MeasuredImage,
	MemoryPlan,
	MicroBatch,
	Native,
	NativeImageProcessor,
	NativeTextEncoder,
	NativeTokenCache,
	PreparedImage,
	RowImage,
	RowProblem,
	TextOptions,
	TokenBatch,
} from "../../src/native.js";
import { loadNative } from "../../src/native.js";
import { FakeEngine, smallPlan } from "./fake-engine.js";
import { takeLock } from "./fake-lock.js";

/** What a test can make the core do. */
export interface Faults {
	/** Called before each step with its number; may throw, or give another loss. */
	onStep?: (step: number, batches: MicroBatch[]) => number | undefined;
	/** Called with each thing that is done with a step: `submit 1`, `finish 1`, `finished 1`, `discard`. */
	onQueue?: (what: string) => void;
	onExport?: (dir: string) => void;
	/** Called with the options of each engine that is opened. */
	onOpen?: (options: EngineOptions) => void;
	/** What the engine says that saved models say differently. */
	exportChanges?: string[];
	/** With fp16: whether the call of `step` with this number (from 1) is skipped; `loss` is not finite then, or given. */
	skips?: (call: number) => { loss: number } | undefined;
	onSaveState?: (dir: string) => void;
	/** Called where a step is given up, and where the cache and the engine are closed; may throw. */
	onDiscard?: () => void;
	onCloseCache?: () => void;
	onCloseEngine?: () => void;
	/** Milliseconds that each call of `fill` takes. */
	fillMs?: number;
	/** Called when an image is decoded; what it returns is awaited. */
	onPrepare?: (bytes: Uint8Array) => Promise<void> | void;
	/** Milliseconds that each step takes. */
	stepMs?: number;
	/** The loss of each target in an evaluation after so many steps; absent: a function of the weights. */
	evalLoss?: (steps: number) => number;
	/** Milliseconds that each micro-batch of an evaluation takes. */
	evaluateMs?: number;
	availableBytes?: number;
	/** What the engine says of how the model runs. */
	notice?: string;
	/** What it says of a state that it restores. */
	restoreNotice?: string;
	/** The memory that an engine takes. */
	planMemory?: (options: EngineOptions) => MemoryPlan;
	stopIds?: number[];
	tokenizerVocab?: number;
}

const decoder = new TextDecoder("utf-8", { fatal: true });
const STOP = 0;
const IMAGE = 1;

/** The images of a row, by the URLs of its parts. */
function refsOf(row: Uint8Array): ImageRef[] {
	return [...decoder.decode(row).matchAll(/"url": ?"([^"]*)"/g)].map(([, url = ""]) => ({ place: "messages[0]", url }));
}

/** Decodes nothing: an image is for the model what its header says, each pixel a patch, and its pixels are its first byte. */
function fakeProcessor(faults: Faults): NativeImageProcessor {
	const info = { patchSize: 1, mergeSize: 2, minPixels: 4, maxPixels: 1e6, fingerprint: "fake" };
	const hashOf = (bytes: Uint8Array) => createHash("md5").update(bytes).digest("hex");
	const measure = async (bytes: Uint8Array): Promise<MeasuredImage> => {
		const type = imageType(bytes);
		const size = type && imageSize(bytes, type);
		if (!size) throw new ArlError("ARL_DATA", "no image");
		const resized = { resizedHeight: 2 * Math.ceil(size.height / 2), resizedWidth: 2 * Math.ceil(size.width / 2) };
		const tokens = (resized.resizedHeight * resized.resizedWidth) / 4;
		return { format: "png", ...size, ...resized, tokens, hash: hashOf(bytes) };
	};
	const prepare = async (bytes: Uint8Array): Promise<PreparedImage> => {
		await faults.onPrepare?.(bytes);
		const { resizedHeight: height, resizedWidth: width, hash } = await measure(bytes);
		return { height, width, hash, pixels: new Uint8Array(3 * height * width).fill(bytes.at(-1) ?? 0) };
	};
	return { info: () => info, measure, prepare };
}

function tokensOf(row: Uint8Array): { ids: number[]; problem: string | null } {
	let value: { messages?: { role: string; content: string | { text?: string }[] }[] };
	try {
		value = JSON.parse(decoder.decode(row));
	} catch {
		return { ids: [], problem: "not json" };
	}
	if (!Array.isArray(value.messages)) return { ids: [], problem: "no messages" };
	const textOf = (content: string | { text?: string }[]) =>
		typeof content === "string" ? content : content.map(({ text = "" }) => text).join("");
	const text = value.messages.map(({ content }) => textOf(content)).join("\n");
	return { ids: [...Buffer.from(text), STOP], problem: null };
}

class FakeEncoder implements NativeTextEncoder {
	constructor(
		readonly options: TextOptions,
		private readonly faults: Faults,
	) {}

	info() {
		return {
			vocabSize: this.faults.tokenizerVocab ?? 256,
			stopIds: this.faults.stopIds ?? [STOP],
			templateSource: "chat_template.jinja",
			fingerprint: this.fingerprint(),
		};
	}

	/** As the real one: of what the folder and the template say, not of where they are. */
	private fingerprint() {
		const { modelDir: _, chatTemplate, ...options } = this.options;
		const template = chatTemplate === undefined ? "" : readFileSync(chatTemplate, "utf8");
		return createHash("sha256")
			.update(JSON.stringify([Object.entries(options).sort(), template]))
			.digest("hex")
			.slice(0, 16);
	}

	detect(rows: Uint8Array[]) {
		const first = rows[0];
		if (first && tokensOf(first).problem !== null) {
			throw new ArlError("ARL_DATA", "the rows have no shape that is known", "Give messages.");
		}
		return "messages";
	}

	encode(row: Uint8Array, images: RowImage[] = []) {
		const { ids } = tokensOf(row);
		let first = 0;
		const places = images.map(({ height, width }, place) => {
			const count = (height * width) / 4;
			first += count;
			return { place, first: first - count, count, height, width };
		});
		const all = [...new Array<number>(first).fill(IMAGE), ...ids];
		return {
			text: "",
			inputIds: Int32Array.from(all),
			weights: Float32Array.from(all, (_, i) => (i < first ? 0 : 1)),
			spans: [{ message: 0, first, last: all.length - 1 }],
			images: places,
			notes: [],
		};
	}

	prompt() {
		return new Int32Array();
	}

	promptRow() {
		return { inputIds: new Int32Array(), positions: new Int32Array(), images: [] };
	}

	decode(ids: Int32Array) {
		return Buffer.from(ids.filter((id) => id > IMAGE)).toString();
	}

	imageRefs(row: Uint8Array): ImageRef[] {
		return this.options.images === "train" ? refsOf(row) : [];
	}
}

/** The caches of one core, in place of the disk. */
type Disk = Map<string, Map<number, Sample>>;

/** The tokens of a row, and its images. */
interface Sample {
	ids: number[];
	images: RowImage[];
}

class FakeCache implements NativeTokenCache {
	notes() {
		return [];
	}

	constructor(
		private readonly samples: Map<number, Sample>,
		private readonly rows: number,
		private readonly encoder: FakeEncoder,
		private readonly faults: Faults,
	) {}

	async fill(rows: Uint8Array[], indexes: Uint32Array, images?: RowImage[][]): Promise<FillReport> {
		if (this.faults.fillMs) await setTimeout(this.faults.fillMs);
		const { maxLength, truncation } = this.encoder.options;
		const problems: RowProblem[] = [];
		const report = { rows: rows.length, tokens: 0, targetTokens: 0, truncated: 0, dropped: 0, problems };
		for (const [i, row] of rows.entries()) {
			const index = indexes[i] as number;
			let { ids, problem } = tokensOf(row);
			const own = images?.[i] ?? [];
			if (this.encoder.options.images === "error" && refsOf(row).length > 0) problem = "image";
			// As many tokens as the image has blocks of four patches of one pixel.
			for (const { height, width } of own) ids = [...new Array<number>((height * width) / 4).fill(IMAGE), ...ids];
			if (problem === null && maxLength !== undefined && ids.length > maxLength) {
				if (truncation === "error") problem = "too long";
				else if (truncation === "drop") {
					report.dropped += 1;
					continue;
				} else {
					ids = ids.slice(0, maxLength);
					report.truncated += 1;
				}
			}
			if (problem !== null) {
				problems.push({ row: index, reason: problem, message: `the row is ${problem}` });
				continue;
			}
			this.samples.set(index, { ids, images: own });
			report.tokens += ids.length;
			report.targetTokens += ids.length - 1;
		}
		return report;
	}

	lengths() {
		return Uint32Array.from({ length: this.rows }, (_, row) => this.samples.get(row)?.ids.length ?? 0);
	}

	filled() {
		return this.samples.size;
	}

	microBatch(indexes: Uint32Array): TokenBatch {
		const samples = [...indexes].map((row) => {
			const sample = this.samples.get(row);
			if (!sample) throw new Error(`row ${row} is not in the cache`);
			return sample.ids;
		});
		const images = [...indexes].flatMap((index) =>
			(this.samples.get(index)?.images ?? []).map((image, place) => ({ index, place, ...image })),
		);
		const starts = [0];
		for (const sample of samples) starts.push((starts.at(-1) as number) + sample.length);
		return {
			inputIds: Int32Array.from(samples.flat()),
			targets: Int32Array.from(samples.flatMap((sample) => [...sample.slice(1), -100])),
			positions: Int32Array.from(samples.flatMap((sample) => sample.map((_, i) => i))),
			cuSeqlens: Int32Array.from(starts),
			images,
		};
	}

	pack(indexes: Uint32Array, maxTokens: number): Uint32Array[] {
		const groups: { positions: number[]; tokens: number }[] = [];
		for (const [position, row] of indexes.entries()) {
			const length = this.samples.get(row)?.ids.length ?? 0;
			const group = groups.find(({ tokens }) => tokens + length <= maxTokens);
			if (group) {
				group.positions.push(position);
				group.tokens += length;
			} else groups.push({ positions: [position], tokens: length });
		}
		return groups.map(({ positions }) => Uint32Array.from(positions));
	}

	sync() {}
	close() {
		this.faults.onCloseCache?.();
	}
}

/** A core with its own "disk" of caches. */
export function fakeNative(faults: Faults = {}, disk: Disk = new Map()): Native {
	return {
		version: () => "0.0.0",
		errorCodes: () => [],
		devices: () => [
			{
				device: "cpu",
				name: "fake",
				threads: 1,
				features: [],
				memoryBytes: 1e12,
				availableBytes: faults.availableBytes ?? 1e12,
			},
		],
		modelConfig,
		checkWeights: () => {},
		mergeAdapter: () => Promise.reject(new Error("the fake core has no adapters")),
		planMemory: (options) => faults.planMemory?.(options) ?? smallPlan(options),
		planTraffic: (options, rounds) => ({
			gradients: 4 * rounds,
			sums: options.zero === 2 ? 0 : 4,
			weights: options.zero ? 2 : 0,
			replicas: options.dpReplicateSize ? 2 : 0,
			tokens: options.tpSize ? 8 * rounds : 0,
		}),
		TextEncoder: { open: (options) => new FakeEncoder(options, faults) },
		TokenCache: {
			open: (dir, key, rows, encoder) => {
				const name = `${dir}/${key}`;
				const samples = disk.get(name) ?? new Map<number, Sample>();
				disk.set(name, samples);
				return new FakeCache(samples, rows, encoder as FakeEncoder, faults);
			},
		},
		FileLock: { take: takeLock },
		Engine: { open: async (options) => new FakeEngine(options, faults) },
		Ranks: { open: alone, connect: alone },
		RankListener: { open: () => unreachable() },
		ncclReport: () => ({ tried: [], hint: "install it" }),
		ncclId: () => unreachable(),
		ImageProcessor: { open: () => fakeProcessor(faults) },
		matmulRate: () => 1,
		backends: () => ["cpu"],
		cudaDriver: () => null,
		cudaFolder: () => null,
		cudaWheels: () => [],
		cudaReport: () => ({
			devices: [],
			libraries: [],
			problem: { kind: "noDriver", message: "no NVIDIA driver (libcuda.so.1)", hint: "Install one." },
		}),
		cudaRuntime: () => "",
		// Files are the real core's: there is nothing to play.
		decompress: (source, target) => loadNative().decompress(source, target),
		jsonArrayRows: (file) => loadNative().jsonArrayRows(file),
		sniff: (head) => loadNative().sniff(head),
		MAX_ROW_BYTES: loadNative().MAX_ROW_BYTES,
		ParquetReader: loadNative().ParquetReader,
		ParquetWriter: loadNative().ParquetWriter,
		ScratchFolder: loadNative().ScratchFolder,
	};
}

function modelConfig(dir: string) {
	const file = join(dir, "config.json");
	if (!existsSync(file)) throw new ArlError("ARL_CONFIG", `${file}: no such file`);
	try {
		const { model_type, vocab_size, max_position_embeddings } = JSON.parse(readFileSync(file, "utf8"));
		return { modelType: model_type, vocabSize: vocab_size, maxPositionEmbeddings: max_position_embeddings };
	} catch {
		throw new ArlError("ARL_CONFIG", `${file}: not JSON`);
	}
}

/** A model's folder that is enough for the fake core. */
export function writeFakeModel(dir: string, config: Record<string, unknown> = {}): string {
	if (!existsSync(dir)) throw new Error(`${dir} does not exist`);
	const full = { model_type: "qwen3", vocab_size: 256, max_position_embeddings: 4096, ...config };
	writeFileSync(join(dir, "config.json"), JSON.stringify(full));
	writeFileSync(join(dir, "model.safetensors"), "fake");
	writeFileSync(join(dir, "tokenizer.json"), "{}");
	return dir;
}

/** What tests of one rank do not call. */
function unreachable(): never {
	throw new Error("a test of one rank opens none");
}

const alone = async () => unreachable();
