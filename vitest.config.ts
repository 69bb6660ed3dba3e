import { defineConfig } from "vitest/config";

export default defineConfig({
	test: {
		include: ["__test__/**/*.test.ts"],
		testTimeout: 30_000,
		// The engine uses every core, so files run side by side only as far as two workers go.
		maxWorkers: 2,
	},
});
