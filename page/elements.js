// Elements of the page, and numbers as people read them. Text of a run only ever becomes text nodes.

/** An element with attributes and children; a text child is text, whatever it holds. */
export function el(tag, attributes = {}, ...children) {
	const element = document.createElement(tag);
	for (const [name, value] of Object.entries(attributes)) {
		if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
		else if (value === true) element.setAttribute(name, "");
		else if (value !== false && value !== undefined) element.setAttribute(name, value);
	}
	element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
	return element;
}

export const known = (value) => typeof value === "number" && Number.isFinite(value);
export const whole = (value) => value.toLocaleString("en-US");
export const percent = (value) => `${(100 * value).toFixed(1)} %`;

function scaled(value, base, units) {
	let rest = value;
	let unit = 0;
	while (Math.abs(rest) >= 0.9995 * base && unit < units.length - 1) {
		rest /= base;
		unit++;
	}
	const digits = unit === 0 && rest % 1 === 0 ? 0 : rest >= 100 ? 0 : rest >= 10 ? 1 : 2;
	return `${rest.toFixed(digits)}${units[unit]}`;
}
export const count = (value) => scaled(value, 1000, ["", "k", "M", "G", "T"]);
export const bytes = (value) => scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]);

export function measure(value) {
	const size = Math.abs(value);
	if (size !== 0 && (size < 0.001 || size >= 100000)) return value.toExponential(3);
	return size >= 100 ? value.toFixed(2) : value.toFixed(4);
}

export const rate = (value) => (value === 0 ? "0" : value.toExponential(2));

export function duration(seconds) {
	if (seconds < 10) return `${seconds.toFixed(1)} s`;
	const all = Math.round(seconds);
	if (all < 60) return `${all} s`;
	if (all < 3600) return `${Math.floor(all / 60)} min ${all % 60} s`;
	if (all < 86400) return `${Math.floor(all / 3600)} h ${Math.floor((all % 3600) / 60)} min`;
	return `${Math.floor(all / 86400)} d ${Math.floor((all % 86400) / 3600)} h`;
}

export const optionText = (value) => {
	const empty = value === null || (typeof value === "object" && Object.keys(value).length === 0);
	return empty ? "none" : typeof value === "string" ? value : JSON.stringify(value);
};
