//! The CUDA kernels, run on a CPU, because machines with a GPU are rare.

use std::process::Command;

use crate::{
    shipped::{repository, run},
    support::is_missing,
};

#[test]
fn the_cuda_kernels_compute_their_definitions() {
    if is_missing("g++", "build-essential") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("check");
    let source = repository().join("tests/kernels/check.cpp");
    let mut compile = Command::new("g++");
    compile.args(["-std=c++20", "-O1", "-w"]).arg(source).arg("-o").arg(&program);
    run(&mut compile);
    let found = run(&mut Command::new(&program));
    println!("{found}");
    assert!(found.contains("attention, copies late:") && found.contains("nearest of"), "{found}");
}
