//! Encoding on a device that works in parallel to the processor, like a GPU. The steps of several
//! scans run at the same time. Here the CPU engine acts as the device.

use std::{
    fs,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use oddscan::{
    compute::{
        EncoderOptions, Precision, cpu::CpuEncoder, position::PositionResize, tokenise::Tokeniser,
    },
    config::Config,
    domain::{
        SliceEncoder,
        error::{DeviceError, ScanError},
        scan::{ScanRecord, ScanState},
    },
    engine::Engine,
    metrics::Metrics,
    numeric::{
        projection::Projection,
        slice::{ImageBatch, PatchFeatures},
        token::TokenGrid,
    },
    pipeline::{Pipeline, Shared, StageEnd, board::StageName},
    store::Store,
};

use crate::{
    support::{self, Site, scan_bytes},
    tiny,
};

/// Called at the start of each batch, with its number.
type AtBatch = Box<dyn Fn(usize) -> Result<(), DeviceError> + Send + Sync>;

#[derive(Clone, Copy)]
struct Kind {
    is_async: bool,
    gives_nan: bool,
}

struct Device {
    encoder: CpuEncoder,
    n_batches: AtomicUsize,
    kind: Kind,
    at_batch: AtBatch,
}

impl SliceEncoder for Device {
    fn encode(&mut self, images: &ImageBatch) -> Result<Vec<PatchFeatures>, DeviceError> {
        (self.at_batch)(self.n_batches.fetch_add(1, Ordering::Relaxed))?;
        let mut layers = self.encoder.encode(images)?;
        if self.kind.gives_nan {
            layers.iter_mut().for_each(|layer| layer.values.fill(f32::NAN));
        }
        Ok(layers)
    }

    fn patch(&self) -> usize {
        self.encoder.patch()
    }

    fn channels(&self) -> usize {
        self.encoder.channels()
    }

    fn device(&self) -> &str {
        "test"
    }

    fn is_async(&self) -> bool {
        self.kind.is_async
    }
}

struct Running {
    site: Site,
    shared: Arc<Shared>,
    pipeline: Pipeline,
}

/// The stages on such a device, with `n` scans in the incoming folder.
fn start(n: u64, is_async: bool, at_batch: AtBatch) -> Running {
    let site = Site::new(2, &["window.max_scans = 100"]);
    for seed in 1..=n {
        site.drop_in(&format!("sub-{seed}_T1w.nii.gz"), &scan_bytes(seed));
    }
    start_on(site, Kind { is_async, gives_nan: false }, at_batch, |_| {})
}

fn start_on(
    site: Site,
    kind: Kind,
    at_batch: AtBatch,
    before: impl FnOnce(&Arc<Shared>),
) -> Running {
    let text = fs::read_to_string(site.path("config.toml")).unwrap();
    let config = Config::parse(&text).unwrap();
    let engine = Engine::start(&config).unwrap();
    let layers = engine.method.layers.clone();
    let options = EncoderOptions {
        layers: layers.clone(),
        final_norm: true,
        position: PositionResize::Offset,
        precision: Some(Precision::F32),
    };
    let weights = tiny::network(0).into_grey();
    let projection = Projection::new(config.projection.seed, weights.architecture.channels, 16);
    let n_batches = AtomicUsize::new(0);
    let encoder =
        Device { encoder: CpuEncoder::new(&weights, &options), n_batches, kind, at_batch };
    // Several batches per scan.
    let tokeniser = Tokeniser::new(
        Box::new(encoder),
        Some(projection),
        config.tokens.clone(),
        layers.len(),
        20,
    );
    let engine = Engine { tokeniser, ..engine };
    let store = Store::open(&site.path("state/store"), config.window.memory_bytes).unwrap().store;
    let method = engine.method.clone();
    let shared = Arc::new(Shared::new(config, store, Metrics::new(), method).unwrap());
    before(&shared);
    let pipeline = Pipeline::start(&shared, engine).unwrap();
    Running { site, shared, pipeline }
}

impl Running {
    fn records(&self) -> Vec<ScanRecord> {
        support::records(&self.site.path("state"))
    }

    fn wait_encoded(&self, n: usize) {
        self.site.wait("encoded", |_| {
            self.records().iter().filter(|record| record.is_member()).count() == n
        });
    }

    /// Ends the stages and returns the records.
    fn end(self) -> (Site, Vec<ScanRecord>) {
        self.shared.request_stop();
        self.pipeline.join();
        let records = support::records(&self.site.path("state"));
        (self.site, records)
    }
}

fn nothing() -> AtBatch {
    Box::new(|_| Ok(()))
}

#[test]
fn steps_side_by_side_give_the_same_tokens_in_the_same_order() {
    let tokens = [false, true].map(|is_async| {
        let running = start(6, is_async, nothing());
        running.wait_encoded(6);
        let store = &running.shared.store;
        let all: Vec<(ScanRecord, Vec<TokenGrid>)> = running
            .records()
            .into_iter()
            .map(|record| {
                let grids = (0..).map_while(|grid| store.tokens(&record.id, grid).unwrap());
                (record.clone(), grids.collect())
            })
            .collect();
        running.site.wait("written", |site| {
            (1..=6).all(|seed| site.sidecar(&format!("sub-{seed}_T1w")).is_some())
        });
        let status = running.shared.board.status();
        assert_eq!((status.n_waiting, status.in_hand), (0, None));
        running.end();
        assert!(all.iter().all(|(record, grids)| record.attempts == 0 && !grids.is_empty()));
        all.into_iter().map(|(record, grids)| (record.id, grids)).collect::<Vec<_>>()
    });
    assert!(tokens[0] == tokens[1], "bit for bit");
}

#[test]
fn a_stop_puts_back_all_that_are_on_their_way() {
    let is_busy = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&is_busy);
    let slow: AtBatch = Box::new(move |batch| {
        seen.store(batch, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(200));
        Ok(())
    });
    let running = start(5, true, slow);
    running.site.wait("one is encoded and others are ready", |_| {
        is_busy.load(Ordering::Relaxed) >= 1
            && running.records().iter().filter(|record| record.attempts > 0).count() >= 2
    });
    let (_site, records) = running.end();
    assert!(records.iter().any(|record| record.state == ScanState::Ingested));
    assert!(records.iter().all(|record| record.attempts == 0), "{records:?}");
}

#[test]
fn a_device_that_fails_ends_the_stage_and_only_its_own_scan_is_to_blame() {
    let failing: AtBatch = Box::new(|batch| {
        thread::sleep(Duration::from_millis(50));
        if batch < 5 {
            return Ok(());
        }
        let (device, message) = ("test".to_owned(), "gone".to_owned());
        Err(DeviceError::Failed { device, message })
    });
    let mut running = start(6, true, failing);
    let (stage, end) = running.pipeline.ended.blocking_recv().unwrap();
    assert_eq!(stage, StageName::Encode);
    assert!(matches!(end, StageEnd::Failed(ScanError::Device(_))), "{end:?}");
    let (_site, records) = running.end();
    let attempts: Vec<u32> = records.iter().map(|record| record.attempts).collect();
    assert_eq!(attempts.iter().sum::<u32>(), 1, "{attempts:?}");
}

#[test]
fn the_last_step_ends_the_stage_when_it_fails_though_no_scan_follows() {
    // Features that are NaN make no tokens.
    let site = Site::new(2, &[]);
    site.drop_in("sub-1_T1w.nii.gz", &scan_bytes(1));
    let mut running = start_on(site, Kind { is_async: true, gives_nan: true }, nothing(), |_| {});
    let (stage, end) = running.pipeline.ended.blocking_recv().unwrap();
    assert_eq!(stage, StageName::Encode);
    assert!(matches!(end, StageEnd::Failed(ScanError::Device(_))), "{end:?}");
    let (_site, records) = running.end();
    assert_eq!(records[0].attempts, 1, "it may be to blame");
}

#[test]
fn a_panic_of_the_device_sets_its_scan_aside_and_the_others_go_on() {
    let panicking: AtBatch = Box::new(|batch| {
        assert!(batch != 4, "a bug");
        Ok(())
    });
    let running = start(5, true, panicking);
    running.wait_encoded(4);
    running.site.wait("set aside", |_| running.shared.board.status().n_quarantined == 1);
    let (_site, records) = running.end();
    assert!(records.iter().all(|record| record.attempts <= 1));
}

#[test]
fn scans_that_were_in_hand_at_a_crash_are_encoded_one_at_a_time() {
    // They are ingested, and the process dies while it encodes three of them.
    let slow: AtBatch = Box::new(|_| {
        thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    let running = start(6, true, slow);
    running.site.wait("taken in", |_| running.records().len() == 6);
    let (site, records) = running.end();
    let ingested: Vec<ScanRecord> =
        records.into_iter().filter(|record| record.state == ScanState::Ingested).collect();
    assert!(ingested.len() >= 3);
    let suspects: Vec<_> = ingested[..3].iter().map(|record| record.id).collect();
    let shared: Arc<OnceLock<Arc<Shared>>> = Arc::default();
    let in_hand: Arc<Mutex<Vec<Vec<ScanRecord>>>> = Arc::default();
    let (seen, looks_at) = (Arc::clone(&in_hand), Arc::clone(&shared));
    let watching: AtBatch = Box::new(move |_| {
        thread::sleep(Duration::from_millis(30));
        let state = looks_at.get().unwrap().config().directories.state.clone();
        let records = support::records(&state);
        let in_hand = records.into_iter().filter(|record| record.attempts > 0).collect();
        seen.lock().unwrap().push(in_hand);
        Ok(())
    });
    let kind = Kind { is_async: true, gives_nan: false };
    let running = start_on(site, kind, watching, |fresh| {
        for record in &ingested[..3] {
            let state = &fresh.config().directories.state;
            support::put_record(state, &ScanRecord { attempts: 1, ..record.clone() });
        }
        shared.set(Arc::clone(fresh)).ok();
    });
    running.wait_encoded(6);
    running.end();
    // Number of attempts of the scans that are being encoded: it was one and is two now.
    let batches = in_hand.lock().unwrap();
    let in_hand = |records: &[ScanRecord], wanted: u32| {
        records.iter().filter(|record| record.attempts == wanted).count()
    };
    let of_suspects = batches.iter().filter(|records| in_hand(records, 2) > 0);
    assert!(of_suspects.clone().count() >= suspects.len());
    for records in of_suspects {
        assert_eq!(in_hand(records, 2), 1);
        let others = records.iter().filter(|record| !suspects.contains(&record.id));
        assert_eq!(others.count(), 0, "{records:?}");
    }
}
