/** A CUDA toolkit, or why there is none; see the module. */
export declare function cudaToolkit(options?: {
	forAddon?: boolean;
	fetch?: boolean;
	say?: (message: string) => void;
}): { home: string; version: string; source: string; reason?: undefined } | { reason: string; home?: undefined };
