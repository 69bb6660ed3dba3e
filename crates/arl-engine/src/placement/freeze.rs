//! What is not trained, by patterns of names, and what has to be frozen together. Knows the table of tensors alone.

use arl_model::{Error, ErrorCode, Result, TensorSpec};

use super::continues;

/// Marks what is not trained.
pub(super) fn freeze(table: &mut [TensorSpec], frozen: &[String]) -> Result<()> {
    let refused = |what: String, hint: &str| Err(Error::new(ErrorCode::Config, what).hint(hint));
    for pattern in frozen {
        let mut matched = table.iter_mut().filter(|spec| matches(pattern, &spec.name)).peekable();
        if matched.peek().is_none() {
            return refused(
                format!("frozen: no parameter is called `{pattern}`"),
                "names are those of the table of tensors, as in model.safetensors; `*` stands for any characters",
            );
        }
        matched.for_each(|spec| spec.trainable = false);
    }
    if table.iter().all(|spec| !spec.trainable) {
        return refused("frozen: no parameter is left to train".into(), "leave some parameter out of the patterns");
    }
    Ok(())
}

/// What one matrix product takes together is trained or frozen as a whole.
pub(super) fn check_products(table: &[TensorSpec]) -> Result<()> {
    for pair in table.windows(2) {
        let (before, spec) = (&pair[0], &pair[1]);
        if continues(Some(before), spec) && before.trainable != spec.trainable {
            let (one, other) = if spec.trainable { (before, spec) } else { (spec, before) };
            let what = format!(
                "frozen: `{}` is frozen and `{}` is not, but one matrix product takes both",
                one.name, other.name
            );
            return Err(Error::new(ErrorCode::Config, what).hint("freeze both or neither"));
        }
    }
    Ok(())
}

/// Whether a name is a pattern's, in which `*` stands for any characters.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            name.char_indices().map(|(at, _)| at).chain([name.len()]).any(|at| matches(rest, &name[at..]))
        }),
    }
}
