import { defineConfig } from "vitest/config";

export default defineConfig({
	test: {
		include: ["__test__/**/*.test.ts"],
		testTimeout: 60_000,
		// The engine uses every core; the third worker computes while tests of leases and lost connections wait.
		maxWorkers: 3,
	},
});
