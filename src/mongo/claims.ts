/**
 * Claims: a document bears the run that trains it, until when, and since when. Taking one is an update of that document alone,
 * so that a standalone server is enough. Knows documents by `_id`, and nothing of rows.
 */
import type { Collection, Document } from "mongodb";
import { type BsonValue, documentOf, driverValue, get, numberOf, valueKey } from "./bson-json.js";
import type { MongoConnection } from "./connection.js";
import type { Selection } from "./selection.js";
import { behind, type Listed } from "./snapshot.js";

/** The field of a claim: `{ owner, until, at }`. */
const CLAIM = "arl_claim";
/** How often rows are looked for that lie before the last claim: looking at 100,000 trained documents takes 0.2 s. */
const LOOK_AT_ALL_MS = 10_000;
/** Documents of one request. */
const TOGETHER = 5_000;

/** The claims of one run. */
export class Claims {
	/** How far the server's clock is ahead: leases are told by it, since runs of several machines share them. */
	private clockAhead = 0;
	private lastContact = performance.now();
	/** Until then no lease that ran out is taken over: after an interruption its owner may be about to extend it. */
	private patientUntil = 0;
	/** The last document that was claimed: most rows that come have higher `_id`s. */
	private last: BsonValue | null = null;
	private lookedAtAll = Number.NEGATIVE_INFINITY;

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

	/** Looks at the server's clock. */
	async readClock(): Promise<void> {
		const { localTime } = await this.ask("reading the server's clock", () => this.connection.db.command({ hello: 1 }));
		if (localTime instanceof Date) this.clockAhead = localTime.getTime() - Date.now();
	}

	private now(ahead = 0): Date {
		return new Date(Date.now() + this.clockAhead + ahead);
	}

	/** Rows of the selection that belong to nobody, or to a run that has not extended its lease. */
	private free(): Document {
		const lapsed = { [`${CLAIM}.owner`]: { $ne: this.owner }, [`${CLAIM}.until`]: { $lte: this.now() } };
		const nobody = { [CLAIM]: null };
		const free = performance.now() < this.patientUntil ? nobody : { $or: [nobody, lapsed] };
		return { $and: [this.selection.filter, free] };
	}

	private own(ids: unknown[]): Document {
		return { _id: { $in: ids }, [`${CLAIM}.owner`]: this.owner };
	}

	private among(ids: unknown[], condition: Document): Document {
		return { $and: [{ _id: { $in: ids } }, condition] };
	}

	private mark(): Document {
		return { $set: { [CLAIM]: { owner: this.owner, until: this.now(this.leaseMs), at: this.now() } } };
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
	 * Claims up to `most` free documents, in the order of their `_id`s. Another run may be quicker with some of them. All of the
	 * collection is looked through now and then, and where `all` says so: else what lies behind the last claim.
	 */
	async take(most: number, all: boolean): Promise<Listed[]> {
		const now = performance.now();
		if (all || now - this.lookedAtAll > LOOK_AT_ALL_MS) {
			this.last = null;
			this.lookedAtAll = now;
		}
		const candidates = await this.find({ $and: [this.free(), behind(this.last)] }, most);
		if (candidates.length === 0) return [];
		this.last = candidates.at(-1)?.id ?? null;
		const ids = candidates.map(({ id }) => driverValue(id));
		// Whatever became of a candidate meanwhile, the update looks at it anew; done twice it changes nothing.
		await this.ask("claiming rows", () => this.documents.updateMany(this.among(ids, this.free()), this.mark()));
		return this.find(this.own(ids));
	}

	/** Claims these again, where nobody else has them; gives those that were got. */
	async takeAgain(wanted: readonly BsonValue[]): Promise<Set<string>> {
		const got = new Set<string>();
		for (const ids of parts(wanted)) {
			const mine = { [`${CLAIM}.owner`]: this.owner };
			await this.ask("claiming rows", () =>
				this.documents.updateMany(this.among(ids, { $or: [mine, this.free()] }), this.mark()),
			);
			for (const { id } of await this.find(this.own(ids))) got.add(valueKey(id));
		}
		return got;
	}

	/** Extends the lease of these; gives those that are no longer this run's. */
	async extend(held: readonly BsonValue[]): Promise<Set<string>> {
		const lost = new Set<string>();
		await this.readClock();
		for (let at = 0; at < held.length; at += TOGETHER) {
			const part = held.slice(at, at + TOGETHER);
			const mine = this.own(part.map(driverValue));
			const extended = { $set: { [`${CLAIM}.until`]: this.now(this.leaseMs) } };
			const { matchedCount } = await this.ask("extending claims", () => this.documents.updateMany(mine, extended));
			if (matchedCount === part.length) continue;
			const left = new Set((await this.find(mine)).map(({ id }) => valueKey(id)));
			for (const id of part) if (!left.has(valueKey(id))) lost.add(valueKey(id));
		}
		return lost;
	}

	/** Gives these back, as far as they are this run's. */
	async release(ids: readonly unknown[]): Promise<void> {
		for (let at = 0; at < ids.length; at += TOGETHER) {
			const mine = this.own(ids.slice(at, at + TOGETHER));
			await this.ask("giving claims back", () => this.documents.updateMany(mine, { $unset: { [CLAIM]: "" } }));
		}
	}

	/** Gives back all that a run had which is known to be gone. */
	async releaseOf(owner: string): Promise<void> {
		await this.ask("giving claims back", () =>
			this.documents.updateMany({ [`${CLAIM}.owner`]: owner }, { $unset: { [CLAIM]: "" } }),
		);
	}

	/** Gives back what was claimed and never noted: the run was killed in between. */
	async releaseAllBut(noted: ReadonlySet<string>): Promise<void> {
		const all = await this.find({ [`${CLAIM}.owner`]: this.owner });
		await this.release(all.filter(({ id }) => !noted.has(valueKey(id))).map(({ id }) => driverValue(id)));
	}
}

function* parts(ids: readonly BsonValue[]): Generator<unknown[]> {
	for (let at = 0; at < ids.length; at += TOGETHER) yield ids.slice(at, at + TOGETHER).map(driverValue);
}
