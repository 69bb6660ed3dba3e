/** A Slurm of one machine, for tests. */
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { chmodSync, existsSync, mkdirSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { hostname } from "node:os";
import { delimiter, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const PROGRAMS = ["munged", "slurmctld", "slurmd", "srun", "sinfo"] as const;

const folders = [...(process.env.PATH ?? "").split(delimiter), "/usr/sbin", "/usr/local/sbin"];
const find = (name: string) => folders.map((folder) => join(folder, name)).find(existsSync);

/** Whether there is one; says on stderr what is missing where there is none. */
export function hasSlurm(test: string): boolean {
	const missing = PROGRAMS.filter((name) => find(name) === undefined);
	const none = `there is no ${missing.join(", ")} (apt-get install slurmctld slurmd slurm-client munge)`;
	const why = missing.length > 0 ? none : process.getuid?.() === 0 ? null : "only root may start its daemons";
	if (why !== null) process.stderr.write(`SKIPPED: ${test}: ${why}\n`);
	return why === null;
}

async function freePort(): Promise<number> {
	const server = createServer();
	const port = await new Promise<number>((resolve) => {
		server.listen(0, () => resolve((server.address() as { port: number }).port));
	});
	await new Promise((resolve) => server.close(resolve));
	return port;
}

export interface Slurm {
	/** The file of `srun`. */
	srun: string;
	/** What its environment needs. */
	env: NodeJS.ProcessEnv;
	/** Ends the daemons. */
	stop(): Promise<void>;
}

/** Starts the daemons, which keep all that they write in `folder`. */
export async function startSlurm(folder: string): Promise<Slurm> {
	// munged refuses places that others may write to.
	chmodSync(folder, 0o755);
	for (const name of ["state", "spool"]) mkdirSync(join(folder, name));
	const socket = join(folder, "munge.socket");
	const key = join(folder, "munge.key");
	writeFileSync(key, Buffer.alloc(128, 7), { mode: 0o600 });
	const file = join(folder, "slurm.conf");
	const host = hostname().split(".")[0];
	writeFileSync(
		file,
		`ClusterName=arl
SlurmctldHost=${host}(127.0.0.1)
SlurmctldPort=${await freePort()}
SlurmdPort=${await freePort()}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=${socket}
CredType=cred/munge
StateSaveLocation=${join(folder, "state")}
SlurmdSpoolDir=${join(folder, "spool")}
SlurmctldPidFile=${join(folder, "slurmctld.pid")}
SlurmdPidFile=${join(folder, "slurmd.pid")}
SlurmctldLogFile=${join(folder, "slurmctld.log")}
SlurmdLogFile=${join(folder, "slurmd.log")}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=${host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
`,
	);
	const env = { SLURM_CONF: file };
	const daemons: ChildProcess[] = [];
	const start = (name: string, ...words: string[]) => {
		daemons.push(spawn(String(find(name)), words, { stdio: "ignore", env: { ...process.env, ...env } }));
	};
	const stop = async () => {
		for (const daemon of daemons.reverse()) {
			const ended = once(daemon, "exit");
			if (daemon.exitCode !== null || !daemon.kill("SIGTERM")) continue;
			// slurmd waits for steps that are still ending.
			const late = setTimeout(() => daemon.kill("SIGKILL"), 5000);
			await ended;
			clearTimeout(late);
		}
	};
	const own = ["pid", "log", "seed"].map((name) => `--${name}-file=${join(folder, `munge.${name}`)}`);
	start("munged", "--foreground", "--force", `--socket=${socket}`, `--key-file=${key}`, ...own);
	while (!existsSync(socket)) await sleep(50);
	start("slurmctld", "-D", "-f", file);
	start("slurmd", "-D", "-f", file, "-N", String(host));
	for (let tries = 0; ; tries++) {
		const { stdout } = spawnSync(String(find("sinfo")), ["-h", "-o", "%T"], {
			encoding: "utf8",
			env: { ...process.env, ...env },
		});
		if (stdout?.trim() === "idle") return { srun: String(find("srun")), env, stop };
		if (tries === 300) throw new Error(`Slurm's node is ${stdout?.trim()}, and not idle`);
		await sleep(100);
	}
}
