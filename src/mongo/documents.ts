/**
 * The documents of AgentRL's models in the database: collections, classes, fields, statuses. One table for reading, writing and
 * counting them. Knows neither the driver nor rows.
 */

/** The splits that AgentRL's models allow. */
export const SPLITS = ["train", "valid", "test", "eval"] as const;
export type Split = (typeof SPLITS)[number];

export type CollectionName = "DBRecordData" | "Record" | "DispatchedSamplingTask" | "Task";

interface CollectionAbout {
	/** The fields of AgentRL's model in its order, `_id` and `_class_id` left out. */
	fields: readonly string[];
	/** The values of `status`; empty: documents have none. */
	statuses: readonly string[];
	/** The index that reading needs, and AgentRL does not create. */
	index: Readonly<Record<string, 1>> | null;
}

/** A collection has the name of its class; so does `_class_id` (for a subclass, `Task.MCPTask`). */
export const COLLECTIONS: Readonly<Record<CollectionName, CollectionAbout>> = {
	DBRecordData: {
		fields: [
			"messages",
			"tools",
			"scores",
			"advantages",
			"created_at_step",
			"reward",
			"step",
			"logprobs",
			"record_id",
			"split",
			"fetched",
		],
		statuses: [],
		index: { split: 1, _id: 1 },
	},
	Record: {
		fields: ["task", "split", "traj_id", "traj", "meta_infos", "status", "score", "trained_count", "last_trained_step"],
		statuses: ["created", "running", "completed", "failed", "scoring", "scored", "ready", "abandoned"],
		index: { status: 1, split: 1, _id: 1 },
	},
	DispatchedSamplingTask: {
		fields: [
			"task",
			"traj_id",
			"req_type",
			"request",
			"response",
			"sampled_from",
			"priority",
			"creat_time",
			"finish_time",
			"score",
			"advantage",
			"created_at_step",
			"is_minio_managed",
			"task_type",
			"status",
		],
		statuses: [
			"pending",
			"running",
			"completed",
			"failed",
			"toolfailed",
			"formaterror",
			"repeaterror",
			"cancelled",
			"dropped",
		],
		// Samples are found by `_id`, through the links of their record.
		index: null,
	},
	Task: {
		fields: ["tid", "split", "epoch", "added_step", "description", "num_samples", "scores", "status"],
		statuses: ["created", "running", "waiting", "completed"],
		index: null,
	},
};

/** Documents must be smaller than this: the driver does not send larger ones. */
export const MAX_DOCUMENT_BYTES = 16 * 1024 * 1024;
