// Draws the page, and what the server sends where the page is live.
import { dark } from "./charts.js";
import { runsPage } from "./compare.js";
import { runPage } from "./run.js";
import { page, state } from "./state.js";

const shown = state.runs.length === 1 && !state.live?.pages ? runPage() : runsPage();
let width = 0;
new ResizeObserver(([entry]) => {
	const next = Math.round(entry.contentRect.width);
	if (next === width) return;
	width = next;
	shown.charts.each((chart) => chart.resize());
}).observe(page);
dark.addEventListener("change", () => {
	shown.draw();
	shown.charts.each((chart) => chart.restyle());
});

function tell(text) {
	const place = document.getElementById("connection");
	if (place) place.textContent = text;
}

if (state.live) {
	const events = new EventSource(state.live.events);
	events.addEventListener("page", (event) => {
		const next = JSON.parse(event.data);
		// A second run has appeared next to the only one, or the reverse: that is another page.
		if (!next.live.pages !== !state.live.pages) location.reload();
		Object.assign(state, next);
		tell("live");
		shown.draw();
	});
	events.addEventListener("open", () => tell("live"));
	events.addEventListener("error", () => tell("no connection to the dashboard; trying again"));
}
document.documentElement.dataset.ready = "true";
