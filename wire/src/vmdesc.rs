use serde::{Deserialize, Serialize};

use crate::{Invalid, ItemType};

/// The JSON at the end of a stream: what the device sections consist of. Spec: docs/wire.md §16.2.
///
/// Keys that are not listed here are passed over: each version of QEMU adds some.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDescription {
    /// The configuration section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configuration: Option<StructDescription>,
    /// Target page size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// Every section of type FULL, in the order of the stream.
    pub devices: Vec<DeviceDescription>,
}

/// One device section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// Name in the section's head.
    pub name: String,
    /// Instance in the section's head.
    pub instance_id: u32,
    /// Name of the layout; `None` for a section written by code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmsd_name: Option<String>,
    /// Version of the layout; `None` for a section written by code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Bytes of the payload, where it is written by code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The fields, in the order of the payload.
    #[serde(default)]
    pub fields: Vec<FieldDescription>,
    /// The subsections, which follow the fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<StructDescription>,
}

/// The layout of a structure or a subsection.
///
/// QEMU up to 9.2 leaves it empty, without a name, for a null pointer in an array of structures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StructDescription {
    /// Name of the layout.
    #[serde(default)]
    pub vmsd_name: String,
    /// Version of the layout.
    #[serde(default)]
    pub version: u32,
    /// The fields, in the order of the payload.
    #[serde(default)]
    pub fields: Vec<FieldDescription>,
    /// The subsections, which follow the fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<Self>,
}

/// One field, or equal elements of an array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldDescription {
    /// Name of the field.
    pub name: String,
    /// Type of the field, such as `uint32`, `buffer`, `struct`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes of the field, or of one element where there is an `array_len`.
    pub size: u64,
    /// The number of equal elements that this describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub array_len: Option<u64>,
    /// This is one element of an array, the one with this index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// What the field consists of, for the type `struct`.
    #[serde(default, rename = "struct", skip_serializing_if = "Option::is_none")]
    pub struct_: Option<Box<StructDescription>>,
}

/// Longest description in bytes: 64 MiB. A PC has some 50 KiB, each vCPU adds about 8 KiB.
pub const MAX_VMDESC: u32 = 64 << 20;

/// Most devices, structures and fields of a description. A PC has some 700, each vCPU adds about
/// 100. Parsed, each takes up to [`VMDESC_NODE_LEN`] bytes beside its names: a text of `{}` after
/// `{}` has one in three bytes.
pub const MAX_VMDESC_NODES: usize = 1 << 19;

/// Bytes that a device, structure or field takes when it is parsed, names apart.
pub const VMDESC_NODE_LEN: usize = 192;

impl VmDescription {
    /// Parses the JSON text, without the type byte and the length before it. Nesting is limited to
    /// 128 levels.
    ///
    /// # Errors
    /// More than [`MAX_VMDESC`] bytes, or not the JSON of a description.
    pub fn parse(json: &[u8]) -> Result<Self, Invalid> {
        if json.len() > MAX_VMDESC as usize {
            let expected = format!("at most {MAX_VMDESC}");
            return Err(Invalid::new("vm description", format_args!("{} bytes", json.len()), expected));
        }
        let nodes = Self::nodes(json);
        if nodes > MAX_VMDESC_NODES {
            let expected = format!("at most {MAX_VMDESC_NODES}");
            let seen = format_args!("{nodes} devices, structures and fields");
            return Err(Invalid::new("vm description", seen, expected));
        }
        serde_json::from_slice(json).map_err(|error| Invalid::new("vm description", error, "the json of one"))
    }
}

impl VmDescription {
    /// Most devices, structures and fields that this JSON text can hold: its opening braces, those
    /// in names included.
    pub fn nodes(json: &[u8]) -> usize {
        json.iter().filter(|byte| **byte == b'{').count()
    }
}

impl DeviceDescription {
    /// Bytes of the section's payload; `None` if they do not fit a u64. Spec: docs/wire.md §16.3.
    pub fn payload_len(&self) -> Option<u64> {
        match self.size {
            Some(size) => Some(size),
            None => contents_len(&self.fields, &self.subsections),
        }
    }
}

impl StructDescription {
    /// Bytes of the contents; `None` if they do not fit a u64.
    pub(crate) fn contents_len(&self) -> Option<u64> {
        contents_len(&self.fields, &self.subsections)
    }
}

impl FieldDescription {
    /// Bytes of the field with all elements that it describes; `None` if they do not fit a u64.
    pub(crate) fn len(&self) -> Option<u64> {
        let one = match self.described_struct() {
            Some(inner) => inner.contents_len()?,
            None => self.size,
        };
        one.checked_mul(self.array_len.unwrap_or(1))
    }

    /// The parts of the field, if they are described.
    pub(crate) fn described_struct(&self) -> Option<&StructDescription> {
        self.struct_.as_deref().filter(|inner| !(inner.fields.is_empty() && inner.subsections.is_empty()))
    }
}

/// Type byte of a subsection. Spec: docs/wire.md §1.
pub(crate) const SUBSECTION: u8 = ItemType::Subsection.byte();

/// A subsection has a type byte, a counted name and a version before its contents. Spec:
/// docs/wire.md §3.3.
fn contents_len(fields: &[FieldDescription], subsections: &[StructDescription]) -> Option<u64> {
    let fields = fields.iter().map(FieldDescription::len);
    let subsections = subsections.iter().map(|sub| {
        let head = 1 + 1 + u64::try_from(sub.vmsd_name.len()).ok()? + 4;
        sub.contents_len()?.checked_add(head)
    });
    fields.chain(subsections).try_fold(0_u64, |sum, len| sum.checked_add(len?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_arrays_structs_and_subsections_add_up() {
        let json = br#"{"page_size": 4096, "later": {}, "devices": [
            {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1,
             "fields": [{"name": "a", "type": "uint16", "size": 2, "array_len": 3, "num": 1},
                        {"name": "s", "type": "struct", "array_len": 2, "size": 5, "struct":
                         {"vmsd_name": "s", "version": 1, "fields": [{"name": "b", "type": "x", "size": 5}]}}],
             "subsections": [{"vmsd_name": "d/x", "version": 1, "fields": []}]},
            {"name": "old", "instance_id": 1, "size": 7,
             "fields": [{"name": "data", "size": 7, "type": "buffer"}]}]}"#;
        let description = VmDescription::parse(json).unwrap();
        let lens: Vec<_> = description.devices.iter().map(|device| device.payload_len().unwrap()).collect();
        assert_eq!(lens, [6 + 10 + 9, 7]);
        let again = serde_json::to_vec(&description).unwrap();
        assert_eq!(VmDescription::parse(&again).unwrap(), description);
    }

    #[test]
    fn repeated_keys_of_list_elements_are_passed_over() {
        let json = br#"{"devices": [{"name": "d", "instance_id": 0, "fields": [{"name": "q", "type": "queue",
            "vmsd_name": "e", "fields": [], "vmsd_name": "e", "fields": [], "size": 9}]}]}"#;
        assert_eq!(VmDescription::parse(json).unwrap().devices[0].payload_len(), Some(9));
    }

    #[test]
    fn a_null_pointer_has_an_empty_layout_and_a_size() {
        let json = br#"{"devices": [{"name": "d", "instance_id": 0, "fields": [
            {"name": "p", "type": "nullptr", "index": 0, "struct": {}, "size": 1}]}]}"#;
        assert_eq!(VmDescription::parse(json).unwrap().devices[0].payload_len(), Some(1));
    }

    #[test]
    fn lengths_that_overflow_are_not_lengths() {
        let json = br#"{"devices": [{"name": "d", "instance_id": 0, "fields": [
            {"name": "a", "type": "x", "size": 4294967296, "array_len": 4294967296}]}]}"#;
        assert_eq!(VmDescription::parse(json).unwrap().devices[0].payload_len(), None);
    }

    #[test]
    fn refuses_deep_nesting_and_other_json() {
        let deep = format!("{{\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(VmDescription::parse(deep.as_bytes()).is_err());
        for text in ["", "{}", "[]", "{\"devices\": 1}", "{\"devices\": []} x"] {
            assert!(VmDescription::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_description_of_too_many_parts_is_refused_before_it_is_parsed() {
        let parts = |count: usize| {
            let parts = "{},".repeat(count);
            format!("{{\"page_size\":4096,\"devices\":[],\"x\":[{}]}}", parts.trim_end_matches(','))
        };
        assert!(VmDescription::parse(parts(MAX_VMDESC_NODES - 1).as_bytes()).is_ok());
        let error = VmDescription::parse(parts(MAX_VMDESC_NODES).as_bytes()).unwrap_err().to_string();
        assert!(error.contains("524289 devices, structures and fields, expected at most 524288"), "{error}");
        assert!(size_of::<FieldDescription>() + size_of::<StructDescription>() <= VMDESC_NODE_LEN);
        assert!(size_of::<DeviceDescription>() <= VMDESC_NODE_LEN);
    }
}
