/** Rows: their shape, and the data sets that code may give. */
export type { ConvertRecordToData, ConvertResult, DatabaseRecord } from "./convert.js";
export type { Dataset, DatasetInfo, IndexedDataset, StreamDataset } from "./custom.js";
export { ParquetDataset, type ParquetDatasetOptions } from "./parquet/dataset.js";
export type { ByMessage, ChatMessage, ContentPart, RecordData, ToolCall } from "./record.js";
