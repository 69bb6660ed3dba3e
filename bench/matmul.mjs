// The best f32 matrix product of this machine, all cores: the yardstick of the training step. One JSON line.
import { loadNative } from "../dist/native.js";

const shapes = [
	[1024, 1024, 1024],
	[2048, 2048, 2048],
	[2048, 3072, 512],
];
const rows = shapes.map(([m, n, k]) => ({
	shape: `${m}x${n}x${k}`,
	gflops: Math.round(loadNative().matmulRate(m, n, k, 1.0) * 10) / 10,
}));
console.log(JSON.stringify({ program: "matmul f32", best_gflops: Math.max(...rows.map((row) => row.gflops)), rows }));
