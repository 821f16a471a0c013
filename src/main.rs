//! The binary `oddscan`.

fn main() {}
