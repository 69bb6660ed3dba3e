// The small world of the rows: what an assistant's tools are, how people ask for them, what the tools may return and how
// the reply reads. A call is a function of what the user says, a reply one of the call and its result, so that exactly one
// text is right; a result is drawn again each time, so that it can be read from the conversation alone.

const CITIES = [
	"Oslo",
	"Rome",
	"Paris",
	"Berlin",
	"Madrid",
	"Lisbon",
	"Vienna",
	"Prague",
	"Cairo",
	"Tokyo",
	"Lima",
	"Boston",
	"Delhi",
	"Seoul",
	"Athens",
	"Dublin",
];
const DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const NAMES = [
	"Ana",
	"Ben",
	"Clara",
	"David",
	"Emma",
	"Felix",
	"Grace",
	"Henry",
	"Ida",
	"Jonas",
	"Karen",
	"Leo",
	"Maria",
	"Nora",
	"Oscar",
	"Paula",
];
const ITEMS = [
	"lamp",
	"chair",
	"table",
	"sofa",
	"desk",
	"mirror",
	"carpet",
	"clock",
	"vase",
	"bench",
	"stool",
	"pillow",
	"basket",
	"drawer",
];
const COLOURS = ["red", "blue", "green", "black", "white", "yellow", "brown", "grey"];
const DISHES = ["tea", "eggs", "pasta", "rice", "bread", "soup", "pizza", "cake"];
const SKIES = ["sun", "rain", "snow", "fog", "wind", "storm"];
const TOPICS = ["lunch", "party", "meeting", "concert", "holiday", "budget", "report", "garden", "wedding", "picnic"];
const STOPS = ["harbour", "market", "museum", "station", "park", "school", "bridge", "airport", "castle", "library"];

const string = { type: "string" };
const integer = { type: "integer" };

/**
 * The tools. `ask`: ways to ask with everything said; `vague`: an opening that leaves one argument out, `question`: what it
 * deserves, `short`: that argument by itself; `follow`: another request after one of the same tool that changes only
 * `change`; `reply`: what the assistant says of a result; `none`: what it
 * says that it has no tool for.
 */
export const TOOLS = [
	{
		name: "get_weather",
		description: "Forecast for a city",
		properties: { city: string, day: string },
		draw: (r) => ({ city: r.pick(CITIES), day: r.pick(DAYS) }),
		ask: [
			(a) => `What is the weather in ${a.city} on ${a.day}?`,
			(a) => `On ${a.day} I fly to ${a.city}. Do I need a coat?`,
			(a) => `Forecast for ${a.city} on ${a.day}, please.`,
		],
		vague: [(a) => `I want to know the weather in ${a.city}.`, (a) => `Tell me about the weather in ${a.city}.`],
		question: "For which day?",
		short: (a) => `On ${a.day}.`,
		change: "city",
		follow: (a) => `And in ${a.city}?`,
		result: (r) => ({ sky: r.pick(SKIES), degrees: r.int(10, 38) }),
		reply: (a, b) => `Expect ${b.sky} and ${b.degrees} degrees in ${a.city} on ${a.day}.`,
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
		],
		vague: [(a) => `I am looking for a ${a.item}.`, (a) => `Show me a ${a.item}.`],
		question: "In which colour?",
		short: (a) => `In ${a.colour}.`,
		change: "colour",
		follow: (a) => `And in ${a.colour}?`,
		result: (r) => ({ count: r.chance(25) ? 0 : r.int(10, 69) }),
		reply: (a, b) =>
			b.count === 0
				? `The ${a.colour} ${a.item} is sold out.`
				: `The ${a.colour} ${a.item} is here: ${b.count} are left.`,
		none: "the stock of a shop",
	},
	{
		name: "set_timer",
		description: "Start a timer",
		properties: { minutes: integer, label: string },
		draw: (r) => ({ minutes: r.int(10, 89), label: r.pick(DISHES) }),
		ask: [
			(a) => `Set a timer of ${a.minutes} minutes for the ${a.label}.`,
			(a) => `The ${a.label} must cook for ${a.minutes} minutes. Tell me when it is done.`,
			(a) => `Remind me of the ${a.label} in ${a.minutes} minutes.`,
		],
		vague: [(a) => `Start a timer for the ${a.label}.`, (a) => `I need a timer for the ${a.label}.`],
		question: "How many minutes?",
		short: (a) => `${a.minutes} minutes.`,
		change: "label",
		follow: (a) => `The same for the ${a.label}.`,
		result: (r) => ({ timer: r.int(1, 9) }),
		reply: (a, b) => `Timer ${b.timer} rings for the ${a.label} in ${a.minutes} minutes.`,
		none: "timers",
	},
	{
		name: "send_message",
		description: "Write to a colleague",
		properties: { name: string, topic: string },
		draw: (r) => ({ name: r.pick(NAMES), topic: r.pick(TOPICS) }),
		ask: [
			(a) => `Write to ${a.name} about the ${a.topic}.`,
			(a) => `Please send ${a.name} a message about the ${a.topic}.`,
			(a) => `The ${a.topic} is moved. Let ${a.name} know.`,
		],
		vague: [(a) => `Write something to ${a.name}.`, (a) => `I have news for ${a.name}.`],
		question: "What about?",
		short: (a) => `About the ${a.topic}.`,
		change: "name",
		follow: (a) => `And to ${a.name}.`,
		result: (r) => ({ message: r.int(10, 99) }),
		reply: (a, b) => `Message ${b.message} about the ${a.topic} went to ${a.name}.`,
		none: "messages",
	},
	{
		name: "next_bus",
		description: "When a bus leaves a stop",
		properties: { line: integer, stop: string },
		draw: (r) => ({ line: r.int(10, 69), stop: r.pick(STOPS) }),
		ask: [
			(a) => `When does bus ${a.line} leave the ${a.stop}?`,
			(a) => `I am at the ${a.stop}. When is the next bus ${a.line}?`,
			(a) => `Next bus ${a.line} from the ${a.stop}, please.`,
		],
		vague: [(a) => `I want to take a bus from the ${a.stop}.`, (a) => `I wait for a bus at the ${a.stop}.`],
		question: "Which line?",
		short: (a) => `Bus ${a.line}.`,
		change: "stop",
		follow: (a) => `And from the ${a.stop}?`,
		result: (r) => ({ wait: r.int(2, 9) }),
		reply: (a, b) => `Bus ${a.line} leaves the ${a.stop} in ${b.wait} minutes.`,
		none: "buses",
	},
];

/** A tool as a row's `tools` list shows it. */
export function schema(tool) {
	const parameters = { type: "object", properties: tool.properties, required: Object.keys(tool.properties) };
	return { type: "function", function: { name: tool.name, description: tool.description, parameters } };
}

/** System messages; `null`: the row has none. */
export const SYSTEMS = [null, "You are a helpful assistant.", "You are an assistant with tools.", "Help the user."];
