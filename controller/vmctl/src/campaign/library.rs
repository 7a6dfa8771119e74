//! Campaigns that are in this program, ready to run on a VM.

/// One of them.
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

macro_rules! entries {
    ($($name:literal),+ $(,)?) => {
        /// All of them.
        pub(crate) const ENTRIES: &[Entry] = &[$(Entry {
            name: $name,
            text: include_str!(concat!("../../../../docs/campaigns/", $name, ".yaml")),
        }),+];
    };
}

entries!(
    "crash-storm",
    "hung-daemon",
    "lying-disk",
    "lost-kick",
    "upgrade-under-load",
    "everything-at-once",
);

/// The campaign of that name.
pub(crate) fn find(name: &str) -> Option<&'static Entry> {
    ENTRIES.iter().find(|entry| entry.name == name)
}
