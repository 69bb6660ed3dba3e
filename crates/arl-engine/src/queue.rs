//! The steps that are on their way, as plain data; what moves them on is `pipeline`.

use std::time::Instant;

use arl_model::Result;

use crate::options::Hyper;
use crate::statistics::{Statistics, StepStats};

/// A step that was submitted: its number among all that were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A step on its way.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) ticket: Ticket,
    pub(crate) start: Instant,
    pub(crate) hyper: Hyper,
    pub(crate) statistics: Statistics,
}

/// The steps on their way: one is updated, while the gradients of the next are computed.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// The ticket given last.
    pub(crate) last: u64,
    /// Its gradients are queued, its update is not.
    pub(crate) submitted: Option<Queued>,
    /// Its update is queued, its figures are on their way.
    pub(crate) applied: Option<Queued>,
    /// What came of steps that nobody has asked for yet.
    pub(crate) outcomes: Vec<(Ticket, Result<StepStats>)>,
    /// When the host knew of the last step that was done.
    pub(crate) end: Option<Instant>,
}
