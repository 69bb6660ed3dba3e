/** Broken connections for tests. */
import { connect, createServer, type Socket } from "node:net";

/** A proxy that closes its connections each time `bytes` have come back from the server, `cuts` times. */
export async function cutting(
	port: number,
	bytes: number,
	cuts: number,
): Promise<{ port: number; cut(): number; close(): void }> {
	let through = 0;
	let done = 0;
	const sockets = new Set<Socket>();
	const proxy = createServer((near) => {
		const far = connect(port, "127.0.0.1");
		for (const socket of [near, far]) {
			sockets.add(socket);
			socket.on("error", () => {});
			socket.on("close", () => {
				sockets.delete(socket);
				near.destroy();
				far.destroy();
			});
		}
		near.pipe(far);
		far.on("data", (chunk) => {
			through += chunk.length;
			if (done < cuts && through > bytes) {
				through = 0;
				done += 1;
				for (const socket of sockets) socket.destroy();
				return;
			}
			near.write(chunk);
		});
	});
	await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
	const address = proxy.address();
	return {
		port: typeof address === "object" && address !== null ? address.port : 0,
		cut: () => done,
		close: () => {
			proxy.close();
			for (const socket of sockets) socket.destroy();
		},
	};
}
