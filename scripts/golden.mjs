// `npm run test:golden`: every golden case in the folder that ARL_GOLDEN names (default ../shared/golden and its folders of
// adapters and of hybrid models), a line a case with the worst figure of each kind; fails where one is beyond its bound. A case is a folder; no code
// knows any by name.
import { join } from "node:path";
import { cargoEnv, orExplain, root, run } from "./setup.mjs";

const shared = join(root, "..", "shared", "golden");
const folders = process.env.ARL_GOLDEN
	? [process.env.ARL_GOLDEN]
	: [shared, join(shared, "lora"), join(shared, "hybrid")];
const command = ["run", "--quiet", "--locked", "-p", "arl-engine", "--example", "golden", "--", ...folders];
orExplain(() => run("cargo", command, { env: cargoEnv() }));
