//! What clients read of the interface in `api/openapi.yaml`, against the interface.

use api::config::{
    ConsoleConfig, CpusConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig,
    ReceiveMigrationData, RestoreConfig, RngConfig, SendMigrationData, SnapshotConfig, VmConfig,
};
use api::replication::{FailoverData, ReceiveReplicaData, ReplicateData, ReplicationInfo};
use serde::de::{Deserialize, Deserializer, Error, Visitor};

use crate::http::head::Method;
use crate::http::response::{Response, Status};
use crate::http::route;

const DESCRIPTION: &str = include_str!("../../../../api/openapi.yaml");

#[test]
fn what_is_described_is_routed() {
    let mut lines = DESCRIPTION.lines();
    let mut routes = 0;
    while let Some(line) = lines.next() {
        let Some(name) = line.strip_prefix("  /").and_then(|rest| rest.strip_suffix(':')) else {
            continue;
        };
        let method = match lines.next().map(str::trim) {
            Some("get:") => Method::Get,
            Some("put:") => Method::Put,
            other => panic!("{name}: {other:?}"),
        };
        // Whatever the body, the route and its method are known.
        if let Err(refusal) = route::route(method, &format!("/api/v1/{name}"), b"", 0) {
            assert_eq!(refusal.chain, [format!("{name} needs a body")]);
        }
        routes += 1;
    }
    assert!(routes > 20, "{routes}");
    assert_eq!(DESCRIPTION.matches("        default:\n").count(), routes, "answers to any request");
}

#[test]
fn answers_to_any_request_are_described() {
    let (_, described) = DESCRIPTION.split_once("\n    Unread:\n").unwrap();
    let (described, _) = described.split_once("content:").unwrap();
    for status in [
        Status::RequestTimeout,
        Status::LengthRequired,
        Status::BodyTooLarge,
        Status::ExpectationFailed,
        Status::HeadersTooLarge,
        Status::Unavailable,
    ] {
        let answer = String::from_utf8(Response::failure(status, &[]).encode(false)).unwrap();
        let code = answer.split(' ').nth(1).unwrap();
        assert!(described.contains(&format!("{code}: ")), "{code}");
    }
}

/// Has nothing to give, and learns which fields are asked for.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(Error::custom("no struct is asked for"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        Err(Error::custom("there is nothing"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

fn fields<T: Deserialize<'static>>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    assert!(T::deserialize(Fields(&mut fields)).is_err());
    fields
}

#[test]
fn every_field_of_a_body_is_described() {
    for (name, fields) in [
        ("VmConfig", fields::<VmConfig>()),
        ("PayloadConfig", fields::<PayloadConfig>()),
        ("CpusConfig", fields::<CpusConfig>()),
        ("MemoryConfig", fields::<MemoryConfig>()),
        ("RngConfig", fields::<RngConfig>()),
        ("ConsoleConfig", fields::<ConsoleConfig>()),
        ("DiskConfig", fields::<DiskConfig>()),
        ("NetConfig", fields::<NetConfig>()),
        ("SnapshotConfig", fields::<SnapshotConfig>()),
        ("RestoreConfig", fields::<RestoreConfig>()),
        ("SendMigrationData", fields::<SendMigrationData>()),
        ("ReceiveMigrationData", fields::<ReceiveMigrationData>()),
        ("ReplicateData", fields::<ReplicateData>()),
        ("ReceiveReplicaData", fields::<ReceiveReplicaData>()),
        ("FailoverData", fields::<FailoverData>()),
        ("ReplicationInfo", fields::<ReplicationInfo>()),
    ] {
        let (_, schema) = DESCRIPTION.split_once(&format!("\n    {name}:\n")).unwrap();
        let schema: Vec<&str> =
            schema.lines().take_while(|line| line.starts_with("      ")).collect();
        assert!(!fields.is_empty(), "{name}");
        for field in fields {
            let property = format!("        {field}:");
            assert!(schema.contains(&property.as_str()), "{name}.{field}");
        }
    }
}
