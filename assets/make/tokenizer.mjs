// A byte-level BPE tokenizer in the manner of Qwen's, trained on texts: the same normalisation, the same split into
// words, the same special tokens. The result is the object of a `tokenizer.json`.

/** Qwen's split, as its `tokenizer.json` has it, and the same in JavaScript's spelling. */
const PATTERN =
	"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const SPLIT =
	/'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+/gu;

/** Added after the merges, in this order; `true`: skipped when text is decoded without special tokens. */
const ADDED = [
	["<|endoftext|>", true],
	["<|im_start|>", true],
	["<|im_end|>", true],
	["<tool_call>", false],
	["</tool_call>", false],
	["<tool_response>", false],
	["</tool_response>", false],
	["<think>", false],
	["</think>", false],
];
const ADDED_PATTERN = new RegExp(ADDED.map(([text]) => text.replaceAll("|", "\\|")).join("|"), "u");

/** A printable character for each of the 256 bytes: itself where it is printable, else one from U+0100 on. */
function byteCharacters() {
	const isPrintable = (b) => (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
	let next = 0x100;
	return Array.from({ length: 256 }, (_, b) => String.fromCharCode(isPrintable(b) ? b : next++));
}
const BYTES = byteCharacters();

/** Words of a text and how often each occurs, each as the characters that stand for its bytes. */
function countWords(texts) {
	const counts = new Map();
	for (const text of texts) {
		for (const part of text.normalize("NFC").split(ADDED_PATTERN)) {
			for (const [word] of part.matchAll(SPLIT)) counts.set(word, (counts.get(word) ?? 0) + 1);
		}
	}
	return [...counts].map(([word, count]) => ({ symbols: [...Buffer.from(word)].map((b) => BYTES[b]), count }));
}

const byCodeUnits = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

/** The pair of neighbours that occurs most often, at least twice; among equals the first in order of code units. */
function mostFrequentPair(words) {
	const counts = new Map();
	for (const { symbols, count } of words) {
		for (let i = 1; i < symbols.length; i++) {
			const pair = `${symbols[i - 1]} ${symbols[i]}`;
			counts.set(pair, (counts.get(pair) ?? 0) + count);
		}
	}
	let best;
	for (const [pair, count] of counts) {
		if (count < 2) continue;
		if (!best || count > best.count || (count === best.count && byCodeUnits(pair, best.pair) < 0))
			best = { pair, count };
	}
	return best?.pair.split(" ");
}

function merge(symbols, [left, right]) {
	const out = [];
	for (let i = 0; i < symbols.length; i++) {
		if (symbols[i] === left && symbols[i + 1] === right) {
			out.push(left + right);
			i++;
		} else {
			out.push(symbols[i]);
		}
	}
	return out;
}

/** Merges are learnt until every pair is rare or the vocabulary, special tokens included, has `maxSize` entries. */
export function trainTokenizer(texts, maxSize) {
	const words = countWords(texts);
	const vocabulary = [...BYTES].sort(byCodeUnits);
	const known = new Set(vocabulary);
	const merges = [];
	while (vocabulary.length + ADDED.length < maxSize) {
		const pair = mostFrequentPair(words);
		if (!pair) break;
		merges.push(pair);
		if (!known.has(pair[0] + pair[1])) {
			known.add(pair[0] + pair[1]);
			vocabulary.push(pair[0] + pair[1]);
		}
		for (const word of words) {
			if (word.symbols.length > 1) word.symbols = merge(word.symbols, pair);
		}
	}
	const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: false, use_regex: false };
	return {
		version: "1.0",
		truncation: null,
		padding: null,
		added_tokens: ADDED.map(([content, special], i) => ({
			id: vocabulary.length + i,
			content,
			single_word: false,
			lstrip: false,
			rstrip: false,
			normalized: false,
			special,
		})),
		normalizer: { type: "NFC" },
		pre_tokenizer: {
			type: "Sequence",
			pretokenizers: [{ type: "Split", pattern: { Regex: PATTERN }, behavior: "Isolated", invert: false }, byteLevel],
		},
		post_processor: byteLevel,
		decoder: byteLevel,
		model: {
			type: "BPE",
			dropout: null,
			unk_token: null,
			continuing_subword_prefix: "",
			end_of_word_suffix: "",
			fuse_unk: false,
			byte_fallback: false,
			ignore_merges: false,
			vocab: Object.fromEntries(vocabulary.map((token, id) => [token, id])),
			merges,
		},
	};
}
