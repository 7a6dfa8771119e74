//! Masks of the fields that answers have (AIP-157).

use std::collections::BTreeMap;

use prost::Message;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, Value};
use prost_types::FieldMask;

use super::{Path, QueryError, dynamic};

/// Paths in one mask.
const MAX_PATHS: usize = 256;

/// A mask that fits a message.
#[derive(Debug, Clone)]
pub struct Mask {
    descriptor: MessageDescriptor,
    kept: Tree,
}

/// Field numbers that stay, and what of each; nothing below means all of it.
#[derive(Debug, Clone, Default)]
struct Tree(BTreeMap<u32, Tree>);

impl Mask {
    /// Reads one for `message`; `None` if it leaves everything.
    ///
    /// # Errors
    /// When it names a field that is not there.
    pub fn parse(
        message: &MessageDescriptor,
        mask: Option<&FieldMask>,
    ) -> Result<Option<Self>, QueryError> {
        let paths = mask.map(|mask| mask.paths.as_slice()).unwrap_or_default();
        if paths.is_empty() || paths.iter().any(|path| path == "*") {
            return Ok(None);
        }
        if paths.len() > MAX_PATHS {
            return Err(QueryError::TooLong { max: MAX_PATHS });
        }
        let mut whole: Vec<Path> = Vec::new();
        for path in paths {
            whole.push(Path::parse(message, path)?);
        }
        // Shorter paths first: what is below something that stays whole says nothing new.
        whole.sort_by_key(|path| path.fields.len());
        let mut kept = Tree::default();
        for path in &whole {
            let mut tree = &mut kept;
            for field in &path.fields {
                let known = tree.0.get(&field.number());
                if known.is_some_and(|whole| whole.0.is_empty()) {
                    break;
                }
                tree = tree.0.entry(field.number()).or_default();
            }
        }
        Ok(Some(Self {
            descriptor: message.clone(),
            kept,
        }))
    }

    /// Clears every other field.
    pub fn apply<T: Message + Default>(&self, message: &T) -> T {
        let mut dynamic = dynamic(&self.descriptor, message);
        prune(&mut dynamic, &self.kept);
        dynamic
            .transcode_to()
            .expect("the message is still one of its type")
    }
}

fn prune(message: &mut DynamicMessage, kept: &Tree) {
    let fields: Vec<_> = message.fields().map(|(field, _)| field).collect();
    for field in fields {
        match kept.0.get(&field.number()) {
            None => message.clear_field(&field),
            Some(inner) if inner.0.is_empty() => {}
            Some(inner) if matches!(field.kind(), Kind::Message(_)) => {
                match message.get_field_mut(&field) {
                    Value::Message(value) => prune(value, inner),
                    Value::List(values) => {
                        for value in values {
                            if let Value::Message(value) = value {
                                prune(value, inner);
                            }
                        }
                    }
                    _ => {}
                }
            }
            Some(_) => {}
        }
    }
}
