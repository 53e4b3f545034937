//! Numbers as the page shows them: a dash for NaN and infinity.

use crate::units::show_bytes;

/// Text for a missing value.
pub(super) const NONE: &str = "–";

/// `38 ms`, `4.25 s`, `2 min 5 s`, `3 h 10 min`
pub(super) fn time_ms(ms: u64) -> String {
    let whole = ms.saturating_add(500) / 1000;
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..10_000 => format!("{:.2} s", ms as f64 / 1e3),
        10_000..100_000 => format!("{:.1} s", ms as f64 / 1e3),
        100_000..3_600_000 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

/// The time of a move, `never` if it does not converge.
pub(super) fn total(converges: bool, ms: u64) -> String {
    if converges { time_ms(ms) } else { "never".to_owned() }
}

/// Seconds in two or three digits, for plots.
pub(super) fn time_s(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() || s < 0.0 => NONE.to_owned(),
        0.0 => "0 s".to_owned(),
        s if s < 1.0 => format!("{} ms", significant(s * 1e3)),
        s if s < 100.0 => format!("{} s", significant(s)),
        s if s < 3600.0 => format!("{} min", significant(s / 60.0)),
        s => format!("{} h", significant(s / 3600.0)),
    }
}

/// Seconds on cores: `41.3 s`
pub(super) fn cpu_s(seconds: f64) -> String {
    if !seconds.is_finite() {
        return NONE.to_owned();
    }
    if seconds < 10.0 { format!("{seconds:.2} s") } else { format!("{seconds:.1} s") }
}

/// Bytes per second in bits: `870 Mbit/s`
pub(super) fn bits_per_s(bytes_per_s: f64) -> String {
    decimal(bytes_per_s * 8.0, "bit/s")
}

/// `42 MB/s`
pub(super) fn bytes_per_s(bytes_per_s: f64) -> String {
    decimal(bytes_per_s, "B/s")
}

/// `2.3 GiB`
pub(super) fn bytes(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return NONE.to_owned();
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and is not negative"
    )]
    show_bytes(value.round() as u64)
}

/// `37.5 %`; a share above 0 is never shown as 0.
pub(super) fn percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent {
        p if !p.is_finite() => NONE.to_owned(),
        p if p > 0.0 && p < 0.05 => "< 0.1 %".to_owned(),
        p => format!("{p:.1} %"),
    }
}

/// `2.87`
pub(super) fn ratio(value: f64) -> String {
    if value.is_finite() { format!("{value:.2}") } else { NONE.to_owned() }
}

/// `other` relative to `best`: `3.1 times as long`, `12 % longer`, `as long`.
pub(super) fn compared(best_ms: u64, other_ms: u64) -> String {
    let factor = other_ms as f64 / best_ms as f64;
    match factor {
        f if !f.is_finite() => NONE.to_owned(),
        f if f >= 1.995 => format!("{f:.1} times as long"),
        f if f >= 1.005 => format!("{:.0} % longer", (f - 1.0) * 100.0),
        f if f <= 0.995 => format!("{:.0} % shorter", (1.0 - f) * 100.0),
        _ => "as long".to_owned(),
    }
}

/// `1 channel`, `4 channels`
pub(super) fn channels(channels: usize) -> String {
    match channels {
        0 => "main channel only".to_owned(),
        1 => "1 channel".to_owned(),
        many => format!("{many} channels"),
    }
}

/// A coordinate with at most two digits after the point, without trailing zeros.
pub(super) fn at(coordinate: f64) -> String {
    if !coordinate.is_finite() {
        return "0".to_owned();
    }
    let text = format!("{coordinate:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

fn decimal(value: f64, unit: &str) -> String {
    if !value.is_finite() || value < 0.0 {
        return NONE.to_owned();
    }
    let (scaled, prefix) = match value {
        v if v >= 1e12 => (v / 1e12, "T"),
        v if v >= 1e9 => (v / 1e9, "G"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e3 => (v / 1e3, "k"),
        v => (v, ""),
    };
    format!("{} {prefix}{unit}", significant(scaled))
}

/// Two or three significant digits: `3`, `3.1`, `31`, `314`
fn significant(value: f64) -> String {
    let text = if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") };
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_the_unit_that_fits() {
        for (ms, text) in [
            (0, "0 ms"),
            (38, "38 ms"),
            (4_250, "4.25 s"),
            (38_190, "38.2 s"),
            (125_000, "2 min 5 s"),
            (11_400_000, "3 h 10 min"),
        ] {
            assert_eq!(time_ms(ms), text);
        }
        assert!(time_ms(u64::MAX).ends_with("min"));
        assert_eq!(time_s(0.25), "250 ms");
        assert_eq!(time_s(12.4), "12 s");
        assert_eq!(time_s(7200.0), "2 h");
    }

    #[test]
    fn rates_and_shares() {
        assert_eq!(bits_per_s(125e6), "1 Gbit/s");
        assert_eq!(bits_per_s(108.75e6), "870 Mbit/s");
        assert_eq!(bytes_per_s(42e6), "42 MB/s");
        assert_eq!(percent(0.375), "37.5 %");
        assert_eq!(percent(0.0), "0.0 %");
        assert_eq!(percent(0.0001), "< 0.1 %");
        assert_eq!(bytes(1536.0), "1.5 KiB");
        assert_eq!(compared(1000, 3100), "3.1 times as long");
        assert_eq!(compared(1000, 1120), "12 % longer");
        assert_eq!(compared(1000, 1001), "as long");
    }

    #[test]
    fn what_is_no_number_is_a_dash_and_no_coordinate() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let show: [fn(f64) -> String; 7] =
                [time_s, cpu_s, bits_per_s, bytes_per_s, bytes, percent, ratio];
            assert!(show.iter().all(|show| show(value) == NONE), "{value}");
            assert_eq!(at(value), "0");
        }
        assert_eq!(compared(0, 5), NONE);
        assert_eq!((at(-0.001), at(12.5), at(3.0)), ("0".into(), "12.5".into(), "3".into()));
    }
}
