//! Compares the native brain extraction networks with an independent PyTorch program.

use oddscan::{
    compute::cpu::CpuBrainNetwork,
    domain::{BrainNetwork, BrainPart},
};

use crate::linknet::{check, image, weights};

#[test]
fn both_networks_give_the_probabilities_of_the_reference() {
    check(&CpuBrainNetwork::new(weights()));
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let (network, image) = (CpuBrainNetwork::new(weights()), image());
    let with = |n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| network.forward(BrainPart::Locate, &image, 96).unwrap())
    };
    assert_eq!(with(1), with(3));
}
