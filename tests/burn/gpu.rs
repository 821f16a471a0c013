//! On a CUDA GPU, where there is one.

/// Built with `--features burn-cpu,cuda`; passes without a GPU, saying so.
#[test]
fn a_cuda_gpu_gives_the_features_and_distances_of_the_cpu() {
    #[cfg(not(feature = "cuda"))]
    println!("skipped: built without the feature cuda");
    #[cfg(feature = "cuda")]
    on_cuda();
}

#[cfg(feature = "cuda")]
fn on_cuda() {
    use oddscan::{
        compute::{
            cpu::{CpuDistances, CpuEncoder},
            gpu::{
                Precision,
                device::{cuda_availability, cuda_encoder_with},
            },
            position::PositionResize,
        },
        domain::{PairDistances, SliceEncoder},
        numeric::scoring::SearchReach,
    };

    use crate::{
        encoder::{options, worst_cosine},
        tiny,
    };

    let weights = tiny::network(4);
    let options = options(&[2, 4], true, PositionResize::Offset);
    match cuda_availability() {
        Ok(found) => println!("{found}"),
        Err(missing) => {
            println!("skipped, no CUDA GPU: {missing}");
            let error = cuda_encoder_with(&weights, &options, 0, Precision::F32).err().unwrap();
            assert!(error.to_string().contains(&missing), "{error}");
            return;
        }
    }
    let images = tiny::images(3);
    let expected = CpuEncoder::new(&weights, &options).encode(&images).unwrap();
    // TF32 rounds like f16.
    for (precision, floor) in
        [(Precision::F32, 0.9999), (Precision::F16, 0.9999), (Precision::Bf16, 0.999)]
    {
        let (mut encoder, _) = cuda_encoder_with(&weights, &options, 0, precision).unwrap();
        let found = encoder.encode(&images).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            let cosine = worst_cosine(&found.values, &expected.values, expected.channels);
            println!("{precision:?}: token cosine at least {cosine:.7}");
            assert!(cosine > floor, "{precision:?} {cosine}");
        }
    }
    let (_, mut distances) = cuda_encoder_with(&weights, &options, 0, Precision::F32).unwrap();
    let (a, b) = (tiny::tokens(1, 8, 96, |c| c % 3 != 0), tiny::tokens(2, 8, 96, |c| c % 2 == 1));
    let found = distances.nearest(&a, &b, SearchReach::WholeVolume).unwrap();
    let expected = CpuDistances::new().nearest(&a, &b, SearchReach::WholeVolume).unwrap();
    let pairs = found.first_to_second.iter().zip(&expected.first_to_second);
    for (found, expected) in
        pairs.chain(found.second_to_first.iter().zip(&expected.second_to_first))
    {
        // Another winner can only be one that is nearly as near.
        assert!((found - expected).abs() <= 1e-4 * expected, "{found} {expected}");
    }
    let own = distances.nearest(&a, &a, SearchReach::WholeVolume).unwrap();
    assert!(own.first_to_second.iter().all(|&d| d == 0.0));
}
