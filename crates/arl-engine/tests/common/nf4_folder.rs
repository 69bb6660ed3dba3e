//! A model's folder as bitsandbytes leaves it: linear layers in NF4, and what else the model has.

use std::path::Path;

use arl_model::{Dtype, Error, ErrorCode, Result, SafetensorsFile, SafetensorsWriter, TensorDecl};

/// Writes the folder of a case: `base` with the tensors of `quantised.safetensors` in the place of its own.
pub fn write_nf4_folder(case: &Path, out: &Path) -> Result<()> {
    let io = |error: std::io::Error| Error::io(out, &error);
    let text = std::fs::read_to_string(case.join("base/config.json")).map_err(io)?;
    let not_json = |error| Error::new(ErrorCode::Data, format!("config.json: {error}"));
    let mut config: serde_json::Value = serde_json::from_str(&text).map_err(not_json)?;
    config["quantization_config"] = serde_json::json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": null,
    });
    std::fs::write(out.join("config.json"), config.to_string()).map_err(io)?;
    let files = [
        SafetensorsFile::open(&case.join("quantised.safetensors"))?,
        SafetensorsFile::open(&case.join("base/model.safetensors"))?,
    ];
    let mut declared: Vec<(TensorDecl, &SafetensorsFile)> = Vec::new();
    for file in &files {
        for name in file.names() {
            let known = declared.iter().any(|(other, _)| other.name == name);
            if let (false, Some((dtype, shape))) = (known, file.info(&name)) {
                declared.push((TensorDecl { name, dtype, shape: shape.to_vec() }, file));
            }
        }
    }
    // Alignment: the widest type first, as safetensors orders tensors.
    declared.sort_by_key(|(decl, _)| decl.dtype != Dtype::F32);
    let decls: Vec<TensorDecl> = declared.iter().map(|(decl, _)| decl.clone()).collect();
    let mut writer = SafetensorsWriter::create(&out.join("model.safetensors"), &[("format", "pt")], &decls)?;
    for (decl, file) in declared {
        writer.append(file.bytes(&decl.name)?)?;
    }
    writer.finish()
}
