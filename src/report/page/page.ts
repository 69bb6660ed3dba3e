/**
 * One HTML page of one run or several: everything is in it, uPlot too, and nothing is loaded from a network. The dashboard sends
 * the same page, with an address from which it gets what is new.
 */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import type { RunReader } from "../runs/read-run.js";
import { type RunData, runData } from "./run-data.js";

/** Where a page that is live gets its data: paths on the server that sent it. */
export interface Live {
	/** Server-sent events, each with the data of the whole page. */
	events: string;
	/** The page of each run; absent on the page of one. */
	pages?: string[];
	/** The page of all runs; absent on that page. */
	all?: string;
}

/** What the script of the page starts from, and what it gets while it is live. */
export interface PageData {
	runs: RunData[];
	live: Live | null;
}

/** A file of the folder `page`, next to both `src` and `dist`. */
const own = (name: string) => readFileSync(new URL(`../../../page/${name}`, import.meta.url), "utf8");

/** The modules of the page's script, each after those that it imports. */
const MODULES = ["state", "elements", "charts", "run-charts", "parts", "run", "compare", "main"];

/** The modules as one script: their names are one another's, and nobody else's. */
function script(): string {
	const bodies = MODULES.map((name) =>
		own(`${name}.js`)
			.replace(/^import [^;]*;\n/gm, "")
			.replace(/^export /gm, ""),
	);
	return `"use strict";\n(() => {\n${bodies.join("\n")}})();`;
}

function uplot(name: string): string {
	return readFileSync(createRequire(import.meta.url).resolve(`uplot/dist/${name}`), "utf8");
}

/** The data of a page; the more runs there are on it, the fewer points a curve has. */
export function pageData(readers: readonly RunReader[], live: Live | null): PageData {
	const points = readers.length > 1 ? 200 : undefined;
	return { runs: readers.map((reader) => runData(reader, points)), live };
}

/** The page of the runs. */
export function pageOf(readers: readonly RunReader[], live: Live | null = null): string {
	const data = pageData(readers, live);
	const title = readers.length === 1 ? `${readers[0]?.name}: arl run` : `${readers.length} arl runs`;
	const parts: Record<string, string> = {
		title: escapeHtml(title),
		style: `${uplot("uPlot.min.css")}\n${own("report.css")}`,
		uplot: uplot("uPlot.iife.min.js"),
		script: script(),
		data: scriptJson(data),
	};
	return own("report.html").replace(/\{\{(\w+)\}\}/g, (_, name: string) => parts[name] ?? "");
}

/** A value as JSON inside a script element, which no text in it can end. */
export function scriptJson(value: unknown): string {
	return JSON.stringify(value).replaceAll("<", "\\u003c");
}

function escapeHtml(text: string): string {
	return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
