// What the page shows: the runs, where new data come from, and what the user has chosen.

const given = JSON.parse(document.getElementById("data").textContent);

export const state = {
	runs: given.runs,
	/** The server's paths for this page; null on a page that is a file. */
	live: given.live,
	smooth: true,
	log: false,
	/** The metric that runs are compared by. */
	metric: "loss",
	/** Folders of the runs that are not drawn. */
	hidden: new Set(),
};

/** Where everything is drawn. */
export const page = document.getElementById("page");
