// Writes docs/options.md and src/config/training-options.ts from the schema of the configuration.

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { createJiti } from "jiti";
import { root } from "./setup.mjs";

// From the sources: they may not compile until the type of options is written.
const { optionsMarkdown, optionsTypescript } = await createJiti(import.meta.url).import("../src/config/docs.ts");
writeFileSync(join(root, "docs", "options.md"), optionsMarkdown());
writeFileSync(join(root, "src", "config", "training-options.ts"), optionsTypescript());
