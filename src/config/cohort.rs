//! `[[cohort]]`: the rules that say which scans are compared with which.

use toml::Value;

use super::check::Checker;
use crate::domain::{
    acquisition::{SUFFIXES, known_suffix},
    cohort::{CohortRule, Condition, MAX_SPACING, NumberFact, Pattern, THICK, TextFact, UNKNOWN},
};

/// Longest name of a cohort. Metric labels and the status line show it.
const MAX_NAME: usize = 40;

/// Label of cohorts beyond `window.max_cohort_labels`.
const OTHER: &str = "other";

impl Checker {
    /// Every rule, in the order of the settings.
    pub(super) fn cohorts(&mut self) -> Vec<CohortRule> {
        let mut rules: Vec<CohortRule> = Vec::new();
        for (index, entry) in self.list("cohort").into_iter().enumerate() {
            // A fault names the rule by its position, counted from 1, and by its name if it has
            // one.
            let mut key = format!("cohort {}", index + 1);
            let Value::Table(mut entry) = entry else {
                self.fault(&key, entry, "a table with name and match is needed");
                continue;
            };
            if let Some(name) = entry.get("name") {
                key += &format!(" ({name})");
            }

            let name = self.cohort_name(&key, entry.remove("name"), &rules);
            let conditions = self.conditions(&key, entry.remove("match"));
            for (unknown, value) in entry {
                self.fault(&format!("{key}.{unknown}"), value, "a rule has only name and match");
            }
            rules.push(CohortRule { name, conditions });
        }
        rules
    }

    fn cohort_name(&mut self, key: &str, name: Option<Value>, before: &[CohortRule]) -> String {
        let key = format!("{key}.name");
        let is_letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let name = match name {
            Some(Value::String(name))
                if (1..=MAX_NAME).contains(&name.len()) && name.chars().all(is_letter) =>
            {
                name
            }
            found => {
                let needed = format!("1 to {MAX_NAME} characters of a-z, 0-9 and - are needed");
                self.fault(&key, shown(found.as_ref()), needed);
                return String::new();
            }
        };

        let of_thick = name.strip_suffix(THICK).unwrap_or(&name);
        if known_suffix(of_thick).is_some() || [UNKNOWN, OTHER].contains(&name.as_str()) {
            let needed = "another name is needed: scans that no rule takes use this name for \
                          their suffix, and would join this cohort";
            self.fault(&key, format!("{name:?}"), needed);
        }
        if before.iter().any(|rule| rule.name == name) {
            self.fault(&key, format!("{name:?}"), "a name that no other rule has is needed");
        }
        name
    }

    fn conditions(&mut self, key: &str, conditions: Option<Value>) -> Vec<Condition> {
        let key = format!("{key}.match");
        let Some(Value::Table(table)) = conditions else {
            let needed = "a table of conditions is needed, like { suffix = \"T1w\" }";
            self.fault(&key, shown(conditions.as_ref()), needed);
            return Vec::new();
        };

        let n_faults = self.n_faults();
        let found: Vec<Condition> =
            table.iter().filter_map(|(name, value)| self.condition(&key, name, value)).collect();
        // A condition with a fault may be the missing one, so this check would mislead.
        if self.n_faults() == n_faults && !found.iter().any(Condition::tells_images_apart) {
            let needed = "one of suffix, series and file is needed, or a T1 and a FLAIR of the same \
                          scanner would be mixed";
            self.fault(&key, Value::Table(table), needed);
        }
        found
    }

    fn condition(&mut self, key: &str, name: &str, value: &Value) -> Option<Condition> {
        let key = format!("{key}.{name}");
        if let Some(fact) = TextFact::ALL.into_iter().find(|fact| fact.key() == name) {
            return self.pattern(&key, value).map(|pattern| Condition::Like(fact, pattern));
        }
        if let Some(fact) = NumberFact::ALL.into_iter().find(|fact| fact.key() == name) {
            return self.range(&key, value).map(|[low, high]| Condition::Within(fact, low..=high));
        }
        match name {
            "suffix" => {
                let suffix = value.as_str().and_then(known_suffix);
                if suffix.is_none() {
                    let needed = format!("one of {} is needed", SUFFIXES.join(", "));
                    self.fault(&key, value, needed);
                }
                suffix.map(Condition::Suffix)
            }
            MAX_SPACING => {
                let most = number(value).filter(|most| *most > 0.0 && most.is_finite());
                if most.is_none() {
                    self.fault(&key, value, "a number above 0 is needed");
                }
                most.map(Condition::MaxSpacing)
            }
            _ => {
                let facts = TextFact::ALL.map(TextFact::key);
                let numbers = NumberFact::ALL.map(NumberFact::key);
                let all = [&["suffix", MAX_SPACING][..], &facts, &numbers].concat();
                let needed = format!("there is no such condition, only {}", all.join(", "));
                self.fault(&key, value, needed);
                None
            }
        }
    }

    fn pattern(&mut self, key: &str, value: &Value) -> Option<Pattern> {
        let text = value.as_str().filter(|text| !text.is_empty());
        let pattern = text.ok_or_else(|| "a text".to_owned()).and_then(Pattern::new);
        pattern
            .map_err(|why| self.fault(key, value, format!("a shell pattern is needed ({why})")))
            .ok()
    }

    fn range(&mut self, key: &str, value: &Value) -> Option<[f64; 2]> {
        let ends = value.as_array().map(|ends| ends.iter().map(number).collect::<Option<Vec<_>>>());
        match ends.flatten().as_deref() {
            Some(&[low, high]) if 0.0 <= low && low <= high && high.is_finite() => {
                Some([low, high])
            }
            _ => {
                let needed = "a range [low, high] of two numbers from 0 on is needed";
                self.fault(key, value, needed);
                None
            }
        }
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64))
}

/// A value as the file writes it.
fn shown(value: Option<&Value>) -> String {
    value.map_or("(absent)".to_owned(), Value::to_string)
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, check::faults};

    #[test]
    fn a_rule_may_ask_for_everything_that_is_known_of_a_scan() {
        let config = Config::parse(
            r#"
            [[cohort]]
            name = "t1-3t"
            match = { suffix = "t1W", field_strength_t = [2.5, 3.5], manufacturer = "Siemens*", model = "*Prisma*", series = "*MPRAGE*", dimensions = "3D", echo_time_ms = [2, 4], repetition_time_ms = [1000, 3000], inversion_time_ms = [800, 1100], slice_thickness_mm = [0, 1.2], max_spacing_mm = 1.5, file = "site-a_*" }
            [[cohort]]
            name = "flair-1"
            match.suffix = "FLAIR"
            "#,
        )
        .unwrap();
        let text = config.cohorts[0].to_string();
        let parts = [
            "t1-3t: ",
            "suffix T1w",
            "field_strength_t 2.5 to 3.5",
            "manufacturer like \"Siemens*\"",
            "max_spacing_mm 1.5",
        ];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(
            (config.cohorts[0].conditions.len(), config.cohorts[1].conditions.len()),
            (12, 1)
        );
        assert!(Config::parse("").unwrap().cohorts.is_empty());
    }

    #[test]
    fn all_faults_of_all_rules_are_listed_at_once_and_say_where() {
        let found = faults(
            r#"
            [[cohort]]
            name = "T1 3T"
            match = { suffix = "T1", field_strength_t = [3.5, 2.5], feild = 3 }
            [[cohort]]
            name = "t1w"
            match = { manufacturer = "GE*" }
            colour = "red"
            [[cohort]]
            match = { series = "[" }
            [[cohort]]
            name = "a"
            [[cohort]]
            name = "a"
            match = { file = "*", max_spacing_mm = 0, echo_time_ms = 3.0 }
            "#,
        );
        let expected = [
            "cohort 1 (\"T1 3T\").name = \"T1 3T\": 1 to 40 characters of a-z",
            "cohort 1 (\"T1 3T\").match.suffix = \"T1\": one of T1w, T2w, FLAIR",
            "cohort 1 (\"T1 3T\").match.field_strength_t = [3.5, 2.5]: a range [low, high]",
            "cohort 1 (\"T1 3T\").match.feild = 3: there is no such condition, only suffix, max",
            "cohort 2 (\"t1w\").name = \"t1w\": another name is needed",
            "cohort 2 (\"t1w\").match = { manufacturer = \"GE*\" }: one of suffix, series and file",
            "cohort 2 (\"t1w\").colour = \"red\": a rule has only name and match",
            "cohort 3.name = (absent): 1 to 40 characters",
            "cohort 3.match.series = \"[\": a shell pattern is needed (unclosed character class",
            "cohort 4 (\"a\").match = (absent): a table of conditions is needed",
            "cohort 5 (\"a\").name = \"a\": a name that no other rule has is needed",
            "cohort 5 (\"a\").match.max_spacing_mm = 0: a number above 0 is needed",
            "cohort 5 (\"a\").match.echo_time_ms = 3.0: a range [low, high]",
        ];
        for start in expected {
            let n = found.iter().filter(|fault| fault.starts_with(start)).count();
            assert_eq!(n, 1, "{start} in {found:#?}");
        }
        assert_eq!(found.len(), expected.len(), "{found:#?}");
    }

    #[test]
    fn what_is_no_list_of_tables_is_a_fault_and_no_riddle() {
        assert!(faults("cohort = [3]")[0].starts_with("cohort 1 = 3: a table with name and match"));
        assert!(faults("[cohort]\nname = \"a\"")[0].contains("a value of type array is needed"));
    }
}
