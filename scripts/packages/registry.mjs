// A package registry on this machine for tests: serves the packages that were made here, and passes everything else on to
// the registry that npm uses. Knows npm's interface of registries, and nothing of what the packages are.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { basename } from "node:path";

/** What npm shows of a package: one version, its file on this machine. */
function packument({ manifest, file }, origin) {
	const bytes = readFileSync(file);
	const hash = (name, encoding) => createHash(name).update(bytes).digest(encoding);
	const dist = {
		tarball: `${origin}/-/files/${basename(file)}`,
		integrity: `sha512-${hash("sha512", "base64")}`,
		shasum: hash("sha1", "hex"),
	};
	const { name, version } = manifest;
	return { name, "dist-tags": { latest: version }, versions: { [version]: { ...manifest, dist } } };
}

/**
 * Serves `packages`, each with its `manifest` and its packed `file`. `downloads`: names of the packages whose files were
 * fetched, in order.
 */
export async function startRegistry(packages, upstream) {
	const downloads = [];
	const server = createServer((request, response) => {
		const { port } = server.address();
		const path = decodeURIComponent(request.url.split("?")[0].slice(1));
		const own = packages.find(({ manifest }) => manifest.name === path);
		if (own !== undefined) {
			response.setHeader("content-type", "application/json");
			response.end(JSON.stringify(packument(own, `http://127.0.0.1:${port}`)));
			return;
		}
		const served = packages.find(({ file }) => path === `-/files/${basename(file)}`);
		if (served !== undefined) {
			downloads.push(served.manifest.name);
			response.end(readFileSync(served.file));
			return;
		}
		pass(request, response, upstream).catch((error) => {
			response.statusCode = 502;
			response.end(String(error));
		});
	});
	await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
	return { url: `http://127.0.0.1:${server.address().port}/`, downloads, close: () => server.close() };
}

async function pass(request, response, upstream) {
	if (request.method !== "GET" && request.method !== "HEAD") {
		// npm asks for known vulnerabilities in this way.
		response.statusCode = 404;
		response.end();
		return;
	}
	const { accept } = request.headers;
	const answer = await fetch(`${upstream.replace(/\/$/, "")}${request.url}`, { headers: accept ? { accept } : {} });
	response.statusCode = answer.status;
	response.setHeader("content-type", answer.headers.get("content-type") ?? "application/octet-stream");
	response.end(Buffer.from(await answer.arrayBuffer()));
}
