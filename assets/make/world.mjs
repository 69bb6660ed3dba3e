// The small world of the rows: what an assistant's tools are, how people ask for them, what the tools return and how
// the reply reads. Everything is a function of the arguments, so that a right reply is exactly one text.
import { hash } from "./random.mjs";

const CITIES = ["Oslo", "Rome", "Paris", "Berlin", "Madrid", "Lisbon", "Vienna", "Prague", "Dublin", "Athens", "Cairo", "Delhi", "Tokyo", "Seoul", "Lima", "Quito", "Boston", "Denver", "Zurich", "Geneva"];
const DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const NAMES = ["Ana", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Karen", "Leo", "Maria", "Nora", "Oscar", "Paula"];
const ITEMS = ["lamp", "chair", "table", "sofa", "desk", "shelf", "mirror", "carpet", "clock", "vase", "bench", "stool", "pillow", "blanket", "basket", "drawer"];
const COLOURS = ["red", "blue", "green", "black", "white", "yellow", "brown", "grey"];
const EVENTS = ["lunch", "dentist", "meeting", "yoga", "haircut", "concert", "dinner", "interview", "training", "walk"];
const DISHES = ["tea", "eggs", "pasta", "rice", "bread", "soup", "pizza", "cake", "beans", "coffee"];
const SKIES = ["sun", "rain", "snow", "fog", "wind", "clouds", "storm", "hail"];
const CURRENCIES = { EUR: "euros", USD: "dollars", GBP: "pounds", JPY: "yen", CHF: "francs", INR: "rupees", BRL: "reais", SEK: "kronor" };
const OPERATORS = { add: "plus", subtract: "minus", multiply: "times" };
const FIELDS = { phone: "phone number", room: "room", desk: "desk" };

const string = { type: "string" };
const integer = { type: "integer" };

/** What `list` holds at a place that belongs to `key`. */
const at = (list, key) => list[hash(key) % list.length];
/** An integer in [low, high] that belongs to `key`. */
const number = (low, high, key) => low + (hash(key) % (high - low + 1));
const clock = (key) => `${number(10, 23, `hour ${key}`)}:${number(10, 59, `minute ${key}`)}`;

/**
 * The tools. `ask`: ways to ask with everything said; `vague`: an opening that leaves `missing` out, and the question that it
 * deserves; `short`: the missing argument by itself; `follow`: another request after one of the same tool that changes only
 * `change` (`accepts` says of which arguments that makes sense); `full` and `brief`: the reply in two styles; `none`: what the reply names where the tool is not offered.
 */
export const TOOLS = [
	{
		name: "get_weather",
		description: "Forecast for a city",
		properties: { city: string, day: string },
		draw: (r) => ({ city: r.pick(CITIES), day: r.pick(DAYS) }),
		ask: [
			(a) => `What is the weather in ${a.city} on ${a.day}?`,
			(a) => `Do I need a coat in ${a.city} on ${a.day}?`,
			(a) => `On ${a.day} I fly to ${a.city}. How is the weather there?`,
			(a) => `Forecast for ${a.city} on ${a.day}, please.`,
		],
		missing: "day",
		vague: [(a) => `What is the weather in ${a.city}?`, (a) => `Forecast for ${a.city}, please.`],
		question: "For which day?",
		short: (a) => `On ${a.day}.`,
		change: "city",
		follow: (a) => `And in ${a.city}?`,
		result: (a) => ({ sky: at(SKIES, `sky ${a.city} ${a.day}`), degrees: number(1, 38, `degrees ${a.city} ${a.day}`) }),
		full: (a, b) => `In ${a.city} expect ${b.sky} and ${b.degrees} degrees on ${a.day}.`,
		brief: (_, b) => `${b.sky}, ${b.degrees} degrees`,
		none: "the weather",
	},
	{
		name: "check_stock",
		description: "How many of an item a shop has",
		properties: { item: string, colour: string },
		draw: (r) => ({ item: r.pick(ITEMS), colour: r.pick(COLOURS) }),
		ask: [
			(a) => `Do you have a ${a.colour} ${a.item}?`,
			(a) => `I want to buy a ${a.item} in ${a.colour}. Is there one left?`,
			(a) => `Is the ${a.colour} ${a.item} in stock?`,
			(a) => `How many of the ${a.item} in ${a.colour} are left?`,
		],
		missing: "colour",
		vague: [(a) => `Do you have a ${a.item}?`, (a) => `I want to buy a ${a.item}.`],
		question: "In which colour?",
		short: (a) => `In ${a.colour}.`,
		change: "colour",
		follow: (a) => `And in ${a.colour}?`,
		result: (a) => {
			const key = `${a.colour} ${a.item}`;
			return hash(`stock ${key}`) % 4 === 0 ? { count: 0 } : { count: number(1, 60, `count ${key}`), price: number(10, 99, `price ${key}`) };
		},
		full: (a, b) => (b.count === 0 ? `The ${a.colour} ${a.item} is sold out.` : `Yes, we have ${b.count} of the ${a.colour} ${a.item} at ${b.price} each.`),
		brief: (_, b) => (b.count === 0 ? "sold out" : `${b.count} left, ${b.price} each`),
		none: "the stock of a shop",
	},
	{
		name: "convert_currency",
		description: "Convert money",
		properties: { amount: integer, from: string, to: string },
		draw: (r) => {
			const [from, to] = r.shuffle(Object.keys(CURRENCIES));
			return { amount: r.int(2, 99), from, to };
		},
		ask: [
			(a) => `How much is ${a.amount} ${a.from} in ${a.to}?`,
			(a) => `Convert ${a.amount} ${CURRENCIES[a.from]} to ${CURRENCIES[a.to]}.`,
			(a) => `I have ${a.amount} ${CURRENCIES[a.from]}. What is that in ${CURRENCIES[a.to]}?`,
			(a) => `How many ${CURRENCIES[a.to]} do I get for ${a.amount} ${CURRENCIES[a.from]}?`,
		],
		missing: "to",
		vague: [(a) => `I want to change ${a.amount} ${CURRENCIES[a.from]}.`, (a) => `Convert ${a.amount} ${a.from}.`],
		question: "To which currency?",
		short: (a) => `To ${CURRENCIES[a.to]}.`,
		change: "amount",
		follow: (a) => `And ${a.amount}?`,
		result: (a) => ({ amount: number(2, 999, `money ${a.amount} ${a.from} ${a.to}`) }),
		full: (a, b) => `${a.amount} ${a.from} is ${b.amount} ${a.to}.`,
		brief: (a, b) => `${b.amount} ${a.to}`,
		none: "currencies",
	},
	{
		name: "add_event",
		description: "Put an event into the calendar",
		properties: { title: string, day: string, hour: integer },
		draw: (r) => ({ title: r.pick(EVENTS), day: r.pick(DAYS), hour: r.int(7, 22) }),
		ask: [
			(a) => `Put ${a.title} into my calendar on ${a.day} at ${a.hour}.`,
			(a) => `I have a ${a.title} on ${a.day} at ${a.hour}. Please note it.`,
			(a) => `Book ${a.title} for ${a.day} at ${a.hour}.`,
			(a) => `On ${a.day} at ${a.hour} there is ${a.title}. Add it.`,
		],
		missing: "hour",
		vague: [(a) => `Put ${a.title} into my calendar on ${a.day}.`, (a) => `Book ${a.title} for ${a.day}.`],
		question: "At what hour?",
		short: (a) => `At ${a.hour}.`,
		change: "day",
		follow: (a) => `Also on ${a.day}.`,
		result: (a) => {
			const key = `${a.title} ${a.day} ${a.hour}`;
			return hash(`calendar ${key}`) % 3 === 0 ? { free: false, busy: at(EVENTS, `busy ${key}`) } : { free: true };
		},
		full: (a, b) => (b.free ? `Done: ${a.title} on ${a.day} at ${a.hour}.` : `Sorry, ${a.day} at ${a.hour} is taken by ${b.busy}.`),
		brief: (_, b) => (b.free ? "done" : `taken by ${b.busy}`),
		none: "the calendar",
	},
	{
		name: "set_timer",
		description: "Start a timer",
		properties: { minutes: integer, label: string },
		draw: (r) => ({ minutes: r.int(2, 90), label: r.pick(DISHES) }),
		ask: [
			(a) => `Set a timer of ${a.minutes} minutes for the ${a.label}.`,
			(a) => `The ${a.label} must cook for ${a.minutes} minutes. Tell me when it is done.`,
			(a) => `Remind me of the ${a.label} in ${a.minutes} minutes.`,
			(a) => `${a.minutes} minutes for the ${a.label}, please.`,
		],
		missing: "minutes",
		vague: [(a) => `Set a timer for the ${a.label}.`, (a) => `Remind me of the ${a.label}.`],
		question: "How many minutes?",
		short: (a) => `${a.minutes} minutes.`,
		change: "label",
		follow: (a) => `The same for the ${a.label}.`,
		result: (a) => ({ ends: clock(`timer ${a.minutes} ${a.label}`) }),
		full: (a, b) => `The timer for the ${a.label} ends at ${b.ends}.`,
		brief: (_, b) => `ends at ${b.ends}`,
		none: "timers",
	},
	{
		name: "calculate",
		description: "Arithmetic with two numbers",
		properties: { left: integer, operator: string, right: integer },
		draw: (r) => {
			const operator = r.pick(Object.keys(OPERATORS));
			const right = r.int(2, operator === "multiply" ? 12 : 49);
			return { left: r.int(operator === "subtract" ? right : 2, 99), operator, right };
		},
		accepts: (a) => a.operator === "add" || (a.operator === "multiply" ? a.right <= 12 : a.right <= a.left),
		ask: [
			(a) => `What is ${a.left} ${OPERATORS[a.operator]} ${a.right}?`,
			(a) => `Please work out ${a.left} ${OPERATORS[a.operator]} ${a.right}.`,
			(a) => `${a.left} ${{ add: "+", subtract: "-", multiply: "*" }[a.operator]} ${a.right}`,
		],
		missing: "right",
		vague: [(a) => `What is ${a.left} ${OPERATORS[a.operator]} something?`],
		question: "Which number?",
		short: (a) => `${a.right}`,
		change: "right",
		follow: (a) => `And with ${a.right}?`,
		result: (a) => ({ value: { add: a.left + a.right, subtract: a.left - a.right, multiply: a.left * a.right }[a.operator] }),
		full: (a, b) => `${a.left} ${OPERATORS[a.operator]} ${a.right} is ${b.value}.`,
		brief: (_, b) => `${b.value}`,
		none: "arithmetic",
	},
	{
		name: "find_contact",
		description: "Look up a colleague",
		properties: { name: string, field: string },
		draw: (r) => ({ name: r.pick(NAMES), field: r.pick(Object.keys(FIELDS)) }),
		ask: [
			(a) => `What is the ${FIELDS[a.field]} of ${a.name}?`,
			(a) => `I need ${a.name}'s ${FIELDS[a.field]}.`,
			(a) => `Tell me the ${FIELDS[a.field]} of ${a.name}, please.`,
		],
		missing: "field",
		vague: [(a) => `I have a question about ${a.name}.`, (a) => `Look up ${a.name} for me.`],
		question: "Phone number, room or desk?",
		short: (a) => `The ${FIELDS[a.field]}.`,
		change: "name",
		follow: (a) => `And of ${a.name}?`,
		result: (a) => ({ [a.field]: number(100, 999, `${a.field} ${a.name}`) }),
		full: (a, b) => `The ${FIELDS[a.field]} of ${a.name} is ${b[a.field]}.`,
		brief: (a, b) => `${b[a.field]}`,
		none: "colleagues",
	},
	{
		name: "next_train",
		description: "The next train between two cities",
		properties: { from: string, to: string },
		draw: (r) => {
			const [from, to] = r.shuffle(CITIES);
			return { from, to };
		},
		accepts: (a) => a.from !== a.to,
		ask: [
			(a) => `When is the next train from ${a.from} to ${a.to}?`,
			(a) => `I must get to ${a.to} from ${a.from}. When does the train leave?`,
			(a) => `Next train from ${a.from} to ${a.to}, please.`,
			(a) => `I am in ${a.from}. When can I take a train to ${a.to}?`,
		],
		missing: "from",
		vague: [(a) => `When is the next train to ${a.to}?`, (a) => `I must get a train to ${a.to}.`],
		question: "From where?",
		short: (a) => `From ${a.from}.`,
		change: "to",
		follow: (a) => `And to ${a.to}?`,
		result: (a) => ({ leaves: clock(`train ${a.from} ${a.to}`), track: number(1, 24, `track ${a.from} ${a.to}`) }),
		full: (a, b) => `The train to ${a.to} leaves ${a.from} at ${b.leaves} from track ${b.track}.`,
		brief: (_, b) => `${b.leaves}, track ${b.track}`,
		none: "trains",
	},
];

/** A tool as a row's `tools` list shows it. */
export function schema(tool) {
	const parameters = { type: "object", properties: tool.properties, required: Object.keys(tool.properties) };
	return { type: "function", function: { name: tool.name, description: tool.description, parameters } };
}

/** System messages by the style of reply that they ask for; `null`: the row has none. */
export const SYSTEMS = {
	full: [null, "You are a helpful assistant.", "You are an assistant with tools.", "Help the user. Reply in a full sentence."],
	brief: ["Be brief.", "You are an assistant with tools. Be brief.", "Help the user. Be brief."],
};
