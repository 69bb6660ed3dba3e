/** Rows: their shape, and the datasets that a user may pass. */
export type { ConvertRecordToData, ConvertResult, DatabaseRecord } from "./sources/convert.js";
export type { Dataset, DatasetInfo, IndexedDataset, StreamDataset } from "./sources/custom.js";
export { ParquetDataset, type ParquetDatasetOptions } from "./sources/parquet/dataset.js";
export type { ByMessage, ChatMessage, ContentPart, RecordData, ToolCall } from "./sources/record.js";
