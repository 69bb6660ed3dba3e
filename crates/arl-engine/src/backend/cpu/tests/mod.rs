//! Every leaf against a plain reference in f64.
