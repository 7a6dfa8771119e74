//! Orders (AIP-132): `field, other.field desc`.

use std::cmp::Ordering;

use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, Value};

use super::{Path, QueryError, timestamp};

/// Fields in one order.
const MAX_FIELDS: usize = 8;

/// An order that fits a message.
#[derive(Debug, Clone)]
pub struct Order {
    fields: Vec<(Path, bool)>,
}

/// Where an item belongs in an [`Order`].
#[derive(Debug, Clone, PartialEq)]
pub struct SortKey(Vec<(Part, bool)>);

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Absent,
    Number(i128),
    Float(f64),
    Text(String),
    Time(i64, i32),
}

impl Order {
    /// Reads one for `message`; `None` for an empty text.
    ///
    /// # Errors
    /// When a field is not there or has no order.
    pub fn parse(message: &MessageDescriptor, text: &str) -> Result<Option<Self>, QueryError> {
        if text.trim().is_empty() {
            return Ok(None);
        }
        let mut fields = Vec::new();
        for part in text.split(',') {
            let mut words = part.split_whitespace();
            let path = words.next().unwrap_or_default();
            let descending = match words.next() {
                None | Some("asc") => false,
                Some("desc") => true,
                Some(_) => {
                    return Err(QueryError::Syntax {
                        at: 0,
                        problem: "after a field may be asc or desc",
                    });
                }
            };
            if words.next().is_some() || fields.len() == MAX_FIELDS {
                return Err(QueryError::Syntax {
                    at: 0,
                    problem: "wants fields with commas between them, at most 8",
                });
            }
            let path = Path::parse(message, path)?;
            let sortable = match path.last().kind() {
                _ if path
                    .fields
                    .iter()
                    .any(|field| field.is_list() || field.is_map()) =>
                {
                    false
                }
                Kind::Message(inner) => inner.full_name() == "google.protobuf.Timestamp",
                Kind::Bytes => false,
                _ => true,
            };
            if !sortable {
                return Err(QueryError::NotScalar { path: path.text });
            }
            fields.push((path, descending));
        }
        Ok(Some(Self { fields }))
    }

    /// Where `message` belongs.
    pub fn key(&self, message: &DynamicMessage) -> SortKey {
        let part = |path: &Path| {
            let mut part = Part::Absent;
            path.any(message, &mut |value| {
                part = Part::of(value);
                true
            });
            part
        };
        SortKey(
            self.fields
                .iter()
                .map(|(path, descending)| (part(path), *descending))
                .collect(),
        )
    }
}

impl Part {
    fn of(value: &Value) -> Self {
        match value {
            Value::Bool(value) => Self::Number((*value).into()),
            Value::I32(value) | Value::EnumNumber(value) => Self::Number((*value).into()),
            Value::I64(value) => Self::Number((*value).into()),
            Value::U32(value) => Self::Number((*value).into()),
            Value::U64(value) => Self::Number((*value).into()),
            Value::F32(value) => Self::Float((*value).into()),
            Value::F64(value) => Self::Float(*value),
            Value::String(value) => Self::Text(value.clone()),
            other => {
                timestamp(other).map_or(Self::Absent, |(seconds, nanos)| Self::Time(seconds, nanos))
            }
        }
    }

    fn compare(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) => a.cmp(b),
            (Self::Float(a), Self::Float(b)) => a.total_cmp(b),
            (Self::Text(a), Self::Text(b)) => a.cmp(b),
            (Self::Time(a, b), Self::Time(c, d)) => (a, b).cmp(&(c, d)),
            // What is not set comes first.
            (Self::Absent, Self::Absent) => Ordering::Equal,
            (Self::Absent, _) => Ordering::Less,
            (_, Self::Absent) => Ordering::Greater,
            // One field has one type.
            _ => Ordering::Equal,
        }
    }
}

impl SortKey {
    /// By the first field that differs.
    pub fn compare(&self, other: &Self) -> Ordering {
        let pairs = self.0.iter().zip(&other.0);
        for ((mine, descending), (theirs, _)) in pairs {
            let order = mine.compare(theirs);
            if order.is_ne() {
                return if *descending { order.reverse() } else { order };
            }
        }
        Ordering::Equal
    }
}
