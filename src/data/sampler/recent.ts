/** Values by key, of which only those that were used last are kept. */
export class Recent<Key, Value> {
	private readonly values = new Map<Key, Value>();

	constructor(private readonly most: number) {}

	/** The value of a key, which counts as used by this. */
	get(key: Key): Value | undefined {
		const value = this.values.get(key);
		if (value === undefined) return undefined;
		this.values.delete(key);
		this.values.set(key, value);
		return value;
	}

	/** Keeps a value, and lets go of the one that was used longest ago where there are too many. */
	set(key: Key, value: Value): void {
		this.values.delete(key);
		this.values.set(key, value);
		const [oldest] = this.values.keys();
		if (this.values.size > this.most && oldest !== undefined) this.values.delete(oldest);
	}
}
