/**
 * Talks to the Hugging Face Hub: the commit of a revision and its files by `@huggingface/hub`, their content by ranged requests,
 * which that package's own cache neither resumes nor checks. The token goes to the Hub's own address alone.
 */
import type { ListFileEntry } from "@huggingface/hub";
import { contentHeaders, contentOf, Fetcher, mayPass } from "../download/fetch.js";
import { ArlError } from "../errors.js";
import type { Repo } from "./names.js";
import type { HubSettings } from "./settings.js";

/** A file of a repository at a commit. */
export interface HubFile {
	path: string;
	size: number;
	/** The name of its content in the cache, which is its hash: SHA-256 of large files, git's id of others. */
	etag: string;
	kind: "sha256" | "git-sha1";
}

const UNREACHABLE =
	"Check the network; HTTPS_PROXY names a proxy, HF_ENDPOINT another Hub. With HF_HUB_OFFLINE=1 only the cache is read.";

/** The Hub, as these settings reach it. */
export class HubClient {
	private readonly fetcher = new Fetcher("the Hugging Face Hub", UNREACHABLE);

	constructor(
		private readonly settings: HubSettings,
		private readonly signal: AbortSignal | null,
	) {}

	/** The address, for messages. */
	get address(): string {
		return this.settings.endpoint;
	}

	/** The commit that a revision is at. */
	async commit(repo: Repo): Promise<string> {
		const { modelInfo, datasetInfo } = await import("@huggingface/hub");
		const { name, revision } = repo;
		const asked = { name, revision, additionalFields: ["sha" as const], ...this.access(repo) };
		const info = () => (repo.type === "model" ? modelInfo(asked) : datasetInfo(asked));
		const { sha } = await this.asked(repo, info);
		if (/^[0-9a-f]{40}$/.test(String(sha))) return sha;
		throw this.odd(repo, "a commit");
	}

	/** The files below `folder` at a commit; `deep`: also those in its folders. */
	async files(
		repo: Repo,
		commit: string,
		folder: string,
		deep: boolean,
	): Promise<{ files: HubFile[]; folders: string[] }> {
		const { listFiles } = await import("@huggingface/hub");
		const found: { files: HubFile[]; folders: string[] } = { files: [], folders: [] };
		await this.asked(repo, async () => {
			const asked = {
				repo: { type: repo.type, name: repo.name },
				revision: commit,
				recursive: deep,
				...(folder !== "" && { path: folder.split("/").map(encodeURIComponent).join("/") }),
				...this.access(repo),
			};
			for await (const entry of listFiles(asked)) {
				if (entry.type === "directory") found.folders.push(safe(repo, entry.path));
				else if (entry.type === "file") found.files.push(this.fileOf(repo, entry));
			}
		});
		return found;
	}

	/** Opens a file's content at `offset`, or at 0 where the server cannot do so. */
	async open(repo: Repo, commit: string, path: string, offset: number) {
		const url = this.contentUrl(repo, commit, path);
		const headers = { ...this.authorization(), ...contentHeaders(offset) };
		const response = await this.fetcher.get(url, { headers, signal: this.signal });
		if (!response.ok) throw await this.refusal(repo, response, path);
		return contentOf(response, offset);
	}

	/** What broke the content of a file off. */
	broken(repo: Repo, commit: string, path: string, thrown: unknown): ArlError {
		return this.fetcher.failed(thrown, this.contentUrl(repo, commit, path), this.signal);
	}

	/** Ends open connections. */
	close(): Promise<void> {
		return this.fetcher.close();
	}

	private contentUrl({ type, name }: Repo, commit: string, path: string): string {
		const kind = type === "model" ? "" : `${type}s/`;
		return `${this.settings.endpoint}/${kind}${name}/resolve/${commit}/${path.split("/").map(encodeURIComponent).join("/")}`;
	}

	private authorization(): Record<string, string> {
		const { authorization } = this.settings;
		return authorization === null ? {} : { Authorization: authorization };
	}

	/** What every call of `@huggingface/hub` is given. It would refuse a token that does not begin as the Hub's own do. */
	private access(repo: Repo) {
		const send = async (input: string | URL | globalThis.Request, init?: RequestInit): Promise<Response> => {
			const url = typeof input === "object" && "url" in input ? input.url : input;
			const own = new URL(url).origin === new URL(this.settings.endpoint).origin;
			const headers = { ...Object.fromEntries(new Headers(init?.headers)), ...(own && this.authorization()) };
			const response = await this.fetcher.get(url, { headers, signal: this.signal });
			if (!response.ok) throw await this.refusal(repo, response);
			return response;
		};
		return { hubUrl: this.settings.endpoint, fetch: send };
	}

	/** Calls `@huggingface/hub`, whose complaints about an answer become errors of ours. */
	private async asked<T>(repo: Repo, call: () => Promise<T>): Promise<T> {
		try {
			return await call();
		} catch (thrown) {
			if (thrown instanceof ArlError) throw thrown;
			throw this.odd(repo, "JSON");
		}
	}

	private odd({ name }: Repo, wanted: string): ArlError {
		return new ArlError(
			"ARL_NETWORK",
			`${name}: ${this.address} answers with something else than ${wanted}`,
			"Check HF_ENDPOINT, and whether a proxy or a login page answers in place of the Hub.",
		);
	}

	/** What an answer other than success means. */
	private async refusal(repo: Repo, response: Response, path?: string): Promise<ArlError> {
		const { status, headers } = response;
		await response.body?.cancel().catch(() => {});
		const { token, tokenFrom } = this.settings;
		const kind = repo.type === "model" ? "model" : "data set";
		const page = `${this.address}/${repo.type === "model" ? "" : "datasets/"}${repo.name}`;
		const error = (message: string, hint: string) => new ArlError("ARL_NETWORK", message, hint);
		const withToken =
			token === null ? "set HF_TOKEN, or run `hf auth login`" : `${tokenFrom} has a token that may not read it`;
		switch (headers.get("X-Error-Code")) {
			case "GatedRepo":
				return error(
					`${repo.name}: access to this ${kind} is restricted`,
					`Accept its terms at ${page}; then ${withToken}.`,
				);
			case "RevisionNotFound":
				return error(
					`${repo.name} has no revision ${JSON.stringify(repo.revision)}`,
					`${page}/tree/main lists its branches and tags.`,
				);
			case "EntryNotFound":
				return error(
					`${repo.name}: there is no ${path ?? "such file or folder"} at revision ${repo.revision}`,
					`${page}/tree/${repo.revision} lists its files.`,
				);
		}
		if (/invalid (credentials|user token)/i.test(headers.get("X-Error-Message") ?? "")) {
			return error(`${this.address} does not accept the token of ${tokenFrom}`, "Renew it: `hf auth login`.");
		}
		// Without a token the Hub answers 401 also for what does not exist.
		if (status === 404 || status === 401) {
			return error(
				`${this.address} has no ${kind} ${repo.name} that can be read ${token === null ? "without a token" : `with the token of ${tokenFrom}`}`,
				`Check the name${repo.type === "model" ? ", or give a local folder" : ""}. If it is private: ${withToken}.`,
			);
		}
		if (status === 403) {
			return error(`${repo.name}: ${this.address} refuses access (403)`, `See ${page}; then ${withToken}.`);
		}
		return mayPass(
			error(
				`${repo.name}: ${this.address} answers ${status}`,
				"The server is busy or broken; run the command again later.",
			),
		);
	}

	private fileOf(repo: Repo, { path, size, oid, lfs }: ListFileEntry): HubFile {
		const etag = lfs?.oid ?? oid ?? "";
		if (!/^[0-9a-f]{40,64}$/.test(etag)) throw this.odd(repo, "the files with their hashes");
		return { path: safe(repo, path), size: lfs?.size ?? size, etag, kind: lfs ? "sha256" : "git-sha1" };
	}
}

/** A path out of an answer: one that would leave the folder of the snapshot is refused. */
function safe({ name }: Repo, path: string): string {
	if (!path.split(/[\\/]/).some((part) => part === "" || part === "." || part === "..")) return path;
	throw new ArlError("ARL_NETWORK", `${name} has a file with the path ${JSON.stringify(path)}`, "It is not fetched.");
}
