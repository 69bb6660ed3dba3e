/** A real MongoDB server for tests: a process of its own on a new folder, or the one that ARL_TEST_MONGODB_URI names. */
import type { ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { MongoClient } from "mongodb";
import { findServer, startServer } from "../../scripts/mongo-server.mjs";

const given = process.env.ARL_TEST_MONGODB_URI;

export interface MongoServer {
	/** Connection string with a database of this server's own (`arl_test_...`), new and empty. */
	uri: string;
	/** The same server with another database. */
	uriOf(database: string): string;
	/** Ends the server and removes its data; on a server that was given, drops the databases that it gave out. */
	stop(): Promise<void>;
	/** kill -9. Only where `canKill`. */
	kill(): Promise<void>;
	/** Starts it again on the same folder and port, killing it first if it runs. Only where `canKill`. */
	restart(): Promise<void>;
}

/** True (and reported on stderr) where there is no server: for `describe.skipIf(mongoMissing("..."))`. */
export function mongoMissing(test: string): boolean {
	if (given !== undefined || findServer() !== null) return false;
	process.stderr.write(`SKIPPED: ${test}: no MongoDB server (node scripts/mongo-server.mjs builds one)\n`);
	return true;
}

/** True (and reported on stderr) where there is no server of our own that may be killed. */
export function killMissing(test: string): boolean {
	if (given === undefined) return mongoMissing(test);
	process.stderr.write(`SKIPPED: ${test}: the server of ARL_TEST_MONGODB_URI is not ours to kill\n`);
	return true;
}

let made = 0;

/** A database name that no other test has. */
export function newDatabase(): string {
	made += 1;
	return `arl_test_${process.pid}_${Date.now().toString(36)}_${made}`;
}

function withDatabase(uri: string, database: string): string {
	const url = /^(mongodb(?:\+srv)?:\/\/[^/?]+)(?:\/[^?]*)?(\?.*)?$/.exec(uri);
	if (url === null) throw new Error("ARL_TEST_MONGODB_URI is no connection string");
	return `${url[1]}/${database}${url[2] ?? ""}`;
}

/** Servers of this process, ended with it should a test not have come to its end. */
const running = new Set<ChildProcess>();
process.on("exit", () => {
	for (const child of running) child.kill("SIGKILL");
});

/** Starts a server. `args`: more flags of secantusd-rs; without any it is a standalone without accounts. */
export async function startMongo(args: string[] = ["--standalone"]): Promise<MongoServer> {
	const database = newDatabase();
	if (given !== undefined) {
		const uri = withDatabase(given, database);
		const databases = [database];
		const never = () => Promise.reject(new Error("the server of ARL_TEST_MONGODB_URI is not ours to kill"));
		return {
			uri,
			uriOf: (other) => {
				databases.push(other);
				return withDatabase(given, other);
			},
			stop: async () => {
				const client = new MongoClient(uri);
				for (const name of databases) await client.db(name).dropDatabase();
				await client.close();
			},
			kill: never,
			restart: never,
		};
	}
	const dir = mkdtempSync(join(tmpdir(), "arl-mongo-"));
	let { child, port } = await startServer({ dir, args });
	running.add(child);
	const end = async () => {
		running.delete(child);
		if (child.exitCode !== null || child.signalCode !== null) return;
		const ended = once(child, "exit");
		child.kill("SIGKILL");
		await ended;
	};
	const base = `mongodb://127.0.0.1:${port}`;
	return {
		uri: withDatabase(base, database),
		uriOf: (other) => withDatabase(base, other),
		stop: async () => {
			await end();
			rmSync(dir, { recursive: true, force: true });
		},
		kill: end,
		restart: async () => {
			await end();
			({ child, port } = await startServer({ dir, port, args }));
			running.add(child);
		},
	};
}
