/** A process that takes folders when its parent says so, all workers at the same moment, and keeps them until its parent says so. */
import { loadNative } from "../../dist/native.js";
import { lockFolder } from "../../dist/run/checkpoint/lock.js";

const native = loadNative();
let held = null;
process.on("message", async ({ folder, at }) => {
	if (folder === null) {
		held?.release();
		held = null;
		process.send({ released: true });
		return;
	}
	while (Date.now() < at);
	try {
		held = await lockFolder(native, folder);
		process.send({ held: true });
	} catch (error) {
		process.send({ held: false, code: error.code, message: error.message });
	}
});
process.send({ ready: true });
