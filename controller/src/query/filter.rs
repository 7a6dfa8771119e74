//! Filters, a subset of AIP-160:
//!
//! ```text
//! filter     = sequence of factors, each must hold; AND may stand between them
//! factor     = term { OR term }                 OR binds closer than AND
//! term       = [ NOT | - ] ( "(" filter ")" | path comparator value )
//! comparator = "=" | "!=" | "<" | "<=" | ">" | ">=" | ":"
//! value      = word | "quoted" | 'quoted'
//! ```
//!
//! `=` on text takes `*` at either end. `:` asks whether a list has the value, a text contains it, or,
//! with `*`, whether the field is set. Names of enums' values may leave out what all have in common.

use std::cmp::Ordering;

use prost_reflect::{DynamicMessage, EnumDescriptor, Kind, MessageDescriptor, Value};

use super::{Path, QueryError, timestamp};

/// A filter is evaluated for each item of a list.
const MAX_BYTES: usize = 2048;
const MAX_DEPTH: usize = 16;

/// A filter that fits a message.
#[derive(Debug, Clone)]
pub struct Filter {
    root: Expression,
}

#[derive(Debug, Clone)]
enum Expression {
    All(Vec<Expression>),
    Any(Vec<Expression>),
    Not(Box<Expression>),
    Compare(Path, Comparator, Operand),
    Present(Path),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Has,
}

#[derive(Debug, Clone)]
enum Operand {
    Text(String),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Bool(bool),
    Enum(i32),
    Time(i64, i32),
}

impl Filter {
    /// Reads one for `message`; nothing but blanks lets everything through.
    ///
    /// # Errors
    /// Where and why it is none.
    pub fn parse(message: &MessageDescriptor, text: &str) -> Result<Self, QueryError> {
        if text.len() > MAX_BYTES {
            return Err(QueryError::TooLong { max: MAX_BYTES });
        }
        let mut parser = Parser {
            message,
            text,
            at: 0,
            depth: 0,
        };
        let root = parser.sequence()?;
        parser.blanks();
        if parser.at < text.len() {
            return Err(parser.problem("nothing opens this parenthesis"));
        }
        Ok(Self { root })
    }

    /// Whether it lets the message through.
    pub fn matches(&self, message: &DynamicMessage) -> bool {
        holds(&self.root, message)
    }
}

fn holds(expression: &Expression, message: &DynamicMessage) -> bool {
    match expression {
        Expression::All(all) => all.iter().all(|inner| holds(inner, message)),
        Expression::Any(any) => any.iter().any(|inner| holds(inner, message)),
        Expression::Not(inner) => !holds(inner, message),
        Expression::Present(path) => path.any(message, &mut |value| !is_default(value, path)),
        // Nothing of the list, if it is one, may be equal.
        Expression::Compare(path, Comparator::NotEqual, operand) => !path
            .any(message, &mut |value| {
                compares(value, Comparator::Equal, operand)
            }),
        Expression::Compare(path, comparator, operand) => {
            path.any(message, &mut |value| compares(value, *comparator, operand))
        }
    }
}

fn is_default(value: &Value, path: &Path) -> bool {
    let field = path.last();
    if field.is_list() || field.is_map() {
        return matches!(value, Value::Map(map) if map.is_empty());
    }
    value.is_default_for_field(field) && !field.supports_presence()
}

fn compares(value: &Value, comparator: Comparator, operand: &Operand) -> bool {
    if let (Value::String(text), Operand::Text(wanted)) = (value, operand) {
        match comparator {
            Comparator::Equal => return globs(wanted, text),
            Comparator::Has => return text.contains(wanted.as_str()),
            _ => {}
        }
    }
    let Some(order) = order(value, operand) else {
        return false;
    };
    match comparator {
        Comparator::Equal | Comparator::Has => order.is_eq(),
        Comparator::NotEqual => order.is_ne(),
        Comparator::Less => order.is_lt(),
        Comparator::LessOrEqual => order.is_le(),
        Comparator::Greater => order.is_gt(),
        Comparator::GreaterOrEqual => order.is_ge(),
    }
}

fn order(value: &Value, operand: &Operand) -> Option<Ordering> {
    match (value, operand) {
        (Value::String(text), Operand::Text(wanted)) => Some(text.as_str().cmp(wanted)),
        (Value::Bool(value), Operand::Bool(wanted)) => Some(value.cmp(wanted)),
        (Value::I32(value), Operand::Signed(wanted)) => Some(i64::from(*value).cmp(wanted)),
        (Value::I64(value), Operand::Signed(wanted)) => Some(value.cmp(wanted)),
        (Value::U32(value), Operand::Unsigned(wanted)) => Some(u64::from(*value).cmp(wanted)),
        (Value::U64(value), Operand::Unsigned(wanted)) => Some(value.cmp(wanted)),
        (Value::F32(value), Operand::Float(wanted)) => f64::from(*value).partial_cmp(wanted),
        (Value::F64(value), Operand::Float(wanted)) => value.partial_cmp(wanted),
        (Value::EnumNumber(value), Operand::Enum(wanted)) => Some(value.cmp(wanted)),
        (message, Operand::Time(seconds, nanos)) => {
            Some(timestamp(message)?.cmp(&(*seconds, *nanos)))
        }
        _ => None,
    }
}

/// `*` at either end stands for anything.
fn globs(pattern: &str, text: &str) -> bool {
    let (front, pattern) = match pattern.strip_prefix('*') {
        Some(rest) => (true, rest),
        None => (false, pattern),
    };
    let (back, middle) = match pattern.strip_suffix('*') {
        Some(rest) => (true, rest),
        None => (false, pattern),
    };
    match (front, back) {
        (false, false) => text == middle,
        (true, false) => text.ends_with(middle),
        (false, true) => text.starts_with(middle),
        (true, true) => text.contains(middle),
    }
}

struct Parser<'a> {
    message: &'a MessageDescriptor,
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn sequence(&mut self) -> Result<Expression, QueryError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(QueryError::TooDeep { max: MAX_DEPTH });
        }
        let mut all = Vec::new();
        loop {
            self.blanks();
            if self.rest().is_empty() || self.rest().starts_with(')') {
                break;
            }
            if !all.is_empty() && self.keyword("AND") {
                self.blanks();
            }
            all.push(self.factor()?);
        }
        self.depth -= 1;
        Ok(Expression::All(all))
    }

    fn factor(&mut self) -> Result<Expression, QueryError> {
        let mut any = vec![self.term()?];
        loop {
            self.blanks();
            if !self.keyword("OR") {
                break;
            }
            any.push(self.term()?);
        }
        Ok(match any.len() {
            1 => any.remove(0),
            _ => Expression::Any(any),
        })
    }

    fn term(&mut self) -> Result<Expression, QueryError> {
        self.blanks();
        if self.keyword("NOT") || self.symbol("-") {
            // One level each, or a row of hyphens would exhaust the stack.
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err(QueryError::TooDeep { max: MAX_DEPTH });
            }
            let term = self.term()?;
            self.depth -= 1;
            return Ok(Expression::Not(Box::new(term)));
        }
        if self.symbol("(") {
            let inner = self.sequence()?;
            self.blanks();
            if !self.symbol(")") {
                return Err(self.problem("a parenthesis is not closed"));
            }
            return Ok(inner);
        }
        self.restriction()
    }

    fn restriction(&mut self) -> Result<Expression, QueryError> {
        let begins = self.at;
        let path = self.take(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.'));
        if matches!(path, "" | "AND" | "OR") {
            self.at = begins;
            return Err(self.problem("here should be a field, such as status.phase"));
        }
        let path = Path::parse(self.message, path)?;
        self.blanks();
        let Some(comparator) = self.comparator() else {
            return Err(self.problem("here should be one of = != < <= > >= :"));
        };
        self.blanks();
        let value = self.value()?;
        if comparator == Comparator::Has && value == "*" {
            return Ok(Expression::Present(path));
        }
        let operand = operand(&path, &value)?;
        Ok(Expression::Compare(path, comparator, operand))
    }

    fn comparator(&mut self) -> Option<Comparator> {
        let known = [
            ("!=", Comparator::NotEqual),
            ("<=", Comparator::LessOrEqual),
            (">=", Comparator::GreaterOrEqual),
            ("=", Comparator::Equal),
            ("<", Comparator::Less),
            (">", Comparator::Greater),
            (":", Comparator::Has),
        ];
        known
            .into_iter()
            .find(|(symbol, _)| self.symbol(symbol))
            .map(|(_, comparator)| comparator)
    }

    fn value(&mut self) -> Result<String, QueryError> {
        let Some(quote) = self
            .rest()
            .chars()
            .next()
            .filter(|c| matches!(c, '"' | '\''))
        else {
            let word = self.take(|c| !c.is_whitespace() && !matches!(c, '(' | ')' | '"' | '\''));
            if word.is_empty() {
                return Err(self.problem("here should be a value"));
            }
            return Ok(word.to_owned());
        };
        self.at += 1;
        let mut value = String::new();
        let mut characters = self.rest().char_indices();
        while let Some((offset, c)) = characters.next() {
            match c {
                '\\' => match characters.next() {
                    Some((_, escaped)) => value.push(escaped),
                    None => break,
                },
                c if c == quote => {
                    self.at += offset + 1;
                    return Ok(value);
                }
                c => value.push(c),
            }
        }
        Err(self.problem("a quotation is not closed"))
    }

    /// A whole word.
    fn keyword(&mut self, word: &str) -> bool {
        let Some(after) = self.rest().strip_prefix(word) else {
            return false;
        };
        let whole = after
            .chars()
            .next()
            .is_none_or(|c| c.is_whitespace() || c == '(');
        if whole {
            self.at += word.len();
        }
        whole
    }

    fn symbol(&mut self, symbol: &str) -> bool {
        let found = self.rest().starts_with(symbol);
        if found {
            self.at += symbol.len();
        }
        found
    }

    fn take(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let text: &'a str = self.text;
        let rest = &text[self.at..];
        let end = rest.find(|c| !belongs(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn blanks(&mut self) {
        self.take(char::is_whitespace);
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn problem(&self, problem: &'static str) -> QueryError {
        QueryError::Syntax {
            at: self.at,
            problem,
        }
    }
}

fn operand(path: &Path, text: &str) -> Result<Operand, QueryError> {
    let bad = |wanted: &str| QueryError::BadValue {
        path: path.text.clone(),
        value: text.to_owned(),
        wanted: wanted.to_owned(),
    };
    match path.last().kind() {
        Kind::String => Ok(Operand::Text(text.to_owned())),
        Kind::Bool => match text {
            "true" => Ok(Operand::Bool(true)),
            "false" => Ok(Operand::Bool(false)),
            _ => Err(bad("true or false")),
        },
        Kind::Int32
        | Kind::Sint32
        | Kind::Sfixed32
        | Kind::Int64
        | Kind::Sint64
        | Kind::Sfixed64 => text
            .parse()
            .map(Operand::Signed)
            .map_err(|_| bad("whole number")),
        Kind::Uint32 | Kind::Fixed32 | Kind::Uint64 | Kind::Fixed64 => text
            .parse()
            .map(Operand::Unsigned)
            .map_err(|_| bad("whole number from 0")),
        Kind::Float | Kind::Double => text.parse().map(Operand::Float).map_err(|_| bad("number")),
        Kind::Enum(kind) => enum_value(&kind, text)
            .map(Operand::Enum)
            .ok_or_else(|| bad(&known_values(&kind))),
        Kind::Message(message) if message.full_name() == "google.protobuf.Timestamp" => {
            let time: prost_types::Timestamp = text
                .parse()
                .map_err(|_| bad("time such as 2026-01-31T12:00:00Z"))?;
            Ok(Operand::Time(time.seconds, time.nanos))
        }
        Kind::Message(_) => Err(QueryError::NotScalar {
            path: path.text.clone(),
        }),
        Kind::Bytes => Err(bad("field that can be compared")),
    }
}

/// `VM_PHASE_RUNNING`, `RUNNING` or `running`.
fn enum_value(kind: &EnumDescriptor, text: &str) -> Option<i32> {
    let wanted = text.to_ascii_uppercase().replace('-', "_");
    let prefix = common_prefix(kind);
    kind.values()
        .find(|value| {
            value.name() == wanted || value.name().strip_prefix(&prefix) == Some(wanted.as_str())
        })
        .map(|value| value.number())
}

fn known_values(kind: &EnumDescriptor) -> String {
    let prefix = common_prefix(kind);
    let names: Vec<String> = kind
        .values()
        .filter(|value| value.number() != 0)
        .map(|value| value.name().trim_start_matches(&prefix).to_lowercase())
        .collect();
    names.join(", ")
}

fn common_prefix(kind: &EnumDescriptor) -> String {
    let zero = kind.values().find(|value| value.number() == 0);
    zero.map(|value| value.name().trim_end_matches("UNSPECIFIED").to_owned())
        .unwrap_or_default()
}
