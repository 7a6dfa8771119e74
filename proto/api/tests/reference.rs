//! `docs/api.md`, the reference of the API, is made from the `.proto` files: this test says when it is
//! out of date, and with `WRITE_REFERENCE=1` in the environment writes it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet, ServiceDescriptorProto,
};

const PACKAGE: &str = "mortise.controller.v1";
const FILE: &str = "../../docs/api.md";

const INTRODUCTION: &str = "# API reference

Made from `proto/api/proto/mortise/controller/v1/` by `WRITE_REFERENCE=1 cargo test -p api --test reference`; do not
edit. The API is gRPC, package `mortise.controller.v1`. It follows the API improvement proposals (AIPs): resource names, standard
methods, `request_id`, `etag`, `update_mask`, `page_token`, long-running operations, errors with `google.rpc.ErrorInfo`.
`proto/api/examples/` has clients in Rust and Python that CI runs.

## What all methods share

- **Callers.** Where the controller was told whom to let in, a request carries `authorization: Bearer TOKEN` or comes with a client
  certificate. UNAUTHENTICATED and PERMISSION_DENIED name the method, the role that it needs and the caller.
- **Request ids.** Metadata `x-request-id` (at most 64 of `A-Z a-z 0-9 - _`; made up if there is none) is in the answer's metadata, in the
  log lines of the request and in the audit log. It is not `request_id`, the field by which a repeated request is known.
- **Traces.** Metadata `traceparent` (W3C Trace Context) is carried on to hosts and daemons.
- **Rates.** RESOURCE_EXHAUSTED with `google.rpc.RetryInfo` says when to try again.
- **Lists.** `page_size` and `page_token`; `filter`, `order_by` and `read_mask` as below. Each answer has a `resume_token`:
  `Watches.WatchResources` goes on from there, so that list and watch together miss nothing.

### Filters

A subset of AIP-160. Restrictions are `field comparator value`; fields are named by paths such as `status.phase`.

| written | means |
|---|---|
| `spec.vcpus >= 4` | numbers, texts, times (`2026-01-31T12:00:00Z`) compare by `= != < <= > >=` |
| `status.phase = running` | values of enums by name, with or without what all have in common |
| `name = \"*/vms/web*\"` | `*` at either end of a text stands for anything |
| `name : web` | a text contains it, a list has it |
| `spec.cloud_init : *` | the field is set |
| `spec.disks.volume : data` | of a list's elements, any |
| `a = 1 AND b = 2`, `a = 1 b = 2` | both |
| `a = 1 OR a = 2` | either; OR binds closer than AND |
| `NOT a = 1`, `-a = 1`, `( ... )` | not; first |

### Orders

AIP-132: `create_time desc, name`. What is not set comes first.
";

#[test]
fn reference_in_docs_is_current() {
    let made = reference();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    if std::env::var_os("WRITE_REFERENCE").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    if there != made {
        let differs = there
            .lines()
            .zip(made.lines())
            .position(|(there, made)| there != made);
        let line = differs.unwrap_or_else(|| there.lines().count().min(made.lines().count())) + 1;
        panic!(
            "docs/api.md is out of date from line {line}; WRITE_REFERENCE=1 cargo test -p api --test reference"
        );
    }
}

fn reference() -> String {
    let set = FileDescriptorSet::decode(api::FILE_DESCRIPTOR_SET).unwrap();
    let mut files: Vec<&FileDescriptorProto> = set
        .file
        .iter()
        .filter(|file| file.package() == PACKAGE)
        .collect();
    files.sort_by_key(|file| file.name());
    let mut text = INTRODUCTION.to_owned();
    let mut services: Vec<(String, String)> = Vec::new();
    let mut messages: Vec<(String, String)> = Vec::new();
    for file in files {
        let comments = Comments::of(file);
        for (index, service) in file.service.iter().enumerate() {
            let text = service_text(service, &comments, &[6, index as i32]);
            services.push((service.name().to_owned(), text));
        }
        for (index, message) in file.message_type.iter().enumerate() {
            let text = message_text(message, &comments, &[4, index as i32]);
            messages.push((message.name().to_owned(), text));
        }
        for (index, kind) in file.enum_type.iter().enumerate() {
            let text = enum_text(kind, &comments, &[5, index as i32]);
            messages.push((kind.name().to_owned(), text));
        }
    }
    services.sort();
    messages.sort();
    text.push_str("\n## Services\n");
    services.iter().for_each(|(_, part)| text.push_str(part));
    text.push_str("\n## Messages and enums\n");
    messages.iter().for_each(|(_, part)| text.push_str(part));
    text
}

/// What is written above each element, by its path.
struct Comments(BTreeMap<Vec<i32>, String>);

impl Comments {
    fn of(file: &FileDescriptorProto) -> Self {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        let with = locations.filter_map(|location| {
            let lines = location.leading_comments().lines().map(str::trim);
            let text = lines.collect::<Vec<_>>().join(" ");
            let text = text.trim().replace('|', "\\|");
            (!text.is_empty()).then(|| (location.path.clone(), text))
        });
        Self(with.collect())
    }

    fn at(&self, path: &[i32], more: &[i32]) -> &str {
        let path = [path, more].concat();
        self.0.get(&path).map_or("", String::as_str)
    }
}

fn service_text(service: &ServiceDescriptorProto, comments: &Comments, path: &[i32]) -> String {
    let mut text = format!("\n### {}\n", service.name());
    paragraph(&mut text, comments.at(path, &[]));
    text.push_str("\n| method | request | answer | |\n|---|---|---|---|\n");
    for (index, method) in service.method.iter().enumerate() {
        let side = |kind: &str, streams: bool| {
            let stream = if streams { "stream of " } else { "" };
            format!("{stream}{}", linked(kind))
        };
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            method.name(),
            side(method.input_type(), method.client_streaming()),
            side(method.output_type(), method.server_streaming()),
            comments.at(path, &[2, index as i32]),
        );
    }
    text
}

fn message_text(message: &DescriptorProto, comments: &Comments, path: &[i32]) -> String {
    let mut text = format!("\n### {}\n", message.name());
    paragraph(&mut text, comments.at(path, &[]));
    if message.field.is_empty() {
        text.push_str("\nNo fields.\n");
        return text;
    }
    text.push_str("\n| field | type | |\n|---|---|---|\n");
    for (index, field) in message.field.iter().enumerate() {
        let choice = match (field.oneof_index, field.proto3_optional()) {
            (Some(oneof), false) => {
                let name = message.oneof_decl[oneof as usize].name();
                format!("One of `{name}`. ")
            }
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "| `{}` = {} | {} | {choice}{} |",
            field.name(),
            field.number(),
            type_of(field, message),
            comments.at(path, &[2, index as i32]),
        );
    }
    text
}

fn enum_text(kind: &EnumDescriptorProto, comments: &Comments, path: &[i32]) -> String {
    let mut text = format!("\n### {}\n", kind.name());
    paragraph(&mut text, comments.at(path, &[]));
    text.push_str("\n| value | |\n|---|---|\n");
    for (index, value) in kind.value.iter().enumerate() {
        let _ = writeln!(
            text,
            "| `{}` = {} | {} |",
            value.name(),
            value.number(),
            comments.at(path, &[2, index as i32]),
        );
    }
    text
}

fn paragraph(text: &mut String, comment: &str) {
    if !comment.is_empty() {
        let _ = writeln!(text, "\n{comment}");
    }
}

fn type_of(field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    let one = match field.r#type() {
        Type::Message | Type::Enum => {
            let entry = field.type_name().rsplit('.').next().unwrap_or_default();
            let map = message
                .nested_type
                .iter()
                .find(|nested| nested.name() == entry)
                .filter(|nested| nested.options.as_ref().is_some_and(|o| o.map_entry()));
            if let Some(map) = map {
                let [key, value] = &map.field[..] else {
                    unreachable!("entries of maps have a key and a value");
                };
                return format!("map of {} to {}", type_of(key, map), type_of(value, map));
            }
            linked(field.type_name())
        }
        other => other
            .as_str_name()
            .trim_start_matches("TYPE_")
            .to_lowercase(),
    };
    match field.label() {
        Label::Repeated => format!("list of {one}"),
        _ => one,
    }
}

fn linked(kind: &str) -> String {
    let kind = kind.trim_start_matches('.');
    match kind.strip_prefix(PACKAGE) {
        Some(own) => {
            let own = own.trim_start_matches('.');
            format!("[{own}](#{})", own.to_lowercase())
        }
        None => format!("`{kind}`"),
    }
}
