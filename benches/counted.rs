//! Runs one piece of work on one thread, so that `instructions.py` can count its instructions. The
//! argument names it. Without an argument, all names are printed.

mod work;

use oddscan::{
    compute::{Precision, cpu::CpuDistances},
    domain::weights::Architecture,
};

/// Small enough for an emulated processor.
const NETWORK: Architecture = Architecture {
    channels: 128,
    depth: 2,
    heads: 2,
    hidden: 512,
    patch: 14,
    registers: 0,
    position_side: 8,
};

const NAMES: [&str; 10] = [
    "encode",
    "compare-whole-volume",
    "compare-within-reach",
    "score",
    "scan-to-cube",
    "slices",
    "tokens",
    "map",
    "packed-map",
    "picture",
];

/// The counted function. callgrind finds it by this name.
#[unsafe(no_mangle)]
#[inline(never)]
fn counted_work(work: &mut dyn FnMut()) {
    work();
}

fn main() {
    let Some(name) = std::env::args().nth(1) else {
        return NAMES.iter().for_each(|name| println!("{name}"));
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    let _pool = pool.expect("one thread");
    let mut work: Box<dyn FnMut()> = match name.as_str() {
        "encode" => Box::new(work::encode(NETWORK, 112, Precision::F32)),
        "compare-whole-volume" => Box::new(work::compare(CpuDistances::in_single(), 9, 0)),
        "compare-within-reach" => Box::new(work::compare(CpuDistances::in_single(), 9, 1)),
        "score" => Box::new(work::score(500, 50)),
        "scan-to-cube" => Box::new(work::around::canonical(2.0)),
        "slices" => Box::new(work::around::slices()),
        "tokens" => Box::new(work::around::tokens(64)),
        "map" => Box::new(work::around::map(2.0)),
        "packed-map" => Box::new(work::around::packed_map(2.0)),
        "picture" => Box::new(work::around::picture(2.0)),
        other => panic!("{other} is none of {NAMES:?}"),
    };
    // A first run for all that is set up once.
    work();
    counted_work(&mut *work);
}
