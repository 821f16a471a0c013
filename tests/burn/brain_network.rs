//! The brain extraction networks in burn against an independent PyTorch program.

use burn::backend::Flex;
use oddscan::compute::burn::BurnBrainNetwork;

use crate::linknet::{check, weights};

#[test]
fn both_networks_give_the_probabilities_of_the_reference() {
    check(&BurnBrainNetwork::<Flex>::new(&weights(), Default::default(), "burn-cpu").unwrap());
}
