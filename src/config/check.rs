//! Checks values against their ranges and collects every fault.

use std::{fmt, num::NonZeroUsize, ops::RangeInclusive, path::PathBuf, time::Duration};

use toml::{Table, Value};

use crate::numeric::scoring::Fraction;

/// A setting with a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Full name of the key, such as `window.min_scans`.
    pub key: String,
    /// Value in the file.
    pub found: String,
    /// What is needed instead.
    pub needed: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, found, needed } = self;
        write!(f, "{key} = {found}: {needed}")
    }
}

/// Overwrites values of `base` with those of `over`. `base` has every key that exists. A key or
/// type that does not match becomes a fault.
pub(super) fn merge(base: &mut Table, over: Table, prefix: &str, faults: &mut Vec<Fault>) {
    for (key, value) in over {
        let path = format!("{prefix}{key}");
        match (base.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => {
                merge(inner, value, &format!("{path}."), faults);
            }
            (Some(Value::Float(slot)), Value::Integer(number)) => *slot = number as f64,
            (Some(slot), value) if slot.same_type(&value) => *slot = value,
            (Some(slot), value) => faults.push(Fault {
                key: path,
                found: value.to_string(),
                needed: format!("a value of type {} is needed", slot.type_str()),
            }),
            (None, value) => faults.push(Fault {
                key: path,
                found: value.to_string(),
                needed: "there is no such key; see config/default.toml for all of them".into(),
            }),
        }
    }
}

/// Takes the values out of a tree and checks each. A valid value replaces one with a fault, so that
/// the check continues and finds all faults.
///
/// The tree comes from [`merge`]: it has every key of `config/default.toml`, and each value has the
/// type of its default.
pub(super) struct Checker {
    tree: Table,
    faults: Vec<Fault>,
}

impl Checker {
    /// `faults` are those found so far; the check adds its own.
    pub(super) fn new(tree: Table, faults: Vec<Fault>) -> Self {
        Self { tree, faults }
    }

    /// Returns all faults. Every key must have been read.
    pub(super) fn finish(&mut self) -> Vec<Fault> {
        let is_read = |value: &Value| value.as_table().is_some_and(Table::is_empty);
        let unread = self.tree.iter().find(|(_, value)| !is_read(value));
        assert!(unread.is_none(), "no check reads these keys of config/default.toml: {unread:?}");
        std::mem::take(&mut self.faults)
    }

    pub(super) fn fault(&mut self, key: &str, found: impl fmt::Display, needed: impl Into<String>) {
        self.faults.push(Fault {
            key: key.into(),
            found: found.to_string(),
            needed: needed.into(),
        });
    }

    pub(super) fn n_faults(&self) -> usize {
        self.faults.len()
    }

    pub(super) fn has_fault(&self, key: &str) -> bool {
        self.faults.iter().any(|fault| fault.key == key)
    }

    fn take(&mut self, key: &str) -> Value {
        let (section, name) = key.split_once('.').unwrap_or(("", key));
        let table = match section {
            "" => Some(&mut self.tree),
            section => self.tree.get_mut(section).and_then(Value::as_table_mut),
        };
        let value = table.and_then(|table| table.remove(name));
        value.unwrap_or_else(|| panic!("config/default.toml lacks {key}, or it is read twice"))
    }

    pub(super) fn flag(&mut self, key: &str) -> bool {
        self.take(key).as_bool().expect("the type of the default")
    }

    /// A whole number of any size.
    pub(super) fn integer(&mut self, key: &str) -> i64 {
        self.take(key).as_integer().expect("the type of the default")
    }

    pub(super) fn text(&mut self, key: &str) -> String {
        match self.take(key) {
            Value::String(text) => text,
            other => panic!("{key} = {other} has not the type of the default"),
        }
    }

    pub(super) fn path(&mut self, key: &str) -> PathBuf {
        self.text(key).into()
    }

    /// A path, unless the text is empty.
    pub(super) fn named_path(&mut self, key: &str) -> Option<PathBuf> {
        Some(self.path(key)).filter(|path| !path.as_os_str().is_empty())
    }

    pub(super) fn list(&mut self, key: &str) -> Vec<Value> {
        match self.take(key) {
            Value::Array(values) => values,
            other => panic!("{key} = {other} has not the type of the default"),
        }
    }

    pub(super) fn texts(&mut self, key: &str) -> Vec<String> {
        let mut texts = Vec::new();
        for value in self.list(key) {
            match value {
                Value::String(text) => texts.push(text),
                other => self.fault(key, other, "a list of texts is needed"),
            }
        }
        texts
    }

    pub(super) fn patterns(&mut self, key: &str) -> Vec<String> {
        let patterns = self.texts(key);
        for pattern in &patterns {
            if let Err(error) = globset::Glob::new(pattern) {
                let needed = format!("a shell pattern is needed ({})", error.kind());
                self.fault(key, format!("{pattern:?}"), needed);
            }
        }
        patterns
    }

    pub(super) fn whole(&mut self, key: &str, range: RangeInclusive<i64>) -> usize {
        let value = self.integer(key);
        self.in_range(key, &Value::Integer(value), range)
    }

    /// Checks one value of a list, or a value that is no list.
    pub(super) fn in_range(
        &mut self,
        key: &str,
        value: &Value,
        range: RangeInclusive<i64>,
    ) -> usize {
        let (low, high) = (*range.start(), *range.end());
        let found = value.as_integer();
        if !found.is_some_and(|found| range.contains(&found)) {
            self.fault(key, value, format!("a whole number from {low} to {high} is needed"));
        }
        found.unwrap_or(low).clamp(low, high) as usize
    }

    pub(super) fn positive(&mut self, key: &str, high: i64) -> NonZeroUsize {
        NonZeroUsize::new(self.whole(key, 1..=high)).unwrap_or(NonZeroUsize::MIN)
    }

    /// A number of MiB, as bytes.
    pub(super) fn mebibytes(&mut self, key: &str, range: RangeInclusive<i64>) -> u64 {
        (self.whole(key, range) as u64) << 20
    }

    pub(super) fn number(&mut self, key: &str, range: RangeInclusive<f64>) -> f64 {
        let value = self.take(key).as_float().expect("the type of the default");
        if range.contains(&value) {
            return value;
        }
        let (low, high) = range.into_inner();
        self.fault(key, value, format!("a number from {low} to {high} is needed"));
        low
    }

    pub(super) fn seconds(&mut self, key: &str, range: RangeInclusive<f64>) -> Duration {
        Duration::from_secs_f64(self.number(key, range))
    }

    /// A share above 0 and at most `most`.
    pub(super) fn share(&mut self, key: &str, most: f64) -> Fraction {
        let value = self.take(key).as_float().expect("the type of the default");
        let share = Fraction::new(value).filter(|share| share.get() <= most);
        share.unwrap_or_else(|| {
            self.fault(key, value, format!("a share above 0 and at most {most} is needed"));
            Fraction::new(most).expect("it is a share itself")
        })
    }

    /// The choice with this name.
    pub(super) fn word<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> T {
        let word = self.text(key);
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == word) {
            return *choice;
        }
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
        let (last, others) = names.split_last().expect("there is something to choose from");
        let needed = format!("{} or {last} is needed", others.join(", "));
        self.fault(key, format!("{word:?}"), needed);
        choices[0].1
    }
}

/// The faults of a site's text, as lines.
#[cfg(test)]
pub(super) fn faults(site: &str) -> Vec<String> {
    match super::Config::parse(site) {
        Err(super::ConfigError::Faults { faults }) => {
            faults.iter().map(ToString::to_string).collect()
        }
        other => panic!("faults expected, got {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_are_listed_at_once_with_key_value_and_need() {
        let found = faults("tokens.slice_stride = 8");
        assert_eq!(
            found,
            ["tokens.slice_stride = 8: at most tokens.slices_per_token (7) is needed"]
        );
        let found = faults(
            "[scoring]\nkeep_fraction = 0.0\n[window]\nmin_scans = 500\nmax_scans = 100\n\
             [service]\nlisten = \"0.0.0.0:9464\"\n[tokens]\nviews = [\"axial\", \"oblique\"]",
        );
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found.iter().any(|f| f.starts_with("scoring.keep_fraction = 0: a share above 0")));
        assert!(found.iter().any(|f| f.contains("at most window.max_scans (100)")));
        assert!(found.iter().any(|f| f.contains("\"0.0.0.0:9464\": a loopback address")));
        assert!(found.iter().any(|f| f.contains("\"oblique\"")));
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_named_with_their_path() {
        let found =
            faults("[scoring]\nkepp_fraction = 0.3\n[window]\nmin_scans = \"8\"\n[extra]\n");
        assert_eq!(found.len(), 3, "{found:?}");
        let named = |start: &str| found.iter().any(|fault| fault.starts_with(start));
        assert!(named("scoring.kepp_fraction = 0.3: there is no such key"), "{found:?}");
        assert!(named("window.min_scans = \"8\": a value of type integer"), "{found:?}");
        let found = faults("[window]\nmin_scans = \"4\"\nmax_scans = 5\n");
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn a_wrong_type_within_a_list_is_one_fault_among_the_others() {
        let found = faults(
            "intake.accept = [\"*.nii\", 3]\nencoder.layers = [\"9\", 2.5, 65]\n\
             scoring.keep_fraction = nan",
        );
        assert_eq!(
            found,
            [
                "intake.accept = 3: a list of texts is needed",
                "encoder.layers = \"9\": a whole number from 1 to 64 is needed",
                "encoder.layers = 2.5: a whole number from 1 to 64 is needed",
                "encoder.layers = 65: a whole number from 1 to 64 is needed",
                "scoring.keep_fraction = NaN: a share above 0 and at most 1 is needed",
            ]
        );
    }
}
