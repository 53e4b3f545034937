//! The secret of a migration that can be resumed: how each end knows over a new link that the other
//! is the one that it had. Spec: docs/wire.md §27.11.

use hmac::{Hmac, Mac as _};
use multifd_wire::{MigrationId, ResumeOpening};
use sha2::Sha256;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::error::{Error, ErrorKind, Phase, Result};

/// Bytes of a random number, a public key, a secret, and a proof.
pub(crate) const LEN: usize = ResumeOpening::NONCE_LEN;

/// What one end makes its half of the secret from.
pub(crate) struct KeyPair(StaticSecret);

/// What both ends know, and nothing that only hears them does.
#[derive(Clone)]
pub(crate) struct Secret {
    key: [u8; LEN],
    id: MigrationId,
}

/// The random numbers of a new link: the source's, the destination's.
#[derive(Clone, Copy)]
pub(crate) struct Nonces {
    pub(crate) source: [u8; LEN],
    pub(crate) destination: [u8; LEN],
}

/// Which end proves that it is the one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prover {
    Source,
    Destination,
}

/// Bytes that nothing can foresee.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| {
        Error::new(ErrorKind::Bug, Phase::Setup, "the system gives no random numbers")
            .because(error.to_string())
    })?;
    Ok(bytes)
}

impl KeyPair {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(StaticSecret::from(random()?)))
    }

    /// What may be told in the clear.
    pub(crate) fn public(&self) -> [u8; LEN] {
        PublicKey::from(&self.0).to_bytes()
    }

    /// The secret of migration `id`, from the other end's public key. Both ends come to the same.
    ///
    /// # Errors
    /// A key that no sound end has, with which the secret could be foreseen.
    pub(crate) fn secret(&self, other: [u8; LEN], id: MigrationId) -> Result<Secret> {
        let shared = self.0.diffie_hellman(&PublicKey::from(other));
        if !shared.was_contributory() {
            let detail = "a public key with which the secret of the migration could be foreseen";
            return Err(Error::misbehaved(Phase::Setup, detail));
        }
        let key = mac(shared.as_bytes(), &[b"multifd resumption", &id.0])?.finalize().into_bytes().into();
        Ok(Secret { key, id })
    }
}

impl Secret {
    pub(crate) fn id(&self) -> MigrationId {
        self.id
    }

    /// That this end knows the secret, for the link with these numbers.
    pub(crate) fn proof(&self, prover: Prover, nonces: Nonces) -> Result<[u8; LEN]> {
        Ok(self.mac(prover, nonces)?.finalize().into_bytes().into())
    }

    /// Whether the other end has shown that it knows the secret.
    pub(crate) fn is_proved(&self, prover: Prover, nonces: Nonces, proof: &[u8; LEN]) -> Result<bool> {
        Ok(self.mac(prover, nonces)?.verify_slice(proof).is_ok())
    }

    fn mac(&self, prover: Prover, nonces: Nonces) -> Result<Hmac<Sha256>> {
        let prover: &[u8] = match prover {
            Prover::Source => b"source",
            Prover::Destination => b"destination",
        };
        mac(&self.key, &[prover, &self.id.0, &nonces.source, &nonces.destination])
    }
}

fn mac(key: &[u8; LEN], parts: &[&[u8]]) -> Result<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|error| Error::bug(Phase::Setup, error))?;
    parts.iter().for_each(|part| mac.update(part));
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([3; 16]);

    #[test]
    fn both_ends_come_to_one_secret_and_no_third_does() {
        let (source, destination, other) =
            (KeyPair::new().unwrap(), KeyPair::new().unwrap(), KeyPair::new().unwrap());
        let nonces = Nonces { source: [1; LEN], destination: [2; LEN] };
        let here = source.secret(destination.public(), ID).unwrap();
        let there = destination.secret(source.public(), ID).unwrap();
        let third = other.secret(destination.public(), ID).unwrap();
        for prover in [Prover::Source, Prover::Destination] {
            let proof = here.proof(prover, nonces).unwrap();
            assert!(there.is_proved(prover, nonces, &proof).unwrap());
            assert!(!third.is_proved(prover, nonces, &proof).unwrap());
            let again = Nonces { source: [9; LEN], ..nonces };
            assert!(!there.is_proved(prover, again, &proof).unwrap(), "it is of one link");
        }
        let proof = here.proof(Prover::Source, nonces).unwrap();
        assert!(!there.is_proved(Prover::Destination, nonces, &proof).unwrap(), "not sent back");
        let of_other = source.secret(destination.public(), MigrationId([4; 16])).unwrap();
        assert!(!of_other.is_proved(Prover::Source, nonces, &proof).unwrap());
    }

    #[test]
    fn a_key_that_makes_the_secret_foreseeable_is_refused() {
        for key in [[0; LEN], {
            let mut one = [0; LEN];
            one[0] = 1;
            one
        }] {
            let error = KeyPair::new().unwrap().secret(key, ID).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::PeerMisbehaved);
        }
    }

    /// What other implementations have to come to, for private keys of 0x11 and 0x22 alone.
    #[test]
    fn keys_and_proofs_are_those_of_the_specification() {
        let hex = |bytes: [u8; LEN]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let (source, destination) =
            (KeyPair(StaticSecret::from([0x11; LEN])), KeyPair(StaticSecret::from([0x22; LEN])));
        assert_eq!(hex(source.public()), "7b4e909bbe7ffe44c465a220037d608ee35897d31ef972f07f74892cb0f73f13");
        assert_eq!(
            hex(destination.public()),
            "0faa684ed28867b97f4a6a2dee5df8ce974e76b7018e3f22a1c4cf2678570f20"
        );
        let secret = source.secret(destination.public(), ID).unwrap();
        let nonces = Nonces { source: [1; LEN], destination: [2; LEN] };
        let proof = |prover| hex(secret.proof(prover, nonces).unwrap());
        assert_eq!(proof(Prover::Source), "638c29b5e8479f2cf049caa6ef9fdda30cb0b437a2bf5ca81044ccf3f8a02f22");
        assert_eq!(
            proof(Prover::Destination),
            "ebdffcfcb9f4a17cc6872d8b5a0e1bb79772c4aed6df5ebb09a45fd1306f5b15"
        );
    }
}
