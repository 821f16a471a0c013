//! The method itself, as pure functions of values. Modules are in the order in which a scan uses
//! them.
//!
//! Nothing here uses a file, a clock, a log, a device or a setting.

pub mod geometry;
pub mod stack;
pub mod volume;

pub mod background;
pub mod brain;
pub mod contrast;
pub mod intensity;
pub mod labels;
pub mod morphology;
pub mod preprocess;
pub mod registration;
pub mod resample;
pub mod slice;
pub mod smoothing;

pub mod projection;
pub mod token;

pub mod fine;
pub mod range;

pub mod mask;
pub mod scoring;
mod smallest;

pub mod fusion;
pub mod tail;

pub mod quality;

pub mod community;
pub mod leiden;

pub mod evaluation;
