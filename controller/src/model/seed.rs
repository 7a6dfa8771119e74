//! Seeds for cloud-init. Their content is apart from the VM's record, under a key of its own: records are
//! shown to users, logged, and written anew with every change of state.

use api::controller as pb;
use api::names::Name;
use api::node;
use api::validate::has_top_level_key;
use serde_json::Value;

/// Key of a VM's seed, a `node.v1.CloudInit`.
pub fn seed_key(vm: &Name) -> String {
    format!("seeds/{}/{}", vm.project, vm.id)
}

/// Takes the content out of `spec`, which keeps what may be shown, and completes it for the host.
pub fn take_seed(spec: &mut pb::VmSpec, vm: &Name, uid: &str) -> Option<node::CloudInit> {
    let given = spec.cloud_init.take()?;
    let len = |content: &[u8]| u32::try_from(content.len()).unwrap_or(u32::MAX);
    spec.cloud_init = Some(pb::CloudInit {
        user_data_bytes: len(&given.user_data),
        meta_data_bytes: len(&given.meta_data),
        network_config_bytes: len(&given.network_config),
        ssh_keys: given.ssh_keys.clone(),
        ..Default::default()
    });
    let mut wanted = vec![
        ("instance-id", Value::from(uid)),
        ("local-hostname", Value::from(vm.id.as_str())),
    ];
    if !given.ssh_keys.is_empty() {
        wanted.push(("public-keys", Value::from(given.ssh_keys)));
    }
    Some(node::CloudInit {
        user_data: given.user_data,
        meta_data: complete(&given.meta_data, wanted),
        network_config: given.network_config,
    })
}

/// Adds what is missing. Both forms of meta-data stay what they are: JSON is parsed, a YAML block
/// mapping goes on at its end, for which nothing needs to be understood of it.
fn complete(given: &[u8], wanted: Vec<(&str, Value)>) -> Vec<u8> {
    if let Ok(Value::Object(mut object)) = serde_json::from_slice(given) {
        for (key, value) in wanted {
            object.entry(key).or_insert(value);
        }
        return Value::Object(object).to_string().into_bytes();
    }
    let mut complete = given.to_vec();
    if !given.is_empty() && !given.ends_with(b"\n") {
        complete.push(b'\n');
    }
    for (key, value) in wanted {
        if !has_top_level_key(given, key) {
            // A JSON value is YAML, too, and quoted: a host may be called `on` or `0123`.
            complete.extend_from_slice(format!("{key}: {value}\n").as_bytes());
        }
    }
    complete
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(meta_data: &str, ssh_keys: &[&str]) -> (pb::CloudInit, node::CloudInit) {
        let mut spec = pb::VmSpec {
            cloud_init: Some(pb::CloudInit {
                user_data: b"#cloud-config\npassword: sesame\n".to_vec(),
                meta_data: meta_data.into(),
                ssh_keys: ssh_keys.iter().map(|key| (*key).to_owned()).collect(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let taken = take_seed(&mut spec, &Name::vm("default", "web"), "u-1").unwrap();
        (spec.cloud_init.unwrap(), taken)
    }

    fn meta_data(given: &str) -> String {
        String::from_utf8(seed(given, &[]).1.meta_data).unwrap()
    }

    #[test]
    fn ids_are_made_of_the_vm_where_none_are_given() {
        let made = "instance-id: \"u-1\"\nlocal-hostname: \"web\"\n";
        assert_eq!(meta_data(""), made);
        assert_eq!(meta_data("cloud: x"), format!("cloud: x\n{made}"));
        assert_eq!(
            meta_data("instance-id: i-9\n"),
            "instance-id: i-9\nlocal-hostname: \"web\"\n"
        );
        let json: Value = serde_json::from_str(&meta_data(r#"{"instance-id": "i-9"}"#)).unwrap();
        assert_eq!(
            (&json["instance-id"], &json["local-hostname"]),
            (&Value::from("i-9"), &Value::from("web"))
        );
    }

    #[test]
    fn keys_come_with_the_meta_data() {
        let (shown, taken) = seed("", &["ssh-ed25519 AAAA me@here"]);
        let text = String::from_utf8(taken.meta_data).unwrap();
        assert!(
            text.ends_with("public-keys: [\"ssh-ed25519 AAAA me@here\"]\n"),
            "{text}"
        );
        assert_eq!(shown.ssh_keys.len(), 1);
    }

    #[test]
    fn record_keeps_lengths_only() {
        let (shown, taken) = seed("a: b\n", &[]);
        assert_eq!(taken.user_data, b"#cloud-config\npassword: sesame\n");
        assert!(shown.user_data.is_empty() && shown.meta_data.is_empty());
        assert_eq!((shown.user_data_bytes, shown.meta_data_bytes), (31, 5));
    }
}
