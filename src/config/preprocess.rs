//! `[preprocess]`: a program of the site that finds the brain or mends intensities before oddscan
//! does.

use std::{path::Path, time::Duration};

use serde::Deserialize;

use super::Checker;
pub use crate::process::hook::{PreprocessChoice, PreprocessSettings};

/// What stands for the files in a command.
pub const PLACEHOLDERS: [&str; 3] = ["{scan}", "{out}", "{mask}"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPreprocess {
    command: Vec<String>,
    name: String,
    version_command: Vec<String>,
    scans: String,
    timeout_secs: f64,
    memory_mib: i64,
    max_output_mib: i64,
}

impl Checker {
    /// The command, if there is one.
    pub(super) fn preprocess(&mut self, raw: RawPreprocess) -> Option<PreprocessSettings> {
        let mebibytes = |value: usize| value as u64 * 1_048_576;
        let timeout = self.number("preprocess.timeout_secs", raw.timeout_secs, 1.0, 86_400.0);
        let memory = self.whole("preprocess.memory_mib", raw.memory_mib, 0, 1 << 24);
        let output = self.whole("preprocess.max_output_mib", raw.max_output_mib, 1, 1 << 20);
        let word = "\"heads\" or \"all\"";
        let scans = self.word("preprocess.scans", &raw.scans, word, PreprocessChoice::Heads);
        self.program("preprocess.version_command", &raw.version_command);
        self.program("preprocess.command", &raw.command);
        let program = raw.command.first()?;
        self.placeholders(&raw.command);
        let file_name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
        Some(PreprocessSettings {
            name: if raw.name.is_empty() { file_name.into_owned() } else { raw.name },
            command: raw.command,
            version_command: raw.version_command,
            scans,
            timeout: Duration::from_secs_f64(timeout),
            memory_bytes: (memory > 0).then_some(mebibytes(memory)),
            max_output_bytes: mebibytes(output),
        })
    }

    /// There is no shell and no search path that could find a program by its name.
    fn program(&mut self, key: &str, command: &[String]) {
        let Some(program) = command.first() else { return };
        if !Path::new(program).is_absolute() {
            let needed = "the full path of a program as the first word is needed";
            self.fault(key, format!("{command:?}"), needed);
        }
        if command.iter().any(|word| word.contains('\0')) {
            self.fault(key, format!("{command:?}"), "words without zero bytes are needed");
        }
    }

    fn placeholders(&mut self, command: &[String]) {
        let key = "preprocess.command";
        let found = format!("{command:?}");
        let names = |placeholder: &str| command.iter().any(|word| word.contains(placeholder));
        if !names("{scan}") || !(names("{out}") || names("{mask}")) {
            let needed = "{scan} and at least one of {out} and {mask} are needed among its words";
            self.fault(key, &found, needed);
        }
        let without = |word: &String| {
            PLACEHOLDERS
                .iter()
                .fold(word.clone(), |word, placeholder| word.replace(placeholder, ""))
        };
        if command.iter().any(|word| without(word).contains(['{', '}'])) {
            self.fault(key, &found, "no braces but those of {scan}, {out} and {mask} are allowed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Config, ConfigError},
        *,
    };

    fn faults(site: &str) -> Vec<String> {
        match Config::parse(site) {
            Err(ConfigError::Faults { faults }) => faults.iter().map(ToString::to_string).collect(),
            other => panic!("faults expected, got {other:?}"),
        }
    }

    #[test]
    fn there_is_no_command_unless_a_site_names_one() {
        assert_eq!(Config::parse("").unwrap().preprocess, None);
        let site =
            "preprocess.command = [\"/opt/fs/mri_synthstrip\", \"-i\", \"{scan}\", \"-m={mask}\"]";
        let found = Config::parse(site).unwrap().preprocess.unwrap();
        assert_eq!(found.name, "mri_synthstrip");
        assert_eq!((found.scans, found.timeout.as_secs()), (PreprocessChoice::Heads, 600));
        let named = Config::parse(&format!("{site}\npreprocess.name = \"SynthStrip\"")).unwrap();
        assert_eq!(named.preprocess.unwrap().name, "SynthStrip");
        let unlimited = Config::parse(&format!("{site}\npreprocess.memory_mib = 0")).unwrap();
        assert_eq!(unlimited.preprocess.unwrap().memory_bytes, None);
        let old = Config::parse("").unwrap();
        let new = Config::parse(site).unwrap();
        assert_eq!(old.restart_needed_for(&new), ["preprocess.command"]);
        assert_eq!(old.with_reloadable_of(new).preprocess, None);
    }

    #[test]
    fn a_command_that_cannot_work_is_refused_with_what_is_missing() {
        let found =
            faults("preprocess.command = [\"hd-bet\", \"{scan}\"]\npreprocess.scans = \"some\"");
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(
            found.iter().any(|fault| fault.contains("the full path of a program")),
            "{found:?}"
        );
        assert!(found.iter().any(|fault| fault.contains("at least one of {out} and {mask}")));
        let found = faults("preprocess.command = [\"/x\", \"{scan}\", \"{mask}\", \"{subject}\"]");
        assert!(found[0].contains("no braces but those"), "{found:?}");
        let found = faults("[preprocess]\ntimeout_secs = 0\nmax_output_mib = 0\nmemory_mib = -1");
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
