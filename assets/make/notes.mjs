// Plain text of the same world, on which the base model is pre-trained: notes in which the same facts stand as questions,
// as sentences and as records, in any order. No chat, no tools, no calls, no replies to choose: what it teaches is the
// words of the world, JSON, and to find in a text what another part of it says again.
import { Random, hash } from "./random.mjs";
import { callKey, isHeldOutCall, spacedJson } from "./rows.mjs";
import { TOOLS } from "./world.mjs";

/** Facts of one note, from the fewest to the most. */
const FACTS = [1, 2];

/** The ways to write a fact down: what was asked, what is so at length and in short, and all of it or half of it as JSON. */
const VIEWS = [
	(random, tool, args) => random.pick(tool.ask)(args),
	(_, tool, args) => tool.full(args, tool.result(args)),
	(_, tool, args) => tool.brief(args, tool.result(args)),
	(_, __, args) => spacedJson(args),
	(_, tool, args) => spacedJson(tool.result(args)),
	(_, tool, args) => spacedJson({ ...args, ...tool.result(args) }),
];

function note(random) {
	const lines = [];
	for (const tool of random.shuffle(TOOLS).slice(0, random.int(...FACTS))) {
		let args;
		do args = tool.draw(random);
		while (isHeldOutCall(callKey(tool.name, args)));
		for (const view of random.shuffle(VIEWS).slice(0, random.int(3, 5))) lines.push(view(random, tool, args));
	}
	return random.shuffle(lines).join("\n");
}

/** `count` rows of plain text from `seed`. */
export function makeNotes(count, seed) {
	const random = new Random(seed);
	return Array.from({ length: count }, () => ({ text: note(random) }));
}
