//! The work that the daemon does in separate processes with limits: the site's preprocessing, and
//! the conversion of DICOM files.

pub mod child;
pub mod convert;
pub mod hook;
