//! Parquet files as rows of JSON text, and rows of JSON text as Parquet files. The crate `parquet` reads pages and values; this
//! one puts rows together and chooses columns. Knows nothing of Node; its errors are `arl_model::Error`.

mod chunk;
mod column;
mod delta;
mod footer;
mod json;
mod leaf;
mod notes;
mod read;
mod rows;
mod schema;
mod values;
mod write;

pub use read::{ReadOptions, Rows, read};
pub use schema::ColumnNames;
pub use write::Writer;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use parquet::errors::ParquetError;

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Calls into the crate `parquet`, which panics on some damaged files: a panic becomes an error, and prints nothing.
fn contained<T>(call: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let print = take_hook();
        set_hook(Box::new(move |panic| {
            if !CONTAINED.get() {
                print(panic);
            }
        }));
    });
    CONTAINED.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CONTAINED.set(false);
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(ParquetError::General(text.unwrap_or("a panic without a message").to_owned()))
    })
}

/// What is wrong, without the names that the crate `parquet` gives its kinds of errors.
fn reason(error: &ParquetError) -> String {
    match error {
        ParquetError::General(text) | ParquetError::NYI(text) | ParquetError::EOF(text) => text.clone(),
        ParquetError::External(error) => error.to_string(),
        other => other.to_string(),
    }
}
