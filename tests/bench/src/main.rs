//! Load that benches put on daemons.

fn main() {}
