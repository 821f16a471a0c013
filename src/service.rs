//! Runs the daemon: start, signals, watchdog, stop.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::{JoinError, JoinHandle},
};
use tracing::{debug, error, info, warn};

use crate::{
    config::{Config, ConfigError},
    domain::error::ScanError,
    engine::{Engine, EngineError, Ingredients},
    metrics::{Fallback, Metrics},
    pipeline::{Pipeline, Shared, StageEnd, now_secs},
    store::{self, Store},
    telemetry::{self, LogHandle},
    watcher::{self, Change},
};

/// Why the daemon could not start or continue.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The settings have faults.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights, the device or another part of the method cannot be used.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A folder cannot be created or written.
    #[error("cannot make or use the folder {} ({key}); create it and let the service write there", path.display())]
    Folder {
        /// Setting that names the folder.
        key: &'static str,
        /// Folder as set.
        path: PathBuf,
        /// Error of the file system.
        source: std::io::Error,
    },
    /// The daemon cannot listen on the address of the pages.
    #[error("cannot listen on {address} (service.listen); is another oddscan running?")]
    Listen {
        /// Address as set.
        address: std::net::SocketAddr,
        /// Error of the system.
        source: std::io::Error,
    },
    /// The store or a stage failed permanently.
    #[error(transparent)]
    Stage(#[from] ScanError),
    /// A stage ended because of a bug.
    #[error("the stage {stage} crashed: {panic}")]
    Crash {
        /// Name of the stage's thread.
        stage: &'static str,
        /// Text of the panic.
        panic: String,
    },
    /// The system refuses a signal handler or a thread.
    #[error("the system refuses a signal handler or a thread")]
    System(#[source] std::io::Error),
}

/// Runs the daemon until SIGTERM, SIGINT or an error that ends it.
pub fn run(path: Option<PathBuf>) -> Result<(), ServiceError> {
    store::share_one_heap();
    let config = Config::load(path.as_deref())?;
    let log = telemetry::start_logging(&config.service.log);

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(ServiceError::System)?;

    let result = runtime.block_on(Service { path, log }.run(config));
    // A thread may still read new settings. Nobody waits for it now.
    runtime.shutdown_background();
    result
}

struct Service {
    path: Option<PathBuf>,
    log: LogHandle,
}

impl Service {
    async fn run(self, config: Config) -> Result<(), ServiceError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(ServiceError::System)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(ServiceError::System)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(ServiceError::System)?;

        make_folders(&config)?;

        let address = config.service.listen;
        let listener = telemetry::bind(address).await;
        let listener = listener.map_err(|source| ServiceError::Listen { address, source })?;

        notify::status("loading the model and opening the store");
        let (shared, engine) = tokio::task::block_in_place(|| build(&config))?;

        let pages = tokio::spawn(telemetry::serve(listener, Arc::clone(&shared)));
        let started = Pipeline::start(&shared, engine);
        let mut pipeline = started.inspect_err(|_| shared.end_orderly())?;
        let waker = pipeline.waker();

        let incoming = config.directories.incoming.clone();
        let watcher = watcher::watch(&incoming, move |change| {
            waker.send(change).ok();
        });
        if let Err(error) = &watcher {
            let secs = config.intake.rescan.as_secs_f64();
            // The error names folders, and folders can name patients.
            debug!(%error, "no file events");
            warn!(
                secs,
                "file events are not available; only listings every intake.rescan_secs find new \
                 files"
            );
        }

        self.ready(&shared, &config);

        let mut watchdog = tokio::time::interval(notify::watchdog_interval());
        let mut reading: Option<JoinHandle<Result<Config, ServiceError>>> = None;
        let ended = loop {
            tokio::select! {
                _ = terminate.recv() => break None,
                _ = interrupt.recv() => break None,
                // If a second signal arrives while settings are read, only the second reading
                // counts.
                _ = hangup.recv() => reading = Some(self.read_again(&shared)),
                read = async { reading.as_mut().expect("there is one").await },
                    if reading.is_some() =>
                {
                    reading = None;
                    let crashed = |error: JoinError| Err(ServiceError::System(error.into()));
                    self.reload(&shared, read.unwrap_or_else(crashed));
                    pipeline.waker().send(Change::Reload).ok();
                }
                _ = watchdog.tick() => feed_watchdog(&shared),
                end = pipeline.ended.recv() => break end,
            }
        };

        notify::stopping();
        shared.board.set_running(false);
        shared.request_stop();
        let result = ended.map_or(Ok(()), |(stage, end)| stage_result(stage.name(), end));
        drop(watcher);
        tokio::task::block_in_place(|| pipeline.join());
        let flushed = shared.store.flush();
        pages.abort();
        if !may_be_caused_by_a_scan(&result) {
            shared.end_orderly();
        }

        match &result {
            Ok(()) => info!("stopped; the next start continues with unfinished scans"),
            Err(error) => error!(%error, "stopped by a failure"),
        }
        result.and_then(|()| Ok(flushed.map_err(ScanError::from)?))
    }

    fn ready(&self, shared: &Shared, config: &Config) {
        {
            let mut status = shared.board.update();
            status.model.clone_from(&shared.method.model);
            status.device.clone_from(&shared.method.device);
            status.method.clone_from(&shared.method.fingerprint);
        }
        shared.board.set_running(true);
        shared.metrics.reload(true, now_secs());

        info!(
            version = env!("CARGO_PKG_VERSION"),
            pages = %config.service.listen,
            "ready"
        );
        notify::ready(&shared.board.status().line());
    }

    /// Reads the settings again and checks that the daemon could also start with them. This runs in
    /// its own thread, because the files may be on a slow disk.
    fn read_again(&self, shared: &Shared) -> JoinHandle<Result<Config, ServiceError>> {
        notify::reloading();
        let (path, old) = (self.path.clone(), shared.config());
        tokio::task::spawn_blocking(move || {
            let new = Config::load(path.as_deref())?;
            if !old.restart_needed_for(&new).is_empty() {
                Ingredients::load(&new)?;
            }
            Ok(new)
        })
    }

    /// Applies new settings. Refused settings change nothing.
    fn reload(&self, shared: &Shared, read: Result<Config, ServiceError>) {
        let old = shared.config();
        let reloaded = read.and_then(|new| Ok((old.reloaded(&new)?, new)));
        match reloaded {
            Ok((reloaded, new)) => {
                let kept = old.restart_needed_for(&new);
                if kept.is_empty() {
                    info!(changed = old.changed_to(&new).join(", "), "settings reloaded");
                } else {
                    warn!(keys = kept.join(", "), "settings reloaded, but these need a restart");
                }
                telemetry::change_filter(&self.log, &reloaded.service.log);
                shared.set_config(reloaded);
                shared.metrics.reload(true, now_secs());
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                error!(%error, cause, "the new settings are refused; the old ones stay in force");
                shared.metrics.reload(false, now_secs());
            }
        }
        notify::ready(&shared.board.status().line());
    }
}

fn build(config: &Config) -> Result<(Arc<Shared>, Engine), ServiceError> {
    let engine = Engine::start(config)?;

    let folder = config.directories.state.join("store");
    let opened = Store::open(&folder, config.window.memory_bytes).map_err(ScanError::from)?;

    let metrics = Metrics::with_max_cohorts(config.window.max_cohort_labels);
    for &repair in &opened.repairs {
        warn!(repair = repair.name(), "{}", repair.words());
        metrics.store_repaired(repair);
    }
    let method = engine.method.clone();
    if engine.fell_back {
        metrics.encode_fallback(Fallback::Cpu);
    }

    let revision = option_env!("ODDSCAN_REVISION").unwrap_or("unknown");
    let version = env!("CARGO_PKG_VERSION");
    metrics.build_info(version, revision, &method.device, &store::FORMAT.to_string());
    metrics.model_info(&method.model, &method.weights_sha256[..12], &method.fingerprint[..12]);

    let shared = Shared::new(config.clone(), opened.store, metrics, method)?;
    shared.board.update().repairs = opened.repairs;
    Ok((Arc::new(shared), engine))
}

fn make_folders(config: &Config) -> Result<(), ServiceError> {
    let folders = &config.directories;
    for (key, path) in [
        ("directories.incoming", &folders.incoming),
        ("directories.results", &folders.results),
        ("directories.quarantine", &folders.quarantine),
        ("directories.state", &folders.state),
    ] {
        std::fs::create_dir_all(path).map_err(|source| ServiceError::Folder {
            key,
            path: path.clone(),
            source,
        })?;
    }
    Ok(())
}

/// Whether a scan that was in hand may be the cause of this end.
fn may_be_caused_by_a_scan(result: &Result<(), ServiceError>) -> bool {
    let is_device = |error: &ScanError| matches!(error, ScanError::Device(_));
    match result {
        Err(ServiceError::Crash { .. }) => true,
        Err(ServiceError::Stage(error)) => is_device(error),
        _ => false,
    }
}

fn stage_result(stage: &'static str, end: StageEnd) -> Result<(), ServiceError> {
    match end {
        StageEnd::Stopped => {
            let panic = "it ended without being asked to".to_owned();
            Err(ServiceError::Crash { stage, panic })
        }
        StageEnd::Failed(error) => Err(error.into()),
        StageEnd::Panicked(panic) => Err(ServiceError::Crash { stage, panic }),
    }
}

/// Notifies the watchdog of the service manager while no stage hangs. Without notification the
/// service manager restarts the daemon.
fn feed_watchdog(shared: &Shared) {
    notify::status(&shared.board.status().line());
    match shared.board.silent_stage(notify::PATIENCE) {
        None => {
            notify::watchdog();
            shared.metrics.watchdog_notified();
        }
        Some(stage) => error!(
            stage = stage.name(),
            "a stage hangs; systemd restarts the daemon unless the stage recovers"
        ),
    }
}

/// The service manager's protocol. Does nothing without the feature `systemd`, or outside systemd.
mod notify {
    use super::Duration;

    /// A stage that is silent for longer hangs. A few slices of the largest network on a slow CPU,
    /// or a MiB from a slow share, take less.
    pub(super) const PATIENCE: Duration = Duration::from_secs(90);

    pub(super) fn ready(status: &str) {
        send(&[("READY", "1"), ("STATUS", status)]);
    }

    pub(super) fn status(status: &str) {
        send(&[("STATUS", status)]);
    }

    pub(super) fn stopping() {
        send(&[("STOPPING", "1"), ("STATUS", "stopping")]);
    }

    pub(super) fn watchdog() {
        send(&[("WATCHDOG", "1")]);
    }

    pub(super) fn reloading() {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let micros = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
        send(&[("RELOADING", "1"), ("MONOTONIC_USEC", &micros.to_string())]);
    }

    /// A third of the unit's limit. Without a limit, ten seconds, for the status line only.
    #[cfg(feature = "systemd")]
    pub(super) fn watchdog_interval() -> Duration {
        match systemd::daemon::watchdog_enabled() {
            Ok(micros) if micros > 0 => Duration::from_micros(micros / 3),
            _ => Duration::from_secs(10),
        }
    }

    #[cfg(not(feature = "systemd"))]
    pub(super) fn watchdog_interval() -> Duration {
        Duration::from_secs(10)
    }

    #[cfg(feature = "systemd")]
    fn send(state: &[(&str, &str)]) {
        // Outside systemd nobody listens.
        systemd::daemon::notify(state.iter()).ok();
    }

    #[cfg(not(feature = "systemd"))]
    fn send(_: &[(&str, &str)]) {}
}
