// Writes docs/options.md from the schema of the configuration. Needs the compiled TypeScript.

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { optionsMarkdown } from "../dist/config/index.js";
import { root } from "./setup.mjs";

writeFileSync(join(root, "docs", "options.md"), optionsMarkdown());
