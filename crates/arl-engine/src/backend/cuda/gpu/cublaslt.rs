//! Matrix products by cuBLASLt: a plan for each shape. The library counts in columns, so that it is asked for the transposed
//! product of row-major matrices: `c^T = b^T a^T`.

use std::ffi::c_void;
use std::sync::Arc;

use arl_model::{Error, ErrorCode, Result};
use candle_core::cuda_backend::cudarc;
use cudarc::cublas::sys::cublasOperation_t;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as DescAttribute, cublasLtMatmulPreferenceAttributes_t as PrefAttribute,
    cublasLtMatrixLayout_t, cublasLtReductionScheme_t, cudaDataType,
};
use cudarc::driver::{CudaContext, CudaStream};

use super::failed;
use super::memory::Allocation;
use crate::backend::cuda::LIBRARY_BYTES;
use crate::backend::cuda::least_recent::LeastRecent;
use crate::backend::{DType, Layout, Matmul};

/// Most plans that are kept. A layer has some fifteen products, but each new number of tokens makes as many new shapes.
const MOST_PLANS: usize = 2048;

/// Addresses of the operands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) c: u64,
    pub(super) bias: Option<u64>,
}

/// What a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    strides: [usize; 3],
    types: [DType; 3],
    accumulate: bool,
    bias: Option<DType>,
    /// Bytes that the addresses of a, b and c are multiples of.
    alignments: [u32; 3],
}

impl Key {
    fn new(op: &Matmul, addresses: Addresses) -> Self {
        // Above 16 bytes nothing is gained.
        let alignment = |address: u64| 1 << address.trailing_zeros().min(4);
        Key {
            layout: op.layout,
            m: op.m,
            n: op.n,
            k: op.k,
            strides: [op.a.stride, op.b.stride, op.c.stride],
            types: [op.a.buffer.dtype, op.b.buffer.dtype, op.c.buffer.dtype],
            accumulate: op.accumulate,
            bias: op.bias.map(|bias| bias.dtype),
            alignments: [addresses.a, addresses.b, addresses.c].map(alignment),
        }
    }
}

/// A product as the library wants it described, and the algorithm that it chose.
struct Plan {
    desc: cublasLtMatmulDesc_t,
    /// Of the library's a (our b), b (our a) and c.
    layouts: [cublasLtMatrixLayout_t; 3],
    algo: cublasLtMatmulAlgo_t,
}

/// The library, and the plans that were used last.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: Allocation,
    plans: LeastRecent<Key, Plan>,
}

// SAFETY: the handles may be used from any thread, one at a time, which `&mut self` has.
unsafe impl Send for CublasLt {}

fn refused(what: &str, error: CublasError) -> Error {
    Error::new(ErrorCode::Device, format!("cuBLASLt refuses {what}: {error:?}"))
        .hint("run `arl doctor`, which shows which libraries were found")
}

fn data_type(dtype: DType) -> Result<cudaDataType> {
    match dtype {
        DType::F32 => Ok(cudaDataType::CUDA_R_32F),
        DType::Bf16 => Ok(cudaDataType::CUDA_R_16BF),
        DType::F16 => Ok(cudaDataType::CUDA_R_16F),
        other => Err(Error::new(ErrorCode::Internal, format!("a matrix product of {other:?}"))),
    }
}

/// Sets an attribute of a description to a plain value.
fn set<T>(desc: cublasLtMatmulDesc_t, attribute: DescAttribute, value: T) -> std::result::Result<(), CublasError> {
    // SAFETY: the description is valid, and the value lives through the call that copies it.
    unsafe { result::set_matmul_desc_attribute(desc, attribute, (&raw const value).cast(), size_of::<T>()) }
}

impl CublasLt {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        context.bind_to_thread().map_err(|error| failed("the device cannot be used", error))?;
        Ok(CublasLt {
            handle: result::create_handle().map_err(|error| refused("to start", error))?,
            workspace: Allocation::device(context, LIBRARY_BYTES)
                .map_err(|error| failed("memory for cuBLASLt", error))?,
            plans: LeastRecent::new(MOST_PLANS),
        })
    }

    /// Queues a product of operands at these addresses.
    pub(super) fn matmul(&mut self, op: &Matmul, addresses: Addresses, stream: &CudaStream) -> Result<()> {
        let key = Key::new(op, addresses);
        let handle = self.handle;
        // What a plan consists of is the host's alone, and a queued product no longer needs it.
        let plan = self.plans.get_or_make(key, || {
            Plan::new(handle, &key, addresses.bias).map_err(|error| refused(&format!("{key:?}"), error))?
        })?;
        let refusing = |error| refused(&format!("{key:?}"), error);
        if let Some(bias) = addresses.bias {
            set(plan.desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias).map_err(refusing)?;
        }
        let (alpha, beta) = (1f32, if op.accumulate { 1f32 } else { 0f32 });
        let pointer = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        let [a_layout, b_layout, c_layout] = plan.layouts;
        // SAFETY: plan and workspace live as long as `self`, which waits for the device before it goes; the operands are at
        // the addresses with the shapes of the plan, as the caller vouches.
        unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(addresses.b),
                a_layout,
                pointer(addresses.a),
                b_layout,
                pointer(addresses.c),
                c_layout,
                pointer(addresses.c),
                c_layout,
                &plan.algo,
                pointer(self.workspace.address()),
                LIBRARY_BYTES,
                stream.cu_stream().cast(),
            )
        }
        .map_err(refusing)
    }
}

impl Plan {
    /// Describes the product and asks for the best algorithm.
    fn new(
        handle: sys::cublasLtHandle_t,
        key: &Key,
        bias: Option<u64>,
    ) -> std::result::Result<Result<Self>, CublasError> {
        let [a_type, b_type, c_type] = match key.types.map(data_type) {
            [Ok(a), Ok(b), Ok(c)] => [a, b, c],
            [Err(error), ..] | [_, Err(error), _] | [.., Err(error)] => return Ok(Err(error)),
        };
        let bias_type = match key.bias.map(data_type).transpose() {
            Ok(bias_type) => bias_type,
            Err(error) => return Ok(Err(error)),
        };
        let (m, n, k) = (key.m as u64, key.n as u64, key.k as u64);
        let [a_stride, b_stride, c_stride] = key.strides.map(|stride| stride as i64);
        // Columns by rows of our matrices as they are stored, and whether they are to be transposed.
        let ((b_rows, b_columns), transpose_b) =
            if key.layout == Layout::Nt { ((k, n), true) } else { ((n, k), false) };
        let ((a_rows, a_columns), transpose_a) =
            if key.layout == Layout::Tn { ((m, k), true) } else { ((k, m), false) };
        let operation =
            |transpose| if transpose { cublasOperation_t::CUBLAS_OP_T } else { cublasOperation_t::CUBLAS_OP_N };

        let desc = result::create_matmul_desc(cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F)?;
        set(desc, DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, operation(transpose_b))?;
        set(desc, DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, operation(transpose_a))?;
        if let Some((bias, bias_type)) = bias.zip(bias_type) {
            set(desc, DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            set(desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
            // By default the library takes it for the result's.
            set(desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, bias_type)?;
        }
        let layouts = [
            result::create_matrix_layout(b_type, b_rows, b_columns, b_stride)?,
            result::create_matrix_layout(a_type, a_rows, a_columns, a_stride)?,
            result::create_matrix_layout(c_type, n, m, c_stride)?,
        ];
        let pref = result::create_matmul_pref()?;
        let [a_alignment, b_alignment, c_alignment] = key.alignments;
        let limits = [
            (PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b_alignment),
            (PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a_alignment),
            (PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c_alignment),
            (PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c_alignment),
        ];
        // SAFETY: preference, description and layouts are valid; values live through the calls that copy them.
        let found = unsafe {
            let workspace = LIBRARY_BYTES;
            let attribute = PrefAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(pref, attribute, (&raw const workspace).cast(), size_of::<usize>())?;
            // Where k is split, parts are added in f32. By default the library may also round each part to the type of c.
            let schemes = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            let attribute = PrefAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
            result::set_matmul_pref_attribute(pref, attribute, (&raw const schemes).cast(), size_of::<u32>())?;
            for (attribute, bytes) in limits {
                result::set_matmul_pref_attribute(pref, attribute, (&raw const bytes).cast(), size_of::<u32>())?;
            }
            let [a, b, c] = layouts;
            let found = result::get_matmul_algo_heuristic(handle, desc, a, b, c, c, pref);
            result::destroy_matmul_pref(pref)?;
            found?
        };
        Ok(Ok(Plan { desc, layouts, algo: found.algo }))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once. No caller is left to report a failure to.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: created in `new`, destroyed once, after the device was waited for.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
