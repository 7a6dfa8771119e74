//! qcow2 images: where guest bytes lie, and how the map is changed safely.
