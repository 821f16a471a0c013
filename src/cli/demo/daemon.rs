//! The daemon as a child process.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::super::{Failure, INTERNAL, status};
use crate::{domain::not_ready::NotReady, pipeline::board::Status};

/// Longest start. It reads and hashes the weights.
const START: Duration = Duration::from_secs(120);

/// A running `oddscan run`. It is killed when this is dropped.
pub(in crate::cli) struct Daemon {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
}

impl Daemon {
    /// Starts this program as the daemon and waits until it is ready. Its log goes to
    /// `<folder>/daemon.log`. `config` must make it listen on `address`.
    pub(in crate::cli) fn start(
        config: &Path,
        address: SocketAddr,
        folder: &Path,
    ) -> Result<Self, Failure> {
        let log = folder.join("daemon.log");
        let output = File::create(&log).map_err(Failure::of_file)?;
        let child = Command::new(std::env::current_exe().map_err(Failure::of_file)?)
            .arg("run")
            .arg("--config")
            .arg(config)
            // The daemon must write its own log and not use the journal of this program.
            .env_remove("JOURNAL_STREAM")
            .stdout(output.try_clone().map_err(Failure::of_file)?)
            .stderr(output)
            .spawn()
            .map_err(Failure::of_file)?;

        let mut daemon = Self { child, address, log };
        let started = Instant::now();
        let is_started = |status: &Status| !status.has(NotReady::StartingOrStopping);
        while !status::ask(address).is_ok_and(|(_, status)| is_started(&status)) {
            daemon.check_alive()?;
            if started.elapsed() > START {
                return Err(daemon.failure("it does not become ready"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(daemon)
    }

    /// The current status of the daemon.
    pub(in crate::cli) fn status(&mut self) -> Result<Status, Failure> {
        self.check_alive()?;
        Ok(status::ask(self.address)?.1)
    }

    /// Stops the daemon like systemd and waits for its end.
    pub(in crate::cli) fn stop(mut self) -> Result<(), Failure> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).map_err(|error| Failure::of_file(error.into()))?;
        let end = self.child.wait().map_err(Failure::of_file)?;
        if end.success() { Ok(()) } else { Err(self.failure(&format!("it ended with {end}"))) }
    }

    fn check_alive(&mut self) -> Result<(), Failure> {
        match self.child.try_wait().map_err(Failure::of_file)? {
            None => Ok(()),
            Some(end) => Err(self.failure(&format!("it ended with {end}"))),
        }
    }

    fn failure(&self, what: &str) -> Failure {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(10)..].join("\n  ");
        let text = format!("the daemon failed: {what}; its log ends with\n  {tail}");
        Failure::new(INTERNAL, text)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
