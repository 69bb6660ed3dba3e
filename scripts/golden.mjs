// `npm run test:golden`: every golden case in the folder that ARL_GOLDEN names (default ../shared/golden), a line a case with
// the worst figure of each kind; fails where one is beyond its bound. A case is a folder; no code knows any by name.
import { join } from "node:path";
import { cargoEnv, orExplain, root, run } from "./setup.mjs";

const env = { ...cargoEnv(), ARL_GOLDEN: process.env.ARL_GOLDEN ?? join(root, "..", "shared", "golden") };
orExplain(() => run("cargo", ["run", "--quiet", "--locked", "-p", "arl-engine", "--example", "golden"], { env }));
