/** A small Hugging Face Hub on loopback, for tests: what it answers is the Hub's own interface, and its faults are the test's. */
import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { afterAll } from "vitest";

/** A file: its content, and whether the Hub keeps it apart from git, as it does with large ones. */
export interface HubContent {
	content: Buffer;
	lfs: boolean;
}

/** A repository: `models/OWNER/NAME` or `datasets/OWNER/NAME`. */
export interface HubRepo {
	commit: string;
	revisions: string[];
	files: Map<string, HubContent>;
	/** The token that may read it; absent: anybody may. */
	token?: string;
	gated?: boolean;
}

export interface Seen {
	url: string;
	authorization: string | undefined;
	range: string | undefined;
}

export const sha256 = (content: Buffer) => createHash("sha256").update(content).digest("hex");
export const gitId = (content: Buffer) =>
	createHash("sha1").update(`blob ${content.length}\0`).update(content).digest("hex");

/** Weights of a model, of no meaning. */
export const weights = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * 7) % 251));
/** A repository of a model, with files that arl does not need. */
export const MODEL = {
	"config.json": '{"model_type": "qwen3"}',
	"generation_config.json": "{}",
	"tokenizer.json": '{"a": 1}',
	"tokenizer_config.json": '{"b": 2}',
	"chat_template.jinja": "{{ messages }}",
	"additional_chat_templates/tools.jinja": "{{ tools }}",
	"model.safetensors": weights,
	"README.md": "# not needed",
	"pytorch_model.bin": "not needed",
	"onnx/model.onnx": "not needed",
};

export class FakeHub {
	readonly repos = new Map<string, HubRepo>();
	/** Every request, in order. */
	readonly seen: Seen[] = [];
	/** Breaks the next answers with content off after so many bytes each. */
	breaks: number[] = [];
	/** Replaces the content that is sent. */
	sends: ((path: string, content: Buffer) => Buffer) | null = null;
	/** Sends content from this address instead, as the Hub does with large files. */
	redirectTo: string | null = null;
	/** Answers everything with this status. */
	status: number | null = null;
	ignoresRange = false;

	private constructor(
		private readonly server: Server,
		readonly url: string,
	) {}

	static async start(): Promise<FakeHub> {
		const server = createServer((request, response) => hub.answer(request, response));
		await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
		const hub = new FakeHub(server, `http://127.0.0.1:${(server.address() as AddressInfo).port}`);
		afterAll(() => hub.stop());
		return hub;
	}

	stop(): void {
		this.server.close();
		this.server.closeAllConnections();
	}

	/** Adds a repository. `lfs`: names of files that are kept apart from git. */
	add(name: string, files: Record<string, string | Buffer>, more: Partial<HubRepo> = {}): HubRepo {
		const isLarge = (path: string) => /\.(safetensors|parquet|bin|onnx)$/.test(path);
		const contents = Object.entries(files).map(([path, content]): [string, HubContent] => [
			path,
			{ content: Buffer.from(content), lfs: isLarge(path) },
		]);
		const commit = createHash("sha1")
			.update(name)
			.update(JSON.stringify(Object.keys(files)))
			.digest("hex");
		const repo = { commit, revisions: ["main"], files: new Map(contents), ...more };
		this.repos.set(name, repo);
		return repo;
	}

	/** Forgets what was asked, and ends all faults. */
	calm(): void {
		this.seen.length = 0;
		this.breaks = [];
		this.sends = null;
		this.redirectTo = null;
		this.status = null;
		this.ignoresRange = false;
	}

	/** The requests for content. */
	get contents(): Seen[] {
		return this.seen.filter(({ url }) => url.includes("/resolve/"));
	}

	private answer(request: IncomingMessage, response: ServerResponse): void {
		const { url = "", headers } = request;
		this.seen.push({ url, authorization: headers.authorization, range: headers.range });
		const fail = (status: number, code: string, said = "") => {
			response.writeHead(status, { "X-Error-Code": code, "X-Error-Message": said, "Content-Type": "application/json" });
			response.end(JSON.stringify({ error: said }));
		};
		if (this.status !== null) return void fail(this.status, "");
		const path = decodeURIComponent(new URL(url, this.url).pathname);
		const api = /^\/api\/(models|datasets)\/([^/]+\/[^/]+)\/(revision|tree)\/([^/]+)(?:\/(.*))?$/.exec(path);
		const content = /^\/(datasets\/)?([^/]+\/[^/]+)\/resolve\/([^/]+)\/(.+)$/.exec(path);
		const name = api ? `${api[1]}/${api[2]}` : `${content?.[1] ?? "models/"}${content?.[2]}`;
		const repo = this.repos.get(name);
		const token = headers.authorization?.replace("Bearer ", "");
		if (token === "hf_expired") return void fail(401, "", "Invalid credentials in Authorization header");
		if (repo?.gated && token !== repo.token) return void fail(token === undefined ? 401 : 403, "GatedRepo", "gated");
		// As the Hub does: what does not exist looks like what is private.
		if (repo === undefined || (repo.token !== undefined && token !== repo.token)) {
			return void fail(token === undefined ? 401 : 404, "RepoNotFound", "Repository not found");
		}
		const revision = api?.[4] ?? content?.[3] ?? "";
		if (revision !== repo.commit && !repo.revisions.includes(revision)) return void fail(404, "RevisionNotFound");
		if (api?.[3] === "revision") {
			response.writeHead(200, { "Content-Type": "application/json" });
			response.end(
				JSON.stringify({ _id: "1", id: api[2], sha: repo.commit, lastModified: "2026-01-01T00:00:00.000Z" }),
			);
		} else if (api) this.list(repo, api[5] ?? "", url.includes("recursive=true"), response, fail);
		else if (content) this.send(repo, content[4] ?? "", headers.range, response, fail);
	}

	private list(
		repo: HubRepo,
		folder: string,
		deep: boolean,
		response: ServerResponse,
		fail: (status: number, code: string) => void,
	): void {
		const below = [...repo.files].filter(([path]) => folder === "" || path.startsWith(`${folder}/`));
		if (below.length === 0) return void fail(404, "EntryNotFound");
		const entries = new Map<string, object>();
		for (const [path, { content, lfs }] of below) {
			const rest = path.slice(folder === "" ? 0 : folder.length + 1).split("/");
			for (let depth = 1; depth < rest.length; depth++) {
				const name = [folder, ...rest.slice(0, depth)].filter(Boolean).join("/");
				if (deep || depth === 1) entries.set(name, { type: "directory", path: name, size: 0, oid: "0".repeat(40) });
			}
			if (!deep && rest.length > 1) continue;
			const large = lfs ? { lfs: { oid: sha256(content), size: content.length, pointerSize: 130 } } : {};
			entries.set(path, { type: "file", path, size: content.length, oid: gitId(content), ...large });
		}
		response.writeHead(200, { "Content-Type": "application/json" });
		response.end(JSON.stringify([...entries.values()]));
	}

	private send(
		repo: HubRepo,
		path: string,
		range: string | undefined,
		response: ServerResponse,
		fail: (status: number, code: string) => void,
	): void {
		const file = repo.files.get(path);
		if (file === undefined) return void fail(404, "EntryNotFound");
		if (this.redirectTo !== null && file.lfs) {
			response.writeHead(302, { Location: `${this.redirectTo}/${sha256(file.content)}` });
			response.end();
			return;
		}
		sendContent(
			this.sends?.(path, file.content) ?? file.content,
			this.ignoresRange ? undefined : range,
			response,
			this.breaks.shift(),
		);
	}
}

const BREAK_MILLISECONDS = 150;

/** Sends content as a server of files does; `breakAfter`: closes the connection after so many bytes. */
export function sendContent(
	content: Buffer,
	range: string | undefined,
	response: ServerResponse,
	breakAfter?: number,
): void {
	const from = Number(/^bytes=(\d+)-/.exec(range ?? "")?.[1] ?? 0);
	const part = content.subarray(from);
	const partial =
		range === undefined ? {} : { "Content-Range": `bytes ${from}-${content.length - 1}/${content.length}` };
	response.writeHead(range === undefined ? 200 : 206, { "Content-Length": part.length, ...partial });
	if (breakAfter === undefined || breakAfter >= part.length) {
		response.end(part);
		return;
	}
	// A client throws away what it has received and not read when the connection ends.
	response.write(part.subarray(0, breakAfter), () => setTimeout(() => response.socket?.end(), BREAK_MILLISECONDS));
}
