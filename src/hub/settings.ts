/** What the environment says of the Hugging Face Hub, under the names that its own programs read. */
import { readFile } from "node:fs/promises";
import { homedir } from "node:os";
import { join } from "node:path";
import { ArlError } from "../errors.js";

/** Where the Hub is, and how this user reaches it. */
export interface HubSettings {
	/** `https://huggingface.co`, without a slash at the end. */
	endpoint: string;
	/** The folder of the cache: `~/.cache/huggingface/hub`. */
	cache: string;
	/** Null: none. Never shown. */
	token: string | null;
	/** Where the token comes from, for messages. */
	tokenFrom: string | null;
	/** The header that authorizes a request to the Hub: the token's, or that of a name and password in `HF_ENDPOINT`. */
	authorization: string | null;
	/** Only the cache is read. */
	offline: boolean;
}

type Environment = Readonly<Record<string, string | undefined>>;

/** Reads the settings, and the token's file where no variable has a token. */
export async function hubSettings(env: Environment = process.env): Promise<HubSettings> {
	const caches = env.XDG_CACHE_HOME || join(homedir(), ".cache");
	const home = expanded(env.HF_HOME || join(caches, "huggingface"));
	const cache = expanded(env.HF_HUB_CACHE || env.HUGGINGFACE_HUB_CACHE || join(home, "hub"));
	const named = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].find((name) => env[name]?.trim());
	const file = expanded(env.HF_TOKEN_PATH || join(home, "token"));
	const saved = named === undefined ? (await readFile(file, "utf8").catch(() => "")).trim() : "";
	const token = named !== undefined ? (env[named]?.trim() ?? null) : saved || null;
	const { plain, basic } = endpointOf(env.HF_ENDPOINT || "https://huggingface.co");
	return {
		endpoint: plain,
		cache,
		token,
		authorization: token === null ? basic : `Bearer ${token}`,
		tokenFrom: named ?? (saved === "" ? null : file),
		offline: isOn(env.HF_HUB_OFFLINE) || isOn(env.TRANSFORMERS_OFFLINE),
	};
}

/** The address without name and password, and the header of these. */
function endpointOf(text: string): { plain: string; basic: string | null } {
	if (!URL.canParse(text)) {
		throw new ArlError("ARL_CONFIG", "HF_ENDPOINT is no URL", "For example HF_ENDPOINT=https://huggingface.co");
	}
	const url = new URL(text);
	const pair = `${decodeURIComponent(url.username)}:${decodeURIComponent(url.password)}`;
	url.username = "";
	url.password = "";
	const basic = pair === ":" ? null : `Basic ${Buffer.from(pair).toString("base64")}`;
	return { plain: `${url.origin}${url.pathname}`.replace(/\/+$/, ""), basic };
}

function isOn(value: string | undefined): boolean {
	return /^(1|on|yes|true)$/i.test(value ?? "");
}

function expanded(path: string): string {
	return path.replace(/^~(?=\/|$)/, homedir());
}
