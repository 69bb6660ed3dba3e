//! Errors on their way to JavaScript: a napi error whose message is JSON `{ code, message, hint }`, which `src/native.ts`
//! turns into an `ArlError`. (A promise can be rejected only with napi's own status codes, so the code travels inside.)

use arl_model::{Error, ErrorCode};

/// The napi error that carries `error`.
pub(crate) fn to_napi(error: &Error) -> napi::Error {
    let reason = serde_json::json!({ "code": error.code.as_str(), "message": error.message, "hint": error.hint });
    napi::Error::from_reason(reason.to_string())
}

/// What a panic left behind, as an error of this program.
pub(crate) fn from_panic(payload: &(dyn std::any::Any + Send)) -> Error {
    let what = payload
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_string());
    Error::new(ErrorCode::Internal, format!("the native part failed: {what}"))
        .hint("This is a defect of arl. Please report it with the command and the lines above.")
}

/// Runs `job`; a panic in it becomes an error, because no panic may cross into Node.
pub(crate) fn guard<T>(job: impl FnOnce() -> arl_model::Result<T>) -> arl_model::Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).unwrap_or_else(|payload| Err(from_panic(&*payload)))
}

/// [`guard`] for functions that return to JavaScript at once.
pub(crate) fn sync<T>(job: impl FnOnce() -> arl_model::Result<T>) -> napi::Result<T> {
    guard(job).map_err(|error| to_napi(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_that_has_its_message() {
        let failed = |job: fn()| {
            let error = guard(|| {
                job();
                Ok(())
            })
            .unwrap_err();
            assert!(error.code == ErrorCode::Internal && error.hint.contains("report"), "{error}");
            error.message
        };
        assert_eq!(failed(|| panic!("out of bounds")), "the native part failed: out of bounds");
        let formatted = failed(|| panic!("layer {}", std::hint::black_box(7)));
        assert_eq!(formatted, "the native part failed: layer 7");
        assert_eq!(failed(|| std::panic::panic_any(7)), "the native part failed: a panic without a message");
        assert_eq!(guard(|| Ok(7)).unwrap(), 7);
    }
}
