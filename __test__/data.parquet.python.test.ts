import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { writeParquet } from "../src/data/sources/parquet/write.js";
import { errorOf, temporaryFolder } from "./support/folder.js";
import { root } from "./support/real.js";
import { python, readRows, runPython } from "./support/tables.js";

const program = python("Parquet files of pyarrow and polars");
const folder = temporaryFolder();
const file = join(root, "assets", "train.jsonl");

/** A row without what Parquet cannot say: the order of a struct's keys, and whether null was written or filled in. */
function canonical(value: unknown): unknown {
	if (Array.isArray(value)) return value.map(canonical);
	if (typeof value !== "object" || value === null) return value;
	const entries = Object.entries(value).filter(([key, inner]) => inner !== null || key === "content");
	return Object.fromEntries(
		entries.sort(([a], [b]) => (a < b ? -1 : 1)).map(([key, inner]) => [key, canonical(inner)]),
	);
}

const rowsOf = (texts: string[]) => texts.map((text) => JSON.stringify(canonical(JSON.parse(text))));

/** Writes one file for each way of writing, named by its place in the list. */
const WRITE = `
import json, sys, pyarrow as pa, pyarrow.parquet as pq, polars as pl
table = pa.Table.from_pylist([json.loads(line) for line in open(sys.argv[1])])
frame = pl.read_ndjson(sys.argv[1])
for i, how in enumerate(json.loads(sys.argv[3])): pq.write_table(table, f'{sys.argv[2]}/pyarrow-{i}.parquet', **eval(how))
for i, how in enumerate(json.loads(sys.argv[4])): frame.write_parquet(f'{sys.argv[2]}/polars-{i}.parquet', **eval(how))
`;

const text = "['messages.list.element.content', 'messages.list.element.role']";
const codecs = ["none", "snappy", "gzip", "zstd", "brotli", "lz4"];
const pyarrow = [
	...codecs.map((codec) => `{'compression': '${codec}', 'row_group_size': 700}`),
	"{'data_page_version': '2.0', 'data_page_size': 4000, 'compression': 'zstd'}",
	"{'use_dictionary': False, 'data_page_size': 3000, 'write_page_checksum': True}",
	"{'data_page_version': '2.0', 'write_page_checksum': True, 'write_page_index': True, 'data_page_size': 2000}",
	`{'use_dictionary': False, 'column_encoding': {path: 'DELTA_BYTE_ARRAY' for path in ${text}}}`,
	`{'use_dictionary': False, 'column_encoding': {path: 'DELTA_LENGTH_BYTE_ARRAY' for path in ${text}}, 'data_page_version': '2.0'}`,
	"{'use_compliant_nested_type': False, 'store_schema': False, 'version': '1.0'}",
];
const polars = [
	...codecs.map((codec) => `{'compression': '${codec.replace("none", "uncompressed")}', 'row_group_size': 900}`),
	"{'data_page_size': 2000}",
];

describe.skipIf(program === null)("Parquet files of Python", () => {
	const expected = rowsOf(readFileSync(file, "utf8").trimEnd().split("\n"));
	const run = (source: string, ...words: string[]) => runPython(program ?? "", source, words);

	beforeAll(() => {
		run(WRITE, file, folder, JSON.stringify(pyarrow), JSON.stringify(polars));
	}, 60_000);

	const written = [
		...pyarrow.map((how, i) => [`pyarrow-${i}`, how] as const),
		...polars.map((how, i) => [`polars-${i}`, how] as const),
	];
	it.each(written)("%s, written with %s, has the rows that were given", async (name) => {
		expect(rowsOf((await readRows([join(folder, `${name}.parquet`)])).rows)).toEqual(expected);
	});

	it("have each value exactly, whatever its type and encoding", async () => {
		const path = join(folder, "types.parquet");
		const source = `
import sys, datetime as dt, decimal, pyarrow as pa, pyarrow.parquet as pq
table = pa.table({
  'i64': pa.array([-2**63, None, 2**63 - 1], pa.int64()),
  'u64': pa.array([2**64 - 1, 0, None], pa.uint64()),
  'u32': pa.array([2**32 - 1, 2**31, 0], pa.uint32()),
  'i32': pa.array([-2**31, 2**31 - 1, 0], pa.int32()),
  'f16': pa.array([1.0, -0.5, 6.1e-5], pa.float16()),
  'f32': pa.array([0.1, 1.0, None], pa.float32()),
  'f64': pa.array([0.1, 1e300, -0.0], pa.float64()),
  'flag': pa.array([True, None, False]),
  'dec': pa.array([decimal.Decimal('-1.230'), None, decimal.Decimal('99999999999999999999999999999999999.999')], pa.decimal128(38, 3)),
  'day': pa.array([dt.date(1, 1, 1), dt.date(9999, 12, 31), None]),
  'ns': pa.array([-1, 1700000000123456789, None], pa.timestamp('ns')),
  'ms': pa.array([-1, 0, None], pa.timestamp('ms', tz='UTC')),
  'clock': pa.array([dt.time(23, 59, 59, 999999), dt.time(0), None], pa.time64('us')),
  'nothing': pa.nulls(3),
  'fixed': pa.array([b'\\xff\\xd8\\xff\\x00', b'\\x00\\x00\\x00\\x01', None], pa.binary(4)),
  'large': pa.array(['a', None, 'c'], pa.large_string()),
  'pairs': pa.array([[('b', 1), ('a', None)], [], None], pa.map_(pa.string(), pa.int64())),
  'words': pa.array(['x', 'y', 'x']).dictionary_encode(),
})
pq.write_table(table, sys.argv[1], **eval(sys.argv[2]))
`;
		const first =
			'{"i64":-9223372036854775808,"u64":18446744073709551615,"u32":4294967295,"i32":-2147483648,"f16":1.0,"f32":0.10000000149011612,"f64":0.1,"flag":true,"dec":-1.230,"day":"0001-01-01","ns":"1969-12-31T23:59:59.999999999","ms":"1969-12-31T23:59:59.999Z","clock":"23:59:59.999999","nothing":null,"fixed":"data:application/octet-stream;base64,/9j/AA==","large":"a","pairs":{"b":1,"a":null},"words":"x"}';
		const delta = "['i64', 'i32', 'u32', 'u64', 'ns', 'ms', 'clock', 'day']";
		const split = "['f32', 'f64', 'i64', 'fixed', 'dec']";
		for (const how of [
			"{}",
			"{'use_dictionary': False, 'data_page_version': '2.0'}",
			`{'use_dictionary': False, 'column_encoding': {name: 'DELTA_BINARY_PACKED' for name in ${delta}}}`,
			`{'use_dictionary': False, 'column_encoding': {name: 'BYTE_STREAM_SPLIT' for name in ${split}}}`,
			"{'use_deprecated_int96_timestamps': True}",
		]) {
			run(source, path, how);
			const { rows } = await readRows([path]);
			const int96 = how.includes("int96");
			expect(rows[0]).toBe(int96 ? first.replace("59.999Z", "59.999000000") : first);
			const second = JSON.parse(rows[1] ?? "");
			expect(second).toMatchObject({ i64: null, u32: 2 ** 31, dec: null, day: "9999-12-31", pairs: {}, large: null });
			expect(rows[1]).toContain('"f64":1e+300');
			expect(rows[2]).toContain('"f64":-0.0');
			expect(rows[2]).toContain('"dec":99999999999999999999999999999999999.999');
			expect(rows[2]).toContain('"pairs":null,"words":"x"');
		}
	}, 60_000);

	it("whose pages have checksums are refused where a single bit of text is another", async () => {
		const path = join(folder, "checked.parquet");
		const source = `
import sys, pyarrow as pa, pyarrow.parquet as pq
table = pa.table({'text': ['a rather particular text']})
pq.write_table(table, sys.argv[1], compression='none', use_dictionary=False, write_page_checksum=True, write_statistics=False)
`;
		run(source, path);
		expect((await readRows([path])).rows).toEqual(['{"text":"a rather particular text"}']);
		const bytes = readFileSync(path);
		const at = bytes.indexOf("particular");
		bytes[at] = (bytes[at] ?? 0) ^ 1;
		writeFileSync(path, bytes);
		const error = await errorOf(readRows([path]));
		expect(error.message).toMatch(/column text cannot be read .*checksum/);
	});

	it("with encrypted columns are named as such", async () => {
		const path = join(folder, "secret.parquet");
		const source = `
import sys, base64, pyarrow as pa, pyarrow.parquet as pq, pyarrow.parquet.encryption as pe
class Kms(pe.KmsClient):
  def __init__(self, config): pe.KmsClient.__init__(self)
  def wrap_key(self, key, name): return base64.b64encode(key)
  def unwrap_key(self, key, name): return base64.b64decode(key)
factory = pe.CryptoFactory(lambda config: Kms(config))
how = pe.EncryptionConfiguration(footer_key='k', column_keys={'k': ['b']}, plaintext_footer=sys.argv[2] == 'plain')
properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), how)
table = pa.table({'a': [1], 'b': ['x']})
with pq.ParquetWriter(sys.argv[1], table.schema, encryption_properties=properties) as writer: writer.write_table(table)
`;
		for (const footer of ["plain", "hidden"]) {
			run(source, path, footer);
			const error = await errorOf(readRows([path]));
			expect(error.message).toBe(`${path}: the Parquet file is encrypted`);
		}
	});

	it("can be made from the files that are written here", async () => {
		const path = join(folder, "written.parquet");
		const rows = readFileSync(file, "utf8").trimEnd().split("\n");
		await writeParquet(path, rows);
		const source = `
import json, sys, pyarrow.parquet as pq, polars as pl
rows = [json.loads(line) for line in open(sys.argv[2])]
for table in (pq.read_table(sys.argv[1]).to_pylist(), pl.read_parquet(sys.argv[1]).to_dicts()):
  read = [{key: json.loads(row[key]) for key in ('messages', 'tools') if row[key] is not None} for row in table]
  assert read == rows
print(len(rows))
`;
		expect(run(source, path, file).trim()).toBe(String(rows.length));
	});
});
