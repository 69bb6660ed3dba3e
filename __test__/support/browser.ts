/** A real browser for tests: Chromium of the system, without a window. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Browser, chromium, type Page } from "playwright-core";

const NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];

/** The browser's program: `ARL_BROWSER`, else one on the path; undefined: there is none. */
function program(): string | undefined {
	const { ARL_BROWSER: given, PATH = "" } = process.env;
	if (given) return given;
	const paths = PATH.split(":").flatMap((folder) => NAMES.map((name) => join(folder, name)));
	return paths.find((path) => existsSync(path));
}

/** A browser; null, with a counted notice: there is none. */
export async function openBrowser(test: string): Promise<Browser | null> {
	const executablePath = program();
	if (executablePath === undefined) {
		process.stderr.write(`SKIPPED: ${test}: no Chromium is on the path (ARL_BROWSER)\n`);
		return null;
	}
	return await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
}

/** A page with what its console complains of and what it requests from elsewhere. */
export async function openPage(
	browser: Browser,
	url: string,
	options: { dark?: boolean; width?: number } = {},
): Promise<{ page: Page; complaints: string[]; requests: string[] }> {
	const page = await browser.newPage({
		colorScheme: options.dark ? "dark" : "light",
		viewport: { width: options.width ?? 1280, height: 900 },
	});
	const complaints: string[] = [];
	const requests: string[] = [];
	page.on("console", (message) => {
		if (["error", "warning"].includes(message.type())) complaints.push(message.text());
	});
	page.on("pageerror", (error) => complaints.push(String(error)));
	page.on("request", (request) => requests.push(request.url()));
	await page.goto(url);
	await page.waitForSelector("html[data-ready]");
	return { page, complaints, requests };
}
