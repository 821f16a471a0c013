//! `[service]`: the daemon's pages, its log and its disk space.

use std::net::SocketAddr;

use tracing::level_filters::LevelFilter;

use super::check::Checker;

/// `[service]` after its check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceSettings {
    /// Loopback address of the HTTP pages.
    pub listen: SocketAddr,
    /// Filter of `tracing` for the log.
    pub log: String,
    /// Free disk space below which intake pauses, bytes.
    pub min_free_bytes: u64,
}

pub(super) fn read(check: &mut Checker) -> ServiceSettings {
    ServiceSettings {
        listen: listen(check),
        log: log(check),
        min_free_bytes: check.mebibytes("service.min_free_mib", 0..=1 << 40),
    }
}

fn listen(check: &mut Checker) -> SocketAddr {
    let key = "service.listen";
    let text = check.text(key);
    let address = text.parse().ok().filter(|address: &SocketAddr| address.ip().is_loopback());
    address.unwrap_or_else(|| {
        let needed = "a loopback address with a port is needed, like \"127.0.0.1:9464\"";
        check.fault(key, format!("{text:?}"), needed);
        SocketAddr::from(([127, 0, 0, 1], 9464))
    })
}

fn log(check: &mut Checker) -> String {
    let key = "service.log";
    let filter = check.text(key);
    // The filter would take any other word for the name of a module and silence all others.
    let says_level = |word: &str| word.contains(['=', '[']) || word.parse::<LevelFilter>().is_ok();
    let says_levels = filter.split(',').map(str::trim).all(says_level);
    if !says_levels || tracing_subscriber::EnvFilter::try_new(&filter).is_err() {
        let needed = "error, warn, info, debug, trace or a tracing filter is needed";
        check.fault(key, format!("{filter:?}"), needed);
    }
    filter
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, check::faults};

    #[test]
    fn a_filter_for_the_log_says_levels() {
        for good in ["info", "WARN", "off", "info,sled=warn", "oddscan=debug"] {
            assert!(Config::parse(&format!("service.log = \"{good}\"")).is_ok(), "{good}");
        }
        for bad in ["loud", "info,loud", "oddscan=loud"] {
            assert_eq!(faults(&format!("service.log = \"{bad}\"")).len(), 1, "{bad}");
        }
    }
}
