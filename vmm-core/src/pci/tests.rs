//! ECAM, BAR sizing and moves, MSI-X masking.
