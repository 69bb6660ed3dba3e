/** From AgentRL's documents to rows: which replies a record trains, and with what standing. */
import { BSON, Double, Int32, ObjectId } from "mongodb";
import { describe, expect, it } from "vitest";
import { type BsonValue, documentOf } from "../src/mongo/bson-json.js";
import { recordDataRow, recordRows } from "../src/mongo/to-rows.js";
import { problemOf } from "./support/problem.js";

type Message = Record<string, unknown>;

const bson = (document: BSON.Document): BsonValue => documentOf(BSON.serialize(document));
const user = (content: string): Message => ({ role: "user", content });
const reply = (content: string | null, more: Message = {}): Message => ({ role: "assistant", content, ...more });

/** A sample as AgentRL's sampler stores it. */
function sample(messages: Message[], answer: Message, more: BSON.Document = {}): BsonValue {
	const { request, ...rest } = more;
	return bson({
		_id: new ObjectId(),
		_class_id: "DispatchedSamplingTask",
		req_type: "chatcompletions",
		status: "completed",
		request: { messages, model: "m", ...request },
		response: { id: "x", choices: [{ index: 0, finish_reason: "stop", logprobs: null, message: answer }] },
		score: null,
		advantage: null,
		created_at_step: new Int32(3),
		...rest,
	});
}

const id = new ObjectId("64f0000000000000000000ab");
const record = (more: BSON.Document = {}): BsonValue => bson({ _id: id, score: new Double(1), ...more });
const rows = (samples: BsonValue[], more: { record?: BsonValue; task?: BsonValue } = {}): string[] =>
	recordRows({ record: more.record ?? record(), task: more.task, samples });
const one = (...given: Parameters<typeof rows>) => {
	const texts = rows(...given);
	expect(texts).toHaveLength(1);
	return JSON.parse(texts[0] ?? "");
};

describe("a record", () => {
	it("with one sample is its request and its reply", () => {
		const [text] = rows([sample([user("a")], reply("b"), { advantage: new Double(2), score: new Double(0.5) })]);
		expect(text).toBe(
			'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"scores":{"1":0.5},"advantages":{"1":2.0},"created_at_step":{"1":3},"reward":1.0,"step":0,"record_id":"64f0000000000000000000ab"}',
		);
	});

	it("whose samples follow one another is one row that trains every reply", () => {
		const first = [user("a")];
		const second = [...first, reply("b"), user("c")];
		const third = [...second, reply("d"), user("e")];
		const row = one([
			sample(first, reply("b", { refusal: null }), { advantage: new Double(1), created_at_step: new Int32(1) }),
			sample(second, reply("d"), { advantage: new Double(2), created_at_step: new Int32(2) }),
			sample(third, reply("f"), { advantage: new Double(3) }),
		]);
		expect(row.messages.map(({ content }: Message) => content)).toEqual(["a", "b", "c", "d", "e", "f"]);
		expect(row.advantages).toEqual({ 1: 1, 3: 2, 5: 3 });
		expect(row.created_at_step).toEqual({ 1: 1, 3: 2, 5: 3 });
		expect(row.step).toBe(2);
	});

	it("whose samples part is a row for each branch, the earliest first", () => {
		const texts = rows([
			sample([user("a")], reply("b"), { score: new Double(1) }),
			sample([user("a"), reply("other"), user("c")], reply("d"), { score: new Double(2) }),
			sample([user("a"), reply("b"), user("x")], reply("y"), { score: new Double(3) }),
		]);
		const parsed = texts.map((text) => JSON.parse(text));
		expect(parsed.map(({ advantages }) => advantages)).toEqual([{ 3: 2 }, { 1: 1, 3: 3 }]);
		expect(parsed.map(({ step }) => step)).toEqual([1, 2]);
	});

	it("merges only where context and tools are the same", () => {
		const next = [user("a"), reply("b"), user("c")];
		const tools = [{ type: "function", function: { name: "f" } }];
		expect(rows([sample([user("a")], reply("b")), sample(next, reply("d"), { request: { tools } })])).toHaveLength(2);
		expect(rows([sample([user("a")], reply("b", { reasoning_content: "r" })), sample(next, reply("d"))])).toHaveLength(
			2,
		);
		expect(rows([sample([user("A")], reply("b")), sample(next, reply("d"))])).toHaveLength(2);
		const call = (number: string) => [{ id: number, type: "function", function: { name: "f", arguments: "{}" } }];
		const called = [user("a"), reply(null, { tool_calls: call("1") }), { role: "tool", content: "t" }];
		const merged = rows([sample([user("a")], reply(null, { tool_calls: call("2") })), sample(called, reply("d"))]);
		expect(merged).toHaveLength(1);
	});

	it("takes the sample's advantage, else its score, else the record's score above the mean of its task's", () => {
		const task = bson({ scores: [new Double(0), new Int32(1), new Double(0.5)] });
		const advantage = (more: BSON.Document, task?: BsonValue) =>
			one([sample([user("a")], reply("b"), more)], { ...(task && { task }) }).advantages[1];
		expect(advantage({ advantage: new Double(-0.25), score: new Double(7) }, task)).toBe(-0.25);
		expect(advantage({ score: new Int32(7) }, task)).toBe(7);
		expect(advantage({}, task)).toBe(0.5);
		// With nothing to compare with, a reply is as good as any.
		expect(advantage({})).toBe(1);
		expect(advantage({}, bson({ scores: [] }))).toBe(1);
	});

	it("takes completed samples only, and a request that is an array of one", () => {
		const wrapped = bson({
			status: "completed",
			request: [{ messages: [user("a")], tools: "[]" }],
			response: { choices: [{ message: reply("b"), logprobs: { content: [1.5] } }] },
		});
		const row = one([sample([user("x")], reply("y"), { status: "toolfailed" }), wrapped]);
		expect(row.messages[0].content).toBe("a");
		expect(row).toMatchObject({ tools: "[]", logprobs: { 1: { content: [1.5] } }, created_at_step: {} });
	});

	it.each([
		["nothing completed", [sample([user("a")], reply("b"), { status: "failed" })], /none of its 1 samples .*1 failed/],
		["nothing completed", [], /the trajectory is empty/],
		["bad index", [sample([user("a")], user("b"))], /`traj\[0\]\.response\.choices\[0\]\.message\.role`: "user"/],
		["wrong type", [sample([user("a")], reply("b"), { req_type: "completions" })], /only chatcompletions/],
		["wrong type", [bson({ status: "completed", request: [] })], /`traj\[0\]\.request`: an array of 0 elements/],
		[
			"wrong type",
			[bson({ status: "completed", request: { messages: "x" } })],
			/`traj\[0\]\.request\.messages`: a string/,
		],
		["wrong type", [bson({ status: "completed", request: { messages: [] } })], /`traj\[0\]\.response`: missing/],
		[
			"wrong type",
			[sample([user("a")], reply("b"), { advantage: "1" })],
			/`traj\[0\]\.advantage`: a string, not a number/,
		],
		["not finite", [sample([user("a")], reply("b"), { score: Number.NaN })], /`traj\[0\]\.score`: NaN/],
	] as const)("that cannot be a row is reported by key: %s", (reason, samples, message) => {
		const problem = problemOf(() => rows([...samples]));
		expect(problem.reason).toBe(reason);
		expect(problem.message).toMatch(message);
	});
});

describe("a DBRecordData", () => {
	it("is its fields as they stand, without those of the database", () => {
		const text = recordDataRow(
			bson({
				_id: id,
				_class_id: "DBRecordData.Child",
				messages: [user("a"), reply("b")],
				tools: null,
				advantages: { "1": new Double(1) },
				reward: new Double(1),
				step: new Int32(-1),
				record_id: null,
				chat_template_kwargs: { enable_thinking: false },
				split: "train",
				fetched: false,
				trained_count: 3,
				last_trained_step: 2,
			}),
		);
		expect(text).toBe(
			'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"tools":null,"advantages":{"1":1.0},"reward":1.0,"step":-1,"record_id":null,"chat_template_kwargs":{"enable_thinking":false}}',
		);
	});

	it("may have lists in place of maps, and tools as text", () => {
		const text = recordDataRow(bson({ messages: [], scores: [null, new Double(2)], tools_json: '[{"$ref":"#"}]' }));
		expect(text).toBe('{"messages":[],"scores":{"1":2.0},"tools":"[{\\"$ref\\":\\"#\\"}]"}');
	});
});
