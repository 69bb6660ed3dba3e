//! What a mesh cannot divide, refused by name before anything is opened.

use arl_model::{Error, ErrorCode, LayerConfig, Mixer, ModelConfig, Result};

use crate::mesh::Mesh;

/// # Errors
/// `ARL_CONFIG` where a model cannot be divided as the mesh says.
pub(crate) fn check(mesh: Mesh, config: &ModelConfig) -> Result<()> {
    let refused = |what: String, hint: &str| Err(Error::new(ErrorCode::Config, what).hint(hint));
    let Mesh { tp, cp, .. } = mesh;
    if cp == 1 {
        return Ok(());
    }
    let heads = |layer: &LayerConfig| match layer.mixer {
        Mixer::Attention { .. } => (config.num_key_value_heads, "key heads"),
        Mixer::Delta(delta) => (delta.linear_num_key_heads, "key heads of linear attention"),
    };
    let Some((count, name)) = config.layers.iter().map(heads).find(|(count, _)| !count.is_multiple_of(cp * tp)) else {
        return Ok(());
    };
    let what = if tp == 1 { format!("cp_size is {cp}") } else { format!("cp_size {cp} x tp_size {tp} is {}", cp * tp) };
    let hint = "attention divides whole heads among these ranks: choose a divisor, and raise dp_size instead";
    refused(format!("{what}, and does not divide the model's {count} {name}"), hint)
}
