// Everything that is checked, the fast things first. Ends in one line: N passed, N failed (, N skipped).
// `npm run test:cuda` runs the part that is about NVIDIA's GPUs alone, `npm run test:long` the
// tests of kill -9 with 50 kills and those of generated cases with ten times as many.
// What needs NVIDIA's compiler, a download of more than a gigabyte, is in `npm test` with ARL_TEST_CUDA=1 alone: so CI calls it.
// A check that needs what is not there prints a line `SKIPPED: ...`; these are counted and named at the end.

import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { checkKernels } from "./cuda-kernels.mjs";
import { cudaToolkit } from "./cuda-toolkit.mjs";
import { installServer } from "./mongo-server.mjs";
import { installMpi } from "./mpi.mjs";
import { buildCudaAddon, cargoEnv, root, setup } from "./setup.mjs";

/** Whether only the part about GPUs, or only kills and generated cases in great number, are asked for. */
const onlyCuda = process.argv[2] === "cuda";
const onlyLong = process.argv[2] === "long";
const compilesCuda = onlyCuda || process.env.ARL_TEST_CUDA === "1";
if (onlyLong) process.env.ARL_LONG = "1";

const totals = { passed: 0, failed: 0, skipped: 0 };
const failures = [];
const notices = [];

/** Runs a command, shows its output as it comes, and returns it with the exit code. */
function capture(command, args, options = {}) {
	return new Promise((done) => {
		let text = "";
		const child = spawn(command, args, { cwd: root, stdio: ["ignore", "pipe", "pipe"], ...options });
		for (const stream of [child.stdout, child.stderr]) {
			stream.setEncoding("utf8").on("data", (chunk) => {
				text += chunk;
				process.stderr.write(chunk);
			});
		}
		child.on("error", (error) => done({ code: 1, text: `${text}${error.message}` }));
		child.on("close", (code) => done({ code: code ?? 1, text }));
	});
}

function count(name, { passed = 0, failed = 0, skipped = 0 }) {
	totals.passed += passed;
	totals.failed += failed;
	totals.skipped += skipped;
	if (failed > 0) failures.push(`${name}: ${failed} failed`);
}

/** Heads a part's output, with the minutes and seconds since the start. */
function title(name) {
	const seconds = Math.round(performance.now() / 1000);
	const at = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
	process.stderr.write(`\n== ${name} (${at})\n`);
}

/** A check that is one yes or no. */
async function single(name, command, args, options) {
	title(name);
	const { code } = await capture(command, args, options);
	count(name, code === 0 ? { passed: 1 } : { failed: 1 });
}

/**
 * Has clippy compile the workspace's own crates: it lints and builds them at once. `cargo clippy` checks every crate, those of
 * others too, and shares nothing with the build of the tests: minutes on a new machine.
 */
function lintingEnv() {
	return { ...cargoEnv(), RUSTC_WORKSPACE_WRAPPER: "clippy-driver", CLIPPY_ARGS: "-D__CLIPPY_HACKERY__warnings" };
}

/**
 * Has cargo build where the addon was built, for the triple that it was built for, so that crates of others are the addon's; the
 * workspace's own as `test-profile.toml` says.
 */
function testProfile() {
	const host = /^host: (.*)$/m.exec(spawnSync("rustc", ["-vV"], { encoding: "utf8" }).stdout ?? "")?.[1];
	return ["--release", "--config", join(root, "scripts", "test-profile.toml"), ...(host ? ["--target", host] : [])];
}

/** Whether Rust's lints have passed and its tests are built. */
let linted = false;

async function rustLints() {
	const name = "Rust lints";
	title(name);
	// There are no tests in examples and documentation.
	const builds = [
		["test", "--no-run", "--workspace", "--lib", "--bins", "--tests"],
		["build", "--workspace", "--examples"],
	];
	for (const build of builds) {
		const { code } = await capture("cargo", [...build, ...testProfile(), "--locked", "--quiet"], { env: lintingEnv() });
		if (code !== 0) return count(name, { failed: 1 });
	}
	linted = true;
	count(name, { passed: 1 });
}

async function rust() {
	const name = "Rust tests";
	title(name);
	const parts = onlyCuda
		? ["arl-engine", "arl-kernels", "arl-cudnn", "arl-cuda-libraries"].flatMap((part) => ["-p", part])
		: onlyLong
			? ["-p", "arl-text"]
			: ["--workspace"];
	const args = [
		"test",
		"--no-fail-fast",
		...parts,
		"--lib",
		"--bins",
		"--tests",
		...testProfile(),
		"--locked",
		"--quiet",
	];
	// What a lint refuses is tested all the same.
	countRust(
		name,
		await capture("cargo", [...args, "--", "--show-output"], { env: linted ? lintingEnv() : cargoEnv() }),
	);
}

/** The TypeScript tests that take as long as they are allowed to: of kills, and of generated cases. */
function longTests() {
	const folder = join(root, "__test__");
	const isLong = (name) =>
		name.endsWith(".kill.test.ts") || /support\/properties\.js|ARL_LONG/.test(readFileSync(join(folder, name), "utf8"));
	return readdirSync(folder).filter((name) => name.endsWith(".test.ts") && isLong(name));
}

async function typescript() {
	const name = "TypeScript tests";
	title(name);
	const folder = mkdtempSync(join(tmpdir(), "arl-test-"));
	const report = join(folder, "vitest.json");
	const { code, text } = await capture(process.execPath, [
		join(root, "node_modules", "vitest", "vitest.mjs"),
		"run",
		"--reporter=default",
		"--reporter=json",
		`--outputFile.json=${report}`,
		...(onlyCuda ? ["__test__/cuda"] : []),
		...(onlyLong ? longTests() : []),
	]);
	if (existsSync(report)) {
		const { numPassedTests, numFailedTests, numPendingTests, numFailedTestSuites } = JSON.parse(
			readFileSync(report, "utf8"),
		);
		notices.push(...new Set([...text.matchAll(/^\s*SKIPPED: (.*)$/gm)].map((match) => match[1])));
		const failed = numFailedTests > 0 ? numFailedTests : numFailedTestSuites;
		count(name, { passed: numPassedTests, failed, skipped: numPendingTests });
		if (code !== 0 && failed === 0) count(name, { failed: 1 });
	} else {
		count(name, { failed: 1 });
	}
	rmSync(folder, { recursive: true, force: true });
}

/** What cargo's tests said, into the totals. */
function countRust(name, { code, text }) {
	const sum = { passed: 0, failed: 0, skipped: 0 };
	for (const line of text.matchAll(/test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored/g)) {
		sum.passed += Number(line[1]);
		sum.failed += Number(line[2]);
		sum.skipped += Number(line[3]);
	}
	const skips = [...text.matchAll(/^\s*SKIPPED: (.*)$/gm)].map((match) => match[1]);
	notices.push(...skips);
	sum.passed -= skips.length;
	sum.skipped += skips.length;
	if (code !== 0 && sum.failed === 0) sum.failed = 1; // did not compile, or died
	count(name, sum);
}

/** The kernels as NVIDIA's compiler sees them, the plans that cuDNN makes, and the addon with them, which the TypeScript tests load. */
async function cuda() {
	title("CUDA kernels and addon");
	const { reason, faults = [], summary, fatbin } = checkKernels();
	if (reason) {
		totals.skipped += 3;
		notices.push(`the CUDA kernels and the CUDA addon are not compiled, cuDNN makes no plans: ${reason}`);
		return;
	}
	process.stderr.write(`${[summary, ...faults].filter(Boolean).join("\n")}\n`);
	count("CUDA kernels", faults.length === 0 ? { passed: 1 } : { failed: 1 });
	const toolkit = cudaToolkit({ forAddon: true });
	if (toolkit.reason) {
		totals.skipped += 2;
		notices.push(`the CUDA addon is not built, cuDNN makes no plans: ${toolkit.reason}`);
		return;
	}
	const plans = [
		"test",
		"-p",
		"arl-cudnn",
		"--features",
		"shim",
		"--test",
		"plans",
		...testProfile(),
		"--locked",
		"--quiet",
	];
	const env = { ...cargoEnv(), CUDA_HOME: toolkit.home };
	countRust("cuDNN's plans", await capture("cargo", [...plans, "--", "--show-output"], { env }));
	try {
		buildCudaAddon(toolkit.home, fatbin);
		count("CUDA addon", { passed: 1 });
	} catch (error) {
		process.stderr.write(`${error.message}\n`);
		count("CUDA addon", { failed: 1 });
	}
}

const needsServer = !onlyCuda && process.env.ARL_TEST_MONGODB_URI === undefined;
// On a new machine the server's build takes minutes: it runs next to the set-up and the checks that do not need it, half of
// whose time keeps one core busy.
const server = needsServer ? installServer({ quiet: true }) : null;
setup();
const tool = (path, ...args) => [process.execPath, [join(root, "node_modules", path), ...args]];
if (!onlyCuda && !onlyLong) {
	await single("Rust is formatted", "cargo", ["fmt", "--all", "--check"], { env: cargoEnv() });
	await single(
		"TypeScript is formatted and lint-free",
		...tool("@biomejs/biome/bin/biome", "check", "--error-on-warnings", "."),
	);
	await single("TypeScript types", ...tool("typescript/bin/tsc", "--noEmit"));
	await rustLints();
}
if (!onlyCuda) {
	const { mpiruns, reason } = installMpi();
	if (mpiruns.length > 0) process.env.ARL_TEST_MPIRUN = mpiruns.join(delimiter);
	if (reason !== null) notices.push(`tests of several ranks with every MPI: ${reason}`);
}
await rust();
if (!onlyLong) {
	if (compilesCuda) await cuda();
	else {
		totals.skipped += 3;
		notices.push(
			"the CUDA kernels and the CUDA addon are not compiled, cuDNN makes no plans: `npm run test:cuda` does all three",
		);
	}
}
if (server !== null) {
	const reason = await server;
	if (reason !== null) notices.push(`tests that need a MongoDB server: ${reason}`);
}
await typescript();

process.stderr.write("\n");
for (const notice of notices) process.stderr.write(`skipped: ${notice}\n`);
for (const failure of failures) process.stderr.write(`FAILED: ${failure}\n`);
console.log(
	`${totals.passed} passed, ${totals.failed} failed${totals.skipped > 0 ? `, ${totals.skipped} skipped` : ""}`,
);
process.exitCode = totals.failed > 0 ? 1 : 0;
