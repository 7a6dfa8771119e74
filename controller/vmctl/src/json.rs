//! Any of the API's messages as JSON and back: proto3 JSON, with field names as in the `.proto`
//! files and plain numbers, from the compiled-in descriptors.

use std::sync::LazyLock;

use anyhow::Context as _;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::Value;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(api::FILE_DESCRIPTOR_SET).expect("the compiled-in descriptors are whole")
});

/// A message of `mortise.controller.v1` called `kind`.
pub(crate) fn value(kind: &str, message: &impl Message) -> anyhow::Result<Value> {
    let dynamic = DynamicMessage::decode(descriptor(kind)?, message.encode_to_vec().as_slice())
        .with_context(|| format!("cannot show a {kind} as JSON"))?;
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false)
        .skip_default_fields(false);
    Ok(dynamic.serialize_with_options(serde_json::value::Serializer, &options)?)
}

/// The message called `kind` that `text` describes.
///
/// # Errors
/// When it is no JSON, or has fields that the message has not.
pub(crate) fn parse<T: Message + Default>(kind: &str, text: &str) -> anyhow::Result<T> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let dynamic = DynamicMessage::deserialize(descriptor(kind)?, &mut deserializer)
        .with_context(|| format!("not a {kind}"))?;
    deserializer
        .end()
        .with_context(|| format!("more follows the {kind}"))?;
    Ok(dynamic.transcode_to()?)
}

fn descriptor(kind: &str) -> anyhow::Result<MessageDescriptor> {
    POOL.get_message_by_name(&format!("mortise.controller.v1.{kind}"))
        .with_context(|| format!("the API has no message {kind}"))
}

/// Prints one value.
pub(crate) fn print(value: &Value) {
    println!("{value:#}");
}

#[cfg(test)]
mod tests {
    use api::controller as pb;

    use super::*;

    #[test]
    fn message_survives_json() {
        let spec = pb::VmSpec {
            vcpus: 2,
            memory_bytes: 1 << 33,
            kernel: "/k".into(),
            disks: vec![pb::Disk {
                source: Some(pb::disk::Source::Path("/img".into())),
                ..Default::default()
            }],
            ..Default::default()
        };
        let json = value("VmSpec", &spec).unwrap();
        assert_eq!(
            json["memory_bytes"],
            1u64 << 33,
            "numbers are numbers: {json}"
        );
        assert_eq!(json["disks"][0]["path"], "/img");
        let back: pb::VmSpec = parse("VmSpec", &json.to_string()).unwrap();
        assert_eq!(back, spec);
    }

    #[test]
    fn unknown_fields_are_refused_by_name() {
        let error = parse::<pb::VmSpec>("VmSpec", r#"{"vcpu": 2}"#).unwrap_err();
        assert!(format!("{error:#}").contains("vcpu"), "{error:#}");
    }

    #[test]
    fn enums_have_their_names() {
        let vm = pb::Vm {
            desired_power: pb::DesiredPower::On as i32,
            ..Default::default()
        };
        assert_eq!(
            value("Vm", &vm).unwrap()["desired_power"],
            "DESIRED_POWER_ON"
        );
    }
}
