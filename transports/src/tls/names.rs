//! Who a certificate says it is.

use std::fmt;

use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::X509Name;

/// The names and dates of a certificate. Nothing in them is verified by having been read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    /// `CN=host,O=Example`: the way GnuTLS and QEMU write it.
    pub(crate) subject: String,
    /// The same in the other order, in which others write it.
    subject_reversed: String,
    pub(crate) issuer: String,
    /// DNS names, addresses, URIs, mail addresses of the subject.
    pub(crate) alternative: Vec<String>,
    pub(crate) not_before: String,
    pub(crate) not_after: String,
}

/// Names that an error text lists; a certificate may have thousands.
const SHOWN: usize = 8;

impl Names {
    /// Of a certificate in DER. What cannot be parsed has no names.
    pub(crate) fn of(certificate: &[u8]) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Self::default() };
        let alternative = match certificate.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.iter().filter_map(alternative).collect(),
            _ => Vec::new(),
        };
        Self {
            subject: distinguished(certificate.subject(), false),
            subject_reversed: distinguished(certificate.subject(), true),
            issuer: distinguished(certificate.issuer(), false),
            alternative,
            not_before: certificate.validity().not_before.to_string(),
            not_after: certificate.validity().not_after.to_string(),
        }
    }

    /// Whether `pattern` is one of the names; a `*` in it stands for any text.
    pub(crate) fn match_pattern(&self, pattern: &str) -> bool {
        let subjects = [&self.subject, &self.subject_reversed];
        let mut all = subjects.into_iter().filter(|name| !name.is_empty()).chain(&self.alternative);
        all.any(|name| is_match(pattern, name))
    }

    /// `DNS or other names`, or that there are none.
    pub(crate) fn alternatives(&self) -> String {
        let mut shown = self.alternative.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>();
        if self.alternative.len() > SHOWN {
            shown.push("...");
        }
        if shown.is_empty() { "no names".to_owned() } else { shown.join(", ") }
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.subject)?;
        if self.alternative.is_empty() { Ok(()) } else { write!(f, " ({})", self.alternatives()) }
    }
}

fn distinguished(name: &X509Name<'_>, reversed: bool) -> String {
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|rdn| {
            let attributes = rdn.iter().map(|attribute| {
                let kind = attribute.attr_type();
                let kind =
                    oid2abbrev(kind, oid_registry()).map_or_else(|_| kind.to_id_string(), str::to_owned);
                format!("{kind}={}", escaped(attribute.as_str().unwrap_or("?")))
            });
            attributes.collect::<Vec<_>>().join("+")
        })
        .collect();
    if reversed {
        parts.reverse();
    }
    parts.join(",")
}

/// RFC 4514 §2.4, and without what a terminal might take for a command.
fn escaped(value: &str) -> String {
    let mut text = String::new();
    for character in value.chars().take(256) {
        if ",+\"\\<>;".contains(character) {
            text.push('\\');
        }
        text.push(if character.is_control() { '?' } else { character });
    }
    text
}

fn alternative(name: &GeneralName<'_>) -> Option<String> {
    let text = |text: &str| text.chars().take(256).map(|c| if c.is_control() { '?' } else { c }).collect();
    match name {
        GeneralName::DNSName(name) | GeneralName::RFC822Name(name) | GeneralName::URI(name) => {
            Some(text(name))
        }
        GeneralName::IPAddress(bytes) => match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
            (Ok(v4), _) => Some(std::net::Ipv4Addr::from(v4).to_string()),
            (_, Ok(v6)) => Some(std::net::Ipv6Addr::from(v6).to_string()),
            _ => None,
        },
        _ => None,
    }
}

/// `*` in the pattern is any text, also none; everything else is itself.
fn is_match(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part).and_then(|at| rest.get(at + part.len()..)) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_any_text_and_the_rest_is_itself() {
        for (pattern, name) in [
            ("CN=a", "CN=a"),
            ("*", "CN=a"),
            ("*", ""),
            ("CN=*,O=x", "CN=host,O=x"),
            ("*.example", "host.example"),
            ("a*b*c", "a-b-b-c"),
            ("a**c", "ac"),
        ] {
            assert!(is_match(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("CN=a", "CN=ab"),
            ("CN=a", "xCN=a"),
            ("", "CN=a"),
            ("a*a", "a"),
            ("CN=*,O=x", "CN=host,O=xy"),
            ("a*b*c", "a-c-b"),
            ("CN=?", "CN=a"),
        ] {
            assert!(!is_match(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn values_cannot_pretend_to_be_more_than_one_part() {
        assert_eq!(escaped("a,O=b"), "a\\,O=b");
        assert_eq!(escaped("\u{1b}[2J"), "?[2J");
    }

    #[test]
    fn garbage_has_no_names() {
        assert_eq!(Names::of(b"garbage"), Names::default());
        assert!(!Names::of(b"garbage").match_pattern("CN=a"));
        // Not even by a star.
        assert!(!Names::of(b"garbage").match_pattern("*"));
    }
}
