//! `cargo bench`: seconds of the kernels on this machine.

mod work;

use std::time::Duration;

use criterion::Criterion;
use oddscan::{
    compute::{Precision, cpu::CpuDistances},
    domain::weights::Architecture,
};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .measurement_time(Duration::from_secs(8))
        .configure_from_args();
    let vit_s = Architecture::named("dinov2_vits14").expect("is one of the names");
    let mut bench = |name: &str, mut work: Box<dyn FnMut()>| {
        criterion.bench_function(name, |bencher| bencher.iter(&mut work));
    };
    bench("encode one slice, ViT-S, f32", Box::new(work::encode(vit_s, 224, Precision::F32)));
    bench("encode one slice, ViT-S, bf16", Box::new(work::encode(vit_s, 224, Precision::Bf16)));
    // About 1,900 tokens each.
    let side = 14;
    bench("compare a pair, whole volume", Box::new(work::compare(CpuDistances::new(), side, 0)));
    let in_single = CpuDistances::in_single();
    bench("compare a pair, whole volume, f32", Box::new(work::compare(in_single, side, 0)));
    bench(
        "compare a pair, one patch around",
        Box::new(work::compare(CpuDistances::new(), side, 1)),
    );
    bench("score a scan against 200", Box::new(work::score(1900, 200)));
    bench("a scan to its cube", Box::new(work::around::canonical(1.0)));
    bench("cut all slices of a cube", Box::new(work::around::slices()));
    bench("features to tokens", Box::new(work::around::tokens(384)));
    bench("scores to a map", Box::new(work::around::map(1.0)));
    bench("pack a map", Box::new(work::around::packed_map(1.0)));
    bench("draw a picture", Box::new(work::around::picture(1.0)));
    criterion.final_summary();
}
