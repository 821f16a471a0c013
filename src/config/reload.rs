//! SIGHUP: which settings change while the daemon runs, and which need a restart.

use toml::{Table, Value};

use super::{Config, ConfigError, check};

/// Keys that SIGHUP cannot change, because stored tokens, open sockets or folders depend on them.
const NEEDS_RESTART: [&str; 12] = [
    "preset",
    "directories",
    "preprocess",
    "alignment",
    "volume",
    "intensity",
    "encoder",
    "tokens",
    "window.memory_mib",
    "window.max_cohort_labels",
    "scoring.reach_patches",
    "service.listen",
];

impl Config {
    /// Keys of `newer` that differ from `self` and need a restart.
    pub fn restart_needed_for(&self, newer: &Config) -> Vec<String> {
        self.changed_to(newer).into_iter().filter(|key| needs_restart(key)).collect()
    }

    /// Keys of `newer` that differ from `self`.
    pub fn changed_to(&self, newer: &Config) -> Vec<String> {
        let mut changed = Vec::new();
        differences(&self.tree, &newer.tree, "", &mut changed);
        changed
    }

    /// The settings of `newer`, but keys that need a restart keep the value of `self`.
    ///
    /// # Errors
    /// If the mixed settings have a fault.
    pub fn reloaded(&self, newer: &Config) -> Result<Config, ConfigError> {
        let mut tree = newer.tree.clone();
        for key in NEEDS_RESTART {
            keep_value(&mut tree, &self.tree, key);
        }
        // A preset changes as a whole at the restart, but it also sets keys here that need none.
        if newer.preset != self.preset {
            for section in ["scoring", "evidence"] {
                keep_value(&mut tree, &self.tree, section);
            }
        }
        check(tree, Vec::new())
    }
}

fn needs_restart(key: &str) -> bool {
    let is_in = |other: &str| key == other || key.starts_with(&format!("{other}."));
    NEEDS_RESTART.into_iter().any(is_in)
}

/// Full names of the keys whose values differ.
fn differences(one: &Table, other: &Table, prefix: &str, found: &mut Vec<String>) {
    for (key, value) in one {
        let path = format!("{prefix}{key}");
        match (value, other.get(key)) {
            (Value::Table(one), Some(Value::Table(other))) => {
                differences(one, other, &format!("{path}."), found);
            }
            (value, other) if other != Some(value) => found.push(path),
            _ => {}
        }
    }
}

/// Writes the old value of a dotted key into `tree`. Both trees hold every key.
fn keep_value(tree: &mut Table, old: &Table, key: &str) {
    match key.split_once('.') {
        None => tree[key] = old[key].clone(),
        Some((section, name)) => tree[section][name] = old[section][name].clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DEFAULT_TOML, defaults};

    /// Every key of the defaults, dotted, with its value.
    fn keys() -> Vec<(String, Value)> {
        let mut keys = Vec::new();
        for (section, value) in defaults() {
            match value {
                Value::Table(table) => {
                    keys.extend(table.into_iter().map(|(k, v)| (format!("{section}.{k}"), v)));
                }
                value => keys.push((section, value)),
            }
        }
        keys
    }

    /// Another value that the key may have.
    fn another(key: &str, value: &Value) -> String {
        match value {
            Value::Boolean(flag) => (!flag).to_string(),
            Value::Integer(number) => (number + 1).to_string(),
            Value::Float(0.0) => "0.5".to_owned(),
            Value::Float(number) if key == "window.compact_above" => (2.0 * number).to_string(),
            Value::Float(number) => format!("{:?}", number / 2.0),
            Value::String(_) => {
                let word = match key {
                    "preset" => "fast",
                    "preprocess.scans" => "all",
                    "alignment.mode" => "never",
                    "alignment.brain" => "network",
                    "intensity.standardise" => "nyul",
                    "encoder.device" => "cpu",
                    "encoder.position_resize" => "size",
                    "encoder.precision" => "f32",
                    "service.listen" => "127.0.0.1:9465",
                    "scoring.mask" => "always",
                    "results.identity" => "none",
                    "service.log" => "debug",
                    _ => "/elsewhere",
                };
                format!("{word:?}")
            }
            Value::Array(_) => match key {
                "cohort" => "[{ name = \"a\", match.suffix = \"T1w\" }]".to_owned(),
                "encoder.layers" => "[3]".to_owned(),
                "tokens.views" => "[\"axial\"]".to_owned(),
                _ => "[\"/program\", \"{scan}\", \"{mask}\"]".to_owned(),
            },
            other => panic!("{key} = {other} has an unexpected type"),
        }
    }

    /// The checked settings as text, without the tree that they were read from.
    fn checked(config: &Config) -> String {
        format!("{:?}", Config { tree: Table::new(), ..config.clone() })
    }

    #[test]
    fn each_key_is_taken_over_by_a_reload_or_waits_for_a_restart() {
        // Standardisation needs a file, so there is one from the start.
        const BEFORE: &str = "intensity.landmarks = \"/landmarks\"\n";
        let old = Config::parse(BEFORE).unwrap();
        for (key, value) in keys() {
            let site = format!("{key} = {}\n", another(&key, &value));
            let site = if key == "intensity.landmarks" { site } else { site + BEFORE };
            let new = Config::parse(&site).unwrap_or_else(|error| panic!("{site}: {error}"));
            assert!(old.changed_to(&new).contains(&key), "{site}");

            let reloaded = old.reloaded(&new).unwrap();
            if needs_restart(&key) {
                assert!(old.restart_needed_for(&new).contains(&key), "{key}");
                assert_eq!(reloaded.tree, old.tree, "{key}");
                assert_eq!(checked(&reloaded), checked(&old), "{key}");
            } else {
                assert!(old.restart_needed_for(&new).is_empty(), "{key}");
                assert_eq!(reloaded.tree, new.tree, "{key}");
                assert_eq!(checked(&reloaded), checked(&new), "{key}");
                assert_ne!(checked(&reloaded), checked(&old), "{key} has no effect");
            }
        }
    }

    /// Whether the comment of a key, or one of its section, marks it with `[reload]`.
    fn is_marked(key: &str) -> bool {
        let (section, name) = key.split_once('.').unwrap_or(("", key));
        let mut sections = DEFAULT_TOML.split("\n[");
        let of_top = sections.next().expect("some keys stand before the first section");
        let header = format!("{section}]\n");
        let text = sections.find_map(|text| text.strip_prefix(&header)).unwrap_or(of_top);
        let (before, _) = text.split_once(&format!("\n{name} = ")).expect("the key is there");
        let is_comment = |line: &&str| line.starts_with('#');
        let mut comment = before.lines().rev().take_while(is_comment);
        comment.any(|line| line.contains("[reload")) || text.contains("All keys here: [reload]")
    }

    #[test]
    fn every_key_that_a_reload_takes_over_is_marked_so_in_the_defaults() {
        for (key, _) in keys() {
            assert_eq!(is_marked(&key), !needs_restart(&key), "{key}");
        }
    }

    #[test]
    fn a_reload_names_the_keys_that_need_a_restart_and_takes_the_others() {
        let old = Config::parse("").unwrap();
        let new = Config::parse("[volume]\nside = 252\n[scoring]\nkeep_fraction = 0.2").unwrap();
        assert_eq!(old.restart_needed_for(&new), ["volume.side"]);
        let reloaded = old.reloaded(&new).unwrap();
        assert_eq!((reloaded.volume.side, reloaded.scoring.keep.get()), (224, 0.2));
        assert_eq!(reloaded.tree["volume"]["side"].as_integer(), Some(224));
        assert_eq!(reloaded.tree["scoring"]["keep_fraction"].as_float(), Some(0.2));
    }

    #[test]
    fn a_preset_waits_for_the_restart_as_a_whole() {
        let old = Config::parse("").unwrap();
        let paper = Config::parse("preset = \"paper\"\nresults.brain_mask = true").unwrap();
        assert!(old.restart_needed_for(&paper).contains(&"preset".to_owned()));
        let reloaded = old.reloaded(&paper).unwrap();
        assert_eq!(reloaded.scoring, old.scoring);
        assert_eq!(reloaded.tree["scoring"], old.tree["scoring"]);
        assert_eq!(reloaded.tree["evidence"], old.tree["evidence"]);
        assert!(reloaded.results.brain_mask);
    }
}
