//! The folders of weights and the template.

use std::path::{Path, PathBuf};

use super::fetch::Model;

/// Why no weights were found.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// None of these places has a weights file.
    #[error("no encoder weights found; searched {}; run `oddscan model fetch`, or name a file in encoder.weights", .0.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    NotFound(Vec<PathBuf>),
}

/// The weights to use: `configured`, or the file in the environment variable `ODDSCAN_WEIGHTS`, or
/// the first file in the folders of `oddscan model fetch`, where the small network has priority.
pub fn find_weights(configured: Option<&Path>) -> Result<PathBuf, ModelError> {
    let named = configured.map(Path::to_owned);
    if let Some(path) = named.or_else(|| std::env::var_os("ODDSCAN_WEIGHTS").map(PathBuf::from)) {
        return if path.is_file() { Ok(path) } else { Err(ModelError::NotFound(vec![path])) };
    }
    let in_folder = |folder: PathBuf| Model::ALL.map(|model| folder.join(model.file_name()));
    let places: Vec<PathBuf> = model_folders().into_iter().flat_map(in_folder).collect();
    places.iter().find(|path| path.is_file()).cloned().ok_or(ModelError::NotFound(places))
}

/// The file `configured`, or else the file with this name beside the encoder's weights.
pub(super) fn find_beside_weights(configured: Option<&Path>, file: &str) -> Option<PathBuf> {
    let fetched = || model_folders().into_iter().map(|folder| folder.join(file)).collect();
    let places: Vec<PathBuf> = configured.map_or_else(fetched, |path| vec![path.to_owned()]);
    places.into_iter().find(|path| path.is_file())
}

/// Folders that are searched: `ODDSCAN_MODELS` alone if it is set, or else the user's data folder,
/// then the system's.
pub fn model_folders() -> Vec<PathBuf> {
    let env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(folder) = env("ODDSCAN_MODELS") {
        return vec![folder];
    }
    let user = env("XDG_DATA_HOME").or_else(|| env("HOME").map(|home| home.join(".local/share")));
    let system = PathBuf::from("/var/lib/oddscan/models");
    user.map(|folder| folder.join("oddscan/models")).into_iter().chain([system]).collect()
}
