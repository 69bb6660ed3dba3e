//! Attention by cuDNN: the library, opened where attention is first asked for, and a plan in both passes for each shape.

use std::collections::HashMap;
use std::path::Path;

use arl_cudnn::{Cudnn, Operands, Pass, Plan, capability_refusal};
use arl_model::{Error, ErrorCode, Result};
use candle_core::cuda_backend::cudarc;
use cudarc::driver::CudaStream;

use crate::backend::cuda::packed::{PackedAttention, PackedShape};

/// The library that was found and opened with CUDA's own.
const LIBRARY: &str = "libcudnn.so.9";

/// Forward and backward.
type Plans = std::result::Result<(Plan, Plan), String>;

/// cuDNN on one GPU, and the plans so far.
pub(super) struct Library {
    capability: (i32, i32),
    /// They go before the library does.
    plans: HashMap<PackedShape, Plans>,
    /// `None`: not asked for yet.
    cudnn: Option<std::result::Result<Cudnn, String>>,
}

impl Library {
    pub(super) fn new(capability: (i32, i32)) -> Self {
        Library { capability, cudnn: None, plans: HashMap::new() }
    }

    /// As [`super::Device::plan_attention`]; the device is the current one of this thread.
    pub(super) fn plan(&mut self, shape: &PackedShape) -> std::result::Result<(), String> {
        let capability = self.capability;
        let cudnn = self.cudnn.get_or_insert_with(|| match capability_refusal(capability) {
            Some(reason) => Err(reason),
            None => Cudnn::open(Path::new(LIBRARY)).map_err(|error| format!("cuDNN: {error}")),
        });
        let cudnn = cudnn.as_mut().map_err(|reason| reason.clone())?;
        let plans = self.plans.entry(*shape).or_insert_with(|| {
            let mut plan = |pass| {
                let plan = cudnn.plan(&shape.of_library(pass, capability))?;
                if plan.workspace() > shape.workspace_bytes(pass) {
                    return Err(format!("its plan wants {} bytes of workspace", plan.workspace()));
                }
                Ok(plan)
            };
            Ok((plan(Pass::Forward)?, plan(Pass::Backward)?))
        });
        plans.as_ref().map(|_| ()).map_err(|reason| format!("cuDNN {}: {reason}", cudnn.version()))
    }

    /// Queues a pass whose shape has plans. Buffers are at `address`.
    pub(super) fn run(
        &mut self,
        pass: &PackedAttention,
        address: impl Fn(crate::backend::Buffer) -> u64,
        stream: &CudaStream,
    ) -> Result<()> {
        let (Some(Ok(cudnn)), Some(Ok((forward, backward)))) = (&mut self.cudnn, self.plans.get(&pass.shape)) else {
            return Err(Error::new(ErrorCode::Internal, format!("{:?} has no plan", pass.shape)));
        };
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
