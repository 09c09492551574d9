//! The `pulsebus` binary.

fn main() {}
