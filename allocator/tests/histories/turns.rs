//! Single turns: what comes out of them, in which order and when.
