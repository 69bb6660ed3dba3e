/** How `arl plan --nodes` shows its model of time: as a table with the constants below it, and as JSON. */
import { CONSTANTS, type MeshTime, type TimePlan } from "../api/plan-time.js";
import { productText } from "../config/mesh.js";
import { percent } from "../report/index.js";

/** The model's numbers, with all that it assumes. */
export function timeJson({ nodes, asked, best }: TimePlan): Record<string, unknown> {
	return { measured: false, nodes, constants: CONSTANTS, asked: asJson(asked), best: best.map(asJson) };
}

function asJson({ sizes, ...time }: MeshTime): Record<string, unknown> {
	const { dp_size, dp_replicate_size, tp_size, cp_size, ep_size, pp_size } = sizes;
	return { dp_size, dp_replicate_size, tp_size, cp_size, ep_size, pp_size, ...time };
}

export function timeText({ nodes, asked, best }: TimePlan): string {
	const { peak, reached, withinNode, betweenNodes, hides, gigabytes } = CONSTANTS;
	const gigabytesPerSecond = (value: number) => `${value / 1e9} GB/s`;
	const lines = [
		"",
		`a model of a step's time on ${nodes === 1 ? "one node" : `${nodes} nodes`} of H100s; nothing of it is measured`,
		row("", ["zero", "GiB", "compute ms", "exposed ms", "bubble ms", "tokens/s", "MFU"]),
		timeRow("asked for", asked),
		...best.map((time, i) => timeRow(`${i + 1}.`, time)),
		...(best.length === 0 ? [`  no mesh that was tried fits GPUs of ${gigabytes} GB`] : []),
		`It assumes ${peak / 1e12} TFLOP/s, of which ${reached.dense} are reached (with experts ${reached.experts}); ${gigabytesPerSecond(withinNode)} within a node and`,
		`${gigabytesPerSecond(betweenNodes)} a GPU between nodes; gradients and weights that hide behind ${hides} of the computation, activations that`,
		"do not hide. tokens/s are those of each GPU. No GPU has run ranks yet; today exchange and computation take turns.",
	];
	return `${lines.join("\n")}\n`;
}

function timeRow(name: string, time: MeshTime): string {
	const { sizes, zero, memoryBytes, computeSeconds, exposedSeconds, bubbleSeconds, tokensPerSecond, mfu } = time;
	const experts = sizes.ep_size > 1 ? `, ep_size ${sizes.ep_size}` : "";
	const replicas = sizes.dp_replicate_size > 1 ? `, ${sizes.dp_replicate_size} replicas` : "";
	const milliseconds = (seconds: number) => (1000 * seconds).toFixed(seconds < 0.01 ? 2 : 0);
	return row(`${name} ${productText(sizes)}${experts}${replicas}`, [
		String(zero),
		`${(memoryBytes / 2 ** 30).toFixed(1)}${time.fits ? "" : "!"}`,
		...[computeSeconds, exposedSeconds, bubbleSeconds].map(milliseconds),
		tokensPerSecond.toFixed(0),
		percent(mfu),
	]);
}

function row(name: string, cells: string[]): string {
	return `  ${name.padEnd(40)} ${cells.map((cell) => cell.padStart(10)).join(" ")}`;
}
