//! Revocation lists: of each issuer, the newest decides.

use rustls::pki_types::CertificateRevocationListDer;
use x509_parser::oid_registry::OID_X509_EXT_ISSUER_DISTRIBUTION_POINT;
use x509_parser::prelude::{CertificateRevocationList, FromDer};
use x509_parser::time::ASN1Time;

use super::names::shown_subject;

/// The revocation lists of a file that decide.
#[derive(Debug, Default)]
pub(super) struct Revocation {
    pub(super) lists: Vec<CertificateRevocationListDer<'static>>,
    /// A text for each of them that is past its next update.
    pub(super) warnings: Vec<String>,
}

impl Revocation {
    /// Keeps the newest list of each issuer and scope. webpki asks the first list that is about a
    /// certificate and no other, so the newest also comes first: it then decides where the scopes
    /// of two lists overlap.
    ///
    /// A newer list replaces an older one as a whole (RFC 5280 §5): a certificate that is only on
    /// the older one was on hold, and is no more.
    ///
    /// # Errors
    /// A block that is not a revocation list.
    pub(super) fn of(all: &[CertificateRevocationListDer<'_>], now: ASN1Time) -> Result<Self, String> {
        let mut lists = all.iter().map(|list| parse(list)).collect::<Result<Vec<_>, _>>()?;
        lists.sort_by(|one, other| age(other).cmp(&age(one)));
        let mut revocation = Self::default();
        let mut decided = Vec::new();
        for list in &lists {
            let about = (list.issuer().as_raw(), scope(list));
            if decided.contains(&about) {
                continue;
            }
            decided.push(about);
            revocation.lists.push(list.as_raw().to_vec().into());
            revocation.warnings.extend(outdated(list, now));
            revocation.warnings.extend(from_the_future(list, now));
        }
        Ok(revocation)
    }
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
    Some(format!(
        "the revocation list of \"{issuer}\" is out of date, the next one was due at {next}: certificates revoked since then are let in"
    ))
}
