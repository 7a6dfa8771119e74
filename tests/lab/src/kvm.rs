//! Can this machine's `/dev/kvm` run Linux, or is a nested host needed?

use std::fs::{self, File};

use nix::unistd::geteuid;

/// Where jobs run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ground {
    /// On this machine.
    Direct,
    /// In a nested host, for this reason.
    Nested(String),
}

impl Ground {
    /// As `cargo lab demo --json` writes it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nested(_) => "nested",
        }
    }

    /// Hardware KVM if it can be used to the full, else a nested host.
    pub(crate) fn choose(force_nested: bool) -> Self {
        if force_nested {
            return Self::Nested("asked for by --nested".into());
        }
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if !has_virtualization(&cpuinfo) {
            return Self::Nested("the CPU offers neither vmx nor svm".into());
        }
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            return Self::Nested(format!(
                "/dev/kvm cannot be opened ({error}); join the group kvm, or load kvm_intel or kvm_amd, to use it"
            ));
        }
        if !geteuid().is_root() {
            return Self::Nested(
                "only root may create taps here; run with sudo to use /dev/kvm".into(),
            );
        }
        Self::Direct
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_flag_counts() {
        assert!(has_virtualization("model : x\nflags\t\t: fpu svm lm\n"));
        assert!(has_virtualization("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualization(
            "flags\t\t: fpu svm_lock\nvmx flags\t: vnmi\n"
        ));
    }
}
