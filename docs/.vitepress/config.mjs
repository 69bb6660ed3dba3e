// The documentation as a site: `npm run docs:build` writes it to out/site, `npm run docs:dev` shows it while pages are edited.
// Navigation comes from docs/README.md. A dead link, or a page that docs/README.md does not list, fails the build.
import { copyFileSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";
import { defineConfig } from "vitepress";

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

/** A path of the repository as a path of the site: a README is the page of its folder. */
const pageOf = (path) => path.replace(/(^|\/)README\.md(?=#|$)/, "$1index.md");

/** An anchor as GitHub makes it, so that links work in both places. */
const slug = (heading) =>
	heading
		.toLowerCase()
		.replaceAll(/[^\p{L}\p{N} _-]/gu, "")
		.replaceAll(" ", "-");

/** The groups of docs/README.md with their pages, and the examples below theirs. */
function navigation() {
	const [, ...groups] = readFileSync(join(root, "docs", "README.md"), "utf8").split(/^## /m);
	const item = ([, text, link]) => ({ text, link: `/${pageOf(normalize(join("docs", link)))}` });
	return groups.map((group) => {
		const [title, ...lines] = group.split("\n");
		const links = lines.flatMap((line) => [...line.matchAll(/\[([^\]]+)\]\(([^)]+\.md)\)/g)]);
		return { text: title, items: links.map(item).flatMap((page) => [page, ...examplesBelow(page)]) };
	});
}

function examplesBelow({ link }) {
	if (link !== "/examples/index.md") return [];
	const folders = readdirSync(join(root, "examples"), { withFileTypes: true }).filter((entry) => entry.isDirectory());
	const items = folders.map(({ name }) => ({ text: name, link: `/examples/${name}/index.md` }));
	return [{ text: "Each example", collapsed: true, items }];
}

const sidebar = navigation();
const listed = JSON.stringify(sidebar);
for (const name of readdirSync(join(root, "docs")).filter((name) => name.endsWith(".md"))) {
	if (name !== "README.md" && !listed.includes(`"/docs/${name}"`))
		throw new Error(`docs/README.md does not list docs/${name}: the site has no way to that page`);
}

export default defineConfig({
	title: "arl",
	description: "Supervised fine-tuning of Qwen models for TypeScript, with an engine in Rust",
	srcDir: root,
	srcExclude: ["**/node_modules/**", "__test__/**", "assets/**", "crates/**", "dist/**", "out/**"],
	outDir: join(root, "out", "site"),
	cacheDir: join(root, "node_modules", ".cache", "vitepress"),
	rewrites: pageOf,
	// No browser asks for an icon that there is none of.
	head: [["link", { rel: "icon", href: "data:," }]],
	markdown: {
		anchor: { slugify: slug },
		config(md) {
			md.core.ruler.push("readme_links", (state) => {
				for (const token of state.tokens.flatMap(({ children }) => children ?? [])) {
					const href = token.type === "link_open" ? token.attrGet("href") : null;
					if (href !== null && !/^\w+:/.test(href)) token.attrSet("href", pageOf(href));
				}
			});
		},
	},
	themeConfig: {
		nav: [
			{ text: "Reading order", link: "/docs/index.md" },
			{ text: "Examples", link: "/examples/index.md" },
			{ text: "Options", link: "/docs/options.md" },
		],
		sidebar,
		outline: [2, 3],
		search: { provider: "local" },
	},
	/** Pages as Markdown next to their HTML, and llms.txt, which links them: for programs that read. */
	buildEnd({ pages, outDir }) {
		for (const path of [...pages, "llms.txt"]) {
			mkdirSync(dirname(join(outDir, path)), { recursive: true });
			copyFileSync(join(root, path), join(outDir, path));
		}
	},
});
