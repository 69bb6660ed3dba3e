/** The folder in `output_dir` for the lists of a database's documents. */
export const FOLDER = ".arl-rows";
