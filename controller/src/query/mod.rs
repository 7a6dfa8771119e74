//! What lists can be asked for beside pages: a filter (a subset of AIP-160), an order (AIP-132) and a
//! mask of the fields to answer (AIP-157). All three work on any of the API's messages by its
//! descriptor; a path that the message does not have is refused by name, never ignored.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage as _,
    Value,
};
use thiserror::Error;

mod filter;
mod mask;
mod order;

pub use filter::Filter;
pub use mask::Mask;
pub use order::{Order, SortKey};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(api::FILE_DESCRIPTOR_SET).expect("the compiled-in descriptors are whole")
});

/// The message `mortise.controller.v1.{kind}`.
///
/// # Panics
/// When the API has no such message.
pub fn descriptor(kind: &str) -> MessageDescriptor {
    POOL.get_message_by_name(&format!("mortise.controller.v1.{kind}"))
        .expect("the API has this message")
}

/// A message whose fields can be asked for by name.
pub fn dynamic(descriptor: &MessageDescriptor, message: &impl Message) -> DynamicMessage {
    DynamicMessage::decode(descriptor.clone(), message.encode_to_vec().as_slice())
        .expect("a message of this type was encoded")
}

/// What was asked for cannot be understood.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QueryError {
    /// Too much to work through for every item.
    #[error("is longer than {max} bytes")]
    TooLong {
        /// The bound.
        max: usize,
    },
    /// Parentheses in parentheses in ...
    #[error("is nested deeper than {max} levels")]
    TooDeep {
        /// The bound.
        max: usize,
    },
    /// No such field.
    #[error("{path}: {message} has no field {field}; it has {known}")]
    NoField {
        /// As given.
        path: String,
        /// Where it was looked for.
        message: String,
        /// What was looked for.
        field: String,
        /// What is there.
        known: String,
    },
    /// A path that ends at a message where a figure or a word is needed.
    #[error("{path}: is a message; name one of its fields")]
    NotScalar {
        /// As given.
        path: String,
    },
    /// A value that the field cannot have.
    #[error("{path}: {value:?} is no {wanted}")]
    BadValue {
        /// Of the field.
        path: String,
        /// As given.
        value: String,
        /// What it takes.
        wanted: String,
    },
    /// The grammar.
    #[error("at byte {at}: {problem}")]
    Syntax {
        /// Where.
        at: usize,
        /// What is wrong there.
        problem: &'static str,
    },
}

/// A checked path of field names.
#[derive(Debug, Clone)]
struct Path {
    text: String,
    fields: Vec<FieldDescriptor>,
}

impl Path {
    fn parse(message: &MessageDescriptor, text: &str) -> Result<Self, QueryError> {
        let mut fields: Vec<FieldDescriptor> = Vec::new();
        let mut inside = message.clone();
        let mut parts = text.split('.').peekable();
        while let Some(part) = parts.next() {
            let field = inside
                .get_field_by_name(part)
                .ok_or_else(|| QueryError::NoField {
                    path: text.to_owned(),
                    message: inside.name().to_owned(),
                    field: part.to_owned(),
                    known: inside
                        .fields()
                        .map(|field| field.name().to_owned())
                        .collect::<Vec<_>>()
                        .join(", "),
                })?;
            let kind = field.kind();
            fields.push(field);
            if parts.peek().is_some() {
                inside = match kind {
                    Kind::Message(message) => message,
                    _ => {
                        return Err(QueryError::NoField {
                            path: text.to_owned(),
                            message: part.to_owned(),
                            field: parts.peek().copied().unwrap_or_default().to_owned(),
                            known: "no fields".to_owned(),
                        });
                    }
                };
            }
        }
        Ok(Self {
            text: text.to_owned(),
            fields,
        })
    }

    /// The field at the end.
    fn last(&self) -> &FieldDescriptor {
        self.fields.last().expect("a path has at least one field")
    }

    /// Calls `visit` with each value at the path, of each element where a field on the way repeats,
    /// until one answers true.
    fn any(&self, message: &DynamicMessage, visit: &mut dyn FnMut(&Value) -> bool) -> bool {
        any_of(message, &self.fields, visit)
    }
}

fn any_of(
    message: &DynamicMessage,
    fields: &[FieldDescriptor],
    visit: &mut dyn FnMut(&Value) -> bool,
) -> bool {
    let Some((field, rest)) = fields.split_first() else {
        return false;
    };
    if field.supports_presence() && !message.has_field(field) {
        return false;
    }
    let value = message.get_field(field);
    if rest.is_empty() {
        return match &*value {
            Value::List(elements) => elements.iter().any(visit),
            single => visit(single),
        };
    }
    match &*value {
        Value::Message(inner) => any_of(inner, rest, visit),
        Value::List(elements) => elements.iter().any(|element| match element {
            Value::Message(inner) => any_of(inner, rest, visit),
            _ => false,
        }),
        _ => false,
    }
}

/// Seconds and nanoseconds of a `google.protobuf.Timestamp`.
fn timestamp(value: &Value) -> Option<(i64, i32)> {
    let message = value.as_message()?;
    if message.descriptor().full_name() != "google.protobuf.Timestamp" {
        return None;
    }
    let seconds = message.get_field_by_name("seconds")?.as_i64()?;
    let nanos = message.get_field_by_name("nanos")?.as_i32()?;
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests;
