//! Revocation lists: of each issuer, the newest decides.

use rustls::pki_types::CertificateRevocationListDer;
use x509_parser::oid_registry::OID_X509_EXT_ISSUER_DISTRIBUTION_POINT;
use x509_parser::prelude::{CertificateRevocationList, FromDer, ParsedExtension};
use x509_parser::time::ASN1Time;

use super::names::shown_subject;

/// The revocation lists of a file that decide.
#[derive(Debug, Default)]
pub(super) struct Revocation {
    /// The lists in the orders in which a verifier may ask them: see [`Revocation::of`].
    pub(super) orders: Vec<Vec<CertificateRevocationListDer<'static>>>,
    /// A text for each of them that is past its next update.
    pub(super) outdated: Vec<String>,
    /// A text for each of them that is of a day to come.
    pub(super) to_come: Vec<String>,
}

impl Revocation {
    /// Keeps the newest list of each issuer, key and scope. webpki asks the first list that is
    /// about a certificate and no other, so the newest also comes first: it then decides where the
    /// scopes of two lists overlap.
    ///
    /// A newer list replaces an older one as a whole (RFC 5280 §5): a certificate that is only on
    /// the older one was on hold, and is no more.
    ///
    /// Two CAs of one name are told apart by their keys: webpki asks by the name, and finds that
    /// the list was not signed by the CA of the certificate. So there is an order for each of their
    /// keys, in which the lists of that key come first and all others as ever. No order is without
    /// a list, and none changes the place of two names: what an older list of the same key would
    /// let in is decided by the newer one in an order before.
    ///
    /// # Errors
    /// A block that is not a revocation list.
    pub(super) fn of(all: &[CertificateRevocationListDer<'_>], now: ASN1Time) -> Result<Self, String> {
        let mut lists = all.iter().map(|list| parse(list)).collect::<Result<Vec<_>, _>>()?;
        lists.sort_by(|one, other| age(other).cmp(&age(one)));
        let mut deciding: Vec<&CertificateRevocationList<'_>> = Vec::new();
        for list in &lists {
            if !deciding.iter().any(|newer| is_replaced(list, newer)) {
                deciding.push(list);
            }
        }
        let mut orders = vec![deciding.clone()];
        for (at, list) in deciding.iter().enumerate() {
            let before = deciding.get(..at).unwrap_or_default();
            let is_of_list = |other: &&CertificateRevocationList<'_>| is_of_one_key(other, list);
            let other_key = before.iter().any(|other| other.issuer().as_raw() == list.issuer().as_raw());
            if other_key && !before.iter().any(is_of_list) {
                let (mut order, others): (Vec<_>, Vec<_>) = deciding.iter().copied().partition(is_of_list);
                order.extend(others);
                orders.push(order);
            }
        }
        let copies = |order: Vec<&CertificateRevocationList<'_>>| {
            order.iter().map(|list| list.as_raw().to_vec().into()).collect()
        };
        Ok(Self {
            orders: orders.into_iter().map(copies).collect(),
            outdated: deciding.iter().filter_map(|list| outdated(list, now)).collect(),
            to_come: deciding.iter().filter_map(|list| from_the_future(list, now)).collect(),
        })
    }
}

/// Whether `newer` is about the same certificates. A list that does not name its key is of any.
fn is_replaced(list: &CertificateRevocationList<'_>, newer: &CertificateRevocationList<'_>) -> bool {
    let unknown = key(list).is_none() || key(newer).is_none();
    let one_name = list.issuer().as_raw() == newer.issuer().as_raw();
    one_name && (unknown || is_of_one_key(list, newer)) && scope(list) == scope(newer)
}

fn is_of_one_key(one: &CertificateRevocationList<'_>, other: &CertificateRevocationList<'_>) -> bool {
    one.issuer().as_raw() == other.issuer().as_raw() && key(one) == key(other)
}

/// The identifier of the key that signed the list.
fn key<'a>(list: &'a CertificateRevocationList<'_>) -> Option<&'a [u8]> {
    list.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(key) => key.key_identifier.as_ref().map(|key| key.0),
        _ => None,
    })
}

fn parse(list: &[u8]) -> Result<CertificateRevocationList<'_>, String> {
    let cannot = |why: String| format!("it holds a revocation list that cannot be read: {why}");
    match CertificateRevocationList::from_der(list) {
        Ok(([], list)) => Ok(list),
        Ok((rest, _)) => Err(cannot(format!("{} bytes follow it", rest.len()))),
        Err(error) => Err(cannot(error.to_string())),
    }
}

/// What sorts lists by age. The number tells two of one second apart; the count is for a CA that
/// does not number its lists, where the one that revokes more is taken.
fn age<'a>(list: &'a CertificateRevocationList<'_>) -> impl Ord + use<'a> {
    (list.last_update(), list.crl_number(), list.iter_revoked_certificates().count())
}

/// The part of the issuer's certificates that a list is about, as it is encoded; `None` is all of
/// them.
fn scope<'a>(list: &'a CertificateRevocationList<'_>) -> Option<&'a [u8]> {
    let mut extensions = list.extensions().iter();
    extensions
        .find(|extension| extension.oid == OID_X509_EXT_ISSUER_DISTRIBUTION_POINT)
        .map(|found| found.value)
}

/// Such a list decides for as long as it is the newest, whatever the CA says meanwhile.
fn from_the_future(list: &CertificateRevocationList<'_>, now: ASN1Time) -> Option<String> {
    let begins = Some(list.last_update()).filter(|begins| *begins > now)?;
    let issuer = shown_subject(list.issuer());
    Some(format!(
        "the revocation list of \"{issuer}\" is of {begins}, which is to come: it decides over all others. Is the clock of this machine right?"
    ))
}

fn outdated(list: &CertificateRevocationList<'_>, now: ASN1Time) -> Option<String> {
    let next = list.next_update().filter(|next| *next < now)?;
    let issuer = shown_subject(list.issuer());
    Some(format!("the revocation list of \"{issuer}\" is out of date, the next one was due at {next}"))
}
