//! What a request is about: its `name`, its `parent` with the id of what is made there, or the name in
//! the resource that it carries. Found by field numbers that come from the descriptors once, so that
//! no message is decoded twice.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, Kind, MessageDescriptor};

/// Collections of what `{..}_id` names.
const COLLECTIONS: [(&str, &str); 9] = [
    ("vm_id", "vms"),
    ("volume_id", "volumes"),
    ("network_id", "networks"),
    ("security_group_id", "securityGroups"),
    ("upload_id", "uploads"),
    ("experiment_id", "faultExperiments"),
    ("project_id", "projects"),
    ("pool_id", "pools"),
    ("host_id", "hosts"),
];

/// Longer names are none.
const MAX_BYTES: usize = 512;

#[derive(Debug, Default)]
struct Fields {
    /// Path of field numbers to a name.
    name: Vec<u32>,
    /// Number of the id, and the collection.
    id: Option<(u32, &'static str)>,
}

static METHODS: LazyLock<HashMap<String, Fields>> = LazyLock::new(|| {
    let pool = DescriptorPool::decode(api::FILE_DESCRIPTOR_SET)
        .expect("the compiled-in descriptors are whole");
    let mut methods = HashMap::new();
    for service in pool.services() {
        for method in service.methods() {
            let key = format!("{}/{}", service.full_name(), method.name());
            methods.insert(key, fields(&method.input()));
        }
    }
    methods
});

fn fields(message: &MessageDescriptor) -> Fields {
    let number = |name: &str| {
        let field = message.get_field_by_name(name)?;
        (field.kind() == Kind::String && !field.is_list()).then(|| field.number())
    };
    let id = COLLECTIONS
        .iter()
        .find_map(|(name, collection)| Some((number(name)?, *collection)));
    if let Some(name) = number("name").or_else(|| number("parent")) {
        return Fields {
            name: vec![name],
            id,
        };
    }
    // Update requests: the resource has it.
    for field in message.fields() {
        if let Kind::Message(inner) = field.kind()
            && !field.is_list()
            && let Some(name) = inner.get_field_by_name("name")
            && name.kind() == Kind::String
            && id.is_none()
        {
            return Fields {
                name: vec![field.number(), name.number()],
                id: None,
            };
        }
    }
    Fields { name: vec![], id }
}

/// What stands for the resource of a message that cannot be read: a project that nobody has.
const UNREADABLE: &str = "projects/?";

/// The resource that a message to `method` is about; empty if it names none.
pub(super) fn of(method: &str, message: &[u8]) -> String {
    let Some(fields) = METHODS.get(method) else {
        return String::new();
    };
    resource(fields, message).unwrap_or_else(|_| UNREADABLE.to_owned())
}

fn resource(fields: &Fields, message: &[u8]) -> Result<String, Unreadable> {
    let name = text(message, &fields.name)?.unwrap_or_default();
    let Some((number, collection)) = fields.id else {
        return Ok(name);
    };
    let id = text(message, &[number])?.unwrap_or_default();
    Ok(match (name.as_str(), id.as_str()) {
        (parent, "") => parent.to_owned(),
        ("", id) => format!("{collection}/{id}"),
        (parent, id) => format!("{parent}/{collection}/{id}"),
    })
}

/// The string at a path of field numbers. As decoders do, the last one of several counts, and messages
/// that come in parts are put together.
fn text(message: &[u8], path: &[u32]) -> Result<Option<String>, Unreadable> {
    let mut fields = LengthDelimited(message);
    let mut found = None;
    while let Some((number, bytes)) = fields.next_field()? {
        match path.split_first() {
            Some((wanted, [])) if number == *wanted => {
                let bytes = &bytes[..bytes.len().min(MAX_BYTES)];
                found = Some(String::from_utf8_lossy(bytes).into_owned());
            }
            Some((wanted, rest)) if number == *wanted => found = text(bytes, rest)?.or(found),
            _ => {}
        }
    }
    Ok(found)
}

/// Not of the wire format, or with groups, which nobody sends any more: a handler might read it
/// differently, so it is not guessed what it names.
#[derive(Debug)]
struct Unreadable;

/// The fields of wire type 2.
struct LengthDelimited<'a>(&'a [u8]);

impl<'a> LengthDelimited<'a> {
    fn next_field(&mut self) -> Result<Option<(u32, &'a [u8])>, Unreadable> {
        while !self.0.is_empty() {
            let key = self.varint().ok_or(Unreadable)?;
            let number = u32::try_from(key >> 3).map_err(|_| Unreadable)?;
            match key & 7 {
                0 => {
                    self.varint().ok_or(Unreadable)?;
                }
                1 => self.0 = self.0.get(8..).ok_or(Unreadable)?,
                2 => {
                    let length = self.varint().ok_or(Unreadable)?;
                    let length = usize::try_from(length).map_err(|_| Unreadable)?;
                    let (bytes, rest) = self.0.split_at_checked(length).ok_or(Unreadable)?;
                    self.0 = rest;
                    return Ok(Some((number, bytes)));
                }
                5 => self.0 = self.0.get(4..).ok_or(Unreadable)?,
                _ => return Err(Unreadable),
            }
        }
        Ok(None)
    }
}

impl LengthDelimited<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use api::controller as pb;
    use prost::Message as _;

    use super::*;

    #[test]
    fn names_are_found_wherever_requests_have_them() {
        let of = |method: &str, message: Vec<u8>| {
            of(&format!("mortise.controller.v1.{method}"), &message)
        };
        let get = pb::GetVmRequest {
            name: "projects/p/vms/v".into(),
        };
        assert_eq!(of("Vms/GetVm", get.encode_to_vec()), "projects/p/vms/v");
        let create = pb::CreateVmRequest {
            parent: "projects/p".into(),
            vm_id: "v".into(),
            vm: Some(pb::Vm {
                name: "projects/evil/vms/x".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            of("Vms/CreateVm", create.encode_to_vec()),
            "projects/p/vms/v"
        );
        let update = pb::UpdateVolumeRequest {
            volume: Some(pb::Volume {
                name: "projects/p/volumes/d".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            of("Volumes/UpdateVolume", update.encode_to_vec()),
            "projects/p/volumes/d"
        );
        let project = pb::CreateProjectRequest {
            project_id: "p".into(),
            ..Default::default()
        };
        assert_eq!(
            of("Projects/CreateProject", project.encode_to_vec()),
            "projects/p"
        );
        assert_eq!(of("Events/ListEvents", vec![]), "");
        assert_eq!(of("Nothing/Of", vec![]), "");
    }

    #[test]
    fn the_last_name_counts_as_it_does_for_the_handler() {
        let first = pb::GetVmRequest {
            name: "projects/mine/vms/v".into(),
        };
        let second = pb::GetVmRequest {
            name: "projects/yours/vms/v".into(),
        };
        let message = [first.encode_to_vec(), second.encode_to_vec()].concat();
        let decoded = pb::GetVmRequest::decode(message.as_slice()).unwrap();
        assert_eq!(
            of("mortise.controller.v1.Vms/GetVm", &message),
            decoded.name
        );
    }

    #[test]
    fn nonsense_is_in_no_project() {
        // The last one hides a second name behind a group.
        let hidden = [&b"\x0a\x01a\x13\x14"[..], b"\x0a\x01b"].concat();
        for bytes in [&[0xff; 20][..], &[0x0a, 0x7f, 1], &[0x0b], &[0x0a], &hidden] {
            assert_eq!(of("mortise.controller.v1.Vms/GetVm", bytes), UNREADABLE);
        }
    }
}
