/** Counts occurrences of many 64-bit hashes, in 24 to 48 bytes per hash. */
export class HashCounts {
	private keys = new BigUint64Array(2048);
	private counts = new Uint32Array(2048);
	/** Slots that contain a hash, even if its count is back at 0. */
	private used = new Uint8Array(2048);
	private size = 0;

	private slot(hash: bigint): number {
		const mask = this.used.length - 1;
		let at = Number(hash & BigInt(mask));
		while (this.used[at] === 1 && this.keys[at] !== hash) at = (at + 1) & mask;
		return at;
	}

	private put(hash: bigint, count: number): void {
		const at = this.slot(hash);
		if (this.used[at] === 0) this.size += 1;
		this.used[at] = 1;
		this.keys[at] = hash;
		this.counts[at] = (this.counts[at] ?? 0) + count;
	}

	/** Counts one more; returns the count before. */
	add(hash: bigint): number {
		const before = this.counts[this.slot(hash)] ?? 0;
		if (this.size * 2 >= this.used.length) this.grow();
		this.put(hash, 1);
		return before;
	}

	/** Subtracts one; false: the count was 0. */
	take(hash: bigint): boolean {
		const at = this.slot(hash);
		const count = this.counts[at] ?? 0;
		if (count > 0) this.counts[at] = count - 1;
		return count > 0;
	}

	private grow(): void {
		const { keys, counts, used } = this;
		this.keys = new BigUint64Array(used.length * 2);
		this.counts = new Uint32Array(used.length * 2);
		this.used = new Uint8Array(used.length * 2);
		this.size = 0;
		for (const [at, there] of used.entries()) if (there === 1) this.put(keys[at] ?? 0n, counts[at] ?? 0);
	}
}
