/**
 * The dashboard's server: the page of the report over the files of runs, and what changes in them as server-sent events. Listens
 * on the loopback address alone, and refuses requests without the token.
 */
import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import type { AddressInfo } from "node:net";
import { type ServerType, serve } from "@hono/node-server";
import { Hono } from "hono";
import { type SSEStreamingApi, streamSSE } from "hono/streaming";
import { toArlError } from "../../errors.js";
import { type Live, pageData, pageOf } from "../page/page.js";
import { Board, type BoardRun } from "./board.js";

const HOST = "127.0.0.1";
/** Between two looks at the files. */
const READ_MILLISECONDS = 1000;
/** Looks without news after which a sign of life is sent. */
const QUIET_LOOKS = 15;

export interface Dashboard {
	/** With the token. */
	url: string;
	close(): Promise<void>;
}

export interface DashboardOptions {
	/** Folders of runs, or with runs below them. */
	folders: readonly string[];
	/** 0: a free one. */
	port: number;
	readMilliseconds?: number;
}

/**
 * Serves the dashboard until it is closed.
 *
 * @throws ArlError `ARL_IO` if the port cannot be had.
 */
export async function openDashboard(options: DashboardOptions): Promise<Dashboard> {
	const token = randomBytes(16).toString("hex");
	const board = new Board(options.folders);
	board.update();
	const timer = setInterval(() => board.update(), options.readMilliseconds ?? READ_MILLISECONDS);
	const app = dashboardApp(board, token, options.readMilliseconds ?? READ_MILLISECONDS);
	try {
		const server = await listen(app, options.port);
		const { port } = server.address() as AddressInfo;
		return {
			url: `http://${HOST}:${port}/?token=${token}`,
			async close() {
				clearInterval(timer);
				if ("closeAllConnections" in server) server.closeAllConnections();
				await new Promise((closed) => server.close(closed));
			},
		};
	} catch (error) {
		clearInterval(timer);
		throw toArlError(error, `port ${options.port}`);
	}
}

function listen(app: Hono, port: number): Promise<ServerType> {
	return new Promise((resolve, reject) => {
		const server = serve({ fetch: app.fetch, hostname: HOST, port }, () => resolve(server));
		server.once("error", reject);
	});
}

function dashboardApp(board: Board, token: string, milliseconds: number): Hono {
	const app = new Hono();
	const query = `token=${token}`;
	app.use(async (context, next) => {
		context.header("Referrer-Policy", "no-referrer");
		context.header("Cache-Control", "no-store");
		if (isToken(context.req.query("token") ?? "", token)) return await next();
		return context.text("The address of this dashboard has a token: copy all of it from the terminal.\n", 403);
	});
	/** The runs that an address is about, and the server's paths for their page. */
	const chosen = (id: string | undefined): { runs: BoardRun[]; live: Live } => {
		const { runs } = board;
		const events = `/events?${query}`;
		if (id !== undefined) {
			const run = runs.filter((one) => one.id === id);
			return { runs: run, live: { events: `${events}&run=${id}`, all: `/?${query}` } };
		}
		// The only run has the page to itself.
		if (runs.length === 1) return { runs, live: { events } };
		return { runs, live: { events, pages: runs.map((run) => `/run/${run.id}?${query}`) } };
	};
	const page = ({ runs, live }: ReturnType<typeof chosen>) => pageOf(readersOf(runs), live);
	app.get("/", (context) => context.html(page(chosen(undefined))));
	app.get("/run/:id", (context) => {
		const found = chosen(context.req.param("id"));
		return found.runs.length === 0 ? context.text("This run is not there any more.\n", 404) : context.html(page(found));
	});
	app.get("/events", (context) => {
		const id = context.req.query("run");
		return streamSSE(context, (stream) => sendChanges(stream, () => chosen(id), board, milliseconds));
	});
	return app;
}

const readersOf = (runs: readonly BoardRun[]) => runs.map(({ reader }) => reader);

/** Sends the page's data at once and whenever they change, as long as the reader stays. */
async function sendChanges(
	stream: SSEStreamingApi,
	choose: () => { runs: BoardRun[]; live: Live },
	board: Board,
	milliseconds: number,
): Promise<void> {
	let sent = "";
	let quiet = 0;
	while (!stream.aborted && !stream.closed) {
		const { runs, live } = choose();
		const version = board.version(runs);
		if (version !== sent) {
			sent = version;
			quiet = 0;
			await stream.writeSSE({ event: "page", data: JSON.stringify(pageData(readersOf(runs), live)) });
		} else if (++quiet % QUIET_LOOKS === 0) {
			await stream.writeSSE({ event: "quiet", data: "" });
		}
		await stream.sleep(milliseconds);
	}
}

function isToken(given: string, token: string): boolean {
	const digest = (text: string) => createHash("sha256").update(text).digest();
	return timingSafeEqual(digest(given), digest(token));
}
