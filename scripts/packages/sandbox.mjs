// A machine as a user may have it: an empty home, and on the path nothing but a JavaScript runtime, npm and a shell. No Rust, no
// compiler, no Python, and npm's registry is the one on this machine.

import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

const windows = process.platform === "win32";

/** What Windows needs to start programs at all. */
const KEPT = windows ? ["SystemRoot", "ComSpec", "PATHEXT", "TEMP", "TMP", "NUMBER_OF_PROCESSORS"] : [];

/** The folder of npm's own programs: that of the npm that runs this, else the global one. */
function npmFolder() {
	if (process.env.npm_execpath?.endsWith("npm-cli.js")) return dirname(process.env.npm_execpath);
	const { stdout } = spawnSync("npm", ["root", "--global"], { encoding: "utf8", shell: windows });
	return join(stdout.trim(), "npm", "bin");
}

export class Sandbox {
	constructor(registry) {
		this.folder = mkdtempSync(join(tmpdir(), "arl-packages-"));
		this.home = join(this.folder, "home");
		this.bin = join(this.folder, "bin");
		for (const path of [this.home, this.bin]) mkdirSync(path);
		const npm = npmFolder();
		for (const name of ["npm", "npx"]) {
			const program = join(npm, `${name}-cli.js`);
			if (!existsSync(program)) throw new Error(`npm's program is missing: ${program}`);
			if (windows) writeFileSync(join(this.bin, `${name}.cmd`), `@"${process.execPath}" "${program}" %*\r\n`);
			else writeFileSync(join(this.bin, name), `#!/bin/sh\nexec node "${program}" "$@"\n`, { mode: 0o755 });
		}
		if (!windows) {
			symlinkSync(process.execPath, join(this.bin, "node"));
			for (const name of ["sh", "env"])
				symlinkSync(["/bin", "/usr/bin"].map((at) => join(at, name)).find(existsSync), join(this.bin, name));
		}
		const path = windows ? [this.bin, dirname(process.execPath)] : [this.bin];
		this.env = {
			...Object.fromEntries(
				KEPT.flatMap((name) => (process.env[name] === undefined ? [] : [[name, process.env[name]]])),
			),
			HOME: this.home,
			USERPROFILE: this.home,
			APPDATA: join(this.home, "AppData"),
			LOCALAPPDATA: join(this.home, "AppData", "Local"),
			PATH: path.join(windows ? ";" : ":"),
			NO_COLOR: "1",
			npm_config_registry: registry,
			npm_config_update_notifier: "false",
			npm_config_audit: "false",
			npm_config_fund: "false",
		};
	}

	/** An empty folder. */
	makeFolder(name) {
		const path = join(this.folder, name);
		mkdirSync(path);
		return path;
	}

	/** Whether a program can be started here. */
	has(program) {
		return spawnSync(program, ["--version"], { env: this.env, shell: windows, stdio: "ignore" }).status === 0;
	}

	/**
	 * Runs a command; throws with all that it said where it fails. `seconds` is how long it took, `until(text)` when its
	 * output first had `mark`.
	 */
	run(command, args, { cwd, mark = null }) {
		const start = performance.now();
		const seconds = () => (performance.now() - start) / 1000;
		const shell = windows && !command.endsWith(".exe");
		const child = spawn(command, args, { cwd, env: this.env, shell, stdio: ["ignore", "pipe", "pipe"] });
		let stdout = "";
		let stderr = "";
		let marked = null;
		child.stdout.setEncoding("utf8").on("data", (text) => {
			stdout += text;
			if (marked === null && mark !== null && stdout.includes(mark)) marked = seconds();
		});
		child.stderr.setEncoding("utf8").on("data", (text) => {
			stderr += text;
		});
		return new Promise((resolve, reject) => {
			child.on("error", reject);
			child.on("close", (code) => {
				if (code === 0) resolve({ stdout, stderr, seconds: seconds(), marked });
				else reject(new Error(`\`${[command, ...args].join(" ")}\` ended with ${code}:\n${stdout}${stderr}`));
			});
		});
	}

	remove() {
		rmSync(this.folder, { recursive: true, force: true });
	}
}
