//! Who a certificate says it is.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;
use x509_parser::x509::{RelativeDistinguishedName, X509Name};

/// The names and dates of a certificate. Nothing in them is verified by having been read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    /// `CN=host,O=Example`, as GnuTLS and QEMU write it. For messages.
    subject: String,
    /// The whole subject, in this order and in the other, in which others write it. For a list;
    /// none if it cannot be written without doubt.
    exact: Vec<String>,
    pub(crate) issuer: String,
    /// DNS names, addresses, URIs, mail addresses of the subject.
    alternative: Vec<Alternative>,
    pub(crate) not_before: String,
    pub(crate) not_after: String,
    pub(crate) has_expired: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Alternative {
    kind: Kind,
    /// As it stands in the certificate.
    name: String,
}

/// What a subject alternative name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Address,
    Dns,
    Mail,
    Uri,
}

impl Kind {
    /// Whether a pattern can be meant for names of this kind: a URI must not pass for a DNS name
    /// that it ends like.
    fn is_meant_by(self, pattern: &str) -> bool {
        let of_address = |character: char| character.is_ascii_hexdigit() || ":.*".contains(character);
        match self {
            _ if pattern == "*" => true,
            // That is a subject.
            _ if pattern.contains('=') => false,
            // The text is ours.
            Self::Address => true,
            Self::Dns => !pattern.contains([':', '@']),
            Self::Mail => pattern.contains('@') && !pattern.contains(':'),
            Self::Uri => pattern.contains(':') && !pattern.chars().all(of_address),
        }
    }
}

/// Names that an error text lists; a certificate may have thousands.
const SHOWN: usize = 8;

/// Characters of a name that an error text shows.
const SHOWN_LEN: usize = 256;

/// What ends a value or begins another in a subject, and what a pattern has a meaning for.
const SPECIAL: &str = ",+\"\\<>;=*";

impl Names {
    /// Of a certificate in DER. What cannot be parsed has no names.
    pub(crate) fn of(certificate: &[u8]) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Self::default() };
        let alternative = match certificate.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.iter().filter_map(alternative).collect(),
            _ => Vec::new(),
        };
        Self {
            subject: shown_subject(certificate.subject()),
            exact: exact_subjects(certificate.subject()).unwrap_or_default(),
            issuer: shown_subject(certificate.issuer()),
            alternative,
            not_before: certificate.validity().not_before.to_string(),
            not_after: certificate.validity().not_after.to_string(),
            has_expired: certificate.validity().not_after < ASN1Time::now(),
        }
    }

    /// Whether `pattern` is one of the names; a `*` in it stands for any text. With a `=` it is for
    /// subjects, with a `:` for URIs and addresses, with an `@` for mail addresses, and otherwise
    /// for DNS names and addresses.
    pub(crate) fn match_pattern(&self, pattern: &str) -> bool {
        let of_subject = pattern == "*" || pattern.contains('=');
        let subject = rewritten(pattern);
        let mut alternatives = self.alternative.iter().filter(|other| other.kind.is_meant_by(pattern));
        of_subject && self.exact.iter().any(|name| is_match(&subject, name))
            || alternatives.any(|other| is_sound(&other.name) && is_match(pattern, &other.name))
    }

    /// `DNS or other names`, or that there are none.
    pub(crate) fn alternatives(&self) -> String {
        let names = self.alternative.iter().take(SHOWN).map(|other| shown(&other.name));
        let mut names = names.collect::<Vec<_>>();
        if self.alternative.len() > SHOWN {
            names.push("...".to_owned());
        }
        if names.is_empty() { "no names".to_owned() } else { names.join(", ") }
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.subject)?;
        if self.alternative.is_empty() { Ok(()) } else { write!(f, " ({})", self.alternatives()) }
    }
}

/// The parts of a name, in order. `value` writes the value of an attribute that is text, and gets
/// none of one that is not.
fn parts(name: &X509Name<'_>, value: impl Fn(Option<&str>) -> Option<String>) -> Option<Vec<String>> {
    let part = |rdn: &RelativeDistinguishedName<'_>| {
        let attributes = rdn.iter().map(|attribute| {
            let kind = attribute.attr_type();
            let kind = oid2abbrev(kind, oid_registry()).map_or_else(|_| kind.to_id_string(), str::to_owned);
            Some(format!("{kind}={}", value(attribute.as_str().ok())?))
        });
        Some(attributes.collect::<Option<Vec<_>>>()?.join("+"))
    };
    name.iter_rdn().map(part).collect()
}

/// RFC 4514 §2.4, for people: cut short, and without what a terminal might take for a command.
pub(super) fn shown_subject(name: &X509Name<'_>) -> String {
    let value = |value: Option<&str>| {
        let shown = shown(value.unwrap_or("?"));
        let escape = |character| SPECIAL.contains(character).then_some('\\');
        Some(shown.chars().flat_map(|character| escape(character).into_iter().chain([character])).collect())
    };
    parts(name, value).unwrap_or_default().join(",")
}

/// The distinguished name in both orders. `None` if it is empty or has a value that cannot be
/// decoded.
fn exact_subjects(name: &X509Name<'_>) -> Option<Vec<String>> {
    let value = |value: Option<&str>| {
        value.filter(|value| is_sound(value)).map(|value| value.chars().map(exact).collect())
    };
    let mut parts = parts(name, value).filter(|parts| !parts.is_empty())?;
    let forward = parts.join(",");
    parts.reverse();
    Some(vec![forward, parts.join(",")])
}

/// For a list: no character of a value is left that a boundary of the subject has, so none can be
/// made up.
fn exact(character: char) -> String {
    match SPECIAL.contains(character) {
        true => format!("\\{:02X}", u32::from(character)),
        false => character.to_string(),
    }
}

/// A pattern with its escapes, `\,` and `\2C`, as [`exact`] writes them.
fn rewritten(pattern: &str) -> String {
    let (mut text, mut rest) = (String::new(), pattern);
    while let Some((plain, escaped)) = rest.split_once('\\') {
        text.push_str(plain);
        let (character, tail) = unescaped(escaped);
        // A backslash with nothing behind it is in no name.
        text.push_str(&character.map_or_else(|| "\\".to_owned(), exact));
        rest = tail;
    }
    text + rest
}

/// The character that is meant behind a backslash, and what follows it.
fn unescaped(text: &str) -> (Option<char>, &str) {
    let pair = text.split_at_checked(2).filter(|(pair, _)| pair.chars().all(|c| c.is_ascii_hexdigit()));
    if let Some((pair, tail)) = pair
        && let Ok(byte @ 0..=127) = u8::from_str_radix(pair, 16)
    {
        return (Some(char::from(byte)), tail);
    }
    let mut characters = text.chars();
    (characters.next(), characters.as_str())
}

/// What an error text shows of a name.
fn shown(name: &str) -> String {
    name.chars().take(SHOWN_LEN).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Whether a name is one that a pattern can be meant for.
fn is_sound(name: &str) -> bool {
    !name.chars().any(char::is_control)
}

fn alternative(name: &GeneralName<'_>) -> Option<Alternative> {
    let (kind, name) = match name {
        GeneralName::DNSName(name) => (Kind::Dns, (*name).to_owned()),
        GeneralName::RFC822Name(name) => (Kind::Mail, (*name).to_owned()),
        GeneralName::URI(name) => (Kind::Uri, (*name).to_owned()),
        GeneralName::IPAddress(bytes) => (Kind::Address, address(bytes)?),
        _ => return None,
    };
    Some(Alternative { kind, name })
}

fn address(bytes: &[u8]) -> Option<String> {
    match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => Some(Ipv4Addr::from(v4).to_string()),
        (_, Ok(v6)) => Some(Ipv6Addr::from(v6).to_string()),
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
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair, SanType};

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

    /// Of a certificate with these values of CN and O, and these alternative names.
    fn names(common: impl Into<DnValue>, alternative: Vec<SanType>) -> Names {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, common);
        params.subject_alt_names = alternative;
        Names::of(params.self_signed(&KeyPair::generate().unwrap()).unwrap().der())
    }

    #[test]
    fn values_cannot_pretend_to_be_more_than_one_part() {
        let mallory = names("mallory,O=Other", Vec::new());
        assert_eq!(mallory.to_string(), "\"CN=mallory\\,O\\=Other,O=Example\"");
        for pattern in ["CN=*,O=Other", "*,O=Other", "*O=Other", "O=Example,CN=mallory,O=Other"] {
            assert!(!mallory.match_pattern(pattern), "{pattern}");
        }
        let other = "CN=mallory\\,O\\=Other";
        for pattern in
            [&format!("{other},O=Example"), &format!("O=Example,{other}"), "CN=*\\2cO\\3D*,O=Example"]
        {
            assert!(mallory.match_pattern(pattern), "{pattern}");
        }
        assert_eq!(rewritten("a\\,\\2C\\41\\#*\\*\\\\\\+1\\"), "a\\2C\\2CA#*\\2A\\5C\\2B1\\");
    }

    #[test]
    fn a_pattern_is_for_one_kind_of_names() {
        let text = |text: &str| text.try_into().unwrap();
        let all = [
            (SanType::URI(text("CN=x,O=Example")), "CN=x,O=Example", "CN=x,O=*"),
            (SanType::URI(text("spiffe://x.example")), "*.example", "*@x.example"),
            (SanType::Rfc822Name(text("root@x.example")), "*.example", "root*"),
            (SanType::DnsName(text("root@x.example")), "root@*", "CN=root*"),
            (SanType::DnsName(text("fe80::1")), "fe80:*", "CN=fe80*"),
            (SanType::URI(text("fe80:x1")), "fe80:*1", "fe80*"),
        ];
        for (name, one, other) in all {
            let names = names("host.example", vec![name]);
            assert!(!names.match_pattern(one) && !names.match_pattern(other), "{names}");
            assert!(names.match_pattern("*") && !names.match_pattern("host.example"));
        }
        let all = [
            (SanType::URI(text("spiffe://x.example")), "spiffe:*"),
            (SanType::Rfc822Name(text("root@x.example")), "*@x.example"),
            (SanType::DnsName(text("x.example")), "*.example"),
            (SanType::IpAddress("10.0.0.7".parse().unwrap()), "10.0.0.*"),
            (SanType::IpAddress("fe80::1".parse().unwrap()), "fe80:*"),
        ];
        for (name, pattern) in all {
            assert!(names("host", vec![name]).match_pattern(pattern), "{pattern}");
        }
    }

    #[test]
    fn what_is_shown_is_not_what_matches() {
        let long = names("x".repeat(300), Vec::new());
        let (part, whole) = (format!("CN={},*", "x".repeat(256)), format!("CN={},*", "x".repeat(300)));
        assert!(!long.match_pattern(&part) && long.match_pattern(&whole));
        assert!(long.to_string().len() < 300);
        let strange = names("\u{1b}[2J", Vec::new());
        assert_eq!(strange.to_string(), "\"CN=?[2J,O=Example\"");
        let undecodable = names(DnValue::BmpString("x".try_into().unwrap()), Vec::new());
        assert_eq!(undecodable.to_string(), "\"CN=?,O=Example\"");
        for (names, pattern) in
            [(&strange, "CN=?[2J,*"), (&undecodable, "CN=?,*"), (&undecodable, "*O=Example*")]
        {
            assert!(!names.match_pattern(pattern) && !names.match_pattern("*"), "{pattern}");
        }
    }

    #[test]
    fn garbage_has_no_names() {
        assert_eq!(Names::of(b"garbage"), Names::default());
        assert!(!Names::of(b"garbage").match_pattern("CN=a"));
        // Not even by a star.
        assert!(!Names::of(b"garbage").match_pattern("*"));
    }
}
