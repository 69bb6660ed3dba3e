/** The documentation names what there is: links, files, scripts, commands and their flags. */
import { execFileSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { describe, expect, it } from "vitest";
import { main } from "../src/cli/commands.js";
import { capturedOutput } from "./support/output.js";
import { root } from "./support/real.js";

/** Files that git knows or would take, by their paths. */
const files = execFileSync("git", ["ls-files", "--cached", "--others", "--exclude-standard"], {
	cwd: root,
	encoding: "utf8",
})
	.trim()
	.split("\n")
	.filter((path) => existsSync(join(root, path)));
const pages = files.filter((path) => path === "llms.txt" || (path.endsWith(".md") && !path.startsWith("__test__/")));
const textOf = (page: string) => readFileSync(join(root, page), "utf8");

/** A page without its blocks of code. */
const prose = (page: string) => textOf(page).replaceAll(/^ *```.*?^ *```$/gms, "");

/** Blocks of a shell's commands, each command on a line of its own. */
function commands(page: string): string[] {
	const blocks = [...textOf(page).matchAll(/^ *```(?:sh|bash)?\n(.*?)^ *```$/gms)].map(([, block = ""]) => block);
	return blocks.flatMap((block) => block.replaceAll(/ *\\\n */g, " ").split("\n")).map((line) => line.trim());
}

/** The anchors of a page's headings, as GitHub makes them. */
function anchors(page: string): string[] {
	return [...prose(page).matchAll(/^#+ +(.+)$/gm)].map(([, heading = ""]) =>
		heading
			.replaceAll(/\[([^\]]*)\]\([^)]*\)/g, "$1")
			.toLowerCase()
			.replaceAll(/[^\p{L}\p{N} _-]/gu, "")
			.replaceAll(" ", "-"),
	);
}

/** Every match of `pattern` on all pages that `fault` finds something wrong with. */
function faults(pattern: RegExp, fault: (page: string, match: string) => boolean, of = prose): string[] {
	return pages.flatMap((page) =>
		[...of(page).matchAll(pattern)].flatMap(([, match = ""]) => (fault(page, match) ? `${page}: ${match}` : [])),
	);
}

describe("the documentation", () => {
	it("is more than a page", () => {
		expect(pages).toEqual(expect.arrayContaining(["README.md", "llms.txt", "AGENTS.md", "docs/data.md"]));
		expect(pages.length).toBeGreaterThan(25);
	});

	it("has links to files and headings that exist", () => {
		const isDead = (page: string, link: string) => {
			const [path = "", anchor] = link.split("#");
			const target = path === "" ? page : normalize(join(dirname(page), path));
			if (!existsSync(join(root, target))) return true;
			return anchor !== undefined && !anchors(target).includes(anchor);
		};
		expect(faults(/\]\((?!\w+:)([^)\s]+)\)/g, isDead)).toEqual([]);
	});

	it("has a page with all pages of docs/ in reading order", () => {
		const links = [...textOf("docs/README.md").matchAll(/\]\(([^)]+)\)/g)].map(([, link]) => link);
		const all = readdirSync(join(root, "docs")).filter((name) => name.endsWith(".md") && name !== "README.md");
		expect(all.filter((name) => !links.includes(name))).toEqual([]);
	});

	it("names files that exist", () => {
		const top = new Set(readdirSync(root).filter((name) => !["out", "dist", "node_modules"].includes(name)));
		const matches = (pattern: string, path: string) =>
			new RegExp(`^${pattern.replaceAll(/[.+()[\]]/g, "\\$&").replaceAll("*", "[^/]*")}(/|$)`).test(path);
		const isMissing = (_: string, word: string) => {
			const path = word.replace(/\/$/, "");
			return top.has(path.split("/")[0] ?? "") && !files.some((file) => matches(path, file));
		};
		expect(faults(/`([\w.*@-]+(?:\/[\w.*@-]+)+\/?)`/g, isMissing)).toEqual([]);
		// Sources that are named without their folder; the others are files of a user.
		const OF_USERS = /^(?:arl\.config|convert|train|rows|metric|my-dataset|ask|make-parquet|make-model)\.m?[jt]s$/;
		const isUnknown = (_: string, name: string) =>
			!OF_USERS.test(name) && !files.some((file) => file === name || file.endsWith(`/${name}`));
		expect(faults(/`([\w./-]+\.(?:rs|cu|cuh|ts|mjs|mts))`/g, isUnknown)).toEqual([]);
	});

	it("names scripts of package.json", () => {
		const { scripts } = JSON.parse(textOf("package.json")) as { scripts: Record<string, string> };
		const isUnknown = (_: string, name: string) => !(name in scripts);
		expect(faults(/npm run ([\w:-]+)/g, isUnknown, textOf)).toEqual([]);
		expect(Object.keys(scripts)).toEqual(expect.arrayContaining(["start", "test"]));
	});
});

describe("the documentation of the command line", () => {
	const output = capturedOutput();

	/** What `arl WORDS --help` prints. */
	async function help(...words: string[]): Promise<string> {
		output.stdout = "";
		expect(await main([...words, "--help"])).toBe(0);
		return output.stdout;
	}

	/** The commands that a group's help lists; none: it is a command's. */
	const listed = (text: string) =>
		/^Usage: arl(?: [a-z]+)? COMMAND/.test(text)
			? [...text.matchAll(/^ {2}([a-z]+) {2,}\S/gm)].map(([, name = ""]) => name)
			: [];

	it("names commands that there are, and flags that they take", async () => {
		const flags = new Map<string, Set<string>>();
		for (const name of listed(await help())) {
			const group = listed(await help(name));
			for (const words of group.length > 0 ? group.map((one) => [name, one]) : [[name]]) {
				const text = await help(...words);
				const found = [...text.matchAll(/--(\w+)/g)].map(([, flag = ""]) => flag);
				const ofTrain = /options[^.]* of\s+`arl\s+train`/.test(text) ? (flags.get("train") ?? []) : [];
				flags.set(words.join(" "), new Set([...found, ...ofTrain, "help"]));
			}
			if (group.length > 0) flags.set(name, new Set(["help"]));
		}
		expect(flags.size).toBeGreaterThan(15);
		expect(flags.get("train")?.has("learning_rate")).toBe(true);

		// Flags of the bench for GPUs and of `step_rate`, and of srun and docker: their first words.
		const bench = "budget|compile|count|dropout|host|keep|lora|only|part|profile|python|rehearse|shapes|steps";
		const foreign = new RegExp(`^(?:${bench}|mpi|gpus|user|dry|long)$`);
		const all = new Set([...flags.values()].flatMap((some) => [...some]));
		const unknown = faults(/`--(\w+)/g, (_, flag) => !all.has(flag.replace(/^no_/, "")) && !foreign.test(flag));
		expect(unknown).toEqual([]);

		const isCommand = (words: string) => {
			const [first = "", second = ""] = words.split(" ");
			return flags.has(first) || flags.has(`${first} ${second}`);
		};
		const named = faults(/`(?:npx )?arl ((?!-)[a-z]+(?: [a-z]+)?)/g, (_, words) => !isCommand(words));
		expect(named).toEqual([]);

		const wrong: string[] = [];
		let seen = 0;
		// The page of errors shows commands that are wrong.
		for (const page of pages.filter((path) => path !== "docs/errors.md")) {
			for (const line of commands(page)) {
				const found = /(?:^|\s)(?:npx arl|(?<!\/)arl|node dist\/cli\/main\.js) ([a-z]+)(?: ([a-z]+))?(.*)$/.exec(
					line.replace(/ # .*$/, ""),
				);
				if (found === null || line.startsWith("#")) continue;
				const [, first = "", second = "", rest = ""] = found;
				const known = flags.get(`${first} ${second}`) ?? flags.get(first);
				seen += 1;
				if (known === undefined) wrong.push(`${page}: ${line}`);
				for (const [, flag = ""] of rest.matchAll(/\s--(\w+)/g)) {
					if (known && !known.has(flag.replace(/^no_/, ""))) wrong.push(`${page}: --${flag} of ${line}`);
				}
			}
		}
		expect(wrong).toEqual([]);
		expect(seen).toBeGreaterThan(50);
	}, 60_000);
});
