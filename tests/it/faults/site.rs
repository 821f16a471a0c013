//! A site whose daemon may end at any moment.

use std::{
    env, fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::replay::one_time;
use crate::support::oddscan;

/// How long a daemon may show no progress before it counts as hanging. The machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const POLL: Duration = Duration::from_millis(25);

pub const FOLDERS: [&str; 4] = ["incoming", "results", "quarantine", "state"];

/// Settings of all sites: a scan takes about 0.1 s.
const SETTINGS: &str = "
encoder.device = \"cpu\"
intake.settle_secs = 0.15
intake.rescan_secs = 0.15
intake.read_at_once = 1
volume.side = 28
tokens.projection = 16
service.min_free_mib = 0
results.identity = \"path\"
window.thick_slice_mm = 0
window.min_scans = 3
";

/// Folders, settings and the daemon of one run.
pub struct Site {
    root: TempDir,
    elsewhere: Option<TempDir>,
    address: SocketAddr,
    daemon: Option<Child>,
}

/// Why a daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Killed,
    Code(i32),
}

/// An address that no other site of this machine uses: each site has an address of its own in the
/// loopback network.
fn address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let number = NEXT.fetch_add(1, Ordering::Relaxed) % 254;
    (Ipv4Addr::new(127, high, low, 1 + number as u8), 9464).into()
}

/// A tiny network, the same for all.
fn weights() -> &'static [u8] {
    static WEIGHTS: OnceLock<Vec<u8>> = OnceLock::new();
    WEIGHTS.get_or_init(|| crate::tiny::network(0).to_safetensors(false))
}

impl Site {
    /// A site with a window of `max_scans`. With `is_apart`, its quarantine lies on another file
    /// system.
    pub fn new(max_scans: usize, is_apart: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = is_apart.then(|| tempfile::tempdir_in("/dev/shm").unwrap());
        let site = Self { root, elsewhere, address: address(), daemon: None };
        for name in FOLDERS {
            fs::create_dir_all(site.path(name)).unwrap();
        }
        fs::write(site.path("weights"), weights()).unwrap();

        let folders =
            FOLDERS.map(|name| format!("directories.{name} = {:?}\n", site.path(name))).concat();
        let own = format!(
            "encoder.weights = {:?}\nservice.listen = \"{}\"\nwindow.max_scans = {max_scans}\n",
            site.path("weights"),
            site.address
        );
        fs::write(site.path("config.toml"), folders + &own + SETTINGS.trim_start()).unwrap();
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        match &self.elsewhere {
            Some(folder) if name == "quarantine" => folder.path().join(name),
            _ => self.root.path().join(name),
        }
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Puts a file into the incoming folder the way a scanner does.
    pub fn drop_in(&self, name: &str, bytes: &[u8]) {
        let partial = self.path("incoming").join(format!("{name}.partial"));
        let mut file = fs::File::create(&partial).unwrap();
        file.write_all(bytes).unwrap();
        file.set_modified(one_time()).unwrap();
        fs::rename(partial, self.path("incoming").join(name)).unwrap();
    }

    /// Starts the daemon with environment variables, and does not wait for it.
    pub fn start(&mut self, variables: &[(String, String)]) {
        assert!(self.daemon.is_none(), "the last one was not waited for");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = oddscan();
        // Another build of the daemon, with the feature `faults`.
        if let Some(binary) = env::var_os("ODDSCAN_FAULTS_BINARY") {
            command = Command::new(binary);
            command.stdin(Stdio::null()).env("ODDSCAN_MODELS", "/nonexistent");
        }
        command.arg("run").arg("--config").arg(self.path("config.toml"));
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.daemon = Some(command.spawn().unwrap());
    }

    /// How the daemon ended, if it has.
    pub fn ended(&mut self) -> Option<End> {
        let status = self.daemon.as_mut()?.try_wait().unwrap()?;
        self.daemon = None;
        Some(end(status))
    }

    /// Asks the daemon to end, and waits for that. `None` if it hangs; it is killed then.
    pub fn stop(&mut self) -> Option<End> {
        self.signal(Signal::TERM);
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(end) = self.ended() {
                return Some(end);
            }
            thread::sleep(POLL);
        }
        self.kill();
        None
    }

    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        if let Some(mut daemon) = self.daemon.take() {
            daemon.wait().unwrap();
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(daemon) = &self.daemon {
            kill_process(Pid::from_child(daemon), signal).ok();
        }
    }

    pub fn process_id(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// A page of the daemon. `None` if it does not answer.
    pub fn get(&self, page: &str) -> Option<String> {
        let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(5)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "GET {page} HTTP/1.1\r\nHost: oddscan\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let is_whole = !head.to_lowercase().contains("transfer-encoding");
        is_whole.then(|| body.to_owned())
    }

    pub fn status(&self) -> Option<Value> {
        serde_json::from_str(&self.get("/status.json")?).ok()
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("log")).unwrap_or_default()).into_owned()
    }

    /// The last lines of the log.
    pub fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(6)..].join("\n    | ")
    }
}

fn end(status: ExitStatus) -> End {
    match status.signal() {
        Some(9) => End::Killed,
        Some(other) => End::Code(128 + other),
        None => End::Code(status.code().unwrap_or(-1)),
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.kill();
    }
}
