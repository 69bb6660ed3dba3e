/** `arl runs send`: sends what the services of `report_to` have missed of a run that has ended. */
import { WEBHOOK_VARIABLE } from "../config/environment.js";
import { number } from "../config/index.js";
import { ArlError } from "../errors.js";
import type { RunRecord } from "../report/runs/record.js";
import { Sinks, type SinksOptions } from "../report/sinks/sinks.js";
import { parseCommand } from "./command.js";
import { runAt } from "./runs.js";

export const COMMAND = {
	name: "arl runs send",
	usage: "DIR [--seconds X]",
	about: `Sends what the services of report_to have missed of a run that has ended, and nothing twice. DIR is its output_dir. Takes
their addresses from the environment, as the run did.`,
	flags: {
		seconds: number({ above: 0, default: 60, description: "How long a service is asked that does not answer." }),
	},
	words: { noun: "the output_dir of a run", least: 1, most: 1 },
};

/** Runs the command; gives the exit code: 1 if a service did not take all. */
export async function run(given: readonly string[]): Promise<number> {
	const parsed = parseCommand(COMMAND, given);
	if (parsed === null) return 0;
	const { folder, record, state } = runAt(parsed.words[0] ?? ".");
	if (record === null) throw new ArlError("ARL_USAGE", `${folder} has no record of its run, which names the services`);
	if (state === "running")
		throw new ArlError("ARL_USAGE", `the run in ${folder} is in progress, and sends by itself`, "Wait for its end.");
	const args = argsOf(folder, record);
	const patienceMilliseconds = 1000 * parsed.flags.seconds;
	const options = { args, shown: record.options, patienceMilliseconds };
	const warnings = await Sinks.sendRest(options, state, record.start.firstStep);
	for (const { message } of warnings) process.stderr.write(`${message}\n`);
	if (warnings.length === 0) process.stdout.write(`${args.report_to.join(", ")}: all is sent\n`);
	return warnings.length === 0 ? 0 : 1;
}

/** The options that sinks read, as the record has them; the address of the webhook is a secret, which it does not have. */
function argsOf(folder: string, record: RunRecord): SinksOptions["args"] {
	const value = record.options.find(({ name }) => name === "report_to")?.value;
	// The page for Prometheus shows a run in progress only.
	const sinks = [value ?? []].flat().filter((name) => name !== "prometheus") as SinksOptions["args"]["report_to"];
	if (sinks.length === 0) throw new ArlError("ARL_USAGE", `${folder}: the run's report_to names no service to send to`);
	const webhook = process.env[WEBHOOK_VARIABLE] || null;
	if (sinks.includes("webhook") && webhook === null)
		throw new ArlError("ARL_CONFIG", "report_to webhook needs the address", `Set ${WEBHOOK_VARIABLE}.`);
	return { output_dir: folder, run_name: record.name, report_to: sinks, webhook_url: webhook, prometheus_address: "" };
}
