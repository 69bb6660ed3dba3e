/** The entry `arl` of the package. Registers the public API for modules that users name in options. */
import { providePublicApi } from "./config/module.js";

export * from "./api/index.js";

providePublicApi(async () => (await import("./api/entries.js")).entries);
