#![no_main]

oddscan_fuzz::target!(dicom_pixels);
