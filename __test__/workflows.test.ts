/** The workflows of CI and of releases: they fit GitHub's schema, and what they run is there. */
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { validateWorkflow } from "@action-validator/core";
import { describe, expect, it } from "vitest";
import { parse } from "yaml";
import { manifest, PLATFORMS } from "../scripts/packages/platforms.mjs";
import { root } from "./support/real.js";

const folder = join(root, ".github", "workflows");
const files = readdirSync(folder);
const paths = files.map((name) => join(folder, name));

interface Workflow {
	jobs: Record<string, { steps: { run?: string; uses?: string }[]; strategy?: { matrix: Record<string, unknown> } }>;
}
const workflows = paths.map((path) => parse(readFileSync(path, "utf8")) as Workflow);
const lines = workflows.flatMap(({ jobs }) =>
	Object.values(jobs).flatMap(({ steps }) => steps.flatMap(({ run }) => run?.split("\n") ?? [])),
);

describe("a workflow", () => {
	it.each(files)("%s fits GitHub's schema", (name) => {
		const found = validateWorkflow(readFileSync(join(folder, name), "utf8"));
		expect(found).toEqual({ actionType: "workflow", errors: [] });
	});

	it("that does not is refused", () => {
		const found = validateWorkflow("on: push\njobs:\n  one:\n    runs_on: ubuntu-24.04\n    steps: []\n");
		expect(found.errors.length).toBeGreaterThan(0);
	});

	it("passes actionlint", (context) => {
		const { status, stdout, error } = spawnSync(process.env.ARL_ACTIONLINT ?? "actionlint", ["-no-color", ...paths], {
			cwd: root,
			encoding: "utf8",
		});
		if (error !== undefined) {
			process.stderr.write("SKIPPED: actionlint on the workflows: it is not in PATH (ARL_ACTIONLINT names it)\n");
			return context.skip();
		}
		expect(`${stdout}${status}`).toBe("0");
	});

	it("runs scripts of package.json and files that are there", () => {
		const scripts = lines.flatMap((line) => /\bnpm (?:run )?([a-z][\w:-]*)/.exec(line)?.[1] ?? []);
		expect(scripts).toEqual(expect.arrayContaining(["test", "test:packages", "docs:build", "pack", "build:cuda"]));
		expect(scripts.filter((name) => manifest.scripts[name] === undefined)).toEqual([]);
		const named = lines.flatMap((line) => [...line.matchAll(/scripts\/[\w./-]+/g)].map(([path]) => path));
		expect(named.length).toBeGreaterThan(1);
		expect(named.filter((path) => !existsSync(join(root, path)))).toEqual([]);
	});

	it("builds every platform's package once, with the standard library of its target", () => {
		const build = workflows[files.indexOf("release.yml")]?.jobs.build;
		const matrix = build?.strategy?.matrix as { include: { targets: string; options: string }[] } | undefined;
		const include = matrix?.include ?? [];
		const targets = include.flatMap((entry) => entry.targets.split(" "));
		const ids = include.flatMap(({ options }) => [...options.matchAll(/--only (\S+)/g)].map(([, id]) => id));
		expect(targets).toEqual(PLATFORMS.map(({ triple }) => triple));
		expect(ids).toEqual(PLATFORMS.map(({ id }) => id));
	});
});
