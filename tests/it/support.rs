//! Small scans, a small network, and the binary as a process.

use std::{
    env,
    fmt::Display,
    fs,
    io::{PipeWriter, pipe},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use oddscan::{
    domain::scan::ScanRecord,
    ledger::Ledger,
    nifti,
    numeric::{
        geometry::{Affine, Shape3},
        projection::Normal,
        token::TokenGrid,
        volume::RawVolume,
    },
    pipeline::board::CohortStatus,
    pipeline::board::Status,
    report::{Sidecar, Standing, read_sidecar},
    store::{MIN_MEMORY, Store},
};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use tempfile::TempDir;

use crate::shipped::repository;

/// A brain of 26 x 30 x 24 voxels of 6 mm: an ellipsoid of smooth random signal on a slightly
/// tilted grid. Each seed gives another signal.
pub fn brain(seed: u64) -> RawVolume {
    let shape = Shape3([26, 30, 24]);
    let affine =
        Affine::new([[6.0, 0.3, 0.0, -80.0], [-0.3, 6.0, 0.0, -90.0], [0.0, 0.0, 6.0, -70.0]]);
    let mut random = Normal::new(seed);
    let waves: Vec<[f64; 4]> =
        (0..4).map(|_| std::array::from_fn(|_| 0.3 * random.next())).collect();
    let voxel = |offset: usize| {
        let [x, y, z] = shape.voxel(offset).map(|index| index as f64);
        let radius = ((x - 12.5) / 11.0).powi(2) + ((y - 14.5) / 13.0).powi(2);
        if radius + ((z - 11.5) / 10.0).powi(2) > 1.0 {
            return 0.0;
        }
        let wave = |[a, b, c, d]: &[f64; 4]| (a * x + b * y + c * z + 10.0 * d).sin();
        (100.0 + 15.0 * waves.iter().map(wave).sum::<f64>() + random.next()) as f32
    };
    let voxels = (0..shape.n_voxels()).map(voxel).collect();
    RawVolume { shape, voxels, affine: affine.unwrap() }
}

/// The scan of [`brain`] as a `.nii.gz`.
pub fn scan_bytes(seed: u64) -> Vec<u8> {
    nifti::encode_volume(&brain(seed))
}

/// A folder with everything that a daemon needs, and the daemon that runs in it.
pub struct Site {
    folder: TempDir,
    pub address: SocketAddr,
    daemon: Option<Child>,
}

impl Site {
    /// A site whose windows need `min_scans`; `more` are further lines of settings, like
    /// `window.max_scans = 5`.
    pub fn new(min_scans: usize, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let site = Self { folder, address, daemon: None };
        fs::write(site.path("weights"), crate::tiny::network(0).to_safetensors(false)).unwrap();
        for name in ["incoming", "results", "quarantine", "state"] {
            fs::create_dir(site.path(name)).unwrap();
        }
        site.configure(min_scans, more);
        site
    }

    pub fn configure(&self, min_scans: usize, more: &[&str]) {
        let folder = self.folder.path().display();
        let key = |line: &str| line.split(' ').next().unwrap().to_owned();
        let mut lines: Vec<String> = ["incoming", "results", "quarantine", "state"]
            .map(|name| format!("directories.{name} = \"{folder}/{name}\""))
            .into();
        lines.extend([
            format!("encoder.weights = \"{folder}/weights\""),
            format!("service.listen = \"{}\"", self.address),
            format!("window.min_scans = {min_scans}"),
        ]);
        lines.extend(
            [
                "encoder.device = \"cpu\"",
                "intake.settle_secs = 0.3",
                "intake.rescan_secs = 0.2",
                "intake.read_at_once = 3",
                "volume.side = 56",
                "tokens.projection = 16",
                "service.min_free_mib = 0",
                // Results are found by the names of their scans.
                "results.identity = \"path\"",
                // Made-up scans have coarse voxels.
                "window.thick_slice_mm = 0",
            ]
            .iter()
            .filter(|line| !more.iter().any(|other| key(other) == key(line)))
            .chain(more)
            .map(|line| (*line).to_owned()),
        );
        fs::write(self.path("config.toml"), lines.join("\n")).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts a file into the incoming folder the way a scanner does.
    pub fn drop_in(&self, name: &str, bytes: &[u8]) {
        let partial = self.path("incoming").join(format!("{name}.partial"));
        fs::write(&partial, bytes).unwrap();
        fs::rename(partial, self.path("incoming").join(name)).unwrap();
    }

    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// Starts the daemon with environment variables.
    pub fn start_with(&mut self, variables: &[(&str, &str)]) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = self.run();
        command.envs(variables.iter().copied());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.spawn(command);
    }

    /// Starts the daemon with its log in a pipe.
    pub fn start_into(&mut self, log: PipeWriter) {
        let mut command = self.run();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.spawn(command);
    }

    fn run(&self) -> Command {
        let mut command = oddscan();
        command.arg("run").arg("--config").arg(self.path("config.toml"));
        command
    }

    fn spawn(&mut self, mut command: Command) {
        self.daemon = Some(command.spawn().unwrap());
        self.wait("ready", |site| site.get("/readyz").is_some_and(|page| page == "ready\n"));
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.daemon.as_ref().unwrap()), signal).unwrap();
    }

    /// A process that the daemon has started, if one is running.
    pub fn child(&self) -> Option<Pid> {
        let daemon = self.daemon.as_ref().unwrap().id().to_string();
        let is_child = |process: &Path| {
            // The parent is the second field behind the name, which ends with a bracket.
            let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
            let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace());
            fields.is_some_and(|mut fields| fields.nth(1) == Some(&daemon))
        };
        let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
        let child = processes.into_iter().find(|process| is_child(process))?;
        Pid::from_raw(child.file_name()?.to_str()?.parse().ok()?)
    }

    /// Asks the daemon to end and returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.daemon.take().unwrap().wait().unwrap().code()
    }

    /// Ends the daemon like a power cut.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.daemon.take().unwrap().wait().unwrap();
    }

    /// Lets a stopped daemon encode all members again from its archive. Their tokens must equal
    /// those that it made of the original files.
    pub fn encode_again(&mut self) {
        let folder = self.path("state/store");
        let store = || Store::open(&folder, MIN_MEMORY).unwrap().store;
        let members: Vec<ScanRecord> =
            records(&self.path("state")).into_iter().filter(ScanRecord::is_member).collect();
        let tokens = |store: &Store| -> Vec<Vec<TokenGrid>> {
            let grids = |record: &ScanRecord| -> Vec<TokenGrid> {
                (0..).map_while(|grid| store.tokens(&record.id, grid).unwrap()).collect()
            };
            members.iter().map(grids).filter(|grids| !grids.is_empty()).collect()
        };
        let opened = store();
        let before = tokens(&opened);
        members.iter().for_each(|record| opened.remove(&record.id).unwrap());
        assert!(tokens(&opened).is_empty());
        drop(opened);
        self.start();
        self.wait("encoded again", |site| {
            let whole = |c: &&CohortStatus| c.n_rebuilding == 0;
            let status = site.status();
            let members = status.cohorts.values().filter(whole).map(|c| c.n_scans).sum::<usize>();
            members == before.len()
        });
        assert_eq!(self.stop(), Some(0));
        assert!(!before.is_empty() && before == tokens(&store()), "bit for bit");
    }

    /// Limits how many files and connections the daemon may have open.
    pub fn limit_files(&self, n_files: u64) {
        let pid = Pid::from_child(self.daemon.as_ref().unwrap());
        let limit = Rlimit { current: Some(n_files), ..getrlimit(Resource::Nofile) };
        prlimit(Some(pid), Resource::Nofile, limit).unwrap();
    }

    pub fn is_running(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(|daemon| daemon.try_wait().unwrap().is_none())
    }

    /// Waits for something to become true; panics with the log after a long time.
    pub fn wait(&self, what: &str, is_true: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !is_true(self) {
            assert!(started.elapsed() < Duration::from_secs(120), "never {what}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// A page of the daemon, whatever its status code.
    pub fn get(&self, page: &str) -> Option<String> {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().proxy(None).http_status_as_error(false).build().into();
        let mut response = agent.get(format!("http://{}{page}", self.address)).call().ok()?;
        response.body_mut().read_to_string().ok()
    }

    pub fn status(&self) -> Status {
        serde_json::from_str(&self.get("/status.json").unwrap()).unwrap()
    }

    /// Value of a metric with its labels, like `oddscan_ready`.
    pub fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in\n{page}")).parse().unwrap()
    }

    pub fn sidecar(&self, stem: &str) -> Option<Sidecar> {
        read_sidecar(&self.path("results").join(format!("{stem}_anomaly.json"))).ok()
    }

    /// Waits until these scans are each other's window and all results are of that window.
    pub fn wait_scored(&self, stems: &[&str]) {
        self.wait(&format!("scored: {stems:?}"), |site| {
            let is_scored = |stem: &&str| {
                site.sidecar(stem).is_some_and(|sidecar| {
                    sidecar.standing == Standing::Scored && sidecar.window.size == stems.len()
                })
            };
            stems.iter().all(is_scored) && site.results_are_in_place()
        });
    }

    /// Whether all result files have the names that users look for. A new sidecar appears shortly
    /// before that.
    pub fn results_are_in_place(&self) -> bool {
        names(&self.path("results")).iter().all(|name| !name.starts_with(".oddscan-"))
    }

    pub fn result(&self, stem: &str, ending: &str) -> Vec<u8> {
        fs::read(self.path("results").join(format!("{stem}_anomaly{ending}"))).unwrap()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.kill().ok();
            daemon.wait().ok();
        }
    }
}

/// The binary, without the settings of this machine.
pub fn oddscan() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oddscan"));
    command.stdin(Stdio::null());
    for name in ["ODDSCAN_WEIGHTS", "RUST_LOG", "JOURNAL_STREAM", "NOTIFY_SOCKET"] {
        command.env_remove(name);
    }
    // Otherwise it would use weights and template that a person has fetched.
    command.env("ODDSCAN_MODELS", "/nonexistent");
    command
}

/// Prints that a test leaves something out. `scripts/test.sh` counts these lines.
pub fn skip(why: impl Display) {
    eprintln!("skipped: {why}");
}

/// Like [`skip`], for tools that `scripts/test.sh` installs. There it is a failure.
fn skip_for_want_of_a_tool(why: &str) {
    assert!(env::var_os("ODDSCAN_REQUIRE").is_none_or(|what| what != "tools"), "{why}");
    skip(why);
}

/// Whether a tool is absent. If so, prints which Debian package has it.
pub fn is_missing(tool: &str, package: &str) -> bool {
    let is_missing = Command::new(tool).arg("--version").output().is_err();
    if is_missing {
        let why = format!("{tool} is missing, install Debian's package {package}");
        skip_for_want_of_a_tool(&why);
    }
    is_missing
}

/// Command for a script of this folder and the Python that `scripts/test.sh` sets up, if it has
/// `module`.
pub fn python(script: &str, module: &str) -> Option<Command> {
    let python = env::var_os("ODDSCAN_PYTHON").unwrap_or_default();
    let import = Command::new(&python).args(["-c", &format!("import {module}")]).output();
    if !import.is_ok_and(|output| output.status.success()) {
        let why = format!("ODDSCAN_PYTHON names no Python with {module}, use scripts/test.sh");
        skip_for_want_of_a_tool(&why);
        return None;
    }
    let mut command = Command::new(python);
    command.arg(repository().join("tests/it").join(script));
    Some(command)
}

/// The stdout and stderr of a finished command, and its exit code.
pub fn said(output: &Output) -> (String, String, Option<i32>) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}

/// A pipe that nobody reads.
pub fn closed_pipe() -> PipeWriter {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    writer
}

/// The stderr of a command and its exit code, when nobody reads its stdout.
pub fn unread(command: &mut Command) -> (String, Option<i32>) {
    let child = command.stdout(closed_pipe()).stderr(Stdio::piped()).spawn().unwrap();
    let (_, stderr, code) = said(&child.wait_with_output().unwrap());
    (stderr, code)
}

/// Names of the files in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The records of a state folder, in order of arrival.
pub fn records(state: &Path) -> Vec<ScanRecord> {
    let loaded = Ledger::open(&state.join("ledger")).unwrap().load().unwrap();
    assert_eq!(loaded.damaged, []);
    let mut records: Vec<ScanRecord> =
        loaded.entries.into_iter().map(|entry| entry.record).collect();
    records.sort_by_key(|record| record.sequence);
    records
}

/// Writes a record into a state folder, as the newest.
pub fn put_record(state: &Path, record: &ScanRecord) {
    let ledger = Ledger::open(&state.join("ledger")).unwrap();
    ledger.load().unwrap();
    ledger.put(record).unwrap();
}
