//! The CPU's leaves.
