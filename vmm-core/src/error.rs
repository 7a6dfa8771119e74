//! One line for a person from an error and its causes.

use std::error::Error;

/// `err` and all its sources, joined by colons.
pub fn chain(err: &dyn Error) -> String {
    let mut line = err.to_string();
    let mut source = err.source();
    while let Some(err) = source {
        line.push_str(": ");
        line.push_str(&err.to_string());
        source = err.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryError;

    #[test]
    fn causes_follow_the_error_on_the_same_line() {
        let err = MemoryError::Memfd {
            size_mib: 16,
            source: std::io::Error::from_raw_os_error(libc::ENOMEM),
        };
        let line = chain(&err);
        assert!(line.starts_with("cannot make a memfd of 16 MiB"), "{line}");
        assert!(
            line.contains("smaller --memory: Cannot allocate memory"),
            "{line}"
        );
    }
}
