//! Matrix products by cuBLASLt: a plan for each shape, with the library's first algorithm or one chosen by measurement
//! (`algorithms.rs`). The library counts in columns, so that it is asked for the transposed product of row-major matrices:
//! `c^T = b^T a^T`.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;

use arl_model::{Error, ErrorCode, Result};
use candle_core::cuda_backend::cudarc;
use cudarc::cublas::sys::cublasOperation_t;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t as DescAttribute, cublasLtMatmulHeuristicResult_t,
    cublasLtMatmulPreferenceAttributes_t as PrefAttribute, cublasLtMatrixLayout_t, cublasLtReductionScheme_t,
    cublasStatus_t, cudaDataType,
};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::failed;
use super::memory::Allocation;
use crate::backend::cuda::LIBRARY_BYTES;
use crate::backend::cuda::algorithms::{Algorithm, Algorithms, MOST_PROPOSALS, Product, Proposals};
use crate::backend::cuda::least_recent::LeastRecent;
use crate::backend::{DType, Layout, Matmul, MatmulAlgorithms};
use crate::placement::arena::ALIGNMENT;

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

impl Product {
    fn new(op: &Matmul, addresses: Addresses) -> Self {
        // As far as the arena promises it: whether an address is a multiple of more depends on what precedes it, which
        // recomputation and offloading change, and they are to change no bit.
        let alignment = |address: u64| 1 << address.trailing_zeros().min(ALIGNMENT.ilog2());
        Product {
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

/// A product as the library wants it described.
struct Description {
    desc: cublasLtMatmulDesc_t,
    /// Of the library's a (our b), b (our a) and c.
    layouts: [cublasLtMatrixLayout_t; 3],
}

/// A product and its algorithm.
struct Plan {
    description: Description,
    algorithm: cublasLtMatmulAlgo_t,
}

/// The library, and the plans that were used last.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: Allocation,
    plans: LeastRecent<Product, Plan>,
    gpu: String,
    /// `None`: the first algorithm that the library proposes.
    algorithms: Option<Algorithms>,
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
    pub(super) fn new(context: &Arc<CudaContext>, gpu: &str) -> Result<Self> {
        context.bind_to_thread().map_err(|error| failed("the device cannot be used", error))?;
        Ok(CublasLt {
            handle: result::create_handle().map_err(|error| refused("to start", error))?,
            workspace: Allocation::device(context, LIBRARY_BYTES)
                .map_err(|error| failed("memory for cuBLASLt", error))?,
            plans: LeastRecent::new(MOST_PLANS),
            gpu: gpu.into(),
            algorithms: None,
        })
    }

    /// Queues a product of operands at these addresses. The first one of a shape may wait for the device, to measure.
    pub(super) fn matmul(&mut self, op: &Matmul, addresses: Addresses, stream: &CudaStream) -> Result<()> {
        let product = Product::new(op, addresses);
        let refusing = |error| refused(&format!("{product:?}"), error);
        let CublasLt { handle, workspace, plans, algorithms, .. } = self;
        let queue = Queue { handle: *handle, workspace: workspace.address(), stream };
        // What a plan consists of is the host's alone, and a queued product no longer needs it.
        let plan = plans.get_or_make(product, || {
            let description = Description::new(&product, addresses.bias)?.map_err(refusing)?;
            let mut library = Library { queue, description: &description, product, addresses, events: None };
            let algorithm = match algorithms {
                Some(algorithms) => algorithms.choose(&product, &mut library)?,
                None => library.proposed(1)?[0],
            };
            Ok::<_, Error>(Plan { description, algorithm: cublasLtMatmulAlgo_t { data: algorithm.0 } })
        })?;
        if let Some(bias) = addresses.bias {
            set(plan.description.desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias).map_err(refusing)?;
        }
        queue.matmul(&plan.description, &plan.algorithm, op.accumulate, addresses).map_err(refusing)
    }
}

impl MatmulAlgorithms for CublasLt {
    fn autotune(&mut self, cache: Option<&Path>) -> Option<String> {
        // SAFETY: it only reads a constant of the library.
        let version = unsafe { sys::cublasLtGetVersion() };
        let (algorithms, notice) = Algorithms::open(&self.gpu, version, cache);
        self.algorithms = Some(algorithms);
        self.plans.clear();
        notice
    }

    fn chosen(&self) -> Option<String> {
        self.algorithms.as_ref()?.to_text()
    }

    fn restore(&mut self, saved: &str) -> Option<String> {
        self.plans.clear();
        match &mut self.algorithms {
            Some(algorithms) => algorithms.restore(saved),
            None => Some(
                "the checkpoint's algorithms of matrix products were chosen by measurement, and `matmul_autotune` is off: results differ in bits"
                    .into(),
            ),
        }
    }
}

/// Where products are queued, and the memory that the library may use meanwhile.
#[derive(Clone, Copy)]
struct Queue<'a> {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    stream: &'a CudaStream,
}

impl Queue<'_> {
    fn matmul(
        self,
        description: &Description,
        algorithm: &cublasLtMatmulAlgo_t,
        accumulate: bool,
        addresses: Addresses,
    ) -> std::result::Result<(), CublasError> {
        let (alpha, beta) = (1f32, if accumulate { 1f32 } else { 0f32 });
        let pointer = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        let [a_layout, b_layout, c_layout] = description.layouts;
        // SAFETY: description and workspace live as long as `CublasLt`, which waits for the device before it goes; the operands
        // are at the addresses with the shapes of the description, as the caller vouches.
        unsafe {
            result::matmul(
                self.handle,
                description.desc,
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
                algorithm,
                pointer(self.workspace),
                LIBRARY_BYTES,
                self.stream.cu_stream().cast(),
            )
        }
    }
}

/// What the library has for one product, measured on the product's own operands.
struct Library<'a> {
    queue: Queue<'a>,
    description: &'a Description,
    product: Product,
    addresses: Addresses,
    /// Before and after a product that is timed.
    events: Option<[CudaEvent; 2]>,
}

impl Proposals for Library<'_> {
    fn proposed(&mut self, most: usize) -> Result<Vec<Algorithm>> {
        let found = self.description.heuristics(self.queue.handle, &self.product, most.min(MOST_PROPOSALS));
        found.map_err(|error| refused(&format!("{:?}", self.product), error))
    }

    fn takes(&mut self, algorithm: &Algorithm) -> bool {
        let algorithm = cublasLtMatmulAlgo_t { data: algorithm.0 };
        let [a, b, c] = self.description.layouts;
        let mut found = MaybeUninit::<cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: handle, description and layouts are valid; the result is read where the call has written it.
        unsafe {
            let desc = self.description.desc;
            let status = sys::cublasLtMatmulAlgoCheck(
                self.queue.handle,
                desc,
                a,
                b,
                c,
                c,
                &raw const algorithm,
                found.as_mut_ptr(),
            );
            status == cublasStatus_t::CUBLAS_STATUS_SUCCESS && found.assume_init().workspaceSize <= LIBRARY_BYTES
        }
    }

    fn time(&mut self, algorithm: &Algorithm) -> Result<f64> {
        let stream = self.queue.stream;
        let [start, end] = match &mut self.events {
            Some(events) => events,
            none => none.insert(timing_events(stream)?),
        };
        let timing = |error| failed("timing a matrix product", error);
        start.record(stream).map_err(timing)?;
        let algorithm = cublasLtMatmulAlgo_t { data: algorithm.0 };
        self.queue
            .matmul(self.description, &algorithm, self.product.accumulate, self.addresses)
            .map_err(|error| refused(&format!("{:?}", self.product), error))?;
        end.record(stream).map_err(timing)?;
        // Waits for both.
        Ok(f64::from(start.elapsed_ms(end).map_err(timing)?) / 1e3)
    }
}

/// Two events that keep the time.
fn timing_events(stream: &CudaStream) -> Result<[CudaEvent; 2]> {
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let both = event().and_then(|first| Ok([first, event()?]));
    both.map_err(|error| failed("an event with a time", error))
}

impl Description {
    /// The inner error is the library's.
    fn new(key: &Product, bias: Option<u64>) -> Result<std::result::Result<Self, CublasError>> {
        let [a, b, c] = key.types.map(data_type);
        let types = [a?, b?, c?];
        let bias = bias.zip(key.bias.map(data_type).transpose()?);
        Ok(Self::of_types(key, types, bias))
    }

    fn of_types(
        key: &Product,
        [a_type, b_type, c_type]: [cudaDataType; 3],
        bias: Option<(u64, cudaDataType)>,
    ) -> std::result::Result<Self, CublasError> {
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
        if let Some((bias, bias_type)) = bias {
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
        Ok(Description { desc, layouts })
    }

    /// At most so many algorithms, the best guess first.
    fn heuristics(
        &self,
        handle: sys::cublasLtHandle_t,
        key: &Product,
        most: usize,
    ) -> std::result::Result<Vec<Algorithm>, CublasError> {
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
            let [a, b, c] = self.layouts;
            let mut found = [MaybeUninit::<cublasLtMatmulHeuristicResult_t>::uninit(); MOST_PROPOSALS];
            let (first, mut count) = (found.as_mut_ptr().cast(), 0);
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.desc,
                a,
                b,
                c,
                c,
                pref,
                most as i32,
                first,
                &raw mut count,
            );
            result::destroy_matmul_pref(pref)?;
            status.result()?;
            // As many as it says are written.
            let found = found.iter().take(count as usize).map(|found| found.assume_init());
            found.filter(|found| found.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS).collect::<Vec<_>>()
        };
        if found.is_empty() {
            return Err(CublasError(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        }
        Ok(found.iter().map(|found| Algorithm(found.algo.data)).collect())
    }
}

impl Drop for Description {
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
