//! Reading `tests/corpus/sections.txt`, whose form is in the README beside it.

use multifd_wire::DeviceDescription;

/// A section of a real guest.
pub(crate) struct Recorded {
    pub(crate) name: String,
    pub(crate) instance: u32,
    pub(crate) version: u32,
    pub(crate) machine: String,
    pub(crate) payload: Vec<u8>,
    /// What QEMU says of it.
    pub(crate) layout: Option<DeviceDescription>,
}

impl Recorded {
    /// The part of the name behind the path.
    pub(crate) fn kind(&self) -> &str {
        self.name.rsplit('/').next().unwrap()
    }
}

pub(crate) fn all() -> Vec<Recorded> {
    let text = include_str!("../corpus/sections.txt");
    let mut all: Vec<Recorded> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (word, rest) = line.split_once(' ').unwrap();
        match word {
            "section" => {
                let [instance, version, name] = rest.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
                all.push(Recorded {
                    name: name.to_owned(),
                    instance: instance.parse().unwrap(),
                    version: version.parse().unwrap(),
                    machine: String::new(),
                    payload: Vec::new(),
                    layout: None,
                });
            }
            "machine" => rest.clone_into(&mut all.last_mut().unwrap().machine),
            "payload" => all.last_mut().unwrap().payload = rest.split(' ').flat_map(bytes).collect(),
            "layout" => {
                let last = all.last_mut().unwrap();
                let mut layout: serde_json::Value = serde_json::from_str(rest).unwrap();
                layout["name"] = last.name.clone().into();
                layout["instance_id"] = last.instance.into();
                last.layout = Some(serde_json::from_value(layout).unwrap());
            }
            other => panic!("a line of {other}"),
        }
    }
    all
}

/// `00ff`, or `00ff*3`.
fn bytes(word: &str) -> Vec<u8> {
    let (digits, times) = word.split_once('*').unwrap_or((word, "1"));
    let pairs = digits.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
    let bytes: Vec<u8> = pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect();
    bytes.repeat(times.parse().unwrap())
}
