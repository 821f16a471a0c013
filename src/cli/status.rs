//! `oddscan status`: asks the running daemon for its status, over HTTP on loopback.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{CONFIG, Failure, UNAVAILABLE};
use crate::{
    config::Config,
    pipeline::board::{PASSED_OVER, Status},
    results::MIXED,
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Settings of the daemon; only its address is used.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the daemon, instead of the one in the settings.
    #[arg(long, value_name = "ADDRESS:PORT")]
    address: Option<SocketAddr>,
    /// Print the JSON of the daemon.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let address = match arguments.address {
        Some(address) => address,
        None => listens(arguments.config.as_deref())?,
    };
    let (text, status) = ask(address)?;
    if arguments.json {
        println!("{text}");
    } else {
        print!("{}", table(&status));
    }
    Ok(())
}

/// The address in the settings. It is used even if other settings have faults: the daemon may run
/// with older settings.
fn listens(path: Option<&Path>) -> Result<SocketAddr, Failure> {
    let error = match Config::load(path) {
        Ok(config) => return Ok(config.service.listen),
        Err(error) => error,
    };
    let Some(address) = path.and_then(Config::listen_in) else {
        return Err(Failure::new(CONFIG, error));
    };
    eprintln!("{error}\nstill asking {address}");
    Ok(address)
}

/// The daemon's status, as text and parsed.
pub(super) fn ask(address: SocketAddr) -> Result<(String, Status), Failure> {
    let text = page(address, "/status.json")?;
    let status = serde_json::from_str(&text).map_err(|error| Failure::new(UNAVAILABLE, error))?;
    Ok((text, status))
}

/// Text of one of the daemon's pages, like `/metrics`.
pub(super) fn page(address: SocketAddr, path: &str) -> Result<String, Failure> {
    let silent = |error: ureq::Error| {
        Failure::new(
            UNAVAILABLE,
            format!("no daemon answers on {address} ({error}); start it, or give --address"),
        )
    };
    // Requests to loopback must not go through the site's proxy.
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(5)))
        .proxy(None)
        .build()
        .into();
    let mut response = agent.get(format!("http://{address}{path}")).call().map_err(silent)?;
    response.body_mut().read_to_string().map_err(silent)
}

fn table(status: &Status) -> String {
    let state = if status.takes_work() { "ready" } else { "not ready" };
    let mut text = format!(
        "oddscan {} is {state}: {}\nmodel {} on {}, method {}\n",
        status.version,
        status.line(),
        status.model,
        status.device,
        status.method
    );
    text += &format!(
        "since the start: {} accepted, {} duplicates, {} quarantined, {} results or notices written\n",
        status.n_accepted, status.n_duplicates, status.n_quarantined, status.n_reported
    );
    if status.n_passed_over > 0 {
        text += &format!(
            "{} files in the incoming folder are passed over: {PASSED_OVER}\n",
            status.n_passed_over
        );
    }
    for (name, cohort) in &status.cohorts {
        text += &format!(
            "cohort {name}: {} scans (needs {} patients, holds at most {} scans), {} results to \
             write\n",
            cohort.n_scans, cohort.min_scans, cohort.max_scans, cohort.n_outdated
        );
        if let Some(ratio) = cohort.heterogeneity.filter(|&ratio| ratio > MIXED) {
            text +=
                &format!("  warning: the scans differ as a whole ({ratio:.2}): several sources?\n");
        }
        if cohort.n_set_aside > 0 {
            text += &format!(
                "  {} of the scans are guests: others are not compared with them ([quality])\n",
                cohort.n_set_aside
            );
        }
        if cohort.n_same_patient > 0 {
            text += &format!(
                "  {} of the scans do not count, because their patient has another scan here; scans of one \
                 patient are not compared with each other (window.compare_same_patient)\n",
                cohort.n_same_patient
            );
        }
        if cohort.few_patients {
            text += "  warning: the window is full with scans of too few patients; scans of one patient are \
                     compared with each other\n";
        }
        if cohort.n_hidden_follow_ups > 0 {
            text += &format!(
                "  warning: {} of the scans look like follow-up scans of one person, but their names do not \
                 say so; see their sidecars (scoring.follow_up_ratio)\n",
                cohort.n_hidden_follow_ups
            );
        }
        if cohort.n_unlike > 0 {
            text += &format!(
                "  warning: {} of the scans look unlike the others; see their sidecars\n",
                cohort.n_unlike
            );
        }
    }
    text
}
