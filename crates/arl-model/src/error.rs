//! The one list of error codes, and the error that every crate of the core returns.
//! An error says what is wrong, where, and what to do; it knows nothing of how it is printed.

use std::fmt;

/// The stable code of an error. The names are part of the public API: TypeScript gets them unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// A model's `config.json`, or an option of a run, is wrong or asks for something that is not implemented.
    Config,
    /// A row, or a file of rows, cannot be used.
    Data,
    /// The chat template or the tokenizer cannot be used, or does not fit the model.
    Text,
    /// A weights file is damaged, or its tensors are not those of the model.
    Weights,
    /// The saved state of a run is damaged, or belongs to another run.
    State,
    /// The operating system refused to read or write a file.
    Io,
    /// Something could not be fetched from a server; the core itself never fetches.
    Network,
    /// There is not enough memory.
    Oom,
    /// A loss or a gradient is not finite.
    NonFinite,
    /// The device cannot be used.
    Device,
    /// The run was interrupted on request.
    Interrupted,
    /// A function of the user's own code threw; the core itself never does.
    User,
    /// A defect of this program.
    Internal,
}

impl ErrorCode {
    /// Every code, in the order of the exit codes' documentation.
    pub const ALL: [ErrorCode; 13] = [
        ErrorCode::Config,
        ErrorCode::Data,
        ErrorCode::Text,
        ErrorCode::Weights,
        ErrorCode::State,
        ErrorCode::Io,
        ErrorCode::Network,
        ErrorCode::Oom,
        ErrorCode::NonFinite,
        ErrorCode::Device,
        ErrorCode::Interrupted,
        ErrorCode::User,
        ErrorCode::Internal,
    ];

    /// The code as users see it, for example `ARL_WEIGHTS`.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorCode::Config => "ARL_CONFIG",
            ErrorCode::Data => "ARL_DATA",
            ErrorCode::Text => "ARL_TEXT",
            ErrorCode::Weights => "ARL_WEIGHTS",
            ErrorCode::State => "ARL_STATE",
            ErrorCode::Io => "ARL_IO",
            ErrorCode::Network => "ARL_NETWORK",
            ErrorCode::Oom => "ARL_OOM",
            ErrorCode::NonFinite => "ARL_NONFINITE",
            ErrorCode::Device => "ARL_DEVICE",
            ErrorCode::Interrupted => "ARL_INTERRUPTED",
            ErrorCode::User => "ARL_USER",
            ErrorCode::Internal => "ARL_INTERNAL",
        }
    }
}

/// What went wrong, and what to do about it.
#[derive(Clone, Debug)]
pub struct Error {
    /// The stable code.
    pub code: ErrorCode,
    /// What is wrong and where: names the file, key, tensor or row.
    pub message: String,
    /// What the user can do; empty where there is no advice.
    pub hint: String,
}

/// The result of everything in the core that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without advice.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: String::new() }
    }

    /// The same error with advice on what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// An error of the operating system, with the path that it is about.
    pub fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        let refused = Self::new(ErrorCode::Io, format!("{}: {error}", path.display()));
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                refused.hint("Free some space, or choose another output_dir.")
            }
            _ => refused,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.message)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
