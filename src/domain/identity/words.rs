//! Words of descriptions and file names that say what a scan is, and never whose it is.

/// Words of sequences, planes, contrast agents, options and file names, in several languages.
/// Lower case and without digits: `t1w` is `tw`, `tfl3d1` is `tfld`.
#[rustfmt::skip]
const KNOWN: &[&str] = &[
    // Contrasts and maps.
    "t", "tw", "tce", "tstar", "ts", "tmap", "inplanet", "flair", "pd", "pdw", "proton", "density",
    "swi", "swan", "swip", "angio", "angiography", "tof", "mra", "mrv", "hemo", "haemo", "medic",
    "dwi", "dti", "adc", "trace", "tracew", "asl", "bold", "epi", "fieldmap", "diff", "perf",
    // Sequences.
    "mprage", "mpr", "mprg", "tfl", "tfld", "spgr", "fspgr", "bravo", "tfe", "ttfe", "ffe", "tffe",
    "ffed", "flash", "fl", "fld", "tse", "ttse", "fse", "tfse", "frfse", "spc", "space", "cube",
    "vista", "gre", "gr", "se", "ir", "tir", "tirm", "stir", "psir", "dir", "dark", "da", "fluid",
    "mp", "inv", "uni", "ciss", "fiesta", "bssfp", "propeller", "blade", "vibe", "lava", "thrive",
    "star", "wi", "w", "weighted", "ns", "mip", "minip", "loc",
    // Planes and geometry.
    "sag", "sagittal", "ax", "axial", "axiale", "tra", "transverse", "trans", "cor", "coronal",
    "coronale", "obl", "oblique", "d", "iso", "isotropic", "mm", "cm", "fov", "res", "hr",
    "highres", "hires", "lowres", "thin", "thick", "slice", "slices", "sl", "axis", "along",
    // Options.
    "p", "ipat", "cs", "sense", "grappa", "caipi", "acc", "fs", "fatsat", "fat", "sat", "spair",
    "spir", "dixon", "water", "ws", "we", "opp", "in", "out", "phase", "mag", "magnitude", "real",
    "nd", "norm", "dis", "filt", "te", "tr", "ti", "fa", "ms", "echo", "dual",
    // Contrast agents.
    "pre", "post", "ce", "c", "km", "nach", "mit", "ohne", "sans", "avec", "con", "sin", "contrast",
    "contraste", "kontrast", "kontrastmittel", "gd", "gad", "gado", "gadolinium", "gadovist",
    "dotarem", "postgd", "enhanced", "native", "nativ", "without", "with", "wo", "non", "no",
    "cont", "after", "before",
    // Anatomy, and words of file names.
    "head", "brain", "kopf", "schaedel", "cerveau", "cerebro", "neuro", "wholehead", "wholebrain",
    "series", "scan", "run", "rec", "acq", "sub", "ses", "session", "image", "img", "vol", "volume",
    "std", "standard", "routine", "seq", "sequence", "repeat", "rpt", "mr", "mri", "rm", "irm",
    "nii", "nifti", "anat", "unknown", "stripped", "bet", "mni",
];

/// The most digits that a word may have. Longer numbers are dates and numbers of patients.
const MAX_DIGITS: usize = 3;

/// Whether a word, without signs, cannot name a patient: a known word or a short number.
pub(super) fn is_harmless(word: &str) -> bool {
    let letters: String =
        word.chars().filter(|c| !c.is_ascii_digit()).flat_map(char::to_lowercase).collect();
    let n_digits = word.chars().filter(char::is_ascii_digit).count();
    n_digits <= MAX_DIGITS && (letters.is_empty() || KNOWN.contains(&letters.as_str()))
}
