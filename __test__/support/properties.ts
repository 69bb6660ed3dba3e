/** Leases about generated values. A failure shows the smallest case that the claim fails on, its seed and its path. */
import fc, { type IAsyncProperty, type IProperty } from "fast-check";

export { fc };

/** The seed of every claim, so that a test has the same values each time; `FC_SEED` replaces it. */
const SEED = 20_261_122;

const parameters = (runs: number) => ({
	seed: Number(process.env.FC_SEED ?? SEED),
	numRuns: Number(process.env.FC_NUM_RUNS ?? (process.env.ARL_LONG === "1" ? 10 * runs : runs)),
});

/** Tries a claim on `runs` generated cases, ten times as many in `npm run test:long`; `FC_NUM_RUNS` replaces the number. */
export function holds<T>(runs: number, claim: IProperty<T>): void {
	fc.assert(claim, parameters(runs));
}

/** The same for a claim that has to be awaited. */
export function holdsAsync<T>(runs: number, claim: IAsyncProperty<T>): Promise<void> {
	return fc.assert(claim, parameters(runs));
}
