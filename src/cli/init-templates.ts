/** The projects that `arl init` writes: their options, sample rows and next commands. */
import { shapesPicture } from "./init-pictures.js";

/** A project by what its rows are. */
export interface Template {
	/** What it is for, in a line. */
	about: string;
	/** Lines of the configuration that name the rows. */
	rows: readonly string[];
	/** Rows to train, and rows held out. */
	train: readonly object[];
	heldOut: readonly object[];
	/** Scripts of package.json in addition to those of every project. */
	scripts: Readonly<Record<string, string>>;
	/** Files besides these, by their paths. */
	files?: () => Readonly<Record<string, Uint8Array>>;
	/** What to run, in order; shown at the end and in the README. */
	steps: readonly string[];
}

const message = (role: string, content: string) => ({ role, content });
const chat = (question: string, answer: string) => ({
	messages: [
		message("system", "You are the assistant of a bookshop. Answer in one sentence."),
		message("user", question),
		message("assistant", answer),
	],
});

const CITIES = [
	["Paris", 18, "cloudy"],
	["Oslo", 4, "clear"],
	["Lagos", 31, "sunny"],
	["Lima", 22, "foggy"],
	["Kyoto", 12, "rainy"],
	["Quito", 15, "windy"],
] as const;

const WEATHER_TOOL = {
	type: "function",
	function: {
		name: "get_weather",
		description: "The weather of a city now.",
		parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
	},
};

/** A conversation in which the assistant calls a tool, and answers with its result. */
function toolCall([city, celsius, sky]: (typeof CITIES)[number]) {
	const call = { type: "function", function: { name: "get_weather", arguments: { city } } };
	return {
		messages: [
			message("user", `What is the weather in ${city}?`),
			{ role: "assistant", content: "", tool_calls: [call] },
			message("tool", JSON.stringify({ celsius, sky })),
			message("assistant", `It is ${celsius} °C and ${sky} in ${city}.`),
		],
		tools: [WEATHER_TOOL],
	};
}

/** What is in each sample picture: how many shapes of which kind and colour. */
const SHAPES = (["red", "green", "blue"] as const).flatMap((colour) =>
	(["circle", "square"] as const).flatMap((kind) => ([1, 3] as const).map((many) => [many, colour, kind] as const)),
);

/** A question about a picture. */
function shapesRow([many, colour, kind]: (typeof SHAPES)[number], i: number) {
	const image = { type: "image_url", image_url: { url: `pictures/${i}.png` } };
	const question = { type: "text", text: "What is in the picture?" };
	return {
		messages: [
			{ role: "user", content: [image, question] },
			message("assistant", `${many === 1 ? `One ${colour} ${kind}` : `Three ${colour} ${kind}s`}.`),
		],
	};
}

const FILES = [
	'\ttrain_file: ["data/train.jsonl"],',
	'\teval_file: ["data/heldout.jsonl"],',
	'\teval_strategy: "epoch",',
];
const OWN_ROWS = "replace data/train.jsonl and data/heldout.jsonl by rows of your own";

/** Every template by its name. */
export const TEMPLATES = {
	chat: {
		about: "Conversations: a system message, questions and answers",
		rows: FILES,
		train: [
			chat("When do you open?", "We open at nine on weekdays and at ten on Saturdays."),
			chat("Can I return a book?", "Yes, within 30 days and with the receipt."),
			chat("Do you sell e-books?", "No, we sell printed books only."),
			chat("Can you order a book for me?", "Yes, it usually arrives within three days."),
			chat("Is there a reading group?", "Yes, it meets on the first Monday of each month."),
			chat("Do you buy used books?", "Yes, on Wednesdays, if they are in good condition."),
		],
		heldOut: [
			chat("Are you open on Sundays?", "No, we are closed on Sundays."),
			chat("Do you wrap gifts?", "Yes, and it is free of charge."),
		],
		scripts: {},
		steps: ["npm run check", "npm run train", "npm run chat", OWN_ROWS],
	},
	tools: {
		about: "Conversations in which the assistant calls tools",
		rows: FILES,
		train: CITIES.slice(0, 5).map(toolCall),
		heldOut: CITIES.slice(5).map(toolCall),
		scripts: {},
		steps: ["npm run check", "npm run train", "npm run chat", OWN_ROWS],
	},
	completion: {
		about: "A prompt and its completion, without conversations",
		rows: FILES,
		train: [
			["A book about birds", "Nature"],
			["A history of Rome", "History"],
			["Recipes for bread", "Cooking"],
			["The life of stars", "Science"],
			["Poems of the sea", "Poetry"],
		].map(([prompt, completion]) => ({ prompt: `${prompt} belongs on the shelf:`, completion: ` ${completion}` })),
		heldOut: [{ prompt: "A guide to mushrooms belongs on the shelf:", completion: " Nature" }],
		scripts: {},
		steps: ["npm run check", "npm run train", "npm run generate", OWN_ROWS],
	},
	images: {
		about: "Questions about pictures, for a model with a vision tower",
		rows: [
			...FILES,
			"\t// Paths of images in rows start here.",
			'\timage_root: "data",',
			"\t// Layers of the language model; the tower stays as it is.",
			'\tlora_target_modules: ["q_proj", "k_proj", "v_proj", "o_proj"],',
		],
		train: SHAPES.slice(0, 10).map(shapesRow),
		heldOut: SHAPES.slice(10).map((shapes, i) => shapesRow(shapes, 10 + i)),
		files: () => Object.fromEntries(SHAPES.map((shapes, i) => [`data/pictures/${i}.png`, shapesPicture(...shapes)])),
		scripts: { look: "arl inspect --html row.html" },
		steps: [
			"npm run check",
			"npm run look   # row.html shows a picture as the model gets it",
			"npm run train",
			"npm run chat",
			OWN_ROWS,
		],
	},
	mongo: {
		about: "Traces of agents in MongoDB, as AgentRL keeps them",
		rows: [
			"\t// The database is that of the environment variable ARL_DB_CONNECTION_STRING, which no file and no log ever holds.",
			'\tdb_source: "auto",',
		],
		train: CITIES.map(toolCall),
		heldOut: [],
		scripts: { import: "arl mongo import data/train.jsonl", status: "arl mongo status" },
		steps: [
			"export ARL_DB_CONNECTION_STRING=mongodb://127.0.0.1:27017/arl",
			"npm run import   # sample rows; leave it out where your agents have written theirs",
			"npm run check",
			"npm run train",
			"npm run chat",
		],
	},
} as const satisfies Readonly<Record<string, Template>>;

export type TemplateName = keyof typeof TEMPLATES;

/** What a project is made of. */
export interface Project {
	name: string;
	template: TemplateName;
	model: string;
	/** The version of arl. */
	version: string;
}

/** The files of a project by their paths. */
export function projectFiles({ name, template, model, version }: Project): Map<string, string | Uint8Array> {
	const { about, rows, train, heldOut, scripts, steps, files }: Template = TEMPLATES[template];
	const jsonl = (values: readonly object[]) => values.map((row) => `${JSON.stringify(row)}\n`).join("");
	const config = [
		'import { defineConfig } from "arl";',
		"",
		`// ${about}. Every option: npx arl train --help`,
		"export default defineConfig({",
		`\tmodel_name_or_path: ${JSON.stringify(model)},`,
		...rows,
		'\toutput_dir: "out",',
		"\t// An adapter (LoRA) of the model: a small file, and little memory. Without it all weights are trained.",
		"\tuse_peft: true,",
		"\tlearning_rate: 2e-4,",
		"\tnum_train_epochs: 3,",
		"\tper_device_train_batch_size: 2,",
		"\tlogging_steps: 1,",
		"});",
		"",
	];
	const reply = template === "completion" ? "generate" : "chat";
	const ask = {
		chat: `arl chat ${shellWord(model)} --adapter out`,
		generate: `arl generate --model_name_or_path ${shellWord(model)} --adapter out --raw --prompt "A book about whales belongs on the shelf:" --max_new_tokens 8`,
	};
	const manifest = {
		name,
		private: true,
		type: "module",
		scripts: {
			...scripts,
			check: "arl data check",
			train: "arl train",
			[reply]: ask[reply],
		},
		dependencies: { arl: version },
	};
	const readme = [
		`# ${name}`,
		"",
		`${about}: fine-tunes ${model} with arl. The options are in arl.config.ts.`,
		"",
		"```sh",
		"npm install",
		...steps.map((step) => (step === OWN_ROWS ? `# ${step}` : step)),
		"```",
		"",
	];
	return new Map<string, string | Uint8Array>([
		["arl.config.ts", config.join("\n")],
		["data/train.jsonl", jsonl(train)],
		...(heldOut.length > 0 ? ([["data/heldout.jsonl", jsonl(heldOut)]] as const) : []),
		["package.json", `${JSON.stringify(manifest, null, "\t")}\n`],
		["README.md", readme.join("\n")],
		[".gitignore", "node_modules/\nout/\n"],
		...Object.entries(files?.() ?? {}),
	]);
}

function shellWord(text: string): string {
	return /^[\w@./:-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}
