//! `[preprocess]`: a program of the site that finds the brain or corrects intensities before
//! oddscan reads the scan.

use std::path::Path;

use super::check::Checker;
pub use crate::process::hook::{PreprocessChoice, PreprocessSettings};

/// Placeholders for the files in a command.
pub const PLACEHOLDERS: [&str; 3] = ["{scan}", "{out}", "{mask}"];

/// The settings, if the site names a command.
pub(super) fn read(check: &mut Checker) -> Option<PreprocessSettings> {
    let choices = [("heads", PreprocessChoice::Heads), ("all", PreprocessChoice::All)];
    let settings = PreprocessSettings {
        command: command(check, "preprocess.command"),
        name: check.text("preprocess.name"),
        version_command: command(check, "preprocess.version_command"),
        scans: check.word("preprocess.scans", &choices),
        timeout: check.seconds("preprocess.timeout_secs", 1.0..=86_400.0),
        memory_bytes: Some(check.mebibytes("preprocess.memory_mib", 0..=1 << 24))
            .filter(|&bytes| bytes > 0),
        max_output_bytes: check.mebibytes("preprocess.max_output_mib", 1..=1 << 20),
    };

    let program = settings.command.first()?;
    placeholders(check, &settings.command);
    let file_name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
    let name =
        if settings.name.is_empty() { file_name.into_owned() } else { settings.name.clone() };
    Some(PreprocessSettings { name, ..settings })
}

/// Program and arguments. No shell runs them and no search path applies, so the program needs its
/// full path.
fn command(check: &mut Checker, key: &str) -> Vec<String> {
    let command = check.texts(key);
    if command.first().is_some_and(|program| !Path::new(program).is_absolute()) {
        let needed = "the full path of a program as the first word is needed";
        check.fault(key, format!("{command:?}"), needed);
    }
    if command.iter().any(|word| word.contains('\0')) {
        check.fault(key, format!("{command:?}"), "words without zero bytes are needed");
    }
    command
}

fn placeholders(check: &mut Checker, command: &[String]) {
    let key = "preprocess.command";
    let found = format!("{command:?}");
    let names = |placeholder: &str| command.iter().any(|word| word.contains(placeholder));
    if !names("{scan}") || !(names("{out}") || names("{mask}")) {
        let needed = "{scan} and at least one of {out} and {mask} are needed among its words";
        check.fault(key, &found, needed);
    }

    let without = |word: &String| {
        PLACEHOLDERS.iter().fold(word.clone(), |word, placeholder| word.replace(placeholder, ""))
    };
    if command.iter().any(|word| without(word).contains(['{', '}'])) {
        check.fault(key, &found, "no braces but those of {scan}, {out} and {mask} are allowed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, check::faults};

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
