//! Disks encrypted with LUKS: headers, keys and AES-XTS on sectors.
