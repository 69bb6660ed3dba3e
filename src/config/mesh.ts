/** The mesh of a run: what its ranks divide, as its options say it. Pure: numbers of ranks, and how messages name them. */
import type { AgentTrainingConfig } from "./schema.js";

/** How many ranks divide what. Those of `ep_size` and `dp_replicate_size` are among those that the others count. */
export type MeshSizes = Pick<
	AgentTrainingConfig,
	"dp_size" | "dp_replicate_size" | "tp_size" | "cp_size" | "ep_size" | "pp_size"
>;

/** The options that divide more than the micro-batches of a step. */
export const MESH_NAMES = ["tp_size", "cp_size", "ep_size", "pp_size"] as const;

/** Of these, the ones that divide weights by what they are: heads and columns, experts, layers. */
export const MODEL_NAMES = ["tp_size", "ep_size", "pp_size"] as const;

/** Ranks that have slices of one micro-batch. */
export function slicesOf({ tp_size: tp, cp_size: cp }: MeshSizes): number {
	return tp * cp;
}

/** Ranks of a stage of the pipeline. */
export function stageOf(sizes: MeshSizes): number {
	return sizes.dp_size * slicesOf(sizes);
}

/** Ranks of a stage that have all of its weights together, where they divide these. */
export function replicaOf(sizes: MeshSizes): number {
	return stageOf(sizes) / sizes.dp_replicate_size;
}

/** All ranks. */
export function worldOf(sizes: MeshSizes): number {
	return stageOf(sizes) * sizes.pp_size;
}

/** Of `names`, those of which the mesh has more than one rank. */
export function above1<Name extends keyof MeshSizes>(sizes: MeshSizes, names: readonly Name[]): Name[] {
	return names.filter((name) => sizes[name] > 1);
}

/** Whether ranks divide weights by what they are. */
export function dividesModel(sizes: MeshSizes): boolean {
	return above1(sizes, MODEL_NAMES).length > 0;
}

/** `dp_size 2 x tp_size 2`: all ranks, without the sizes that are 1. */
export function productText(sizes: MeshSizes): string {
	const named = (["pp_size", "dp_size", "cp_size", "tp_size"] as const).filter((name) => sizes[name] > 1);
	return named.length === 0 ? "dp_size 1" : named.map((name) => `${name} ${sizes[name]}`).join(" x ");
}

/** The data-parallel ranks among `world` ranks; null: the other sizes do not divide them. */
export function dataParallelOf(sizes: MeshSizes, world: number): number | null {
	const others = slicesOf(sizes) * sizes.pp_size;
	return world % others === 0 ? world / others : null;
}

/** Why these are not the sizes of `world` ranks, and what to do; null: they are. */
export function wrongWorld(sizes: MeshSizes, world: number): { line: string; hint: string } | null {
	const wanted = worldOf(sizes);
	if (wanted === world) return null;
	const found = world === 1 ? "this process trains alone" : `${world} ranks were started`;
	if (above1(sizes, ["tp_size", "cp_size", "pp_size"]).length === 0) {
		return {
			line: `dp_size is ${wanted}, and ${found}`,
			hint: `Start ${wanted} ranks, for example with mpirun -n ${wanted} npx arl train, or leave dp_size out.`,
		};
	}
	const others = slicesOf(sizes) * sizes.pp_size;
	const many = others === wanted ? `${others} ranks or a multiple of that` : `${wanted} ranks`;
	return {
		line: `${productText(sizes)} makes ${wanted} ranks, and ${found}`,
		hint: `Start ${many}, for example with mpirun -n ${wanted} npx arl train; dp_size is by itself what tp_size, cp_size and pp_size leave of them.`,
	};
}

/** A line about a mesh; null: its ranks divide micro-batches alone. */
export function meshText(sizes: MeshSizes): string | null {
	const { dp_replicate_size: replicas } = sizes;
	if (above1(sizes, MESH_NAMES).length === 0 && replicas === 1) return null;
	const groups = replicas > 1 ? `; ${replicas} replicas of ${replicaOf(sizes)} ranks` : "";
	const experts = sizes.ep_size > 1 ? `; ep_size ${sizes.ep_size} of the ${stageOf(sizes)} ranks of a stage` : "";
	return `a mesh of ${worldOf(sizes)} ranks: ${productText(sizes)}${experts}${groups}`;
}
