//! A column's values of whatever physical type, decoded some rows at a time.

use std::sync::{Arc, Mutex, PoisonError};

use parquet::basic::{Encoding, Type as Physical};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, DoubleType, FixedLenByteArray, FixedLenByteArrayType, FloatType,
    Int32Type, Int64Type, Int96, Int96Type,
};
use parquet::errors::Result;
use parquet::schema::types::{ColumnDescPtr, ColumnDescriptor, Type};

use crate::values::Value;

/// Rows whose values are decoded at a time.
const ROWS: usize = 1024;

/// The levels of the entries that were decoded last; empty where the column has none of that kind.
#[derive(Default)]
pub(crate) struct Levels {
    pub(crate) repetition: Vec<i16>,
    pub(crate) definition: Vec<i16>,
}

/// Decodes pages. One is given at a time, and the next only once `decode` finds nothing more in it, so that no more than one
/// is held.
pub(crate) trait Column {
    fn give(&mut self, page: Page);
    /// Decodes the next entries in place of those before, and returns how many there are.
    fn decode(&mut self, levels: &mut Levels) -> Result<usize>;
    /// A value of those that were decoded.
    fn value(&self, index: usize) -> Value<'_>;
}

/// The page that a reader of the crate `parquet` gets when it asks for the next one.
#[derive(Clone, Default)]
struct Slot(Arc<Mutex<Option<Page>>>);

impl Slot {
    fn page(&self) -> std::sync::MutexGuard<'_, Option<Page>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Iterator for Slot {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.page().take().map(Ok)
    }
}

impl PageReader for Slot {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        Ok(self.page().take())
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        Ok(None)
    }

    fn skip_next_page(&mut self) -> Result<()> {
        *self.page() = None;
        Ok(())
    }

    /// A row may continue in the next page. The reader need not know: the levels show where rows begin.
    fn at_record_boundary(&mut self) -> Result<bool> {
        Ok(false)
    }
}

/// Values of one physical type.
struct Typed<T: DataType> {
    reader: ColumnReaderImpl<T>,
    slot: Slot,
    values: Vec<T::T>,
}

impl<T: DataType> Typed<T> {
    fn new(column: ColumnDescPtr) -> Self {
        let slot = Slot::default();
        Self { reader: ColumnReaderImpl::new(column, Box::new(slot.clone())), slot, values: Vec::new() }
    }
}

impl<T: DataType> Column for Typed<T>
where
    for<'a> Value<'a>: From<&'a T::T>,
{
    fn give(&mut self, page: Page) {
        *self.slot.page() = Some(page);
    }

    fn decode(&mut self, levels: &mut Levels) -> Result<usize> {
        self.values.clear();
        let Levels { repetition, definition } = levels;
        repetition.clear();
        definition.clear();
        let (_, _, entries) = self.reader.read_records(ROWS, Some(definition), Some(repetition), &mut self.values)?;
        Ok(entries)
    }

    fn value(&self, index: usize) -> Value<'_> {
        self.values.get(index).map_or(Value::None, Value::from)
    }
}

/// Integers of 32 bits. Where they are packed as differences some writers (DuckDB) have the first one, unsigned, in 33 bits,
/// so such pages are decoded in 64.
struct Int32 {
    plain: Typed<Int32Type>,
    differences: Typed<Int64Type>,
}

impl Int32 {
    fn new(column: ColumnDescPtr) -> Result<Self> {
        let wide = Arc::new(Type::primitive_type_builder(column.name(), Physical::INT64).build()?);
        let (definition, repetition) = (column.max_def_level(), column.max_rep_level());
        let wide = ColumnDescriptor::new(wide, definition, repetition, column.path().clone());
        Ok(Self { plain: Typed::new(column), differences: Typed::new(Arc::new(wide)) })
    }
}

impl Column for Int32 {
    fn give(&mut self, page: Page) {
        if page.is_data_page() && page.encoding() == Encoding::DELTA_BINARY_PACKED {
            self.differences.give(page);
        } else {
            self.plain.give(page);
        }
    }

    fn decode(&mut self, levels: &mut Levels) -> Result<usize> {
        let count = self.plain.decode(levels)?;
        if count > 0 {
            return Ok(count);
        }
        let count = self.differences.decode(levels)?;
        self.plain.values.extend(self.differences.values.iter().map(|&value| value as i32));
        Ok(count)
    }

    fn value(&self, index: usize) -> Value<'_> {
        self.plain.value(index)
    }
}

/// The decoder of a column's pages.
pub(crate) fn open(column: &ColumnDescPtr) -> Result<Box<dyn Column>> {
    let physical = column.physical_type();
    let column = Arc::clone(column);
    Ok(match physical {
        Physical::BOOLEAN => Box::new(Typed::<BoolType>::new(column)),
        Physical::INT32 => Box::new(Int32::new(column)?),
        Physical::INT64 => Box::new(Typed::<Int64Type>::new(column)),
        Physical::INT96 => Box::new(Typed::<Int96Type>::new(column)),
        Physical::FLOAT => Box::new(Typed::<FloatType>::new(column)),
        Physical::DOUBLE => Box::new(Typed::<DoubleType>::new(column)),
        Physical::BYTE_ARRAY => Box::new(Typed::<ByteArrayType>::new(column)),
        Physical::FIXED_LEN_BYTE_ARRAY => Box::new(Typed::<FixedLenByteArrayType>::new(column)),
    })
}

macro_rules! values {
    ($($from:ty: $value:ident => $into:expr;)*) => {
        $(impl<'a> From<&'a $from> for Value<'a> {
            fn from($value: &'a $from) -> Self {
                $into
            }
        })*
    };
}

values! {
    bool: value => Value::Bool(*value);
    i32: value => Value::Integer(i64::from(*value));
    i64: value => Value::Integer(*value);
    Int96: value => Value::Int96(value.data());
    f32: value => Value::Float(f64::from(*value));
    f64: value => Value::Float(*value);
    ByteArray: value => Value::Bytes(value.data());
    FixedLenByteArray: value => Value::Bytes(value.data());
}
