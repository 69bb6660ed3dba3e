//! Attention by cuDNN: the library, opened where attention is first asked for, and a plan in both passes for each shape, made
//! on threads of their own.

use std::path::Path;
use std::sync::Arc;

use arl_cudnn::{Cudnn, Operands, Pass, Plan, capability_refusal};
use arl_model::{Error, ErrorCode, Result};
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaContext, CudaStream};

use crate::backend::cuda::packed::{PackedAttention, PackedShape};
use crate::backend::cuda::planner::{Made, Maker, Planner};

/// The library that was found and opened with CUDA's own.
const LIBRARY: &str = "libcudnn.so.9";

/// Most threads that make plans; each plan keeps one of them busy for a second or two.
const THREADS: usize = 4;

/// Forward and backward.
type Plans = (Plan, Plan);

/// cuDNN on one GPU, and the plans so far.
pub(super) struct Library {
    capability: (i32, i32),
    context: Arc<CudaContext>,
    /// `None`: not asked for yet.
    opened: Option<std::result::Result<Opened, String>>,
}

/// The library in use.
struct Opened {
    /// They go before the library does.
    plans: Planner<PackedShape, Plans>,
    /// Queues them.
    cudnn: Cudnn,
}

impl Library {
    pub(super) fn new(capability: (i32, i32), context: Arc<CudaContext>) -> Self {
        Library { capability, context, opened: None }
    }

    /// As [`super::Device::expect_attention`].
    pub(super) fn expect(&mut self, shape: &PackedShape) {
        if let Ok(opened) = self.open() {
            opened.plans.expect(shape);
        }
    }

    /// As [`super::Device::plan_attention`]; the device is the current one of this thread.
    pub(super) fn plan(&mut self, shape: &PackedShape) -> std::result::Result<(), String> {
        let Opened { plans, cudnn } = self.open()?;
        plans.get(shape).map(|_| ()).map_err(|reason| format!("cuDNN {}: {reason}", cudnn.version()))
    }

    fn open(&mut self) -> std::result::Result<&mut Opened, String> {
        let (capability, context) = (self.capability, &self.context);
        let open = || {
            if let Some(reason) = capability_refusal(capability) {
                return Err(reason);
            }
            let cudnn = Cudnn::open(Path::new(LIBRARY)).map_err(|error| format!("cuDNN: {error}"))?;
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let context = Arc::clone(context);
            let plans = Planner::start((cores / 2).clamp(1, THREADS), move || maker(capability, &context))?;
            Ok(Opened { plans, cudnn })
        };
        self.opened.get_or_insert_with(open).as_mut().map_err(|reason| reason.clone())
    }

    /// Queues a pass whose shape has plans. Buffers are at `address`.
    pub(super) fn run(
        &mut self,
        pass: &PackedAttention,
        address: impl Fn(crate::backend::Buffer) -> u64,
        stream: &CudaStream,
    ) -> Result<()> {
        let missing = || Error::new(ErrorCode::Internal, format!("{:?} has no plan", pass.shape));
        let Some(Ok(Opened { plans, cudnn })) = &mut self.opened else { return Err(missing()) };
        let Some(Ok((forward, backward))) = plans.made_before(&pass.shape) else { return Err(missing()) };
        let [q, k, v, out, stats, d_out, d_q, d_k, d_v] = pass.operands.map(|operand| match operand.len {
            0 => 0,
            _ => address(operand),
        });
        let offsets = pass.offsets.map(|offsets| if offsets.len == 0 { 0 } else { address(offsets) });
        let lengths = address(pass.lengths);
        let operands = Operands { q, k, v, out, stats, d_out, d_q, d_k, d_v, lengths, offsets };
        let plan = if pass.backward { backward } else { forward };
        // SAFETY: the operands have the plan's layouts, as the leaf's tests prove of what it asks for, and the workspace the
        // bytes that bound the plan's; they are in pools that outlive what is queued, as the plans do, which are kept.
        let queued = unsafe { cudnn.run(plan, &operands, address(pass.workspace), stream.cu_stream().cast()) };
        queued.map_err(|error| {
            Error::new(ErrorCode::Device, format!("cuDNN's attention: {error}"))
                .hint("use attention own, which needs no cuDNN")
        })
    }
}

/// Makes plans on this thread, with a handle of its own: a plan keeps the device's properties, and takes from the handle that
/// queues it the stream alone.
fn maker(capability: (i32, i32), context: &CudaContext) -> Maker<PackedShape, Plans> {
    let bound = context.bind_to_thread().map_err(|error| error.to_string());
    let mut cudnn = bound.and_then(|()| Cudnn::open(Path::new(LIBRARY)));
    Box::new(move |shape: &PackedShape| -> Made<Plans> {
        let cudnn = cudnn.as_mut().map_err(|reason| reason.clone())?;
        let mut plan = |pass| {
            let plan = cudnn.plan(&shape.of_library(pass, capability))?;
            if plan.workspace() > shape.workspace_bytes(pass) {
                return Err(format!("its plan wants {} bytes of workspace", plan.workspace()));
            }
            Ok(plan)
        };
        Ok((plan(Pass::Forward)?, plan(Pass::Backward)?))
    })
}
