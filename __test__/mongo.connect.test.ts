/** Connection strings: what may be shown of them, and what is said where no database can be had. */
import { execFileSync, spawnSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { inspect } from "node:util";
import { describe, expect, it } from "vitest";
import { formatError } from "../src/errors.js";
import { connect } from "../src/mongo/connect.js";
import { hideSecrets, redactUri } from "../src/mongo/redact.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { killMissing, mongoMissing, startMongo } from "./support/mongo.js";

const folder = temporaryFolder();

/** True (and reported) where certificates cannot be made. */
function opensslMissing(): boolean {
	if (spawnSync("openssl", ["version"]).status === 0) return false;
	process.stderr.write("SKIPPED: connecting by TLS: openssl is missing\n");
	return true;
}

const quick = "serverSelectionTimeoutMS=400&connectTimeoutMS=400";

describe("a connection string that is shown", () => {
	it.each([
		["mongodb://joe:s3cr3t@h1:27017,h2/db?authSource=admin", "mongodb://***@h1:27017,h2/db?authSource=admin"],
		["mongodb+srv://joe:s3cr3t@h/db", "mongodb+srv://***@h/db"],
		["mongodb://joe:s3@cr/3t@h/db", "mongodb://***@h/db"],
		[
			"mongodb://h/db?tls=true&tlsCertificateKeyFilePassword=s3cr3t",
			"mongodb://h/db?tls=true&tlsCertificateKeyFilePassword=***",
		],
		["mongodb://h/db?authMechanismProperties=AWS_SESSION_TOKEN:s3cr3t", "mongodb://h/db?authMechanismProperties=***"],
		["mongodb://joe:s3?cr3t@h/db", "***"],
		["mongodb://joe:s3#cr3t@h/db", "***"],
		["postgres://joe:s3cr3t@h/db", "***"],
	])("hides what is secret: %s", (uri, shown) => {
		expect(redactUri(uri)).toBe(shown);
	});

	it("hides every spelling of a secret in other texts", () => {
		const uri = "mongodb://joe:p%40ss%2Fword@h/db?tlsCertificateKeyFilePassword=k%3Dey&proxyPassword=x";
		const printed = hideSecrets(`p@ss/word p%40ss%2Fword k=ey k%3Dey joe ${uri} x ex`, uri);
		expect(printed).toBe(
			"*** *** *** *** joe mongodb://***@h/db?tlsCertificateKeyFilePassword=***&proxyPassword=*** *** ex",
		);
	});
});

describe("a database that cannot be had", () => {
	it.each([
		["s3cr3t", "ARL_CONFIG", /must begin with/],
		["http://joe:s3cr3t@h/db", "ARL_CONFIG", /must begin with/],
		["mongodb://joe:s3cr3t?@h/db", "ARL_CONFIG", /percent-encoded/],
		["mongodb://joe:s3cr3t@127.0.0.1:1", "ARL_CONFIG", /mongodb:\/\/\*\*\*@127\.0\.0\.1:1\/ names no database/],
		["mongodb://joe:s3cr3t@127.0.0.1:1/?authSource=admin", "ARL_CONFIG", /no database/],
		["mongodb://joe:s3cr3t@127.0.0.1:1/db?nonsense=1", "ARL_CONFIG", /nonsense/],
		["mongodb://joe:s3cr3t:x@127.0.0.1:1/db", "ARL_CONFIG", /db_connection_string/],
		[`mongodb://joe:s3cr3t@127.0.0.1:1/db?${quick}`, "ARL_IO", /127\.0\.0\.1:1\/db: no server answers/],
		[`mongodb://joe:s3cr3t@no.such.host.invalid/db?${quick}`, "ARL_IO", /no server answers|unknown host name/],
	] as const)("is reported without the password: %s", async (uri, code, message) => {
		const error = await errorOf(connect(uri));
		expect(error.code).toBe(code);
		expect(error.message).toMatch(message);
		expect(error.hint).not.toBe("");
		const everything = formatError(error, { trace: true }) + inspect(error, { depth: 9 });
		expect(everything).not.toContain("s3cr3t");
	});

	it("is reported when what answers is no MongoDB", async () => {
		const server = createServer((socket) => socket.end("220 hello\r\n"));
		await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
		const address = server.address();
		const port = typeof address === "object" && address !== null ? address.port : 0;
		const error = await errorOf(connect(`mongodb://127.0.0.1:${port}/db?${quick}`));
		expect(error.code).toBe("ARL_IO");
		expect(error.hint).toContain("Check");
		server.close();
	});
});

describe.skipIf(mongoMissing("connecting to a server"))("a server", () => {
	it("is connected to by the name of its database", async () => {
		const server = await startMongo();
		try {
			const connection = await connect(server.uri);
			expect(connection.name).toMatch(/^[^@]+\/arl_test_/);
			expect((await connection.db.command({ ping: 1 })).ok).toBe(1);
			await connection.close();
		} finally {
			await server.stop();
		}
	});
});

describe.skipIf(killMissing("a server with accounts"))("a server with accounts", () => {
	it("tells a wrong password and a missing one apart, and shows neither", async () => {
		const server = await startMongo(["--standalone", "--auth"]);
		try {
			const host = new URL(server.uri).host;
			const wrong = await errorOf(connect(`mongodb://joe:s3cr3t@${host}/db?authSource=admin&${quick}`));
			expect(wrong).toMatchObject({ code: "ARL_CONFIG" });
			expect(wrong.message).toContain("refused user or password");
			expect(inspect(wrong, { depth: 9 })).not.toContain("s3cr3t");
			const none = await errorOf(connect(`mongodb://${host}/db?${quick}`));
			expect(none).toMatchObject({ code: "ARL_CONFIG" });
			expect(none.message).toContain("no right");
		} finally {
			await server.stop();
		}
	});

	it.skipIf(opensslMissing())("is spoken to by TLS with the certificate's authority, and refused without", async () => {
		const place = mkdtempSync(join(folder, "tls-"));
		const [cert, key] = [join(place, "cert.pem"), join(place, "key.pem")];
		const subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"];
		const files = ["-keyout", key, "-out", cert];
		execFileSync("openssl", ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", ...subject, ...files], {
			stdio: "pipe",
		});
		const server = await startMongo(["--standalone", "--tls-cert-file", cert, "--tls-key-file", key]);
		try {
			const connection = await connect(`${server.uri}?tls=true&tlsCAFile=${cert}`);
			await connection.close();
			const unknown = await errorOf(connect(`${server.uri}?tls=true&${quick}`));
			expect(unknown.message).toMatch(/no TLS connection.*certificate/);
			const plain = await errorOf(connect(`${server.uri}?${quick}`));
			expect(plain.hint).toContain("tls=true");
			const missing = await errorOf(connect(`${server.uri}?tls=true&tlsCAFile=${cert}.none&${quick}`));
			expect(missing).toMatchObject({ code: "ARL_CONFIG" });
			expect(missing.message).toContain("cert.pem.none");
		} finally {
			await server.stop();
		}
	});

	it("is reported when it speaks no TLS", async () => {
		const server = await startMongo();
		try {
			const error = await errorOf(connect(`${server.uri}?tls=true&${quick}`));
			expect(error.code).toBe("ARL_IO");
			expect(error.hint).toMatch(/tls/i);
		} finally {
			await server.stop();
		}
	});
});
