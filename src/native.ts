/**
 * The only module that imports the addon: loads it, names what it offers, and turns its errors into `ArlError`.
 * Nothing else may know that there is a native part; public types never show one of these.
 */

/** A device that the engine can run on. */
export interface DeviceInfo {
	device: string;
	name: string;
	threads: number;
	features: string[];
	memoryBytes: number;
	availableBytes: number;
}

/** How rows become tokens. Field names are the configuration's own. */
export interface TextOptions {
	/** Folder with `tokenizer.json`, and a chat template. */
	modelDir: string;
	/** A template's file that replaces the checkpoint's. */
	chatTemplate?: string;
	/** Longest sample in tokens; absent: no bound. */
	maxLength?: number;
	/** What happens to a longer one. */
	truncation: "error" | "drop" | "left" | "right";
	/** What happens to reasoning of earlier turns; absent: as the template does. */
	thinking?: "keep" | "strip" | "last";
	/** Names of a file's columns that differ from the known ones, for example `{ prompt: "q", completion: "a" }`. */
	columns?: Record<string, string>;
	minimalAdvantage?: number;
	dropZeroAdvantage?: boolean;
	skipNonPositiveAdvantage?: boolean;
}

/** What is known of a tokenizer and its template. */
export interface TextInfo {
	/** Ids that the tokenizer can produce: one more than the largest. */
	vocabSize: number;
	/** The token that ends a reply. */
	stopIds: number[];
	/** `chat_template.jinja`, `tokenizer_config.json`, or the file that was given. */
	templateSource: string;
	/** Changes whenever the template, the tokenizer or an option that changes tokens does. */
	fingerprint: string;
}

/** One row as the model sees it; for inspection. */
export interface EncodedRow {
	text: string;
	inputIds: Int32Array;
	/** Weight of each token as a target; 0 where it is not trained. */
	weights: Float32Array;
	/** The trained spans: message index, first token, last token (both ends in). */
	spans: { message: number; first: number; last: number }[];
	recordId?: string;
}

/** Why a row cannot be used. */
export interface RowProblem {
	/** Index of the row in its source. */
	row: number;
	/** Stable and short, for counting: `not json`, `no messages`, `unknown role`, `no target`, ... */
	reason: string;
	message: string;
}

/** What one call of `fill` did. */
export interface FillReport {
	rows: number;
	tokens: number;
	targetTokens: number;
	truncated: number;
	dropped: number;
	problems: RowProblem[];
}

/** Samples side by side, as the engine takes them. */
export interface MicroBatch {
	inputIds: Int32Array;
	/** Already shifted: position t is scored against `targets[t]`; -100 is not trained. */
	targets: Int32Array;
	positions: Int32Array;
	cuSeqlens: Int32Array;
	/** Weight of each target; absent: 1. */
	weights?: Float32Array;
}

/** What an engine is made of. */
export interface EngineOptions {
	modelDir: string;
	/** Random weights from `seed` instead of the folder's; the folder need not have any. */
	initFromConfig?: boolean;
	seed?: number;
	device: string;
	dtype: "f32" | "bf16";
	recompute: "off" | "norms" | "mlp" | "block";
	lossSeqChunkSize?: number;
	/** Tokens of the largest micro-batch expected; a larger one makes the engine plan anew. */
	maxTokens: number;
	/** Sequences of the micro-batch with the most. */
	maxSequences: number;
	adamBeta1: number;
	adamBeta2: number;
	adamEpsilon: number;
	weightDecay: number;
	threads?: number;
	/** Leave out gradients and moments: evaluation and generation only. */
	inferenceOnly?: boolean;
}

/** Bytes by category. */
export interface MemoryPlan {
	categories: { name: string; bytes: number }[];
	totalBytes: number;
}

export interface EngineInfo {
	/** Trainable parameters, tied ones once. */
	parameters: number;
	modelType: string;
	vocabSize: number;
	maxPositionEmbeddings: number;
	device: string;
	dtype: string;
	/** Model FLOPs a token without attention's share: 6 x parameters of the matrix products, head included. */
	flopsPerToken: number;
	/** Attention's FLOPs for a token of a sequence of length n are `attentionFlops * n`. */
	attentionFlops: number;
}

export interface MicroBatchStats {
	tokens: number;
	targetTokens: number;
	targetWeight: number;
	/** Sum of weight x negative log-likelihood. */
	lossSum: number;
	correct: number;
	entropySum: number;
}

export interface StepStats {
	/** Sum of all losses over the weight of all targets (and the router's balance loss, where the model has one). */
	loss: number;
	/** Before clipping. */
	gradNorm: number;
	microBatches: MicroBatchStats[];
	seconds: number;
}

export interface GenerateOptions {
	maxNewTokens: number;
	stopIds: number[];
	/** 0: the most probable token always. */
	temperature?: number;
	seed?: number;
}

export interface NativeTextEncoder {
	info(): TextInfo;
	/** Finds out what shape the rows have; throws where it is none that is known. Later rows must have the same. */
	detect(rows: Uint8Array[]): string;
	encode(row: Uint8Array): EncodedRow;
	/** The text of a conversation up to message `until` (exclusive) plus the header of a reply. */
	prompt(row: Uint8Array, until?: number): Int32Array;
	decode(ids: Int32Array, skipSpecialTokens: boolean): string;
}

export interface NativeTokenCache {
	/** Rows are encoded on all cores and appended; each row's tokens land under its index. */
	fill(rows: Uint8Array[], indexes: Uint32Array): Promise<FillReport>;
	/** Tokens of every row; 0: not there yet, or dropped. */
	lengths(): Uint32Array;
	filled(): number;
	microBatch(indexes: Uint32Array): MicroBatch;
	/** Groups of positions into `indexes`, each at most `maxTokens` together, best fit. */
	pack(indexes: Uint32Array, maxTokens: number): Uint32Array[];
	/** What is filled is on disk from here on. */
	sync(): void;
	close(): void;
}

export interface NativeEngine {
	info(): EngineInfo;
	memory(): MemoryPlan;
	step(batches: MicroBatch[], hyper: { learningRate: number; maxGradNorm: number }): Promise<StepStats>;
	evaluate(batches: MicroBatch[]): Promise<MicroBatchStats[]>;
	generate(prompts: Int32Array[], options: GenerateOptions): Promise<Int32Array[]>;
	/** Exact weights, moments and step count, as safetensors in `dir`. */
	saveState(dir: string): Promise<void>;
	restoreState(dir: string): Promise<void>;
	/** A folder in Hugging Face's layout; `dtype` absent: that of the checkpoint it came from. */
	exportModel(dir: string, dtype?: "f32" | "bf16" | "f16"): Promise<void>;
	/** The step in progress ends with `ARL_INTERRUPTED`; weights are as before it. */
	interrupt(): void;
	close(): Promise<void>;
}

/** The addon as its module shows it. Errors are thrown with a JSON `{ code, message, hint }` as their message. */
export interface Native {
	version(): string;
	errorCodes(): string[];
	devices(): DeviceInfo[];
	planMemory(options: EngineOptions): MemoryPlan;
	TextEncoder: { open(options: TextOptions): NativeTextEncoder };
	/** `rows`: how many rows the source has; `key`: names the cache; an existing one with that key is gone on with. */
	TokenCache: { open(dir: string, key: string, rows: number, encoder: NativeTextEncoder): NativeTokenCache };
	Engine: { open(options: EngineOptions): Promise<NativeEngine> };
	/** gzip or zstd, told apart by content, unpacked into `target`; true if `source` was compressed at all. */
	decompress(source: string, target: string): Promise<boolean>;
	/** Measured rate of f32 matrix products `[m, k] x [k, n]` on all cores, in GFLOP/s; takes about `seconds`. */
	matmulRate(m: number, n: number, k: number, seconds: number): number;
	/** Byte ranges [start, end, ...] of the elements of a JSON file whose top level is an array. */
	jsonArrayRows(file: string): Float64Array;
}
