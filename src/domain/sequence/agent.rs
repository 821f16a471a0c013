//! Whether a contrast agent was given. Header fields and names say so in many languages, and say
//! it of agents that were not given, too: "NO CONTRAST", "ohne KM", "sans injection".

use super::{
    values::AgentFields,
    words::{BEFORE_WEIGHTING, plain},
};

/// What a source says about a contrast agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Agent {
    /// Nothing.
    Silent,
    /// It was given.
    Given,
    /// It was not given.
    Withheld,
    /// Both, or one source contradicts another.
    Contradicted,
}

impl Agent {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Silent, said) | (said, Self::Silent) => said,
            (one, other) if one == other => one,
            _ => Self::Contradicted,
        }
    }
}

/// Names of agents and words for one.
const AGENTS: [&str; 40] = [
    "gd",
    "gad",
    "gado",
    "gadovist",
    "gadavist",
    "dotarem",
    "clariscan",
    "prohance",
    "magnevist",
    "multihance",
    "omniscan",
    "primovist",
    "eovist",
    "optimark",
    "elucirem",
    "vueway",
    "artirem",
    "ablavar",
    "dtpa",
    "gbca",
    "contrast",
    "contraste",
    "contrasto",
    "kontrast",
    "kontrastmittel",
    "contrastmiddel",
    "contr",
    "cont",
    "cte",
    "km",
    "mdc",
    "ce",
    "inj",
    "injection",
    "injecte",
    "injected",
    "injektion",
    "inyeccion",
    "enhanced",
    "feraheme",
];

/// "After the agent", without more words.
const AFTER: [&str; 3] = ["post", "postcon", "nachkm"];

/// "Before the agent", or "without it", without more words.
const BEFORE: [&str; 10] =
    ["pre", "precon", "nativ", "native", "nativa", "nativo", "natif", "basale", "basal", "blanco"];

/// Words that deny the agent that follows.
const WITHOUT: [&str; 24] = [
    "without", "wo", "no", "non", "not", "none", "ohne", "kein", "keine", "sans", "sin", "sem",
    "senza", "zonder", "geen", "aucun", "before", "vor", "avant", "antes", "prima", "voor", "pas",
    "bez",
];

/// Those of them that deny other things, too: "no angle".
const WEAK: [&str; 4] = ["no", "non", "not", "pas"];

/// Words that announce the agent that follows.
const WITH: [&str; 13] = [
    "with", "w", "mit", "avec", "con", "com", "met", "after", "nach", "apres", "dopo", "despues",
    "post",
];

/// Words between a denial and the agent.
const FILLERS: [&str; 20] = [
    "iv", "i", "v", "and", "und", "et", "y", "e", "en", "de", "di", "del", "du", "la", "le", "l",
    "any", "of", "the", "gabe",
];

/// After `post` and `pre`, these speak of a treatment.
const TREATMENTS: [&str; 14] = [
    "op",
    "operative",
    "operatively",
    "surgery",
    "surgical",
    "rt",
    "treatment",
    "therapy",
    "chemo",
    "radiation",
    "biopsy",
    "processing",
    "trauma",
    "stroke",
];

/// Before "contrast", these speak of another kind of contrast.
const OTHER_CONTRASTS: [&str; 6] = ["phase", "multi", "transfer", "susceptibility", "t2", "tissue"];

/// What fields, description and protocol say together.
///
/// The fields and the description are equals: neither wins over the other. The fields are often
/// copied from one series of an examination to the next, and descriptions are often not changed.
/// The protocol counts only if both are silent, because it may name the whole examination.
pub(super) fn agent(
    fields: &AgentFields,
    description: Option<&str>,
    protocol: Option<&str>,
    protocol_is_of_series: bool,
) -> Agent {
    let near = of_fields(fields).and(description.map_or(Agent::Silent, of_name));
    match (near, protocol.map_or(Agent::Silent, of_name)) {
        (Agent::Silent, said) if protocol_is_of_series || description.is_none() => said,
        // "Head with contrast" includes the images before it.
        (Agent::Silent, Agent::Given) => Agent::Contradicted,
        // "With and without": the images after it are labelled.
        (Agent::Silent, Agent::Contradicted) => Agent::Silent,
        (Agent::Silent, said) => said,
        (said, _) => said,
    }
}

/// What the fields of the header say. Any text that denies nothing is taken for an agent.
fn of_fields(fields: &AgentFields) -> Agent {
    let volume = match fields.volume_ml {
        Some(volume) if volume > 0.0 => Agent::Given,
        _ => Agent::Silent,
    };
    fields.name.as_deref().map_or(Agent::Silent, of_field).and(volume)
}

fn of_field(text: &str) -> Agent {
    const NOTHING: [&str; 9] = ["", "na", "n", "unknown", "unk", "x", "xx", "tbd", "other"];
    const DENIALS: [&str; 9] =
        ["nil", "nein", "nicht", "nessuno", "ninguno", "nenhum", "aucune", "neg", "false"];

    let words = words(text);
    let is_filled = |word: &Word| !NOTHING.contains(&word.text.as_str());
    let is_number = |word: &Word| word.text.chars().all(|c| c.is_ascii_digit());
    let is_zero = |word: &Word| word.text.chars().all(|c| c == '0');
    if !words.iter().any(is_filled) || text.trim().eq_ignore_ascii_case("n/a") {
        return Agent::Silent;
    }
    if words.iter().all(is_number) {
        return if words.iter().all(is_zero) { Agent::Silent } else { Agent::Given };
    }

    // "Non-ionic" is no denial.
    let denies = |(index, word): (usize, &Word)| {
        let is_ionic = words.get(index + 1).is_some_and(|next| next.text.starts_with("ionic"));
        DENIALS.contains(&word.text.as_str())
            || (WITHOUT.contains(&word.text.as_str()) && !is_ionic)
    };
    match of_name(text) {
        Agent::Contradicted => Agent::Contradicted,
        Agent::Withheld => Agent::Withheld,
        _ if words.iter().enumerate().any(denies) => Agent::Withheld,
        _ => Agent::Given,
    }
}

/// A word, and whether a sign stands directly beside it: `+C`, `C+`, `C-`, `-C`.
struct Word {
    text: String,
    has_plus: bool,
    has_minus: bool,
}

/// The words of a text, with the abbreviations for "with" and "without" written out.
fn words(text: &str) -> Vec<Word> {
    let mut text = format!(" {} ", plain(text));
    for (short, long) in [
        ("w/wo", "with and without"),
        ("w/w/o", "with and without"),
        ("w & w/o", "with and without"),
        ("w&w/o", "with and without"),
        ("w/o", "without"),
        ("c/s", "with and without"),
        ("c/c", "with contrast"),
        ("s/c", "without contrast"),
        ("c/", "with "),
        ("s/", "without "),
        ("w/", "with "),
        ("o.", "ohne "),
    ] {
        for start in [' ', '_', '(', '-'] {
            text = text.replace(&format!("{start}{short}"), &format!("{start}{long}"));
        }
    }

    let letters: Vec<char> = text.chars().collect();
    let is_letter = |index: usize| letters.get(index).is_some_and(char::is_ascii_alphanumeric);
    let is_sign = |index: usize, sign: char| letters.get(index) == Some(&sign);
    let mut words = Vec::new();
    let mut index = 0;
    while index < letters.len() {
        let start = index;
        while is_letter(index) {
            index += 1;
        }
        if start == index {
            index += 1;
            continue;
        }
        // The text begins and ends with a blank, so that both neighbours exist.
        let (before, after) = (start - 1, index);
        let begins = before > 0 && is_sign(before, '-') && !is_letter(before - 1);
        let ends = is_sign(after, '-') && !is_letter(after + 1);
        words.push(Word {
            text: letters[start..index].iter().collect(),
            has_plus: is_sign(before, '+') || is_sign(after, '+'),
            has_minus: begins || ends,
        });
    }
    words
}

/// What a description or a protocol says.
fn of_name(text: &str) -> Agent {
    let words = words(text);
    let mut said = Agent::Silent;
    let mut index = 0;
    while index < words.len() {
        let (now, n_used) = of_words(&words[..index], &words[index..]);
        said = said.and(now);
        index += n_used;
    }
    said
}

/// What the next words say, and how many of them.
fn of_words(before: &[Word], words: &[Word]) -> (Agent, usize) {
    let word = &words[0];
    let text = without_kind(&word.text);
    let is_last = words.len() == 1;
    let follows = |list: &[&str]| words.get(1).is_some_and(|next| list.contains(&&*next.text));

    // "Precontrast" and "postgad" are one word, and so is "unenhanced".
    let joined = |starts: &[&str]| {
        starts.iter().any(|start| text.strip_prefix(start).is_some_and(names_agent))
    };
    if BEFORE.contains(&text) || joined(&["pre", "non", "no", "un"]) {
        // "Pre gd" is one thing, "pre and post" are two.
        let n_used = 1 + n_denied(&words[1..]);
        return if follows(&TREATMENTS) { (Agent::Silent, 2) } else { (Agent::Withheld, n_used) };
    }
    if AFTER.contains(&text) || joined(&["post"]) {
        return if follows(&TREATMENTS) { (Agent::Silent, 2) } else { (Agent::Given, 1) };
    }

    if WITHOUT.contains(&text) {
        let n_between = words[1..].iter().take_while(|next| is_between(next)).count().min(3);
        let announces = |next: &Word| WITH.contains(&next.text.as_str());
        let is_both = words[1..=n_between].iter().any(announces);
        return match words.get(1 + n_between) {
            Some(next) if is_agent(next) => {
                let said = if is_both { Agent::Contradicted } else { Agent::Withheld };
                (said, 1 + n_between + n_denied(&words[1 + n_between..]))
            }
            // "Sans" at the end can only mean the agent; "no" may mean anything.
            _ if is_last && !WEAK.contains(&text) => (Agent::Withheld, 1),
            _ => (Agent::Silent, 1),
        };
    }
    if WITH.contains(&text) {
        let n_between = words[1..].iter().take_while(|next| is_filler(next)).count().min(2);
        let next = words.get(1 + n_between).map(|next| next.text.as_str());
        // "With no contrast" is one thing, "with and without contrast" are two.
        let is_strong = |next: &str| n_between > 0 || !WEAK.contains(&next);
        let denies = next.is_some_and(|next| WITHOUT.contains(&next) && is_strong(next));
        return if denies { (Agent::Contradicted, words.len()) } else { (Agent::Silent, 1) };
    }

    if is_agent(word) {
        let is_other = before.last().is_some_and(|last| OTHER_CONTRASTS.contains(&&*last.text))
            && text == "contrast";
        if is_other {
            return (Agent::Silent, 1);
        }
        let is_denied = follows(&["none", "nein", "nil", "off", "neg"])
            || (follows(&["no"]) && words.len() == 2);
        let is_withheld = word.has_minus || is_denied;
        return (
            if is_withheld { Agent::Withheld } else { Agent::Given },
            1 + usize::from(is_denied),
        );
    }
    match dose(before, text) {
        Some(true) => (Agent::Given, 1),
        Some(false) => (Agent::Withheld, 1),
        None => (Agent::Silent, 1),
    }
}

/// How many words belong to an agent that is denied: "injection de gadolinium".
fn n_denied(words: &[Word]) -> usize {
    let belongs = |word: &&Word| is_agent(word) || is_filler(word);
    let n_words = words.iter().take_while(belongs).count();
    words[..n_words].iter().rposition(is_agent).map_or(0, |last| last + 1)
}

fn is_filler(word: &Word) -> bool {
    FILLERS.contains(&word.text.as_str())
}

/// Whether a word may stand between a denial and the agent.
fn is_between(word: &Word) -> bool {
    is_filler(word) || WITH.contains(&word.text.as_str())
}

/// Whether a word names an agent. `C` and `IV` do so only beside a sign, or in `t1c`.
fn is_agent(word: &Word) -> bool {
    let text = without_kind(&word.text);
    let has_sign = word.has_plus || word.has_minus;
    let is_short = ["c", "iv"].contains(&text) && (has_sign || text != word.text);
    names_agent(text) || is_short
}

fn names_agent(text: &str) -> bool {
    AGENTS.contains(&text) || text.starts_with("gado")
}

/// `t1gd` and `axt1post` in one word: what follows the kind of image.
fn without_kind(word: &str) -> &str {
    const KINDS: [&str; 6] = ["t1w", "t1", "mprage", "bravo", "spgr", "flair"];
    let rest = |kind: &&str| {
        let (before, after) = word.split_once(*kind)?;
        (BEFORE_WEIGHTING.contains(&before) && !after.is_empty()).then_some(after)
    };
    KINDS.iter().find_map(rest).unwrap_or(word)
}

/// Whether a word with the words before it is a volume in ml, and whether that is above 0.
fn dose(before: &[Word], word: &str) -> Option<bool> {
    let digits = word.strip_suffix("ml")?;
    let is_number = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    if !digits.is_empty() && !is_number(digits) {
        return None;
    }
    let numbers = before.iter().rev().map(|word| word.text.as_str());
    let numbers: Vec<&str> =
        numbers.take_while(|text| is_number(text)).take(2).chain([digits]).collect();
    let is_dose = numbers.iter().any(|text| !text.is_empty());
    is_dose.then(|| numbers.iter().any(|text| text.chars().any(|c| c != '0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_in_many_languages_whether_an_agent_was_given() {
        for (text, said) in [
            ("SAG T1 C+", Agent::Given),
            ("T1+C_fs", Agent::Given),
            ("t1_mprage nach Gadovist", Agent::Given),
            ("t1 mit KM", Agent::Given),
            ("T1 apres injection", Agent::Given),
            ("T1 con contraste", Agent::Given),
            ("T1 dopo mdc", Agent::Given),
            ("T1 na contrast", Agent::Given),
            ("T1 pós contraste", Agent::Given),
            ("t1c", Agent::Given),
            ("T1 7.5 ml", Agent::Given),
            ("AX T1 10ml", Agent::Given),
            ("T1 POST", Agent::Given),
            ("T1 IV+", Agent::Given),
            ("T1 postcontraste", Agent::Given),
            ("T1 FS +Gd no angle", Agent::Given),
            ("T1 tse m. KM", Agent::Given),
            ("T1 C/C", Agent::Given),
            ("t1_mprage ohne KM", Agent::Withheld),
            ("AX T1 W/O CONTRAST", Agent::Withheld),
            ("AX T1 W/O", Agent::Withheld),
            ("T1 sans", Agent::Withheld),
            ("T1 sans injection", Agent::Withheld),
            ("T1 sin contraste", Agent::Withheld),
            ("T1 senza mdc", Agent::Withheld),
            ("T1 zonder contrast", Agent::Withheld),
            ("T1 sem contraste", Agent::Withheld),
            ("T1 nativ", Agent::Withheld),
            ("T1 tse o. KM", Agent::Withheld),
            ("T1 unenhanced", Agent::Withheld),
            ("T1 precontraste", Agent::Withheld),
            ("T1 sans injection de gado", Agent::Withheld),
            ("T1 pre", Agent::Withheld),
            ("T1 pre gd", Agent::Withheld),
            ("SAG T1 C-", Agent::Withheld),
            ("SAG T1 -C", Agent::Withheld),
            ("non-contrast T1", Agent::Withheld),
            ("contrast: none", Agent::Withheld),
            ("BRAIN W/WO CONTRAST", Agent::Contradicted),
            ("with and without contrast", Agent::Contradicted),
            ("vor und nach KM", Agent::Contradicted),
            ("mit und ohne KM", Agent::Contradicted),
            ("T1 pre/post", Agent::Contradicted),
            ("T1 sag+cor", Agent::Silent),
            ("t1 ohne fs", Agent::Silent),
            ("T1 post op", Agent::Silent),
            ("T1 preop", Agent::Silent),
            ("t1 c-spine", Agent::Silent),
            ("phase contrast", Agent::Silent),
        ] {
            assert_eq!(of_name(text), said, "{text}");
        }
    }

    #[test]
    fn a_field_names_an_agent_or_denies_it_or_is_empty() {
        for (text, said) in [
            ("Gadovist", Agent::Given),
            ("YES", Agent::Given),
            ("7.5", Agent::Given),
            ("10ml DOTAREM", Agent::Given),
            ("gadoteridol (non-ionic)", Agent::Given),
            ("NO CONTRAST", Agent::Withheld),
            ("none", Agent::Withheld),
            ("No", Agent::Withheld),
            ("ohne KM", Agent::Withheld),
            ("sans", Agent::Withheld),
            ("nativ", Agent::Withheld),
            ("n/a", Agent::Silent),
            ("-", Agent::Silent),
            ("0", Agent::Silent),
            ("0.0", Agent::Silent),
        ] {
            assert_eq!(of_field(text), said, "{text}");
        }
    }

    #[test]
    fn fields_and_description_are_equals_and_the_protocol_counts_only_if_both_are_silent() {
        let say = |name: &str, volume_ml, description: &str, protocol: &str, is_of_series| {
            let fields = AgentFields { name: Some(name.to_owned()), volume_ml };
            agent(&fields, Some(description), Some(protocol), is_of_series)
        };
        assert_eq!(say("Gadovist", None, "T1 pre", "", true), Agent::Contradicted);
        assert_eq!(say("NO CONTRAST", None, "T1 C+", "", true), Agent::Contradicted);
        assert_eq!(say("NO CONTRAST", Some(7.5), "T1", "", true), Agent::Contradicted);
        assert_eq!(say("", Some(7.5), "T1", "", true), Agent::Given);
        assert_eq!(say("none", None, "T1", "T1 mit KM", true), Agent::Withheld);
        assert_eq!(say("", None, "T1 ohne KM", "Kopf mit KM", false), Agent::Withheld);
        assert_eq!(say("", None, "T1", "Kopf mit KM", false), Agent::Contradicted);
        assert_eq!(say("", None, "T1", "T1 mit KM", true), Agent::Given);
        assert_eq!(say("", None, "T1", "BRAIN W/WO CONTRAST", false), Agent::Silent);
        assert_eq!(say("", None, "T1", "Kopf ohne KM", false), Agent::Withheld);
    }
}
