// Writes docs/errors.md from the table behind `arl explain`.

import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { createJiti } from "jiti";
import { root } from "./setup.mjs";

const { errorsMarkdown } = await createJiti(import.meta.url).import("../src/cli/explanations.ts");
writeFileSync(join(root, "docs", "errors.md"), errorsMarkdown());
