/** How often the tests of kill -9 kill a run: a few times in `npm test`, `ARL_KILLS` times in `npm run test:kill`. */
export const KILLS = Number(process.env.ARL_KILLS ?? 8);
