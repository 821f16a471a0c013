//! burn engine
