//! A report as JUnit's XML, as CI systems read it: a check is a test case; one that showed nothing is an
//! error, since it must not count as passed.

use std::fmt::Write as _;

use api::controller as pb;

use super::Parts;

/// One test suite.
pub(crate) fn junit(report: &pb::FaultReport) -> String {
    let parts = Parts::of(report);
    let count = |verdict| {
        let checks = report.checks.iter();
        checks.filter(|check| check.verdict() == verdict).count()
    };
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let seconds = f64::from(parts.status.elapsed_ms) / 1000.0;
    let _ = writeln!(
        xml,
        "<testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"{}\" time=\"{seconds:.3}\">",
        escape(&parts.name),
        report.checks.len(),
        count(pb::FaultVerdict::Fail),
        count(pb::FaultVerdict::Inconclusive),
    );
    let _ = writeln!(
        xml,
        "  <properties>\n    <property name=\"seed\" value=\"{}\"/>\n    <property name=\"replay\" value=\"{}\"/>\n  </properties>",
        parts.spec.seed,
        escape(&report.replay)
    );
    for check in &report.checks {
        let detail = escape(&check.detail);
        let _ = write!(
            xml,
            "  <testcase classname=\"fault.{}\" name=\"{}\"",
            escape(&parts.name),
            escape(&check.name)
        );
        let _ = match check.verdict() {
            pb::FaultVerdict::Fail => {
                writeln!(xml, ">\n    <failure message=\"{detail}\"/>\n  </testcase>")
            }
            pb::FaultVerdict::Inconclusive => {
                writeln!(
                    xml,
                    ">\n    <error type=\"inconclusive\" message=\"{detail}\"/>\n  </testcase>"
                )
            }
            _ => writeln!(
                xml,
                ">\n    <system-out>{detail}</system-out>\n  </testcase>"
            ),
        };
    }
    xml.push_str("</testsuite>\n");
    xml
}

/// For XML and HTML, in text and in attributes. Characters that XML cannot have are left out.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(' '),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => escaped.push(c),
        }
    }
    escaped
}
