//! On a CUDA GPU, where there is one; without it these pass and say so. Built with
//! `--features burn-cpu,cuda`; `scripts/gpu_check.sh` runs them on such a machine.

#[cfg(not(feature = "cuda"))]
#[test]
fn a_cuda_gpu_gives_the_features_and_distances_of_the_cpu() {
    eprintln!("skipped: built without the feature cuda");
}

#[cfg(feature = "cuda")]
mod with_cuda {
    use std::{num::NonZeroUsize, time::Instant};

    use oddscan::{
        compute::{
            Devices, EncoderOptions, Precision,
            cpu::{CpuDistances, CpuEncoder},
            cuda::CudaDistances,
            device::{
                cuda::{cuda_brain_network, cuda_encoder},
                probe::cuda_availability,
            },
            position::PositionResize,
        },
        domain::{GridName, PairDistances, SliceEncoder, scan::ScanId, weights::VitWeights},
        numeric::{
            scoring::{PairColumns, SearchReach},
            slice::{ImageBatch, PatchFeatures},
        },
    };

    use crate::{
        encoder::options,
        goldens::{Goldens, shared, worst_cosine},
        linknet, tiny,
    };

    /// With the least token cosine that each may have with f32. TF32 rounds factors like f16. Burn
    /// comes last: it holds the GPU for good, and the others are to set it up by themselves.
    const PRECISIONS: [(Precision, f64); 3] =
        [(Precision::F16, 0.9999), (Precision::Bf16, 0.999), (Precision::F32, 0.9999)];

    fn gpu_is_there() -> bool {
        match cuda_availability() {
            Ok(found) => println!("{found}"),
            Err(missing) => {
                eprintln!("skipped: no CUDA GPU ({missing})");
                return false;
            }
        }
        true
    }

    fn assert_like(found: &PatchFeatures, expected: &[f32], floor: f64, what: &str) {
        let cosine = worst_cosine(&found.values, expected, found.channels);
        println!("{what}: token cosine at least {cosine:.7}");
        assert!(cosine >= floor, "{what} {cosine}");
    }

    #[test]
    fn without_a_gpu_the_engine_is_an_error_that_says_what_is_missing() {
        let Err(missing) = cuda_availability() else { return };
        let options = options(&[2], true, PositionResize::Offset);
        let error = cuda_encoder(&tiny::network(0), &options, 0, 56).err().unwrap();
        println!("{error}");
        assert!(error.to_string().contains(&missing), "{error}");
    }

    #[test]
    fn a_cuda_gpu_gives_the_features_and_distances_of_the_cpu() {
        if !gpu_is_there() {
            return;
        }
        let weights = tiny::network(4);
        let options = options(&[2, 4], true, PositionResize::Offset);
        let mut cpu = CpuEncoder::new(&weights, &options);
        for (precision, floor) in PRECISIONS {
            let (mut encoder, _) = cuda_encoder(
                &weights,
                &EncoderOptions { precision: Some(precision), ..options.clone() },
                0,
                56,
            )
            .unwrap();
            // The many go through in several parts, whose buffers are used in turn.
            let [few, many] = [5, 200].map(tiny::some_patches);
            let all = [tiny::images(3), few.clone(), many, few];
            let found = all.each_ref().map(|images| encoder.encode(images).unwrap());
            for (images, found) in all.iter().zip(&found) {
                let expected = cpu.encode(images).unwrap();
                for (found, expected) in found.iter().zip(&expected) {
                    assert_like(found, &expected.values, floor, &format!("{precision:?}"));
                }
            }
            let values = |features: &[PatchFeatures]| -> Vec<Vec<f32>> {
                features.iter().map(|layer| layer.values.clone()).collect()
            };
            assert_eq!(values(&found[1]), values(&found[3]), "{precision:?}, before and after");
        }
        assert_distances(&mut CudaDistances::new(0, "cuda:0").unwrap());
    }

    fn assert_distances(distances: &mut CudaDistances) {
        let a = tiny::tokens(1, 13, 1152, |cell| cell % 7 != 0);
        let b = tiny::tokens(2, 13, 1152, |cell| cell % 9 != 0);
        for reach in [SearchReach::WholeVolume, SearchReach::Patches(NonZeroUsize::MIN)] {
            let expected = CpuDistances::new().nearest(&a, &b, reach).unwrap();
            let found = distances.nearest(&a, &b, reach).unwrap();
            for (found, expected) in both(&found).into_iter().zip(both(&expected)) {
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(expected) {
                    // Another winner can only be one that is nearly as near.
                    assert!((found - expected).abs() <= 1e-4 * expected, "{found} {expected}");
                }
            }
            let mirrored = distances.nearest(&b, &a, reach).unwrap();
            assert_eq!(found.first_to_second, mirrored.second_to_first);
            assert_eq!(found.second_to_first, mirrored.first_to_second);
            let own = distances.nearest(&a, &a, reach).unwrap();
            assert!(own.first_to_second.iter().all(|&distance| distance == 0.0));
            let [one, other, unknown] =
                [1, 2, 3].map(|n| GridName { scan: ScanId([n; 32]), grid: 0 });
            distances.keep(one, &a).unwrap();
            distances.keep(other, &b).unwrap();
            let kept = distances.nearest_of_kept(one, &[unknown, other], reach).unwrap();
            assert_eq!(kept, [None, Some(found)]);
            let others = [other; 100];
            let started = Instant::now();
            distances.nearest_of_kept(one, &others, reach).unwrap();
            let kept = started.elapsed().as_secs_f64() * 10.0;
            let started = Instant::now();
            (0..20).for_each(|_| drop(distances.nearest(&a, &b, reach).unwrap()));
            let given = started.elapsed().as_secs_f64() * 50.0;
            let [n_a, n_b] = [a.n_tokens(), b.n_tokens()];
            println!("a pair of {n_a} and {n_b} tokens: {given:.2} ms, kept ones {kept:.3} ms");
        }
    }

    fn both(columns: &PairColumns) -> [&[f32]; 2] {
        [&columns.first_to_second, &columns.second_to_first]
    }

    #[test]
    fn the_brain_networks_on_a_cuda_gpu_give_the_probabilities_of_the_reference() {
        if gpu_is_there() {
            linknet::check(&cuda_brain_network(&linknet::weights(), 0).unwrap());
        }
    }

    #[test]
    fn the_real_network_on_a_cuda_gpu_reaches_the_golden_features() {
        let (true, Some(weights), Some(golden)) = (
            gpu_is_there(),
            shared("weights/dinov2_vits14.fp16.safetensors"),
            shared("weights/golden_astronaut_224.safetensors"),
        ) else {
            return;
        };
        let weights = oddscan::model::load_weights(&weights).unwrap();
        let golden = Goldens::open(&golden);
        let image = ImageBatch::whole(1, 224, 14, golden.values("input_224"));
        let options = options(&[3, 6, 9, 12], false, PositionResize::Size);
        for (precision, floor) in PRECISIONS {
            let engine = cuda_encoder(
                &weights,
                &EncoderOptions { precision: Some(precision), ..options.clone() },
                0,
                56,
            );
            let (mut encoder, _): Devices = engine.unwrap();
            let names = ["hidden_3", "hidden_6", "hidden_9", "hidden_12"];
            for (found, name) in encoder.encode(&image).unwrap().iter().zip(names) {
                let expected = golden.values(name).split_off(384);
                assert_like(found, &expected, floor, &format!("{precision:?} {name}"));
            }
            for n_images in [8, 32, 128] {
                let rate = images_per_second(&mut *encoder, &image, n_images);
                println!("{precision:?}, batches of {n_images}: {rate:.0} images/s");
            }
        }
    }

    /// Four layers to the host included; kernels for this batch are compiled before.
    fn images_per_second(
        encoder: &mut dyn SliceEncoder,
        image: &ImageBatch,
        n_images: usize,
    ) -> f64 {
        let batch = ImageBatch::whole(n_images, 224, 14, image.pixels.repeat(n_images));
        encoder.encode(&batch).unwrap();
        let started = Instant::now();
        (0..10).for_each(|_| drop(encoder.encode(&batch).unwrap()));
        10.0 * n_images as f64 / started.elapsed().as_secs_f64()
    }
}
