/**
 * Leases: a document records which run trains it, until when, and since when. Taking a lease updates that document only, so that
 * a standalone server suffices. Knows documents by `_id`, and nothing about rows.
 */
import type { Collection, Document } from "mongodb";
import { type BsonValue, documentOf, driverValue, get, numberOf, valueKey } from "./bson-json.js";
import type { MongoConnection } from "./connection.js";
import type { Listed } from "./document-list.js";
import type { Selection } from "./selection.js";
import { after } from "./snapshot.js";

/** The field of a lease in a document: `{ owner, until, at }`. */
const LEASE = "arl_claim";
/** How often the whole collection is searched, and not only after the last lease: 100,000 trained documents take 0.2 s. */
const SEARCH_ALL_MS = 10_000;
/** Documents of one request. */
const TOGETHER = 5_000;

/** The leases of one run. */
export class Leases {
	/** How far the server's clock is ahead: leases use its time, because runs on several machines share them. */
	private clockAhead = 0;
	private lastContact = performance.now();
	/** Until then no expired lease is taken over: after an interruption its owner may be about to extend it. */
	private patientUntil = 0;
	/** The last document that was leased: most new rows have higher `_id`s. */
	private last: BsonValue | null = null;
	private searchedAll = Number.NEGATIVE_INFINITY;

	constructor(
		private readonly connection: MongoConnection,
		private readonly selection: Selection,
		private readonly owner: string,
		private readonly leaseMs: number,
	) {}

	private get documents(): Collection {
		return this.connection.db.collection(this.selection.collection);
	}

	private async ask<T>(doing: string, action: () => Promise<T>): Promise<T> {
		const result = await this.connection.attempt(doing, action);
		const now = performance.now();
		if (now - this.lastContact > this.leaseMs / 2) this.patientUntil = now + this.leaseMs / 2;
		this.lastContact = now;
		return result;
	}

	/** Reads the server's clock. */
	async readClock(): Promise<void> {
		const { localTime } = await this.ask("reading the server's clock", () => this.connection.db.command({ hello: 1 }));
		if (localTime instanceof Date) this.clockAhead = localTime.getTime() - Date.now();
	}

	private now(ahead = 0): Date {
		return new Date(Date.now() + this.clockAhead + ahead);
	}

	/** Rows of the selection without a lease, or with an expired lease of another run. */
	private free(): Document {
		const expired = { [`${LEASE}.owner`]: { $ne: this.owner }, [`${LEASE}.until`]: { $lte: this.now() } };
		const none = { [LEASE]: null };
		const free = performance.now() < this.patientUntil ? none : { $or: [none, expired] };
		return { $and: [this.selection.filter, free] };
	}

	private own(ids: unknown[]): Document {
		return { _id: { $in: ids }, [`${LEASE}.owner`]: this.owner };
	}

	private among(ids: unknown[], condition: Document): Document {
		return { $and: [{ _id: { $in: ids } }, condition] };
	}

	private mark(): Document {
		return { $set: { [LEASE]: { owner: this.owner, until: this.now(this.leaseMs), at: this.now() } } };
	}

	private async find(filter: Document, limit = 0): Promise<Listed[]> {
		const projection = { _id: 1, trained_count: 1 };
		const found = await this.ask("looking for rows", () =>
			this.documents.find(filter, { raw: true, projection }).sort({ _id: 1 }).limit(limit).toArray(),
		);
		return found.flatMap((bytes) => {
			const document = documentOf(bytes as unknown as Uint8Array);
			const id = get(document, "_id");
			return id ? [{ id, rows: 1, trainedCount: Math.max(0, numberOf(get(document, "trained_count")) ?? 0) }] : [];
		});
	}

	/**
	 * Leases up to `most` free documents, in the order of their `_id`s; another run may win some of them. Searches after the last
	 * leased document, and now and then, or with `all`, the whole collection.
	 */
	async take(most: number, all: boolean): Promise<Listed[]> {
		const now = performance.now();
		if (all || now - this.searchedAll > SEARCH_ALL_MS) {
			this.last = null;
			this.searchedAll = now;
		}
		const candidates = await this.find({ $and: [this.free(), after(this.last)] }, most);
		if (candidates.length === 0) return [];
		this.last = candidates.at(-1)?.id ?? null;
		const ids = candidates.map(({ id }) => driverValue(id));
		// The update checks again whether a candidate is still free; repeating it changes nothing.
		await this.ask("leasing rows", () => this.documents.updateMany(this.among(ids, this.free()), this.mark()));
		return this.find(this.own(ids));
	}

	/** Leases these again unless another run has them; returns those that it got. */
	async takeAgain(wanted: readonly BsonValue[]): Promise<Set<string>> {
		const got = new Set<string>();
		for (const ids of parts(wanted)) {
			const mine = { [`${LEASE}.owner`]: this.owner };
			await this.ask("leasing rows", () =>
				this.documents.updateMany(this.among(ids, { $or: [mine, this.free()] }), this.mark()),
			);
			for (const { id } of await this.find(this.own(ids))) got.add(valueKey(id));
		}
		return got;
	}

	/** Extends these leases; returns those that this run has lost. */
	async extend(held: readonly BsonValue[]): Promise<Set<string>> {
		const lost = new Set<string>();
		await this.readClock();
		for (let at = 0; at < held.length; at += TOGETHER) {
			const part = held.slice(at, at + TOGETHER);
			const mine = this.own(part.map(driverValue));
			const extended = { $set: { [`${LEASE}.until`]: this.now(this.leaseMs) } };
			const { matchedCount } = await this.ask("extending leases", () => this.documents.updateMany(mine, extended));
			if (matchedCount === part.length) continue;
			const left = new Set((await this.find(mine)).map(({ id }) => valueKey(id)));
			for (const id of part) if (!left.has(valueKey(id))) lost.add(valueKey(id));
		}
		return lost;
	}

	/** Releases these, if this run still has them. */
	async release(ids: readonly unknown[]): Promise<void> {
		for (let at = 0; at < ids.length; at += TOGETHER) {
			const mine = this.own(ids.slice(at, at + TOGETHER));
			await this.ask("releasing rows", () => this.documents.updateMany(mine, { $unset: { [LEASE]: "" } }));
		}
	}

	/** Releases everything that a run which is known to have ended had leased. */
	async releaseOf(owner: string): Promise<void> {
		await this.ask("releasing rows", () =>
			this.documents.updateMany({ [`${LEASE}.owner`]: owner }, { $unset: { [LEASE]: "" } }),
		);
	}

	/** Releases what was leased and never logged, because the run was killed in between. */
	async releaseAllBut(logged: ReadonlySet<string>): Promise<void> {
		const all = await this.find({ [`${LEASE}.owner`]: this.owner });
		await this.release(all.filter(({ id }) => !logged.has(valueKey(id))).map(({ id }) => driverValue(id)));
	}
}

function* parts(ids: readonly BsonValue[]): Generator<unknown[]> {
	for (let at = 0; at < ids.length; at += TOGETHER) yield ids.slice(at, at + TOGETHER).map(driverValue);
}
