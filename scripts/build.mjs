// `npm run build`: packages, the addon, the TypeScript; only what is not built already.
import { setup } from "./setup.mjs";

setup();
