//! Scans by source (site, data set), as their names tell it.

use std::collections::BTreeMap;

/// The source that a stem names: its part before the first `-` or `_`, after an optional `sub-`.
pub fn source_of(stem: &str) -> &str {
    let name = stem.strip_prefix("sub-").unwrap_or(stem);
    name.split(['-', '_']).next().unwrap_or(name)
}

/// Groups scans, each with its stem, by source. Empty if all are of one source, or if each is a
/// source of its own (`sub-01`, `sub-02`): names then do not tell the source.
pub fn by_source<'a, T>(
    scans: impl IntoIterator<Item = (&'a str, T)>,
) -> BTreeMap<&'a str, Vec<T>> {
    let mut sources: BTreeMap<&str, Vec<T>> = BTreeMap::new();
    for (stem, scan) in scans {
        sources.entry(source_of(stem)).or_default().push(scan);
    }
    let is_told = sources.len() >= 2 && sources.values().any(|scans| scans.len() >= 2);
    if is_told { sources } else { BTreeMap::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_stands_before_the_first_dash_or_underscore() {
        let stems = ["ms-07_FLAIR", "brats13-0001_FLAIR", "sub-tcga-12_T1w", "sub-01_T1w", "x"];
        assert_eq!(stems.map(source_of), ["ms", "brats13", "tcga", "01", "x"]);
    }

    #[test]
    fn scans_are_grouped_if_their_names_tell_several_sources() {
        let scans = [("ms-1_FLAIR", 1), ("tcga-1_FLAIR", 2), ("ms-2_FLAIR", 3)];
        assert_eq!(by_source(scans), BTreeMap::from([("ms", vec![1, 3]), ("tcga", vec![2])]));
        // Two sources of one scan each, and one source of two scans.
        assert!(by_source(scans[..2].to_vec()).is_empty());
        assert!(by_source([scans[0], scans[2]]).is_empty());
    }
}
