/**
 * The types of `arl`: training (`QwenTrainer`), models that answer (`Model`), checks of rows, memory and devices, the
 * configuration, and errors. The other entries have their own: `arl/images` in `dist/images/index.d.ts`, and `arl/mongo` in
 * `dist/api/mongo.d.ts`.
 */
export * from "./dist/index.js";
