// Seeded randomness for the scripts that make `assets/`. Integers only, so that every machine draws the same rows.

/** FNV-1a over UTF-16 code units: a 32-bit number that belongs to a text. */
export function hash(text) {
	let h = 0x811c9dc5;
	for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
	h ^= h >>> 16;
	h = Math.imul(h, 0x85ebca6b);
	h ^= h >>> 13;
	h = Math.imul(h, 0xc2b2ae35);
	return (h ^ (h >>> 16)) >>> 0;
}

/** A stream of random 32-bit numbers (mulberry32) and what is drawn from it. */
export class Random {
	constructor(seed) {
		this.state = seed >>> 0;
	}

	/** The next number in [0, 2^32). */
	next() {
		this.state = (this.state + 0x6d2b79f5) >>> 0;
		let t = this.state;
		t = Math.imul(t ^ (t >>> 15), t | 1);
		t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
		return (t ^ (t >>> 14)) >>> 0;
	}

	/** An integer in [low, high], both ends in. */
	int(low, high) {
		return low + (this.next() % (high - low + 1));
	}

	/** One of `list`. */
	pick(list) {
		return list[this.next() % list.length];
	}

	/** True in `percent` of 100 draws. */
	chance(percent) {
		return this.next() % 100 < percent;
	}

	/** A shuffled copy of `list`. */
	shuffle(list) {
		const out = [...list];
		for (let i = out.length - 1; i > 0; i--) {
			const j = this.next() % (i + 1);
			[out[i], out[j]] = [out[j], out[i]];
		}
		return out;
	}

	/** A key of `weights`, as often as its weight says. */
	weighted(weights) {
		let left = this.next() % Object.values(weights).reduce((a, b) => a + b, 0);
		for (const [key, weight] of Object.entries(weights)) {
			if (left < weight) return key;
			left -= weight;
		}
		throw new Error("weights are empty");
	}
}
