//! What is wrong with a campaign's file, each with its line.

use std::fmt::Write as _;

use serde_saphyr::Spanned;

/// All that is wrong, so that it can be mended in one go.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Problem>);

#[derive(Debug)]
struct Problem {
    line: u64,
    column: u64,
    field: String,
    words: String,
}

impl Problems {
    /// Notes what is wrong at a value.
    pub(super) fn add<T>(&mut self, at: &Spanned<T>, field: &str, words: String) {
        self.0.push(Problem {
            line: at.referenced.line(),
            column: at.referenced.column(),
            field: field.to_owned(),
            words,
        });
    }

    /// The value, or nothing and a problem.
    pub(super) fn take<T, V: Default>(
        &mut self,
        at: &Spanned<T>,
        field: &str,
        value: Result<V, String>,
    ) -> V {
        value.unwrap_or_else(|words| {
            self.add(at, field, words);
            V::default()
        })
    }

    /// `file:line:column: field: what is wrong`, a line each.
    pub(super) fn into_result(mut self, file: &str) -> Result<(), String> {
        if self.0.is_empty() {
            return Ok(());
        }
        self.0.sort_by_key(|problem| (problem.line, problem.column));
        let mut text = String::new();
        for problem in &self.0 {
            let Problem {
                line,
                column,
                field,
                words,
            } = problem;
            let _ = writeln!(text, "{file}:{line}:{column}: {field}: {words}");
        }
        Err(text.trim_end().to_owned())
    }
}
