/** What this program notes of the columns of a Parquet file that it writes, for itself when it reads one. */

/** Key of the file's own metadata under which `ColumnNotes` are kept as JSON. */
export const NOTES_KEY = "arl.columns";

/** What the columns' types cannot say. */
export interface ColumnNotes {
	/** Columns whose text is JSON. */
	json: string[];
	/** Columns in which null stands for an absent key. */
	absent: string[];
}
