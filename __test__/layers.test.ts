/** Who imports whom in `src/`: nobody in a circle, nobody from a higher floor. docs/architecture.md says what the floors are for. */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { isStringLiteralLikeNode } from "typescript/unstable/ast/is";
import { API } from "typescript/unstable/sync";
import { describe, expect, it } from "vitest";
import { root } from "./support/real.js";

/** The files and folders of `src/`, lowest floor first. Each may import from lower floors, and none from its own. */
const FLOORS = [
	["errors"],
	["disk", "launch"],
	["config", "download", "native"],
	["device", "hub", "ranks"],
	["data"],
	["events", "images", "mongo"],
	["report"],
	["run"],
	["api"],
	["cli", "index"],
];

/** Who alone may import what is not for everyone above it. The addon: the generated `binding.d.ts` of the package. */
const KNOWN_TO: Readonly<Record<string, readonly string[]>> = {
	"the addon": ["native"],
	native: ["device", "ranks", "data", "run", "api", "cli"],
	device: ["run", "api", "cli"],
	hub: ["run", "api", "cli"],
	images: ["run", "api", "cli"],
	mongo: ["run", "api", "cli"],
};

/** Who imports which dependency. */
const PACKAGES: Readonly<Record<string, readonly string[]>> = {
	"@hono/node-server": ["report"],
	"@clack/prompts": ["cli"],
	"@huggingface/hub": ["hub"],
	"csv-parse": ["data"],
	hono: ["report"],
	jiti: ["config"],
	mongodb: ["mongo"],
	picocolors: ["errors", "report", "cli"],
	pino: ["report"],
	sharp: ["images"],
	undici: ["download", "images"],
	yaml: ["config"],
	yauzl: ["device"],
	zod: ["config"],
};

/** An import of any kind: of values or types, at the top or by `import()`, or a re-export. */
interface Import {
	/** `src/run/loop/loop.ts:12` */
	place: string;
	from: string;
	/** A path in the package, or the name of a dependency. */
	to: string;
}

/** All imports of `src/` but those of Node's own modules, found by TypeScript's own parser. */
function readImports(files: readonly string[]): Import[] {
	const compiler = new API({ cwd: root });
	try {
		const snapshot = compiler.updateSnapshot({ openProjects: [join(root, "tsconfig.build.json")] });
		const program = snapshot.getProjects()[0]?.program;
		return files.flatMap((from) => {
			const file = program?.getSourceFile(join(root, from));
			if (file === undefined) throw new Error(`${from}: the compiler does not read it`);
			return file.imports.filter(isStringLiteralLikeNode).flatMap(({ text, end }): Import[] => {
				if (text.startsWith("node:")) return [];
				const place = `${from}:${file.text.slice(0, end).split("\n").length}`;
				const isPath = text.startsWith(".");
				const name = text.split("/", text.startsWith("@") ? 2 : 1).join("/");
				return [{ place, from, to: isPath ? join(dirname(from), text.replace(/\.js$/, ".ts")) : name }];
			});
		});
	} finally {
		compiler.close();
	}
}

/** The file or folder of `src/` that `path` is in: `src/data/sources/csv.ts` is in `data`. */
const unitOf = (path: string) =>
	path === "binding.ts" ? "the addon" : (path.split("/")[1] ?? "").replace(/\.ts$/, "");
const floorOf = (unit: string) => FLOORS.findIndex((floor) => floor.includes(unit));

/** Every circle that a walk along the imports comes upon, as the files of its way round. */
function circlesOf(imports: readonly Import[]): string[] {
	const circles: string[] = [];
	const done = new Set<string>();
	const walk = (file: string, way: readonly string[]) => {
		const start = way.indexOf(file);
		if (start >= 0) circles.push([...way.slice(start), file].join(" -> "));
		if (start >= 0 || done.has(file)) return;
		for (const { from, to } of imports) if (from === file) walk(to, [...way, file]);
		done.add(file);
	};
	for (const { from } of imports) walk(from, []);
	return circles;
}

/** A section of docs/architecture.md. */
function sectionOf(title: string): string {
	const text = readFileSync(join(root, "docs", "architecture.md"), "utf8");
	return text.split(`## ${title}\n`)[1]?.split("\n## ")[0] ?? "";
}

const knows = (from: string, to: string) => inside.some((one) => one.from === from && one.to === to);

/** How often a way through files changes between going to what a file imports and to what imports it. */
function turnsOf(way: readonly string[]): number {
	const directions = way.slice(1).map((to, i) => {
		const from = way[i] as string;
		if (knows(from, to)) return "to what it imports";
		if (knows(to, from)) return "to what imports it";
		throw new Error(`neither of ${from} and ${to} imports the other`);
	});
	return directions.filter((direction, i) => i > 0 && direction !== directions[i - 1]).length;
}

const files = readdirSync(join(root, "src"), { recursive: true, encoding: "utf8" })
	.filter((name) => name.endsWith(".ts"))
	.map((name) => join("src", name));
const imports = readImports(files);
const inside = imports.filter(({ to }) => to.endsWith(".ts"));

describe("the files of src/", () => {
	it("are all read, with imports of values and types, at the top and by import()", () => {
		const found = inside.map(({ from, to }) => `${from} ${to}`);
		expect(found).toContain("src/cli/main.ts src/cli/commands.ts");
		expect(found).toContain("src/events.ts src/data/tokens/notes.ts");
		expect(found).toContain("src/cli/commands.ts src/cli/train.ts");
		expect(found).toContain("src/api/index.ts src/events.ts");
		const unknown = inside.filter(({ to }) => !files.includes(to) && unitOf(to) !== "the addon");
		expect(unknown).toEqual([]);
	});

	it("are all that benches, scripts and tests import from dist/", () => {
		const folders = ["bench", "scripts", "__test__"];
		const users = folders.flatMap((folder) =>
			readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
				.filter((name) => /\.m?[jt]s$/.test(name))
				.map((name) => join(folder, name)),
		);
		const missing = users.flatMap((user) =>
			[...readFileSync(join(root, user), "utf8").matchAll(/dist\/([\w/.-]+)\.js\b/g)]
				.map(([, path]) => `src/${path}.ts`)
				.filter((path) => !files.includes(path))
				.map((path) => `${user} imports ${path}, which does not exist`),
		);
		expect(missing).toEqual([]);
	});

	it("import each other in no circle", () => {
		expect(circlesOf(inside)).toEqual([]);
	});

	it("each have a floor", () => {
		const units = new Set(files.map(unitOf));
		expect([...units].sort()).toEqual(FLOORS.flat().sort());
	});

	it("import from lower floors only", () => {
		const upward = inside
			.map(({ place, from, to }) => ({ place, to, below: unitOf(from), above: unitOf(to) }))
			.filter(({ below, above }) => below !== above && floorOf(below) <= floorOf(above))
			.map(({ place, to, below, above }) => `${place} imports ${to}, and ${above} is not below ${below}`);
		expect(upward).toEqual([]);
	});

	it("know the addon, the devices, images and databases only where they may", () => {
		const wrong = inside
			.map(({ place, from, to }) => ({ place, to, who: unitOf(from), whom: unitOf(to) }))
			.filter(({ who, whom }) => who !== whom && KNOWN_TO[whom]?.includes(who) === false)
			.map(({ place, to, whom }) => `${place} imports ${to}; only ${KNOWN_TO[whom]?.join(", ")} may import ${whom}`);
		expect(wrong).toEqual([]);
	});

	it("import a dependency only where it belongs", () => {
		const outside = imports.filter(({ to }) => !to.endsWith(".ts"));
		const wrong = outside
			.filter(({ from, to }) => !PACKAGES[to]?.includes(unitOf(from)))
			.map(({ place, to }) => `${place} imports ${to}; only ${PACKAGES[to]?.join(", ") ?? "nobody"} may`);
		expect(wrong).toEqual([]);
		expect([...new Set(outside.map(({ to }) => to))].sort()).toEqual(Object.keys(PACKAGES).sort());
	});

	it("are on the floors that docs/architecture.md describes", () => {
		const rows = [...sectionOf("Who may know whom").matchAll(/^\| (`.*?`) \|/gm)].map(([, names = ""]) =>
			names.replaceAll("`", "").split(", "),
		);
		expect(rows.reverse()).toEqual(FLOORS);
	});

	it("lead a batch from its file to the engine as docs/architecture.md describes: no file comes twice, and the imports turn round once", () => {
		const section = sectionOf("The way of a batch");
		const way = [...section.matchAll(/^\d+\. `(src\/[^`]+)`/gm)].map(([, file = ""]) => file);
		expect(way.length).toBeGreaterThanOrEqual(5);
		expect(new Set(way).size).toBe(way.length);
		expect(turnsOf(way)).toBe(1);
		// What the steps are made of meets the rows in one file.
		const order = [...section.matchAll(/^- `(src\/[^`]+)`/gm)].map(([, file = ""]) => file);
		expect(order.length).toBeGreaterThanOrEqual(2);
		const meeting = way.filter((file) => knows(file, order.at(-1) as string));
		expect(turnsOf([...order, ...meeting])).toBe(0);
		expect(meeting).toHaveLength(1);
	});
});
