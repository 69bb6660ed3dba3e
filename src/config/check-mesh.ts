/** Options of a run whose ranks divide a model or its tokens, and what does not go with them yet. Reads valid values only. */
import type { Checks } from "./check-evaluation.js";
import { above1, dividesModel, MODEL_NAMES, replicaOf, stageOf, wrongWorld } from "./mesh.js";

/** Reports each contradiction. `world`: the ranks that were started, or will be; null: not known. */
export function checkMesh({ args, shown, add }: Checks, world: number | null): void {
	const wrong = world === null ? null : wrongWorld(args, world);
	if (wrong !== null) add(wrong.line, wrong.hint);
	const stage = stageOf(args);
	if (wrong === null && stage % args.ep_size !== 0) {
		const ranks = `dp_size ${args.dp_size} x cp_size ${args.cp_size} x tp_size ${args.tp_size} = ${stage}`;
		add(
			`${shown("ep_size")} does not divide the ranks of a stage, ${ranks}`,
			"Expert-parallel ranks are among those that the other sizes count, so that ep_size divides their product: start more ranks, or take a smaller ep_size.",
		);
	}
	if (args.dp_replicate_size > 1) checkReplicas({ args, shown, add }, wrong === null);
	if (!dividesModel(args)) return;
	const model = above1(args, MODEL_NAMES).map(shown).join(" and ");
	if (args.zero === 0)
		add(
			`${shown("zero")} contradicts ${model}: ranks that divide a model divide its gradients and moments too`,
			"Leave zero out, or set it to 1 or 2.",
		);
	if (args.zero === 3 && args.pp_size > 1)
		add(
			`${shown("zero")} contradicts ${shown("pp_size")}: each micro-batch would gather the weights of its stage again`,
			"Leave zero out, or set it to 2.",
		);
}

/** `whole`: the number of ranks is that of the sizes. */
function checkReplicas({ args, shown, add }: Pick<Checks, "args" | "shown" | "add">, whole: boolean): void {
	const { dp_size, dp_replicate_size, ep_size, zero } = args;
	if (zero !== "auto" && zero < 3)
		add(
			`${shown("zero")} contradicts ${shown("dp_replicate_size")}: every rank has all weights, and replicas are groups that divide them`,
			"Leave zero out, or set it to 3.",
		);
	if (args.pp_size > 1)
		add(
			`${shown("pp_size")} contradicts ${shown("dp_replicate_size")}: replicas divide weights, and each micro-batch would gather those of its stage again`,
			"Leave dp_replicate_size out: with stages every rank has all weights of its own.",
		);
	if (!whole) return;
	if (dp_size % dp_replicate_size !== 0)
		add(
			`${shown("dp_replicate_size")} does not divide dp_size ${dp_size}`,
			"Each replica has as many data-parallel ranks: start more ranks, or take a smaller dp_replicate_size.",
		);
	else if (stageOf(args) % ep_size === 0 && replicaOf(args) % ep_size !== 0)
		add(
			`${shown("ep_size")} does not divide the ${replicaOf(args)} ranks of a replica`,
			"Each replica has all experts: take a smaller ep_size or dp_replicate_size.",
		);
}
