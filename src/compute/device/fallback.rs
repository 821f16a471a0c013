//! Brain extraction on a GPU, and on the CPU after the GPU has failed.
//!
//! After the first failure, the GPU is never used again. The error appears in one warning only. The
//! CPU finds the same brain, so the scan continues. A CUDA error that breaks the whole process (an
//! illegal address, a lost device) also breaks the encoder's next call. The encoder reports it, and
//! the service ends as for any other failure of the device.

use std::sync::{Mutex, PoisonError};

use tracing::warn;

use crate::domain::{BrainNetwork, BrainPart, error::DeviceError};

/// The networks on a GPU until they fail there, and then on the CPU.
pub struct FallbackBrainNetwork<G, C> {
    /// Dropped at the first failure, so that the encoder can use its memory.
    ///
    /// The lock allows one call at a time, because intake prepares several heads in parallel, and
    /// each call takes the memory of a whole head. The lock is not held while the CPU works. A
    /// rayon thread that waits there can start on another head, and would then wait for itself.
    gpu: Mutex<Option<G>>,
    cpu: C,
}

impl<G, C> FallbackBrainNetwork<G, C> {
    /// Both must hold the same weights.
    pub fn new(gpu: G, cpu: C) -> Self {
        Self { gpu: Mutex::new(Some(gpu)), cpu }
    }
}

impl<G: BrainNetwork, C> FallbackBrainNetwork<G, C> {
    /// The output of the GPU; `None` if it fails or has failed before.
    fn on_gpu(&self, part: BrainPart, image: &[f32], side: usize) -> Option<Vec<f32>> {
        let mut gpu = self.gpu.lock().unwrap_or_else(PoisonError::into_inner);
        match gpu.as_ref()?.forward(part, image, side) {
            Ok(probability) => Some(probability),
            Err(reason) => {
                warn!(%reason, "brain extraction failed on the GPU; it runs on the CPU until the next start");
                *gpu = None;
                None
            }
        }
    }
}

impl<G: BrainNetwork, C: BrainNetwork> BrainNetwork for FallbackBrainNetwork<G, C> {
    fn forward(
        &self,
        part: BrainPart,
        image: &[f32],
        side: usize,
    ) -> Result<Vec<f32>, DeviceError> {
        let probability = self.on_gpu(part, image, side);
        probability.map_or_else(|| self.cpu.forward(part, image, side), Ok)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc, Barrier,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        thread,
    };

    use super::*;

    /// Counts of the calls and drops of a network in these tests.
    #[derive(Default)]
    struct Calls {
        all: AtomicUsize,
        now: AtomicUsize,
        most_at_once: AtomicUsize,
        drops: AtomicUsize,
    }

    /// Answers with `answer` for the first `n_good` calls, then fails.
    struct Fake {
        answer: f32,
        n_good: usize,
        failure: fn() -> DeviceError,
        calls: Arc<Calls>,
    }

    fn fake(answer: f32, n_good: usize, failure: fn() -> DeviceError) -> (Fake, Arc<Calls>) {
        let calls = Arc::new(Calls::default());
        (Fake { answer, n_good, failure, calls: Arc::clone(&calls) }, calls)
    }

    impl BrainNetwork for Fake {
        fn forward(&self, _: BrainPart, image: &[f32], _: usize) -> Result<Vec<f32>, DeviceError> {
            let calls = &self.calls;
            calls.most_at_once.fetch_max(calls.now.fetch_add(1, Relaxed) + 1, Relaxed);
            let is_good = calls.all.fetch_add(1, Relaxed) < self.n_good;
            thread::yield_now();
            calls.now.fetch_sub(1, Relaxed);
            if is_good { Ok(vec![self.answer; image.len()]) } else { Err((self.failure)()) }
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            self.calls.drops.fetch_add(1, Relaxed);
        }
    }

    fn out_of_memory() -> DeviceError {
        DeviceError::OutOfMemory { batch: 1 }
    }

    fn broken() -> DeviceError {
        DeviceError::Failed { device: "cuda:0".into(), message: "an illegal address".into() }
    }

    fn answer(network: &dyn BrainNetwork) -> f32 {
        network.forward(BrainPart::Outline, &[0.5; 8], 2).unwrap()[7]
    }

    #[test]
    fn a_gpu_that_works_does_everything() {
        let (gpu, _) = fake(1.0, 9, broken);
        let (cpu, cpu_calls) = fake(2.0, 9, broken);
        let network = FallbackBrainNetwork::new(gpu, cpu);
        assert_eq!([answer(&network), answer(&network)], [1.0, 1.0]);
        assert_eq!(cpu_calls.all.load(Relaxed), 0);
    }

    #[test]
    fn the_cpu_takes_over_for_good_and_the_memory_of_the_gpu_is_free() {
        for failure in [out_of_memory, broken] {
            let (gpu, gpu_calls) = fake(1.0, 1, failure);
            let (cpu, _) = fake(2.0, 9, broken);
            let network = FallbackBrainNetwork::new(gpu, cpu);
            assert_eq!([1, 2, 3].map(|_| answer(&network)), [1.0, 2.0, 2.0]);
            assert_eq!(gpu_calls.all.load(Relaxed), 2, "the failed call is the last one");
            assert_eq!(gpu_calls.drops.load(Relaxed), 1);
        }
    }

    #[test]
    fn an_error_of_the_cpu_is_handed_on() {
        let (gpu, _) = fake(1.0, 0, out_of_memory);
        let (cpu, _) = fake(2.0, 0, broken);
        let network = FallbackBrainNetwork::new(gpu, cpu);
        let error = network.forward(BrainPart::Locate, &[0.5; 8], 2).unwrap_err();
        assert!(error.to_string().contains("an illegal address"), "{error}");
    }

    #[test]
    fn many_threads_use_the_gpu_one_by_one_and_all_get_an_answer_when_it_fails() {
        const N_THREADS: usize = 8;
        let (gpu, gpu_calls) = fake(1.0, 20, out_of_memory);
        let (cpu, cpu_calls) = fake(2.0, usize::MAX, broken);
        let (network, start) = (FallbackBrainNetwork::new(gpu, cpu), Barrier::new(N_THREADS));
        thread::scope(|scope| {
            for _ in 0..N_THREADS {
                scope.spawn(|| {
                    start.wait();
                    (0..5).for_each(|_| assert!([1.0, 2.0].contains(&answer(&network))));
                });
            }
        });
        assert_eq!(gpu_calls.most_at_once.load(Relaxed), 1);
        assert_eq!([&gpu_calls, &cpu_calls].map(|calls| calls.all.load(Relaxed)), [21, 20]);
    }
}
