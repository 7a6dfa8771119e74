//! Words for times, and guesses at what was meant.

/// Microseconds of `250us`, `50ms`, `2s`, `1m` or `1h`; parts of a unit are fine: `1.5s`.
pub(super) fn duration_us(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no duration; write it as 50ms, 2s or 1m");
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .ok_or_else(wrong)?;
    let number: f64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match &text[digits..] {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        "m" => 60e6,
        "h" => 3600e6,
        _ => return Err(wrong()),
    };
    let us = number * unit;
    // Days are enough, and exact as floats.
    if !(us.is_finite() && us <= 30.0 * 24.0 * 3600e6) {
        return Err(format!("{text:?} is too long"));
    }
    Ok(us.round() as u64)
}

/// First and last sector of `0-2047` or `17`.
pub(super) fn sectors(text: &str) -> Result<(u64, u64), String> {
    let wrong = || format!("{text:?} is no range of sectors; write it as 0-2047");
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let first: u64 = first.trim().parse().map_err(|_| wrong())?;
    let last: u64 = last.trim().parse().map_err(|_| wrong())?;
    match first <= last && last < u64::MAX {
        true => Ok((first, last)),
        false => Err(wrong()),
    }
}

/// What differs from `word` by two letters at most.
pub(super) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = known.map(|name| (distance(word, name), name));
    let (least, name) = scored.min()?;
    (least <= 2).then_some(name)
}

/// Levenshtein's.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, a) in one.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, b) in other.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(duration_us("250us"), Ok(250));
        assert_eq!(duration_us("1.5s"), Ok(1_500_000));
        assert_eq!(duration_us("2m"), Ok(120_000_000));
        for bad in ["", "5", "ms", "-1s", "1 s", "1d", "1.2.3s", "99999999h"] {
            assert!(duration_us(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_include_both_ends() {
        assert_eq!(sectors("0-2047"), Ok((0, 2047)));
        assert_eq!(sectors("17"), Ok((17, 17)));
        for bad in ["", "9-1", "a-b", "1-", "1-2-3"] {
            assert!(sectors(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_slip_of_the_finger_is_seen() {
        let kinds = ["kill", "latency", "drop"];
        assert_eq!(nearest("latncy", kinds.into_iter()), Some("latency"));
        assert_eq!(nearest("explode", kinds.into_iter()), None);
    }
}
