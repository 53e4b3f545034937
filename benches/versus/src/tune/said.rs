//! What `multifd tune` says of a guest: the part of its JSON that can be measured.

use std::path::Path;

use multifd_tests::{CommandReport, Compression, During, Failure, Multifd, Outcome, Qemu, Side};
use multifd_tune::{Advice, Prediction};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::guest::TIMEOUT;

/// The part of `multifd_tune::Findings` that is compared with moves.
#[derive(Debug, Deserialize)]
pub(super) struct Said {
    predictions: Vec<Prediction>,
    advice: Vec<Advice>,
}

impl Said {
    /// Of the guest in this checkpoint, for moves with that many channels over these links.
    pub(super) fn of<'l>(
        checkpoint: &Path,
        channels: u8,
        links: impl IntoIterator<Item = &'l str>,
    ) -> Outcome<Self> {
        let mut arguments = vec!["tune".to_owned(), checkpoint.display().to_string(), "--json".to_owned()];
        arguments.extend(["--channels".to_owned(), channels.to_string()]);
        arguments.extend(links.into_iter().flat_map(|link| ["--link".to_owned(), link.to_owned()]));
        let mut tune = Multifd::spawn("tune", arguments)?;
        tune.wait_success(TIMEOUT)?;
        Self::deserialize(CommandReport::by(&tune)?.object()).during("what tune printed")
    }

    pub(super) fn prediction(&self, link: &str, channels: u8, codec: Compression) -> Outcome<&Prediction> {
        let name = codec.to_string();
        let wanted = |one: &&Prediction| {
            one.link == link && one.channels == usize::from(channels) && one.codec.to_string() == name
        };
        let found = self.predictions.iter().find(wanted);
        found.ok_or_else(|| Failure::new(format!("tune says nothing of {name} over {link}")))
    }

    pub(super) fn advice(&self, link: &str) -> Outcome<&Advice> {
        let found = self.advice.iter().find(|one| one.link == link);
        found.ok_or_else(|| Failure::new(format!("tune advises nothing for {link}")))
    }

    /// What is predicted of a move that follows the advice.
    pub(super) fn best(&self, advice: &Advice) -> Outcome<&Prediction> {
        let found = self.predictions.get(advice.best).filter(|best| best.link == advice.link);
        found
            .ok_or_else(|| Failure::new(format!("the best of {} is {}: not there", advice.link, advice.best)))
    }
}

/// Sets a QEMU up by the advice alone.
pub(super) fn follow(advice: &Advice, qemu: &mut Qemu, side: Side, fresh: &Fresh) -> Outcome {
    // The destination has just been started. The source has made other moves.
    if side == Side::Source {
        fresh.give_to(qemu)?;
    }
    // For this bench, to see the move end.
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    qemu.execute("migrate-set-capabilities", events)?;
    let mut commands = advice.qmp.iter();
    commands.try_for_each(|command| {
        qemu.execute(&command.execute, Value::Object(command.arguments.clone())).map(drop)
    })
}

/// The codec of a prediction, as moves take it.
pub(super) fn compression(prediction: &Prediction) -> Outcome<Compression> {
    prediction.codec.to_string().parse()
}

/// The default settings of a QEMU.
#[derive(Debug)]
pub(super) struct Fresh {
    parameters: Value,
    capabilities: Value,
}

impl Fresh {
    /// Asks one.
    pub(super) fn look() -> Outcome<Self> {
        let mut qemu = Qemu::builder().paused().spawn("a fresh QEMU")?;
        let parameters = qemu.execute("query-migrate-parameters", json!({}))?;
        let capabilities = qemu.execute("query-migrate-capabilities", json!({}))?;
        Ok(Self { parameters, capabilities })
    }

    fn give_to(&self, qemu: &mut Qemu) -> Outcome {
        let capabilities = json!({ "capabilities": self.capabilities });
        qemu.execute("migrate-set-capabilities", capabilities)?;
        qemu.execute("migrate-set-parameters", self.parameters.clone()).map(drop)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A prediction for 1 Gbit/s and two channels, as tune prints it.
    pub(in crate::tune) fn prediction(codec: &str, [total_ms, wire_bytes, qemu_total_ms]: [u64; 3]) -> Value {
        json!({
            "link": "1Gbit/s", "link_bytes_per_s": 125_000_000, "channels": 2, "codec": codec,
            "total_ms": total_ms, "wire_bytes": wire_bytes, "rounds": 2, "downtime_ms": 3,
            "cpu_source_s": 1.0, "cpu_destination_s": 0.5, "converges": true, "bottleneck": "link",
            "qemu_total_ms": qemu_total_ms, "qemu_converges": true,
        })
    }

    #[test]
    fn what_tune_prints_is_read_and_found() -> Outcome {
        let printed = json!({
            "status": "done",
            "predictions": [prediction("none", [9, 8, 7]), prediction("zstd:3", [6, 5, 4])],
            "advice": [{ "link": "1Gbit/s", "best": 1, "runner_up": null, "plain": 0, "reason": "", "flags": "", "qmp": [
                { "execute": "migrate-set-parameters", "arguments": { "multifd-channels": 2 } },
                { "execute": "query-migrate" },
            ] }],
        });
        let said: Said = serde_json::from_value(printed)?;
        assert_eq!(said.prediction("1Gbit/s", 2, Compression::None)?.wire_bytes, 8);
        assert!(said.prediction("1Gbit/s", 4, Compression::None).is_err());
        assert!(said.prediction("loopback", 2, Compression::None).is_err());
        let advice = said.advice("1Gbit/s")?;
        let best = said.best(advice)?;
        assert_eq!((compression(best)?, best.qemu_total_ms), (Compression::Zstd(3), 4));
        assert_eq!(advice.qmp.len(), 2);
        Ok(())
    }
}
