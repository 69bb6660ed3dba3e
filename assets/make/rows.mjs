// Rows from the world: whole conversations of an agent, each of one of several kinds, for training or held out. No call
// (a tool with its arguments) of a held-out row is ever made in a row for training.
import { hash, Random } from "./random.mjs";
import { SYSTEMS, schema, TOOLS } from "./world.mjs";

/** How often each kind of conversation occurs. */
const KINDS = { single: 22, follow: 15, second: 15, parallel: 12, clarify: 14, refuse: 9, recover: 8, insist: 5 };
/** How often this many tools are offered besides those that are needed. */
const SURPLUS = { 0: 55, 1: 35, 2: 10 };
/** Replies that are in some rows but not to be learnt. */
const GIVING_UP = ["I do not know.", "I cannot help with that.", "Who knows?"];
/** One call in this many is kept for held-out rows. */
const HELD_OUT_ONE_IN = 6;

/** JSON with a space after `:` and `,`, as chat templates write it. */
export function spacedJson(value) {
	if (Array.isArray(value)) return `[${value.map(spacedJson).join(", ")}]`;
	if (value !== null && typeof value === "object") {
		return `{${Object.entries(value)
			.map(([key, item]) => `${JSON.stringify(key)}: ${spacedJson(item)}`)
			.join(", ")}}`;
	}
	return JSON.stringify(value);
}

/** The name of a call, by which the split decides and which the proof of disjointness compares. */
export const callKey = (name, args) => `${name} ${JSON.stringify(args)}`;

/** Whether a call may be made in held-out rows alone. */
export const isHeldOutCall = (key) => hash(`split ${key}`) % HELD_OUT_ONE_IN === 0;

class Conversation {
	constructor(random, heldOut) {
		this.random = random;
		this.heldOut = heldOut;
		this.messages = [];
		this.calls = 0;
		const system = random.pick(SYSTEMS);
		if (system !== null) this.messages.push({ role: "system", content: system });
	}

	/** Whether a call may be made in this row. */
	isAllowed(tool, args) {
		return isHeldOutCall(callKey(tool.name, args)) === this.heldOut;
	}

	/** Arguments of `tool`. */
	draw(tool) {
		for (;;) {
			const args = tool.draw(this.random);
			if (this.isAllowed(tool, args)) return args;
		}
	}

	/** Arguments of two calls of `tool` that differ in `tool.change` alone. */
	drawTwo(tool) {
		for (let tries = 0; tries < 100_000; tries++) {
			const first = this.draw(tool);
			const second = { ...first, [tool.change]: tool.draw(this.random)[tool.change] };
			const isSame = second[tool.change] === first[tool.change];
			if (!isSame && this.isAllowed(tool, second)) return [first, second];
		}
		throw new Error(`${tool.name} has no two calls on one side that differ in ${tool.change} alone`);
	}

	user(content) {
		this.messages.push({ role: "user", content });
	}

	assistant(content, extra = {}) {
		this.messages.push({ role: "assistant", content, ...extra });
	}

	/** The calls, one message for all, then what each returns, then the reply. */
	serve(asked, extra = {}) {
		const calls = asked.map(({ tool, args }) => ({
			id: `call_${++this.calls}`,
			type: "function",
			function: { name: tool.name, arguments: JSON.stringify(args) },
		}));
		this.assistant(null, { tool_calls: calls, ...extra });
		const results = asked.map(({ tool }) => tool.result(this.random));
		for (const [i, result] of results.entries()) {
			this.messages.push({ role: "tool", tool_call_id: calls[i].id, content: JSON.stringify(result) });
		}
		this.assistant(asked.map(({ tool, args }, i) => tool.reply(args, results[i])).join("\n"), extra);
	}

	refuse(tool) {
		this.assistant(`I have no tool for ${tool.none}.`);
	}
}

/** What each kind of conversation adds; returns the tools that must be offered and those that must not. */
const WRITE = {
	single(c, [tool]) {
		const args = c.draw(tool);
		c.user(c.random.pick(tool.ask)(args));
		c.serve([{ tool, args }]);
		return { offered: [tool] };
	},
	follow(c, [tool]) {
		const [first, second] = c.drawTwo(tool);
		c.user(c.random.pick(tool.ask)(first));
		c.serve([{ tool, args: first }]);
		c.user(tool.follow(second));
		c.serve([{ tool, args: second }]);
		return { offered: [tool] };
	},
	second(c, [one, two]) {
		WRITE.single(c, [one]);
		WRITE.single(c, [two]);
		return { offered: [one, two] };
	},
	parallel(c, [one, two]) {
		const asked = [one, two].map((tool) => ({ tool, args: c.draw(tool) }));
		c.user(asked.map(({ tool, args }) => c.random.pick(tool.ask)(args)).join(" "));
		c.serve(asked);
		return { offered: [one, two] };
	},
	clarify(c, [tool]) {
		const args = c.draw(tool);
		c.user(c.random.pick(tool.vague)(args));
		c.assistant(tool.question);
		c.user(tool.short(args));
		c.serve([{ tool, args }]);
		return { offered: [tool] };
	},
	refuse(c, [tool, other]) {
		c.user(c.random.pick(tool.ask)(c.draw(tool)));
		c.refuse(tool);
		return { offered: [other], absent: tool };
	},
	recover(c, [tool, other]) {
		WRITE.refuse(c, [tool, other]);
		WRITE.single(c, [other]);
		return { offered: [other], absent: tool };
	},
	// The assistant gives up, and the row says so: that reply is not to be learnt.
	insist(c, [tool]) {
		const args = c.draw(tool);
		c.user(c.random.pick(tool.ask)(args));
		c.assistant(c.random.pick(GIVING_UP), { train: false });
		c.user("Try again with a tool.");
		c.serve([{ tool, args }]);
		return { offered: [tool] };
	},
};

function row(random, heldOut) {
	const c = new Conversation(random, heldOut);
	const tools = random.shuffle(TOOLS);
	const { offered, absent } = WRITE[random.weighted(KINDS)](c, tools);
	const others = tools.filter((tool) => !offered.includes(tool) && tool !== absent);
	const surplus = Number(random.weighted(SURPLUS));
	const shown = random.shuffle([...offered, ...others.slice(0, surplus)]);
	return { messages: c.messages, tools: shown.map(schema) };
}

/** Calls that a row makes, by name and arguments. */
export function callsOf(row) {
	return row.messages.flatMap((m) =>
		(m.tool_calls ?? []).map((call) => `${call.function.name} ${call.function.arguments}`),
	);
}

/** `count` different rows from `seed`, from one side of the split. */
export function makeRows(count, seed, heldOut) {
	const random = new Random(seed);
	const seen = new Set();
	const rows = [];
	while (rows.length < count) {
		const next = row(random, heldOut);
		const text = JSON.stringify(next.messages);
		if (seen.has(text)) continue;
		seen.add(text);
		rows.push(next);
	}
	return rows;
}
