//! The high precision event timer.

use crate::{Description, Device, Error, Fields, Hook, Subsections, Timer, layout};

/// An HPET.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hpet {
    /// The configuration register.
    pub config: u64,
    /// The interrupt status register.
    pub isr: u64,
    /// The main counter, where it stands.
    pub counter: u64,
    /// Comparators, which version 1 does not say: three.
    pub num_timers: u8,
    /// The comparators.
    pub timers: Vec<HpetTimer>,
    /// Level of the line that it has taken over from the real-time clock.
    pub rtc_irq_level: Option<HpetRtcLevel>,
    /// Between the main counter and the guest's clock, of a guest that does not compute it anew.
    pub offset: Option<HpetOffset>,
}

impl Hpet {
    /// Fewest comparators that an HPET may have.
    pub const MIN_TIMERS: u8 = 3;
    /// Most comparators.
    pub const MAX_TIMERS: u8 = 32;
}

impl Default for Hpet {
    fn default() -> Self {
        Self {
            config: 0,
            isr: 0,
            counter: 0,
            num_timers: Self::MIN_TIMERS,
            timers: vec![HpetTimer::default(); Self::MIN_TIMERS.into()],
            rtc_irq_level: None,
            offset: None,
        }
    }
}

impl Device for Hpet {
    const DESCRIPTION: Description = Description::new("hpet", 2).minimum(1);

    fn pre_load(&mut self) -> Hook {
        self.num_timers = Self::MIN_TIMERS;
        self.rtc_irq_level = None;
        self.offset = None;
        Ok(())
    }

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let range = Self::MIN_TIMERS..=Self::MAX_TIMERS;
        fields.field("config", &mut self.config)?;
        fields.field("isr", &mut self.isr)?;
        fields.field("hpet_counter", &mut self.counter)?;
        fields.since(2, "num_timers_save", &mut self.num_timers)?;
        fields.validate("num_timers in range", self.num_timers, range.contains(&self.num_timers))?;
        fields.counted("timer", &mut self.timers, self.num_timers)
    }

    fn subsections(&mut self, subsections: &mut Subsections<'_, '_>) -> Result<(), Error> {
        subsections.optional(&mut self.rtc_irq_level)?;
        subsections.optional(&mut self.offset)
    }
}

layout! {
    /// One comparator.
    pub struct HpetTimer = "hpet_timer", version 1 {
        tn: u8;
        config: u64;
        cmp: u64;
        fsb: u64;
        period: u64;
        wrap_flag: u8;
        qemu_timer: Timer;
    }
}

layout! {
    /// Level of the line that it has taken over from the real-time clock.
    pub struct HpetRtcLevel = "hpet/rtc_irq_level", version 1 {
        rtc_irq_level: u8;
    }
}

layout! {
    /// Between the main counter and the guest's clock.
    pub struct HpetOffset = "hpet/offset", version 1 {
        offset as "hpet_offset": u64;
    }
}
