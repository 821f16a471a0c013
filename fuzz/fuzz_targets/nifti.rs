#![no_main]

oddscan_fuzz::target!(nifti);
