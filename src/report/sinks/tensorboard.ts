/** TensorBoard: event files in `output_dir/tensorboard`, one for each part of the run. */
import { appendFile, mkdir } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { METRICS_FILE } from "../metrics.js";
import type { ShownOption } from "../runs/record.js";
import { scalarsEvent, startEvent, textEvent, versionEvent } from "./event-file.js";
import { metricsOfLine, tagOf } from "./lines.js";
import { type Sink, TENSORBOARD_FOLDER } from "./outbox.js";

/** `folder`: the `output_dir`; `firstStep`: the steps that an earlier part of the run has done. */
export function tensorboardSink(folder: string, options: readonly ShownOption[], firstStep: number): Sink {
	const seconds = () => Date.now() / 1000;
	const host = hostname().replaceAll(/[^\w.-]/g, "_");
	const path = join(
		folder,
		TENSORBOARD_FOLDER,
		`events.out.tfevents.${Math.floor(seconds())}.${host}.${process.pid}.${firstStep}`,
	);
	let begun = false;
	return {
		name: "tensorboard",
		source: METRICS_FILE,
		async send(lines) {
			const parts = begun ? [] : head(options, firstStep, seconds());
			for (const line of lines) {
				const metrics = metricsOfLine(line);
				if (metrics === null) continue;
				const scalars = metrics.values.map(([name, value]): [string, number] => [tagOf(name), value]);
				parts.push(scalarsEvent(seconds(), metrics.step, scalars));
			}
			await mkdir(join(folder, TENSORBOARD_FOLDER), { recursive: true });
			await appendFile(path, Buffer.concat(parts));
			begun = true;
		},
	};
}

function head(options: readonly ShownOption[], firstStep: number, seconds: number): Buffer[] {
	const table = ["| option | value |", "|---|---|"];
	for (const { name, value } of options) table.push(`| ${name} | ${JSON.stringify(value).replaceAll("|", "\\|")} |`);
	const resumed = firstStep > 0 ? [startEvent(seconds, firstStep + 1)] : [];
	return [versionEvent(seconds), ...resumed, textEvent(seconds, "configuration", table.join("\n"))];
}
