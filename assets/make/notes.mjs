// Plain text of the same world, on which the base model is pre-trained: notes in which the same facts stand as questions,
// as sentences and as records, in any order. No chat, no tools, no calls, no replies to choose: what it teaches is the
// words of the world, JSON, and to find in a text what another part of it says again.
import { Random } from "./random.mjs";
import { TOOLS } from "./world.mjs";

/** Notes about two facts among 100 of the later ones; the others are about one. */
const TWO_FACTS = 50;

/** The ways to write a fact down: what was asked, what is so, and each as JSON. */
const VIEWS = [
	(random, tool, args) => random.pick(tool.ask)(args),
	(_, tool, args, result) => tool.reply(args, result),
	(_, __, args) => JSON.stringify(args),
	(_, __, ___, result) => JSON.stringify(result),
];

/** A note: at `progress` 0 two lines on one fact, at 1 up to four lines on each of up to two facts. */
function note(random, progress) {
	const facts = [random.pick(TOOLS)];
	if (progress > 0.3 && random.chance(TWO_FACTS)) facts.push(random.pick(TOOLS));
	const most = 2 + Math.round(progress * (VIEWS.length - 2));
	const lines = facts.flatMap((tool) => {
		const args = tool.draw(random);
		const result = tool.result(random);
		return random
			.shuffle(VIEWS)
			.slice(0, random.int(2, most))
			.map((view) => view(random, tool, args, result));
	});
	return random.shuffle(lines).join("\n");
}

/** `count` rows of plain text from `seed`, from the short to the long: what to look for is found sooner among few words. */
export function makeNotes(count, seed) {
	const random = new Random(seed);
	return Array.from({ length: count }, (_, i) => ({ text: note(random, i / count) }));
}
