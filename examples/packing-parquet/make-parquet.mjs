// Writes rows.parquet from rows.jsonl with DuckDB (npm install @duckdb/node-api); polars, pandas or Spark would do as well.
import { DuckDBInstance } from "@duckdb/node-api";

const connection = await (await DuckDBInstance.create()).connect();
await connection.run("copy (from read_json('rows.jsonl')) to 'rows.parquet' (codec zstd)");
