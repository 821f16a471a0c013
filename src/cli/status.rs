//! `oddscan status`: asks the running daemon for its status, over HTTP on loopback.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};

use super::{CONFIG, Failure, INTERNAL, IO, UNAVAILABLE};
use crate::{
    config::Config,
    domain::left_alone::LeftAlone,
    nifti::foreign_format,
    pipeline::board::{LEFT_ALONE_FILE, LeftAloneNames, Status},
    results::MIXED,
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Settings of the daemon; its address is used, and with --names its state folder.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the daemon, instead of the one in the settings.
    #[arg(long, value_name = "ADDRESS:PORT")]
    address: Option<SocketAddr>,
    /// Print the JSON of the daemon.
    #[arg(long)]
    json: bool,
    /// Also name the files that are left alone. Needs the right to read the state folder, because
    /// names can name patients.
    #[arg(long)]
    names: bool,
}

/// Names of what is left alone, by reason.
type Names = BTreeMap<LeftAlone, LeftAloneNames>;

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let address = match arguments.address {
        Some(address) => address,
        None => listens(arguments.config.as_deref())?,
    };
    let (text, status) = ask(address)?;
    let names = arguments.names.then(|| names(arguments.config.as_deref())).transpose()?;
    match (arguments.json, names) {
        (true, None) => println!("{text}"),
        (true, Some(names)) => println!("{}", with_names(&text, &names)?),
        (false, names) => print!("{}", table(&status, &names.unwrap_or_default())),
    }
    Ok(())
}

/// The names that the daemon keeps in its state folder.
fn names(path: Option<&Path>) -> Result<Names, Failure> {
    let config = Config::load(path).map_err(|error| Failure::new(CONFIG, error))?;
    let file = config.directories.state.join(LEFT_ALONE_FILE);
    let bytes = fs::read(&file).map_err(|error| {
        let text = "run this as the user of the service or as root, and give --config";
        Failure::new(IO, format!("cannot read {}: {error}; {text}", file.display()))
    })?;
    serde_json::from_slice(&bytes).map_err(|error| Failure::new(INTERNAL, error))
}

/// The daemon's JSON with the names under `left_alone_names`.
fn with_names(text: &str, names: &Names) -> Result<Value, Failure> {
    let mut status: Value =
        serde_json::from_str(text).map_err(|error| Failure::new(UNAVAILABLE, error))?;
    let names: BTreeMap<_, _> =
        names.iter().map(|(reason, named)| (reason.name(), &named.names)).collect();
    status["left_alone_names"] = json!(names);
    Ok(status)
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

/// What is left alone, by reason, with names where there are any.
fn left_alone(status: &Status, names: &Names) -> String {
    let n_all: usize = status.left_alone.values().sum();
    if n_all == 0 {
        return String::new();
    }

    let mut text = format!("{n_all} files in the incoming folder are left alone:\n");
    for (reason, n_files) in &status.left_alone {
        text += &format!("  {n_files} {}: {reason}\n", reason.name());
        let Some(named) = names.get(reason) else { continue };
        // A name may hold line breaks and the control codes of a terminal.
        for name in &named.names {
            let advice = foreign_format(name).map(|advice| format!(" ({advice})"));
            text += &format!("    {}{}\n", name.escape_debug(), advice.unwrap_or_default());
        }
        if named.n_files > named.names.len() {
            text += &format!("    and {} more\n", named.n_files - named.names.len());
        }
    }
    text
}

fn table(status: &Status, names: &Names) -> String {
    let state = if status.ready { "ready" } else { "not ready" };
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
    match status.n_unfinished {
        0 => {}
        1 => text += "1 file waits for its end: it is cut off, or somebody is writing it\n",
        n => text += &format!("{n} files wait for their end: cut off, or being written\n"),
    }
    for repair in &status.repairs {
        text += &format!("repaired at the start: {}\n", repair.words());
    }
    for (damage, n_things) in &status.damaged {
        text += &format!("found damaged and made good as far as possible: {n_things} {damage}\n");
    }
    text += &left_alone(status, names);
    for (name, cohort) in &status.cohorts {
        text += &format!(
            "cohort {name}: {} scans (needs {} patients, holds at most {} scans), {} results to \
             write\n",
            cohort.n_scans, cohort.min_scans, cohort.max_scans, cohort.n_outdated
        );
        if cohort.n_rebuilding > 0 {
            text += &format!(
                "  {} of the scans are encoded again, because the store lacks their tokens; then the window is \
                 scored. Results stay as they are until then\n",
                cohort.n_rebuilding
            );
        }
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
        if cohort.n_parts_of_heads > 0 {
            text += &format!(
                "  warning: {} of the scans show a part of the head; have all slices arrived? See their \
                 sidecars (alignment.coverage, quality.min_coverage)\n",
                cohort.n_parts_of_heads
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{domain::damage::Damage, pipeline::board::CohortStatus};

    #[test]
    fn damage_and_a_window_that_is_being_rebuilt_are_shown() {
        let mut status = Status::default();
        assert!(!table(&status, &Names::new()).contains("damaged"));
        status.damaged.insert(Damage::Source, 2);
        let cohort = CohortStatus { n_rebuilding: 3, ..CohortStatus::default() };
        status.cohorts.insert("t1w".into(), cohort);
        let text = table(&status, &Names::new());
        assert!(text.contains("2 archived sources of scans\n"), "{text}");
        assert!(text.contains("3 of the scans are encoded again"), "{text}");
        assert!(status.line().contains("t1w 0/0 (3 encoded again)"), "{}", status.line());
    }

    #[test]
    fn what_is_left_alone_is_counted_and_named_on_request() {
        let mut status = Status { n_unfinished: 1, ..Status::default() };
        assert!(!table(&status, &Names::new()).contains("left alone"));
        status.left_alone = [(LeftAlone::Localiser, 3), (LeftAlone::TooDeep, 1)].into();
        let text = table(&status, &Names::new());
        assert!(text.contains("1 file waits for its end"), "{text}");
        let wanted = "4 files in the incoming folder are left alone:\n  3 localiser: a localiser\n  \
                      1 too_deep: below too many folders\n";
        assert!(text.ends_with(wanted), "{text}");

        let named = LeftAloneNames { n_files: 3, names: vec!["a\n1".into(), "b.mgz".into()] };
        let names = [(LeftAlone::Localiser, named)].into();
        let text = table(&status, &names);
        let names_of_it = "a localiser\n    a\\n1\n    b.mgz (FreeSurfer .mgz: convert";
        assert!(text.contains(names_of_it), "{text}");
        assert!(text.contains(")\n    and 1 more\n  1 too"), "{text}");
        let json = with_names("{\"ready\":true}", &names).unwrap();
        assert_eq!(
            json,
            json!({"ready": true, "left_alone_names": {"localiser": ["a\n1", "b.mgz"]}})
        );
    }
}
