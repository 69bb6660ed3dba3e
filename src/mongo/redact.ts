/**
 * Redacts connection strings: shows hosts, database and options without secrets. Knows only the string's form, not the driver.
 */

/** Options of a connection string whose values are secrets, in lower case. */
const SECRET_OPTIONS = new Set([
	"tlscertificatekeyfilepassword",
	"sslpass",
	"authmechanismproperties",
	"proxypassword",
]);

/** The parts of a connection string, still percent-encoded. */
interface UriParts {
	scheme: string;
	/** `user:password`; null: none. */
	credentials: string | null;
	hosts: string;
	/** Empty: none is named. */
	database: string;
	options: [name: string, value: string][];
}

/** Splits a connection string; null: the text does not have its form. */
export function uriParts(uri: string): UriParts | null {
	const found = /^(mongodb(?:\+srv)?:\/\/)(.*)$/is.exec(uri.trim());
	if (found === null) return null;
	const [, scheme = "", rest = ""] = found;
	const [before = "", ...query] = rest.split("?");
	// With an unencoded ? or # in the password its end is ambiguous, so that nothing may be shown.
	if (query.some((part) => part.includes("@")) || rest.includes("#")) return null;
	// Split at the last @, so that a password with an unencoded @ is hidden whole.
	const at = before.lastIndexOf("@");
	const place = before.slice(at + 1);
	const slash = place.indexOf("/");
	const options = query
		.join("?")
		.split(/[&;]/)
		.filter((option) => option !== "")
		.map((option): [string, string] => {
			const equals = option.indexOf("=");
			return equals < 0 ? [option, ""] : [option.slice(0, equals), option.slice(equals + 1)];
		});
	return {
		scheme,
		credentials: at < 0 ? null : before.slice(0, at),
		hosts: slash < 0 ? place : place.slice(0, slash),
		database: slash < 0 ? "" : place.slice(slash + 1),
		options,
	};
}

function decoded(text: string): string {
	try {
		return decodeURIComponent(text);
	} catch {
		return text;
	}
}

/** A connection string without user, password and other secrets. */
export function redactUri(uri: string): string {
	const parts = uriParts(uri);
	if (parts === null) return "***";
	const options = parts.options.map(([name, value]) =>
		SECRET_OPTIONS.has(name.toLowerCase()) ? `${name}=***` : `${name}=${value}`,
	);
	const user = parts.credentials === null ? "" : "***@";
	return `${parts.scheme}${user}${parts.hosts}/${parts.database}${options.length > 0 ? `?${options.join("&")}` : ""}`;
}

/** Every form in which a message may quote a secret of the connection string, the longest first. */
function secretsOf(uri: string): string[] {
	const parts = uriParts(uri);
	if (parts === null) return [];
	const secrets: string[] = [];
	if (parts.credentials !== null) {
		secrets.push(parts.credentials);
		const colon = parts.credentials.indexOf(":");
		if (colon >= 0) secrets.push(parts.credentials.slice(colon + 1));
	}
	for (const [name, value] of parts.options) {
		if (!SECRET_OPTIONS.has(name.toLowerCase())) continue;
		secrets.push(
			value,
			...decoded(value)
				.split(",")
				.map((pair) => pair.slice(pair.indexOf(":") + 1)),
		);
	}
	const forms = secrets.flatMap((secret) => [secret, decoded(secret), encodeURIComponent(decoded(secret))]);
	return [...new Set(forms)].filter((form) => form !== "").sort((a, b) => b.length - a.length);
}

/**
 * Removes the connection string's secrets from `text`, such as a driver's message. A secret of one or two characters is removed
 * only as a separate word, because it may be part of any other.
 */
export function hideSecrets(text: string, uri: string): string {
	let hidden = text.replaceAll(uri, redactUri(uri));
	for (const secret of secretsOf(uri)) {
		if (secret.length > 2) hidden = hidden.replaceAll(secret, "***");
		else hidden = hidden.replaceAll(new RegExp(`(?<![\\w])${escaped(secret)}(?![\\w])`, "g"), "***");
	}
	return hidden;
}

function escaped(text: string): string {
	return text.replaceAll(/[.*+?^${}()|[\]\\]/g, "\\$&");
}
