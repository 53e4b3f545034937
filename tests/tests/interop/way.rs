//! The ways in which a guest moves: the rows of the matrix.

use multifd_tests::{Compression, Settings, ZeroPages};
use serde_json::json;

/// What the stream goes over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Link {
    Tcp,
    Unix,
    File,
    Exec,
}

/// One way of moving a guest in and out.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) link: Link,
    /// What is set at both ends.
    pub(crate) settings: Settings,
    /// Capabilities that only a source has on.
    pub(crate) of_source: Vec<&'static str>,
    pub(crate) tls: bool,
    /// It is also tried from one release into another.
    pub(crate) across: bool,
    /// What QEMU runs the guest by.
    pub(crate) accel: &'static str,
}

impl Way {
    fn new(name: &'static str, link: Link) -> Self {
        let settings = Settings { min_rounds: 2, fewer_rounds_allowed: true, ..Settings::default() };
        let of_source = Vec::new();
        Self { name, link, settings, of_source, tls: false, across: false, accel: "kvm" }
    }

    fn across(mut self) -> Self {
        self.across = true;
        self
    }

    fn tls(mut self) -> Self {
        self.tls = true;
        self.settings.parameters.insert("tls-creds".into(), "tls0".into());
        self
    }

    fn answered(mut self) -> Self {
        self.settings.return_path = true;
        self
    }

    fn channels(mut self, channels: u8, compression: Compression) -> Self {
        self.settings.channels = Some(channels);
        self.settings.compression = compression;
        self
    }

    fn zero_pages(mut self, zero_pages: ZeroPages) -> Self {
        self.settings.zero_pages = Some(zero_pages);
        self
    }

    fn with_xbzrle(mut self) -> Self {
        self.settings.xbzrle = true;
        self
    }

    fn with(mut self, capabilities: &[&'static str]) -> Self {
        self.settings.capabilities.extend(capabilities);
        self
    }

    fn at_source(mut self, capability: &'static str) -> Self {
        self.of_source.push(capability);
        self
    }

    /// What is set in the source.
    pub(crate) fn source_settings(&self) -> Settings {
        let mut settings = self.settings.clone();
        settings.capabilities.extend(&self.of_source);
        if self.snapshot() || self.held() {
            // The guest is paused, for its RAM to be comparable, or the switch-over waits.
            settings.min_rounds = 0;
        }
        settings
    }

    pub(crate) fn mapped(&self) -> bool {
        self.settings.capabilities.contains(&"mapped-ram")
    }

    pub(crate) fn direct(&self) -> bool {
        self.settings.parameters.contains_key("direct-io")
    }

    /// The guest goes on at the source.
    pub(crate) fn snapshot(&self) -> bool {
        self.of_source.contains(&"background-snapshot")
    }

    /// What arrives is the source's RAM. With KVM's dirty ring QEMU loses pages by itself, also
    /// between two QEMUs.
    pub(crate) fn judged_at_source(&self) -> bool {
        self.accel == "kvm"
    }

    /// The source waits for `migrate-continue`.
    pub(crate) fn held(&self) -> bool {
        self.of_source.contains(&"pause-before-switchover")
    }
}

/// All of them.
pub(crate) fn ways() -> Vec<Way> {
    let mut all = streams();
    all.extend(files());
    all.extend(capabilities());
    all
}

fn streams() -> Vec<Way> {
    let (zlib, zstd) = (Compression::Zlib(1), Compression::Zstd(1));
    let tcp = |name| Way::new(name, Link::Tcp);
    let unix = |name| Way::new(name, Link::Unix);
    vec![
        tcp("single").across(),
        tcp("single, return path").answered().across(),
        unix("single, return path, unix").answered(),
        unix("single, xbzrle, return path").with_xbzrle().answered(),
        tcp("2 channels").channels(2, Compression::None),
        tcp("2 channels, return path").channels(2, Compression::None).answered().across(),
        unix("2 channels, return path, unix").channels(2, Compression::None).answered(),
        tcp("3 channels, zlib").channels(3, zlib).across(),
        tcp("3 channels, zlib, return path").channels(3, zlib).answered(),
        tcp("4 channels, zstd").channels(4, zstd),
        tcp("4 channels, zstd, return path").channels(4, zstd).answered().across(),
        tcp("2 channels, zero pages by main, return path")
            .channels(2, Compression::None)
            .zero_pages(ZeroPages::Legacy)
            .answered(),
        tcp("2 channels, zero pages as data, return path")
            .channels(2, Compression::None)
            .zero_pages(ZeroPages::None)
            .answered(),
        tcp("TLS, single, return path").tls().answered(),
        tcp("TLS, 2 channels, return path").tls().channels(2, Compression::None).answered().across(),
        tcp("TLS, 2 channels, zstd").tls().channels(2, zstd),
    ]
}

fn files() -> Vec<Way> {
    let file = |name| Way::new(name, Link::File);
    let mut direct = file("file, mapped-ram, 2 channels, direct I/O").channels(2, Compression::None);
    direct.settings.parameters.insert("direct-io".into(), json!(true));
    vec![
        Way::new("exec", Link::Exec).across(),
        file("file").across(),
        file("file, mapped-ram").with(&["mapped-ram"]).across(),
        file("file, mapped-ram, 4 channels").channels(4, Compression::None).with(&["mapped-ram"]).across(),
        direct.with(&["mapped-ram"]),
        file("file, background-snapshot").at_source("background-snapshot"),
        Way::new("exec, background-snapshot", Link::Exec).at_source("background-snapshot"),
    ]
}

/// Each capability that is in none of the others, with what it does not work without.
fn capabilities() -> Vec<Way> {
    let tcp = |name| Way::new(name, Link::Tcp).answered();
    let mut ring = tcp("capability dirty-limit").at_source("dirty-limit");
    ring.accel = "kvm,dirty-ring-size=4096";
    vec![
        tcp("capability auto-converge").at_source("auto-converge"),
        tcp("capability block").at_source("block"),
        tcp("capability compress").at_source("compress").across(),
        tcp("capability dirty-bitmaps").with(&["dirty-bitmaps"]),
        ring,
        tcp("capability late-block-activate").with(&["late-block-activate"]),
        tcp("capability pause-before-switchover").at_source("pause-before-switchover"),
        tcp("capability postcopy-ram, not started").with(&["postcopy-ram"]),
        tcp("capability postcopy-ram, 2 channels, not started")
            .channels(2, Compression::None)
            .with(&["postcopy-ram"]),
        // A destination of 7.2 with it waits for a channel that a source without post-copy lacks.
        tcp("capability postcopy-preempt, not started").with(&["postcopy-ram"]).at_source("postcopy-preempt"),
        tcp("capability rdma-pin-all").with(&["rdma-pin-all"]),
        tcp("capability release-ram").at_source("release-ram"),
        tcp("capability switchover-ack").at_source("switchover-ack"),
        tcp("capability validate-uuid").with(&["validate-uuid"]),
        tcp("capability x-ignore-shared").with(&["x-ignore-shared"]),
        tcp("capability zero-blocks").with(&["zero-blocks"]),
        tcp("capability zero-copy-send").channels(2, Compression::None).at_source("zero-copy-send"),
    ]
}
