//! Files of weights for DINOv2 and brain extraction, and the template: finding, downloading,
//! converting and loading them.

mod brain;
mod fetch;
mod folders;
mod import;
mod load;
mod onnx;
mod pickle;
mod template;
mod tensor;

pub use brain::{BRAIN_FILE, fetch_brain_weights, find_brain_weights};
pub use fetch::{FetchError, Fetched, Model, Origin, fetch};
pub use folders::{ModelError, find_weights, model_folders};
pub use import::{ImportError, import};
pub use load::{LoadError, load_brain_weights, load_weights};
pub use template::{TEMPLATE_FILE, fetch_template, find_template};
