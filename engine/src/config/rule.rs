//! What may not be combined, and what needs what: the one table.

use std::fmt;

/// Something that a migration does only when it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// All of RAM compared with what was sent.
    Audit,
    /// Addresses of their own for the parallel channels.
    ChannelAddresses,
    /// Parallel channels over sockets.
    Channels,
    /// A codec other than none.
    Compression,
    /// Pages past the page cache.
    DirectIo,
    /// Pages at fixed places of a file.
    MappedRam,
    /// RAM that follows a guest which runs at the destination.
    Postcopy,
    /// A connection of its own for pages that the guest waits for.
    PostcopyPreempt,
    /// Encrypted channels.
    Tls,
    /// Pages as differences.
    Xbzrle,
    /// Pages sent straight from guest memory by the kernel.
    ZeroCopySend,
}

/// One rule of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rule {
    /// What the rule is about.
    pub feature: Feature,
    /// What it says.
    pub relation: Relation,
    /// Of what.
    pub other: Feature,
    /// Why it is so.
    pub why: &'static str,
}

/// How two features stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Relation {
    /// Both at a time are an error.
    Excludes,
    /// The first without the second is an error.
    Needs,
}

/// Every rule, in the order in which they are checked. QEMU has the same (docs/wire.md §22), but
/// for those of the audit, and one more: its xbzrle excludes parallel channels, where this engine
/// has differences between two of its own ends.
pub const RULES: &[Rule] = &[
    excludes(Feature::MappedRam, Feature::Compression, "pages have fixed places"),
    excludes(Feature::MappedRam, Feature::Xbzrle, "pages have fixed places"),
    excludes(Feature::MappedRam, Feature::Tls, "a file is not a connection"),
    excludes(Feature::Postcopy, Feature::MappedRam, "a file runs no guest"),
    needs(Feature::PostcopyPreempt, Feature::Postcopy, "no guest waits for pages before"),
    needs(Feature::DirectIo, Feature::MappedRam, "a plain stream is not aligned"),
    needs(Feature::Compression, Feature::Channels, "the main channel is not compressed"),
    needs(Feature::ChannelAddresses, Feature::Channels, "there are none"),
    needs(Feature::ZeroCopySend, Feature::Channels, "the main channel is buffered"),
    excludes(Feature::ZeroCopySend, Feature::Compression, "what is sent is not in guest memory"),
    excludes(Feature::ZeroCopySend, Feature::Tls, "what is sent is not in guest memory"),
    excludes(Feature::ZeroCopySend, Feature::Audit, "what the kernel sends later is not known"),
    excludes(Feature::MappedRam, Feature::Audit, "what the kernel writes is not known"),
];

const fn excludes(feature: Feature, other: Feature, why: &'static str) -> Rule {
    Rule { feature, relation: Relation::Excludes, other, why }
}

const fn needs(feature: Feature, other: Feature, why: &'static str) -> Rule {
    Rule { feature, relation: Relation::Needs, other, why }
}

/// The first rule that a combination breaks; `has` tells which features it has.
pub fn broken(has: impl Fn(Feature) -> bool) -> Option<&'static Rule> {
    RULES.iter().find(|rule| {
        let allowed = match rule.relation {
            Relation::Excludes => !has(rule.other),
            Relation::Needs => has(rule.other),
        };
        has(rule.feature) && !allowed
    })
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Audit => "an audit",
            Self::ChannelAddresses => "an address of parallel channels",
            Self::Channels => "parallel channels",
            Self::Compression => "compression",
            Self::DirectIo => "direct I/O",
            Self::MappedRam => "mapped-ram",
            Self::Postcopy => "post-copy",
            Self::PostcopyPreempt => "a channel for pages that are asked for",
            Self::Tls => "TLS",
            Self::Xbzrle => "xbzrle",
            Self::ZeroCopySend => "zero-copy send",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let relation = match self.relation {
            Relation::Excludes => "excludes",
            Relation::Needs => "needs",
        };
        write!(f, "{} {relation} {}: {}", self.feature, self.other, self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_rule_says_what_and_why() {
        let says = |features: &[Feature]| {
            broken(|feature| features.contains(&feature)).map_or_else(String::new, Rule::to_string)
        };
        assert_eq!(says(&[]), "");
        assert_eq!(says(&[Feature::Channels, Feature::Compression, Feature::Tls, Feature::Xbzrle]), "");
        assert_eq!(says(&[Feature::DirectIo]), "direct I/O needs mapped-ram: a plain stream is not aligned");
        let both = [Feature::Channels, Feature::ZeroCopySend, Feature::Tls];
        assert_eq!(says(&both), "zero-copy send excludes TLS: what is sent is not in guest memory");
    }
}
