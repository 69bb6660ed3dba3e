/** How often the tests of kill -9 kill a run: a few times in `npm test`, 50 times in `npm run test:long`; `ARL_KILLS` replaces the number. */
export const KILLS = Number(process.env.ARL_KILLS ?? (process.env.ARL_LONG === "1" ? 50 : 8));
