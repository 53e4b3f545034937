//! What is moved, how, and by whom: the list that the command runs.

use multifd_tests::{Compression, Settings};

use serde_json::{Map, json};

use crate::guest::Guest;
use crate::live::WorkingSet;
use crate::tls;

/// One comparison: the same guest, the same settings, every way to move it.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: String,
    pub(crate) guest: Guest,
    pub(crate) transport: Transport,
    /// Parallel channels; `None`: everything on the main channel.
    pub(crate) channels: Option<u8>,
    pub(crate) codec: Compression,
    /// Certificates on both sides.
    pub(crate) tls: bool,
    /// Pages that are written again go as differences.
    pub(crate) xbzrle: bool,
    /// QEMU has looked at all of its guest's RAM before: what was never touched is memory of zeros,
    /// no holes.
    pub(crate) looked_at: bool,
    /// Mbit/s of the link; none: this machine's own.
    pub(crate) link: Option<u32>,
    /// The guest runs, and rewrites these pages. `None`: it is paused.
    pub(crate) live: Option<WorkingSet>,
    /// The least ratio of QEMU's time to ours that the project aims at.
    pub(crate) target: Option<f64>,
}

/// What the bytes go over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

/// Who sends to whom.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Way {
    QemuToQemu,
    OursToOurs,
    QemuToOurs,
    OursToQemu,
    /// The raw pump into a mapping.
    PumpMapping,
    /// The raw pump into a file.
    PumpFile,
}

impl Scenario {
    pub(crate) fn new(name: &str, guest: Guest, channels: Option<u8>, codec: Compression) -> Self {
        Self {
            name: name.to_owned(),
            guest,
            transport: Transport::Tcp,
            channels,
            codec,
            tls: false,
            xbzrle: false,
            looked_at: false,
            link: None,
            live: None,
            target: None,
        }
    }

    fn over_unix(mut self) -> Self {
        self.transport = Transport::Unix;
        self
    }

    fn target(mut self, ratio: f64) -> Self {
        self.target = Some(ratio);
        self
    }

    fn over(mut self, mbit: u32) -> Self {
        self.link = Some(mbit);
        self
    }

    fn live(mut self, set_mib: u32) -> Self {
        self.live = Some(WorkingSet { pages: set_mib << 8, laps_per_second: 19 });
        self
    }

    pub(crate) fn over_tcp(&self) -> bool {
        self.transport == Transport::Tcp
    }

    /// The pump says nothing about compressed moves, and would need as much memory again for a
    /// large guest.
    pub(crate) fn ways(&self) -> Vec<Way> {
        if self.live.is_some() {
            return vec![Way::QemuToQemu, Way::OursToOurs];
        }
        let mut ways = vec![Way::QemuToQemu, Way::OursToOurs, Way::QemuToOurs, Way::OursToQemu];
        let whole = matches!(self.guest, Guest::Linux { .. }) && self.link.is_none();
        if self.codec == Compression::None && whole {
            ways.extend([Way::PumpMapping, Way::PumpFile]);
        }
        ways
    }

    pub(crate) fn settings(&self) -> Settings {
        let mut parameters = Map::new();
        parameters.insert("tls-creds".to_owned(), json!(if self.tls { tls::OBJECT } else { "" }));
        Settings {
            parameters,
            channels: self.channels,
            compression: self.codec,
            // Both ends know that the guest has arrived: the time is that of a move that can be
            // trusted.
            return_path: true,
            xbzrle: self.xbzrle,
            ..Settings::default()
        }
    }
}

impl Way {
    /// We are at both ends.
    pub(crate) fn is_ours(self) -> bool {
        self == Self::OursToOurs
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::QemuToQemu => "qemu > qemu",
            Self::OursToOurs => "multifd > multifd",
            Self::QemuToOurs => "qemu > multifd",
            Self::OursToQemu => "multifd > qemu",
            Self::PumpMapping => "pump (mapping)",
            Self::PumpFile => "pump (file)",
        }
    }
}

/// Every scenario, `ram_mib` of guest RAM where it does not say otherwise.
pub(crate) fn all(ram_mib: u32) -> Vec<Scenario> {
    use Compression::{None as Plain, Zlib, Zstd};
    let linux = Guest::Linux { ram_mib };
    let mut list = vec![Scenario::new("single", linux, None, Plain).target(2.5)];
    for channels in [1, 2, 4] {
        let name = format!("none-{channels}");
        let tcp = Scenario::new(&name, linux, Some(channels), Plain);
        list.push(if channels == 2 { tcp.clone().target(1.2) } else { tcp.clone() });
        list.push(Scenario { name: format!("{name}-unix"), ..tcp.over_unix() });
    }
    let plain = Scenario::new("none-2-tls", linux, Some(2), Plain).target(1.6);
    list.push(Scenario { tls: true, ..plain });
    let second = Scenario::new("none-2-again", linux, Some(2), Plain);
    list.push(Scenario { looked_at: true, ..second });
    list.push(Scenario::new("zlib1", linux, Some(2), Zlib(1)).target(3.0));
    list.push(Scenario::new("zstd1", linux, Some(2), Zstd(1)).target(1.5));
    list.push(Scenario::new("zstd3", linux, Some(2), Zstd(3)));
    list.push(Scenario::new("sparse", Guest::Sparse, Some(2), Plain).target(20.0));
    let small_live = Guest::Filled { ram_mib: 512 };
    for set_mib in [4, 16, 64, 128] {
        list.push(Scenario::new(&format!("live-{set_mib}"), small_live, Some(2), Plain).live(set_mib));
    }
    list.push(Scenario {
        xbzrle: true,
        channels: None,
        ..Scenario::new("live-64-xbzrle", small_live, None, Plain).live(64)
    });
    let codecs = [("none", Plain), ("zlib1", Zlib(1)), ("zstd1", Zstd(1)), ("zstd3", Zstd(3))];
    for (rate, mbit, guest) in [("1gbit", 1000, linux), ("100mbit", 100, Guest::Filled { ram_mib: 256 })] {
        for (codec_name, codec) in codecs {
            list.push(Scenario::new(&format!("{rate}-{codec_name}"), guest, Some(2), codec).over(mbit));
        }
    }
    for channels in [8, 16] {
        list.push(Scenario::new(&format!("channels-{channels}"), linux, Some(channels), Plain));
    }
    for ram_mib in [256, 512, 2048, 4096, 8192] {
        let name = format!("ram-{ram_mib}");
        list.push(Scenario::new(&name, Guest::Filled { ram_mib }, Some(2), Plain));
    }
    list
}
