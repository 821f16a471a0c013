//! What the names of a series suggest: words in lower case, in several languages and habits.

use super::values::Hint;

/// Words of series that are no structural image, or of a kind without a rule.
const OTHER: [(&str, &[&str]); 12] = [
    (
        "the name says diffusion",
        &[
            "dwi",
            "dti",
            "diff",
            "diffusion",
            "adc",
            "eadc",
            "trace",
            "tracew",
            "dki",
            "noddi",
            "hardi",
            "ivim",
            "tensor",
            "colfa",
            "b0",
            "b1000",
            "resolve",
        ],
    ),
    (
        "the name says perfusion",
        &[
            "asl",
            "pcasl",
            "pasl",
            "perf",
            "perfusion",
            "cbf",
            "cbv",
            "dsc",
            "dce",
            "twist",
            "tricks",
            "ktwist",
        ],
    ),
    ("the name says functional images", &["bold", "fmri", "epi", "sbref", "rest", "moco"]),
    (
        "the name says a calibration or a field map",
        &[
            "fieldmap",
            "fmap",
            "b0map",
            "b1",
            "b1map",
            "shim",
            "calibration",
            "asset",
            "refscan",
            "sensitivity",
            "prescan",
        ],
    ),
    (
        "the name says a localiser",
        &[
            "loc",
            "localizer",
            "localiser",
            "localizador",
            "scout",
            "aascout",
            "aahscout",
            "survey",
            "smartbrain",
            "3plane",
            "topo",
            "reperage",
        ],
    ),
    ("the name says a projection", &["mip", "minip", "mnip", "mpvr"]),
    ("the name says a phase image", &["phase", "pha", "ph"]),
    (
        "the name says another kind of inversion recovery",
        &["stir", "psir", "dir", "mp2rage", "inv1", "inv2", "uni", "fgatir", "wmn", "ssfse"],
    ),
    (
        "the name says balanced or steady-state images",
        &["ciss", "fiesta", "trufi", "truefisp", "bffe", "dess", "psif", "ssfp", "drive", "haste"],
    ),
    (
        "the name says a map",
        &[
            "t1map",
            "t2map",
            "t2starmap",
            "t1mapping",
            "t2mapping",
            "mapit",
            "r2star",
            "r2s",
            "qsm",
            "swim",
            "relaxometry",
            "t1rho",
            "despot",
            "mtr",
            "mtw",
            "qalas",
            "mdme",
            "syntac",
            "synthetic",
            "map",
        ],
    ),
    ("the name says spectroscopy", &["mrs", "svs", "csi", "press"]),
    (
        "the name says images that were computed from others",
        &["flairstar", "sub", "subtraction", "fused", "fusion", "reformat", "reformatted", "cpr"],
    ),
];

/// The same in two words.
const OTHER_PAIRS: [(&str, [&str; 2]); 9] = [
    ("the name says a calibration or a field map", ["field", "map"]),
    ("the name says a calibration or a field map", ["field", "mapping"]),
    ("the name says a calibration or a field map", ["sense", "ref"]),
    ("the name says a calibration or a field map", ["coil", "survey"]),
    ("the name says a localiser", ["3", "plane"]),
    ("the name says balanced or steady-state images", ["b", "ffe"]),
    ("the name says images that were computed from others", ["flair", "star"]),
    ("the name says another kind of inversion recovery", ["double", "ir"]),
    ("the name says another kind of inversion recovery", ["double", "inversion"]),
];

const ANGIOGRAPHY: [&str; 6] = ["tof", "mra", "angio", "angiography", "tof3d", "arm"];
const SUSCEPTIBILITY: [&str; 9] =
    ["swi", "swan", "swip", "eswan", "venobold", "venbold", "swi3d", "swi3d1r", "susceptibility"];
const T2_STAR: [&str; 13] = [
    "t2star", "t2s", "t2starw", "t2ffe", "t2wffe", "t2gre", "hemo", "haemo", "heme", "hamo",
    "medic", "merge", "t2hemo",
];
const T1: [&str; 25] = [
    "mprage",
    "memprage",
    "mpr1",
    "tfl",
    "tfl3d1",
    "spgr",
    "fspgr",
    "irspgr",
    "irfspgr",
    "efgre3d",
    "bravo",
    "mprg",
    "flash",
    "ffe3d",
    "vibe",
    "geir",
    "turboflash",
    "tfe3d",
    "fsp3d",
    "fspgr3d",
    "mpragesag",
    "mpragetra",
    "3dmprage",
    "bravo3d",
    "3dbravo",
];
const PROTON: [&str; 6] = ["pd", "pdw", "proton", "dp", "epdw", "spdw"];

/// What may stand before `t1` or `t2` in one word: `eT1W`, `AXT2`, `3DT1`.
pub(super) const BEFORE_WEIGHTING: [&str; 26] = [
    "", "e", "s", "d", "w", "ax", "axi", "axial", "sag", "sagittal", "cor", "coronal", "tra",
    "trans", "3d", "2d", "ax3d", "sag3d", "cor3d", "fs", "hr", "se", "tse", "fse", "obl", "iso",
];

/// What may not follow them: maps, preparations, and levels of the spine.
const NO_WEIGHTING: [&str; 4] = ["map", "rho", "prep", "star"];

/// The words of a name, in lower case and without accents. Signs separate words, except in `t2*`
/// and `flair*`, where they have a meaning.
pub(super) fn words(name: &str) -> Vec<String> {
    let name = plain(name).replace("t2*", "t2star ").replace("flair*", "flairstar ");
    let words = name.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Lower case, and letters without accents.
pub(super) fn plain(name: &str) -> String {
    let letter = |c: char| match c {
        'à'..='å' => 'a',
        'ç' => 'c',
        'è'..='ë' => 'e',
        'ì'..='ï' => 'i',
        'ñ' => 'n',
        'ò'..='ö' => 'o',
        'ù'..='ü' => 'u',
        c => c,
    };
    name.to_lowercase().chars().map(letter).collect()
}

/// What the words of a name suggest. Siemens calls an acquired MPRAGE "mpr"; `mpr_is_reformat` says
/// that the word means a reformat here.
pub(super) fn by_name(words: &[String], mpr_is_reformat: bool) -> Hint {
    let has = |wanted: &str| words.iter().any(|word| word == wanted);
    let has_any = |wanted: &[&str]| words.iter().any(|word| wanted.contains(&word.as_str()));
    let has_pair = |pair: [&str; 2]| words.windows(2).any(|two| two == pair);

    // Philips calls susceptibility images of veins "VEN_BOLD".
    let is_susceptibility =
        has_any(&SUSCEPTIBILITY) || has_pair(["ven", "bold"]) || has_pair(["t2", "swi"]);
    let is_bold = |word: &str| word == "bold" && is_susceptibility;
    for (cause, others) in OTHER {
        if words.iter().any(|word| others.contains(&word.as_str()) && !is_bold(word)) {
            return Hint::Other(cause);
        }
    }
    if has("mpr") && mpr_is_reformat {
        return Hint::Other("the name says a reformat");
    }
    if let Some((cause, _)) = OTHER_PAIRS.into_iter().find(|(_, pair)| has_pair(*pair)) {
        return Hint::Other(cause);
    }

    let is_flair = words.iter().any(|word| word.contains("flair"))
        || has("darkfluid")
        || has_pair(["dark", "fluid"])
        || has_pair(["da", "fl"]);
    let weighted = |kind| words.iter().any(|word| is_weighted(word, kind));
    let is_t1 = weighted("t1") || has_any(&T1) || has_pair(["mp", "rage"]);
    let is_t2 = weighted("t2");
    let is_pd = has_any(&PROTON);

    // The rarer kinds first: a "t2 swi" is a swi, and a "t1 flair" a T1 image.
    let kinds = [
        (has_any(&ANGIOGRAPHY), "angio"),
        (is_susceptibility, "swi"),
        (has_any(&T2_STAR), "T2star"),
        (is_flair && !is_t1, "FLAIR"),
        (is_t1 && !is_t2 && !is_pd, "T1w"),
        (is_t2 && !is_t1 && !is_pd, "T2w"),
        (is_pd && !is_t1 && !is_t2, "PDw"),
    ];
    match kinds.into_iter().find(|(is_so, _)| *is_so) {
        Some((_, kind)) => Hint::Kind(kind),
        None if has("mpr") && !is_t1 && !is_t2 => Hint::Kind("T1w"),
        None => Hint::Open,
    }
}

/// Whether a word says T1 or T2: `t1`, `t1w`, `et1w`, `axt1`, `t1tse`, but not `t1map` or `t12`.
fn is_weighted(word: &str, kind: &str) -> bool {
    let Some((before, after)) = word.split_once(kind) else { return false };
    let is_level = after.starts_with(|c: char| c.is_ascii_digit())
        && !["3d", "2d"].iter().any(|start| after.starts_with(start));
    BEFORE_WEIGHTING.contains(&before)
        && !is_level
        && !NO_WEIGHTING.iter().any(|end| after.starts_with(end))
}
