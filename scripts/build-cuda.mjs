// `npm run build:cuda`: the addon for machines with an NVIDIA GPU, next to the one that every machine loads. Takes the CUDA
// toolkit that is there, or fetches one; needs no GPU.

import { cudaToolkit } from "./cuda-toolkit.mjs";
import { buildCudaAddon, orExplain, setup } from "./setup.mjs";

setup();
const { home, reason } = cudaToolkit({ forAddon: true });
if (reason) {
	console.error(`\narl: the CUDA addon cannot be built: ${reason}`);
	process.exitCode = 1;
} else {
	console.log(orExplain(() => buildCudaAddon(home)));
}
