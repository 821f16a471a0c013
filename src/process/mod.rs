//! Everything that the daemon starts as a process of its own: the site's preprocessing and the
//! conversion of DICOM files, both through a child with limits.

pub mod child;
pub mod convert;
pub mod hook;
