// Parts of a page: sections, tables, badges, and the controls of its charts.
import { el, whole } from "./elements.js";
import { state } from "./state.js";

const STATES = {
	completed: "completed",
	early_stopped: "stopped early",
	running: "running",
	died: "died: its process is gone",
	failed: "failed",
	interrupted: "interrupted",
	stopped: "stopped",
	unknown: "no record of the run",
};
/** How a run is, in a word. */
export const badge = (how) =>
	el("span", { class: `badge ${how === "early_stopped" ? "completed" : how}` }, STATES[how] ?? how);

export function section(title, ...children) {
	return el("section", {}, el("h2", {}, title), ...children);
}

/** A table; a number is a cell of its own alignment, and an element stays as it is. */
export function table(head, rows) {
	const cell = (tag) => (value) =>
		value instanceof Node
			? value
			: el(tag, typeof value === "number" ? { class: "number" } : {}, typeof value === "number" ? whole(value) : value);
	return el(
		"div",
		{ class: "scroll" },
		el(
			"table",
			{},
			el("thead", {}, el("tr", {}, head.map(cell("th")))),
			el(
				"tbody",
				{},
				rows.map((row) => el("tr", {}, row.map(cell("td")))),
			),
		),
	);
}

/** A part of the page that is made again only where its data differ. */
export function part(make) {
	const holder = el("div");
	let drawn = "";
	return {
		holder,
		update(...data) {
			const next = JSON.stringify(data);
			if (next === drawn) return;
			drawn = next;
			const made = make(...data);
			holder.replaceChildren(...(made ? [made] : []));
		},
	};
}

/** What the user can change of the charts, and the state of the connection. */
export function controls(changed, ...more) {
	const box = (name, text) =>
		el(
			"label",
			{},
			el("input", {
				type: "checkbox",
				checked: state[name],
				onchange: (event) => {
					state[name] = event.target.checked;
					changed();
				},
			}),
			` ${text}`,
		);
	return el(
		"div",
		{ class: "controls" },
		...more,
		box("smooth", "smooth"),
		box("log", "logarithmic"),
		el("span", {}, "drag to zoom, double-click to see all"),
		el("span", { id: "connection" }),
	);
}
